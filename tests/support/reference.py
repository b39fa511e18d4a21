"""The specification in float64: losses by their definitions, gradients by autograd on the weights themselves.

Slow and obvious on purpose. Nothing here is shared with the worker: full logits, one sequence at a time, no masks, no
batches, no hooks. Formulas: SFT is the token mean of -log p; DPO's are its papers', and ORPO is eq. 6 of
arXiv:2403.07691.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ReferenceRow:
    """Token ids of a prompt and its completions."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int] | None = None
    desirable: bool | None = None
    """The label, of rows whose only completion is ``chosen``."""


def token_logps(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """Log-probabilities of the completion's tokens."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0, :-1]
    every = torch.log_softmax(logits, -1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
    return every[len(prompt) - 1 :]


def sft_loss(model: nn.Module, rows: Sequence[ReferenceRow]) -> Tensor:
    return -torch.cat([token_logps(model, row.prompt, row.chosen) for row in rows]).mean()


def full_sequence_nll(model: nn.Module, rows: Sequence[ReferenceRow]) -> Tensor:
    return -torch.cat([token_logps(model, row.prompt[:1], row.prompt[1:] + row.chosen) for row in rows]).mean()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def cross_entropy(wanted: Sequence[float], given: Sequence[Tensor]) -> Tensor:
    return -sum(weight * torch.log(p) for weight, p in zip(wanted, given, strict=True))


def divergence(given: Sequence[Tensor], wanted: Sequence[float]) -> Tensor:
    return sum(p * (torch.log(p) - math.log(q)) for p, q in zip(given, wanted, strict=True))


DPO_LOSSES: Mapping[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "sigmoid": lambda c, r, beta, e: -torch.log(sigmoid(beta * (c - r))),
    "sigmoid_norm": lambda c, r, beta, e: -torch.log(sigmoid(beta * (c - r))),
    "hinge": lambda c, r, beta, e: (1 - beta * (c - r)).clamp(min=0),
    "ipo": lambda c, r, beta, e: (c - r - 1 / (2 * beta)).square(),
    "robust": lambda c, r, beta, e: cross_entropy(
        [(1 - e) / (1 - 2 * e), -e / (1 - 2 * e)], [sigmoid(beta * (c - r)), sigmoid(beta * (r - c))]
    ),
    "exo_pair": lambda c, r, beta, e: divergence([sigmoid(beta * (c - r)), sigmoid(beta * (r - c))], [1 - e, e]),
    "nca_pair": lambda c, r, beta, e: cross_entropy(
        [1, 0.5, 0.5], [sigmoid(beta * c), sigmoid(-beta * c), sigmoid(-beta * r)]
    ),
    "bco_pair": lambda c, r, beta, e: cross_entropy([1, 1], [sigmoid(beta * c), sigmoid(-beta * r)]),
    "sppo_hard": lambda c, r, beta, e: (c - 1 / (2 * beta)).square() + (r + 1 / (2 * beta)).square(),
    "apo_zero": lambda c, r, beta, e: 1 - sigmoid(beta * c) + sigmoid(beta * r),
    "apo_down": lambda c, r, beta, e: sigmoid(beta * c) + 1 - sigmoid(beta * (c - r)),
}
"""From the log-ratios of chosen and rejected, beta and label smoothing. Papers, in this order: arXiv:2305.18290;
2405.14734 with a reference; 2305.10425; 2310.12036, eq. 17; 2403.00409; 2402.00856, eq. 16; 2402.05369; 2404.04656;
2405.00675, eq. 4.7 with hard labels; 2408.06266, eq. 7 and 8."""
PER_TOKEN = {"sigmoid_norm", "ipo"}


def dpo_loss(
    model: nn.Module,
    reference: nn.Module,
    rows: Sequence[ReferenceRow],
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float | None = None,
) -> Tensor:
    losses = []
    for row in rows:
        ratios = []
        for completion in (row.chosen, row.rejected):
            with torch.no_grad():
                anchor = token_logps(reference, row.prompt, completion)
            ratio = token_logps(model, row.prompt, completion) - anchor
            ratios.append(ratio.mean() if loss_type in PER_TOKEN else ratio.sum())
        losses.append(DPO_LOSSES[loss_type](*ratios, beta, label_smoothing or 0.0))
    return torch.stack(losses).mean()


def kto_loss(
    model: nn.Module,
    reference: nn.Module,
    rows: Sequence[ReferenceRow],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Eq. 7 of arXiv:2402.01306; every prompt's mismatched completion is that of the row before."""

    def log_ratio(prompt: list[int], completion: list[int]) -> Tensor:
        with torch.no_grad():
            anchor = token_logps(reference, prompt, completion).sum()
        return token_logps(model, prompt, completion).sum() - anchor

    others = [log_ratio(row.prompt, rows[index - 1].chosen) for index, row in enumerate(rows)]
    point = torch.stack(others).mean().clamp(min=0).detach()
    losses = []
    for row in rows:
        gain = beta * (log_ratio(row.prompt, row.chosen) - point)
        value = desirable_weight * sigmoid(gain) if row.desirable else undesirable_weight * sigmoid(-gain)
        losses.append((desirable_weight if row.desirable else undesirable_weight) - value)
    return torch.stack(losses).mean()


def odds_ratio_loss(model: nn.Module, rows: Sequence[ReferenceRow]) -> Tensor:
    losses = []
    for row in rows:
        p = torch.exp(token_logps(model, row.prompt, row.chosen).mean())
        q = torch.exp(token_logps(model, row.prompt, row.rejected).mean())
        losses.append(-torch.log(torch.sigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q)))))
    return torch.stack(losses).mean()


def orpo_loss(model: nn.Module, rows: Sequence[ReferenceRow], *, beta: float, full_sequence: bool = False) -> Tensor:
    nll = full_sequence_nll(model, rows) if full_sequence else sft_loss(model, rows)
    return nll + beta * odds_ratio_loss(model, rows)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of the model."""
    twin = copy.deepcopy(model).double().eval()
    if twin._can_set_experts_implementation():
        twin.set_experts_implementation("eager")  # the grouped products of mixtures of experts know no float64
    return twin


def weight_gradients(
    model: nn.Module, targets: Iterable[str], loss: Callable[[nn.Module], Tensor]
) -> Mapping[str, Tensor]:
    """Gradients of the loss by the named modules' weights, computed by a float64 copy of the model.

    Orientation is (out, in), also for Conv1D, which stores its weight the other way round.
    """
    twin = in_float64(model)
    modules = {name: twin.get_submodule(name) for name in targets}
    for module in modules.values():
        module.weight.requires_grad_()
    loss(twin).backward()
    return {
        name: module.weight.grad if isinstance(module, nn.Linear) else module.weight.grad.T
        for name, module in modules.items()
    }

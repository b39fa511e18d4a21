"""The specification in float64: losses by their definitions, gradients by autograd on the weights themselves.

Slow and obvious on purpose. Nothing here is shared with the worker: full logits, one sequence at a time, no masks, no
batches, no hooks. Formulas: SFT is the token mean of -log p; DPO is eq. 7 of arXiv:2305.18290 and ORPO eq. 6 of
arXiv:2403.07691.
"""

import copy
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


def dpo_loss(model: nn.Module, reference: nn.Module, rows: Sequence[ReferenceRow], *, beta: float) -> Tensor:
    losses = []
    for row in rows:
        policy = token_logps(model, row.prompt, row.chosen).sum() - token_logps(model, row.prompt, row.rejected).sum()
        with torch.no_grad():
            anchor = (
                token_logps(reference, row.prompt, row.chosen).sum()
                - token_logps(reference, row.prompt, row.rejected).sum()
            )
        losses.append(-torch.log(torch.sigmoid(beta * (policy - anchor))))
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


def weight_gradients(
    model: nn.Module, targets: Iterable[str], loss: Callable[[nn.Module], Tensor]
) -> Mapping[str, Tensor]:
    """Gradients of the loss by the named modules' weights, computed by a float64 copy of the model.

    Orientation is (out, in), also for Conv1D, which stores its weight the other way round.
    """
    twin = copy.deepcopy(model).double().eval()
    modules = {name: twin.get_submodule(name) for name in targets}
    for module in modules.values():
        module.weight.requires_grad_()
    loss(twin).backward()
    return {
        name: module.weight.grad if isinstance(module, nn.Linear) else module.weight.grad.T
        for name, module in modules.items()
    }

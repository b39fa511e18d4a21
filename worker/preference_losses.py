"""DPO's losses as functions of the log-ratios c and r of chosen and rejected completion, and their slopes at 0; KTO's.

A log-ratio is log(policy / reference) of a completion, summed over its tokens or, for some losses, their mean. At the
start the policy is the reference, so c = r = 0 for every row, and a loss enters the gradient by two numbers alone.
Every loss is that of `DPOTrainer._compute_loss` in TRL 1.16 under its ``loss_type`` (docs/method.md, section 1), and
KTO's that of `KTOTrainer._compute_loss`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from d2lora.initializations import Dpo, DpoLoss, Kto


@dataclass(frozen=True)
class Slopes:
    """Derivatives of a row's loss by c and r, at c = r = 0."""

    chosen: float
    rejected: float


@dataclass(frozen=True)
class _Loss:
    rows: Callable[[float, float, Tensor, Tensor], Tensor]
    """From beta, label smoothing, c and r to one loss per row."""
    slope: Callable[[float, float], float]
    """From beta and label smoothing to the slope by r at the start; that by c is its negative."""
    per_token: bool = False
    """Whether c and r are means over tokens."""
    one_sided: bool = False
    """The slope by c at the start is 0 instead."""


def _sigmoid(beta: float, _: float, c: Tensor, r: Tensor) -> Tensor:
    return -logsigmoid(beta * (c - r))


def _robust(beta: float, smoothing: float, c: Tensor, r: Tensor) -> Tensor:
    clean, flipped = -logsigmoid(beta * (c - r)), -logsigmoid(beta * (r - c))
    return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)


def _exo_pair(beta: float, smoothing: float, c: Tensor, r: Tensor) -> Tensor:
    margin = beta * (c - r)
    chosen = torch.sigmoid(margin) * (logsigmoid(margin) - math.log1p(-smoothing))
    return chosen + torch.sigmoid(-margin) * (logsigmoid(-margin) - math.log(smoothing))


def _nca_pair(beta: float, _: float, c: Tensor, r: Tensor) -> Tensor:
    return -logsigmoid(beta * c) - 0.5 * logsigmoid(-beta * c) - 0.5 * logsigmoid(-beta * r)


_LOSSES: Mapping[DpoLoss, _Loss] = {
    "sigmoid": _Loss(_sigmoid, lambda beta, _: beta / 2),
    "sigmoid_norm": _Loss(_sigmoid, lambda beta, _: beta / 2, per_token=True),
    "hinge": _Loss(lambda beta, _, c, r: torch.relu(1 - beta * (c - r)), lambda beta, _: beta),
    "ipo": _Loss(lambda beta, _, c, r: (c - r - 0.5 / beta) ** 2, lambda beta, _: 1 / beta, per_token=True),
    "robust": _Loss(_robust, lambda beta, smoothing: beta / (2 - 4 * smoothing)),
    "exo_pair": _Loss(_exo_pair, lambda beta, smoothing: beta / 4 * math.log((1 - smoothing) / smoothing)),
    "nca_pair": _Loss(_nca_pair, lambda beta, _: beta / 4),
    "bco_pair": _Loss(lambda beta, _, c, r: -logsigmoid(beta * c) - logsigmoid(-beta * r), lambda beta, _: beta / 2),
    "sppo_hard": _Loss(lambda beta, _, c, r: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2, lambda beta, _: 1 / beta),
    "apo_zero": _Loss(
        lambda beta, _, c, r: torch.sigmoid(-beta * c) + torch.sigmoid(beta * r), lambda beta, _: beta / 4
    ),
    # The chosen completion's two terms cancel at the start: only the rejected one is pushed, down.
    "apo_down": _Loss(
        lambda beta, _, c, r: torch.sigmoid(beta * c) + torch.sigmoid(beta * (r - c)),
        lambda beta, _: beta / 4,
        one_sided=True,
    ),
}


def is_per_token(objective: Dpo) -> bool:
    """Return whether the loss looks at the mean over a completion's tokens and not at their sum."""
    return _LOSSES[objective.loss_type].per_token


def slopes_at_start(objective: Dpo) -> Slopes:
    """Return how a row's loss begins to fall."""
    loss = _LOSSES[objective.loss_type]
    slope = loss.slope(objective.beta, objective.label_smoothing or 0.0)
    return Slopes(0.0 if loss.one_sided else -slope, slope)


def dpo_losses(objective: Dpo, c: Float[Tensor, " R"], r: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Return the rows' losses from their log-ratios, which are means over tokens where `is_per_token` says so."""
    return _LOSSES[objective.loss_type].rows(objective.beta, objective.label_smoothing or 0.0, c, r)


def dpo_slopes(
    objective: Dpo, c: Float[Tensor, " R"], r: Float[Tensor, " R"]
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Return the derivatives of the rows' losses by c and by r, at any policy."""
    chosen, rejected = _slopes(lambda *ratios: dpo_losses(objective, *ratios), c, r)
    return chosen, rejected


def kto_losses(
    objective: Kto, log_ratios: Float[Tensor, " R"], desirable: Bool[Tensor, " R"], shift: float
) -> Float[Tensor, " R"]:
    """Return the rows' losses; ``shift`` is the reference point, by which all completions' log-ratios have moved."""
    gain = objective.beta * (log_ratios - shift)
    return torch.where(
        desirable,
        objective.desirable_weight * torch.sigmoid(-gain),
        objective.undesirable_weight * torch.sigmoid(gain),
    )


def kto_slopes(
    objective: Kto, log_ratios: Float[Tensor, " R"], desirable: Bool[Tensor, " R"], shift: float
) -> Float[Tensor, " R"]:
    """Return the derivatives of the rows' losses by their log-ratios, at any policy; the shift is a constant."""
    (slopes,) = _slopes(lambda own: kto_losses(objective, own, desirable, shift), log_ratios)
    return slopes


def _slopes(losses: Callable[..., Tensor], *log_ratios: Tensor) -> tuple[Tensor, ...]:
    """Return the derivatives of each row's loss by its own log-ratios; a row's loss looks at no other row."""
    leaves = [tensor.detach().requires_grad_() for tensor in log_ratios]
    with torch.enable_grad():
        total = losses(*leaves).sum()
    return torch.autograd.grad(total, leaves)


def kto_slopes_at_start(objective: Kto) -> tuple[float, float]:
    """Return how the loss of a desirable and of an undesirable row begins to change with its log-ratio."""
    return -objective.desirable_weight * objective.beta / 4, objective.undesirable_weight * objective.beta / 4

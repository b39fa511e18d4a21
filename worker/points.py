"""Where a round begins: the sum of the steps so far, cut to rank r (docs/method.md, section 4).

A point is kept as the low-rank matrix P of every layer whose negative is the update, ``s B A = -P``; after one round
that is eta times the direction.

Shape legend
    O  out_features    I  in_features    N  LoRA rank r
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from worker.factors import Direction, adapted, calibrated_step
from worker.low_rank import LowRank

Point = Direction
"""The negative update of every layer, of rank r."""


def first_point(direction: Direction, eta: float) -> Point:
    """Return where a step of size eta from the base model leads."""
    return {name: layer.taken(eta) for name, layer in direction.items()}


def moved(point: Point, direction: Direction, eta: float, *, rank: int) -> Point:
    """Return where a step of size eta from the point leads, cut to the rank again."""
    return {name: _sum(layer, direction[name].taken(eta), rank) for name, layer in point.items()}


def at(targets: Mapping[str, nn.Module], point: Point) -> AbstractContextManager[None]:
    """Let the model be the one at the point while the block runs."""
    return adapted(targets, calibrated_step(point, eta=1.0, scaling=1.0), scaling=1.0)


def _sum(point: LowRank, step: LowRank, rank: int) -> LowRank:
    """Return the best rank-r approximation of the sum, which has rank 2r at most: exact, and no O x I matrix is made.

    ``energy`` becomes that of the sum before the cut; sketch errors add up at most as norms do.
    """
    left_ON = torch.cat([point.left * point.values, step.left * step.values], dim=1).double()
    right_IN = torch.cat([point.right, step.right]).double().T
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left_ON), torch.linalg.qr(right_IN)
    u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    left, right = q_left @ u, v @ q_right.T
    largest = right.gather(1, right.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)  # as `worker.low_rank` fixes them
    missed = (point.missed**0.5 + step.missed**0.5) ** 2
    whole = LowRank(left * signs.T, values, right * signs, values.square().sum().item(), missed).cut(rank)
    return replace(
        whole, left=whole.left.to(point.left), values=whole.values.to(point.left), right=whole.right.to(point.left)
    )

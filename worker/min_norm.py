"""The point of least norm in the convex hull of vectors, from their inner products: MGDA's weights, exactly.

Shape legend
    J  vectors    A  active ones, whose weights are not zero

References:
    [1] Wolfe. Finding the nearest point in a polytope. Mathematical Programming 11, 1976.
    [2] Desideri. Multiple-gradient descent algorithm (MGDA) for multiobjective optimization. 2012.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_TOLERANCE = 1e-12
"""By how much the plane through the point may cut off a vector, of unit norm."""
_MOST_STEPS = 100
"""Per vector; a few are enough, but rounding must not let the search go in circles."""


def min_norm_weights(gramian: Float[Tensor, "J J"]) -> Float[Tensor, " J"]:
    """Return the weights, none negative and of sum 1, that minimize ``w^T G w``.

    Wolfe's algorithm [1], from equal weights: it ends after finitely many steps, where Frank-Wolfe only draws near.
    """
    count = len(gramian)
    active = torch.ones(count, dtype=torch.bool, device=gramian.device)
    weights = _within(gramian, active, torch.full_like(gramian[0], 1.0 / count))
    for _ in range(_MOST_STEPS * count):
        slopes = gramian @ weights
        lowest = slopes.argmin()
        if slopes[lowest] >= weights @ slopes - _TOLERANCE:
            break  # no vector lies behind the plane through the point
        active = weights > 0
        active[lowest] = True
        weights = _within(gramian, active, weights)
    return weights


def _within(
    gramian: Float[Tensor, "J J"], active: Bool[Tensor, " J"], weights: Float[Tensor, " J"]
) -> Float[Tensor, " J"]:
    """Return the least point of the active vectors' affine hull, or where the way there from ``weights`` leaves them.

    In the second case the vector that was left is dropped, and the search goes on among the others.
    """
    active = active.clone()
    while True:
        aim = _affine_minimum(gramian, active)
        out = active & (aim < 0)
        if not out.any():
            return aim
        steps = torch.where(out, weights / (weights - aim).clamp(min=torch.finfo(weights.dtype).tiny), torch.inf)
        weights = (weights + steps.min() * (aim - weights)).clamp(min=0.0)
        active[steps.argmin()] = False
        weights = torch.where(active, weights, 0.0)


def _affine_minimum(gramian: Float[Tensor, "J J"], active: Bool[Tensor, " J"]) -> Float[Tensor, " J"]:
    """Return the weights of sum 1, of any sign, that minimize ``w^T G w`` over the active vectors."""
    index = active.nonzero()[:, 0]
    size = len(index)
    system = gramian.new_ones(size + 1, size + 1)
    system[:size, :size] = gramian[index][:, index]
    system[size, size] = 0.0
    right = gramian.new_zeros(size + 1)
    right[size] = 1.0
    aim = torch.zeros_like(gramian[0])
    aim[index] = (torch.linalg.pinv(system, hermitian=True) @ right)[:size]
    return aim

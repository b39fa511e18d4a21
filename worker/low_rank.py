"""A matrix of low rank by its singular vectors, signs and orientation settled.

Shape legend
    O  out_features, I  in_features; L  the larger of the two, M  the smaller; N  rank
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from worker.matrices import Shape


@dataclass(frozen=True)
class LowRank:
    """``left @ diag(values) @ right`` with orthonormal factors, and what it leaves out."""

    left: Float[Tensor, "O N"]
    values: Float[Tensor, " N"]
    """Descending."""
    right: Float[Tensor, "N I"]
    energy: float
    """Squared Frobenius norm of the matrix that was factorized; an unbiased estimate from a sketch."""
    missed: float
    """Estimated squared Frobenius norm of what the sketch could not represent, before the cut; 0 when exact."""
    noise: float = 0.0
    """Estimated part of every squared value that is the sketch's noise; 0 when exact."""
    slope: float | None = None
    """Inner product with the gradient that is descended; None if that is ``kept``, as for a part of the gradient."""

    @property
    def kept(self) -> float:
        """Squared Frobenius norm of this factorization."""
        return self.values.double().square().sum().item()

    @property
    def descent(self) -> float:
        """How fast the loss falls along this direction, at first."""
        return self.kept if self.slope is None else self.slope

    def cut(self, rank: int) -> "LowRank":
        """Return the best approximation of the given rank."""
        if rank >= len(self.values):
            return self
        kept = self.left[:, :rank], self.values[:rank], self.right[:rank]
        return LowRank(*kept, self.energy, self.missed, self.noise)


def oriented(
    left: Float[Tensor, "L N"],
    values: Float[Tensor, " N"],
    right: Float[Tensor, "N M"],
    *,
    energy: float,
    missed: float,
    noise: float = 0.0,
    shape: Shape,
) -> LowRank:
    """Undo the transposition, and fix the signs."""
    if shape.transposed:
        left, right = right.T, left.T
    return LowRank(*signed(left, values, right), energy, missed, noise)


def signed(
    left: Float[Tensor, "O N"], values: Float[Tensor, " N"], right: Float[Tensor, "N I"]
) -> tuple[Float[Tensor, "O N"], Float[Tensor, " N"], Float[Tensor, "N I"]]:
    """Fix the sign that a singular vector pair leaves open: largest entry of right > 0."""
    largest = right.gather(1, right.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    return left * signs.T, values, right * signs

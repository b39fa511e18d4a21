"""A matrix of low rank by its singular vectors, signs and orientation settled.

Shape legend
    O  out_features, I  in_features; L  the larger of the two, M  the smaller; N  rank
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from worker.matrices import Shape

_NEGLIGIBLE = 1e-4
"""Of the largest value: what is below is rounding in float32, and its singular vectors mean nothing."""


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
    rows: float = 0.0
    """Sum over rows of the squared Frobenius norm of what the row alone adds to the gradient."""
    along: Float[Tensor, " N"] | None = None
    """``u^T G v`` of every direction for the gradient G that is descended; None if these are the values."""
    lengths: Float[Tensor, " N"] | None = None
    """Of a step of size 1 along every direction; None if these are the values."""

    @property
    def kept(self) -> float:
        """Squared Frobenius norm of this factorization."""
        return self.values.double().square().sum().item()

    @property
    def step(self) -> Float[Tensor, " N"]:
        """The singular values of a step of size 1."""
        return self.values if self.lengths is None else self.lengths

    @property
    def step_energy(self) -> float:
        """Squared Frobenius norm of a step of size 1."""
        return self.step.double().square().sum().item()

    @property
    def descent(self) -> float:
        """How fast the loss falls along the step, at first."""
        along = self.values if self.along is None else self.along
        return (along.double() @ self.step.double()).item()

    def cut(self, rank: int) -> "LowRank":
        """Return the best approximation of the given rank."""
        if rank >= len(self.values):
            return self
        return replace(
            self,
            left=self.left[:, :rank],
            values=self.values[:rank],
            right=self.right[:rank],
            along=None if self.along is None else self.along[:rank],
            lengths=None if self.lengths is None else self.lengths[:rank],
        )

    def orthogonalized(self, length: float) -> "LowRank":
        """Return the same directions with steps of one length; those that are nothing but rounding get none."""
        real = self.values > _NEGLIGIBLE * self.values[:1]
        return replace(self, lengths=torch.where(real, length, 0.0).to(self.values))

    def taken(self, eta: float) -> "LowRank":
        """Return a step of size eta as a matrix of its own; ``energy`` and ``missed`` keep their ratio to ``kept``."""
        kept = self.kept
        scale = eta**2 * (self.step_energy / kept if kept else 0.0)
        return LowRank(self.left, eta * self.step, self.right, scale * self.energy, scale * self.missed)


def oriented(
    left: Float[Tensor, "L N"],
    values: Float[Tensor, " N"],
    right: Float[Tensor, "N M"],
    *,
    energy: float,
    missed: float,
    noise: float = 0.0,
    rows: float = 0.0,
    shape: Shape,
) -> LowRank:
    """Undo the transposition, and fix the signs."""
    if shape.transposed:
        left, right = right.T, left.T
    return LowRank(*signed(left, values, right), energy, missed, noise, rows)


def signed(
    left: Float[Tensor, "O N"], values: Float[Tensor, " N"], right: Float[Tensor, "N I"]
) -> tuple[Float[Tensor, "O N"], Float[Tensor, " N"], Float[Tensor, "N I"]]:
    """Fix the sign that a singular vector pair leaves open: largest entry of right > 0."""
    largest = right.gather(1, right.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    return left * signs.T, values, right * signs

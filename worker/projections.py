"""What test matrices are made of: orthonormal columns, signs, folds, and a product that layers with one input share.

Shape legend
    L  length of the vectors that are projected    P  length of what they become
    W  length of a folded vector    B  rows of a block    N, M  any
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class FoldedMatrix:
    """A test matrix psi (P x L), in one or two blocks of rows.

    A block cuts a vector into parts, adds these up with signs, and multiplies the sum by its ``mix``: folding costs an
    addition per entry, and leaves the product only a part of the length. Signs keep squared norms unbiased
    (E |psi g|^2 = P |g|^2). Entries that one block adds up lie apart in the other, since the lengths of their parts
    have no common factor: no two entries are ever confused.
    """

    signs: Float[Tensor, " L"]
    mixes: tuple[Float[Tensor, "_ _"], ...]
    """Of every block, W x B: the length of its parts, and its rows; a single one with W = L is no fold at all."""

    def of(self, rows: Float[Tensor, "*N L"]) -> Float[Tensor, "*N P"]:
        """Return ``rows @ psi.T``."""
        if len(self.mixes) == 1:
            return rows @ self.mixes[0]
        return torch.cat([self._folded(rows, len(mix)) @ mix for mix in self.mixes], dim=-1)

    def dense(self) -> Float[Tensor, "P L"]:
        """Return psi itself."""
        return self.of(torch.eye(len(self.signs), device=self.signs.device)).T

    def _folded(self, rows: Float[Tensor, "*N L"], part: int) -> Float[Tensor, "*N W"]:
        folded = rows[..., :part] * self.signs[:part]
        for start in range(part, len(self.signs), part):
            end = min(start + part, len(self.signs))
            folded[..., : end - start].addcmul_(rows[..., start:end], self.signs[start:end])
        return folded


@dataclass(frozen=True)
class Remembered:
    """A product of a tensor, and of which one it is; the tensor itself is not kept alive."""

    storage: StorageWeakRef
    view: tuple[object, ...]
    product: Tensor

    @staticmethod
    def of(rows: Tensor, size: tuple[int, int], product: Tensor) -> "Remembered":
        """Return the product of a tensor as it is now; ``size`` is that of what it was multiplied with."""
        return Remembered(StorageWeakRef(rows.untyped_storage()), _view(rows, size), product)

    def is_of(self, rows: Tensor, size: tuple[int, int]) -> bool:
        """Whether the product is of these very numbers."""
        # An address alone would not do: once a tensor is freed, another one may get it.
        if self.storage.expired() or self.view != _view(rows, size):
            return False
        return self.storage == StorageWeakRef(rows.untyped_storage())


def _view(rows: Tensor, size: tuple[int, int]) -> tuple[object, ...]:
    version = rows._version  # noqa: SLF001  # counts changes in place; there is no other way to see them
    return size, rows.dtype, rows.shape, rows.stride(), rows.storage_offset(), version


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Float[Tensor, "N M"]:
    """Return columns that are orthonormal up to a factor: each entry has variance 1."""
    gaussian = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * torch.sign(torch.diagonal(r))  # makes the distribution uniform (Haar)
    return (q * rows**0.5).float()


def random_signs(rows: int, columns: int, generator: torch.Generator) -> Float[Tensor, "N M"]:
    """Return entries of +-1."""
    return torch.randint(0, 2, (rows, columns), generator=generator) * 2.0 - 1.0

"""The sizes of a layer and of its sketch, and the fixed random matrices that the sketch is taken with.

Shape legend
    R  rows; I  in_features, O  out_features; L  the larger of the two, M  the smaller
    Q  range-sketch width, P  co-range-sketch width, N  any number of rows, or the width of a moment's sketch
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from worker.projections import FoldedMatrix, Remembered, orthonormal, random_signs

_MOST_PARTS = 8
"""Parts that psi folds onto each other; more would save little and cost a kernel each."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer and of its sketch."""

    out_features: int
    in_features: int
    width: int
    """Q."""

    @property
    def transposed(self) -> bool:
        """Whether G^T is sketched: the wider sketch lies along the shorter side, of a square layer along its outputs.

        So query, key and value layers have one product of their common inputs with psi.
        """
        return self.in_features >= self.out_features

    @property
    def longer(self) -> int:
        """L."""
        return max(self.out_features, self.in_features)

    @property
    def shorter(self) -> int:
        """M."""
        return min(self.out_features, self.in_features)

    @property
    def corange_width(self) -> int:
        """P, twice Q and so at least four times the directions that are fitted; never more than a full basis.

        Two above Q where Q is 1: with fewer, the fit's expected error is not finite.
        """
        return min(max(2 * self.width, self.width + 2), self.longer)


@dataclass
class TestMatrices:
    """Seeded test matrices, shared by all layers of equal sides: ``omega`` (M x Q) and ``psi`` (P x L).

    Columns of omega are orthonormal up to a factor that makes squared norms unbiased, and so are those of psi's mix:
    this is better conditioned than Gaussian entries, and exact for a full basis.
    """

    __test__: ClassVar[bool] = False  # not a test case, whatever pytest thinks of the name

    seed: int
    device: torch.device
    _cache: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    _elsewhere: dict[torch.device, "TestMatrices"] = field(default_factory=dict)
    _last: dict[str, Remembered] = field(default_factory=dict)

    def on(self, device: torch.device) -> "TestMatrices":
        """Return the same matrices on another device, for the layers of a spread model that lie there."""
        if device == self.device:
            return self
        return self._elsewhere.setdefault(device, TestMatrices(self.seed, device))

    def omega(self, shape: Shape) -> Float[Tensor, "M Q"]:
        """Return the test matrix of the range sketch."""
        return self._kept("omega", shape.shorter, shape.width)

    def moment(self, in_features: int, width: int) -> Float[Tensor, "I N"]:
        """Return the test matrix of an input's second moment."""
        return self._kept("moment", in_features, width)

    def psi(self, shape: Shape) -> FoldedMatrix:
        """Return the test matrix of the co-range sketch."""
        length, rows = shape.longer, shape.corange_width
        parts = min(_MOST_PARTS, length // rows)
        if parts < 2:
            return FoldedMatrix(torch.ones(length, device=self.device), (self._kept("mix", length, rows),))
        shorter = -(-length // parts) | 1
        blocks = ((shorter, rows // 2), (shorter + 2, rows - rows // 2))  # odd numbers two apart have no common factor
        return FoldedMatrix(self._kept("signs", length, 1)[:, 0], tuple(self._kept("mix", *block) for block in blocks))

    def omega_of(self, shape: Shape, rows: Float[Tensor, "*N M"]) -> Float[Tensor, "*N Q"]:
        """Return ``rows @ omega`` in float32, computed once if several layers in turn have the same inputs."""
        return self._once("omega", (shape.shorter, shape.width), rows, lambda rows: rows @ self.omega(shape))

    def psi_of(self, shape: Shape, rows: Float[Tensor, "*N L"]) -> Float[Tensor, "*N P"]:
        """Return ``rows @ psi.T`` in float32, computed once if several layers in turn have the same inputs."""
        return self._once("psi", (shape.longer, shape.corange_width), rows, self.psi(shape).of)

    def moment_of(self, width: int, tokens: Float[Tensor, "*N I"]) -> Float[Tensor, "M I"]:
        """Return ``moment.T @ tokens.T @ tokens`` in float32, computed once if several layers in turn have the same."""
        size = (tokens.shape[-1], width)
        return self._once("moment", size, tokens, lambda tokens: (tokens @ self.moment(*size)).mT @ tokens)

    def _once(self, role: str, size: tuple[int, int], rows: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        last = self._last.get(role)
        if last is None or not last.is_of(rows, size):
            last = self._last[role] = Remembered.of(rows, size, product(rows.float()))
        return last.product

    def _kept(self, role: str, rows: int, columns: int) -> Tensor:
        key = (role, rows, columns)
        if key not in self._cache:
            generator = torch.Generator().manual_seed(self.seed * 3 + ("omega", "mix", "signs", "moment").index(role))
            make = random_signs if role == "signs" else orthonormal
            self._cache[key] = make(rows, columns, generator).to(self.device)
        return self._cache[key]

"""What is kept of each layer's weight gradients: two-sided sketches, or the dense gradients as an oracle.

For a frozen linear layer with inputs X and output gradients D, basis k has ``G_k = sum_s a_ks D_s^T X_s``. A `Sketch`
keeps only products of G_k with two fixed random test matrices, taken while the backward runs; G_k itself never exists.
Both kinds are linear in the data, so batches, folds and shards merge by addition.

Shape legend
    S  sequences, T  tokens of a padded sequence, R  rows (S = 2R when rows are chosen/rejected pairs)
    I  in_features, O  out_features; L  the larger of the two, M  the smaller; G is L x M, transposed if I > O
    K  bases, Q  range-sketch width, P  co-range-sketch width, N  rank of a factorization

References:
    [1] Tropp, Yurtsever, Udell, Cevher. Practical sketching algorithms for low-rank matrix approximation. 2017.
        arXiv:1609.00048
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from worker.projections import FoldedMatrix, Remembered, orthonormal, random_signs

_TRANSIENT_ELEMENTS = 2**20
"""Elements of the per-sequence products held at once; 4 MiB in float32."""
_MOST_PARTS = 8
"""Parts that psi folds onto each other; more would save little and cost a kernel each."""


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
        return LowRank(self.left[:, :rank], self.values[:rank], self.right[:rank], self.energy, self.missed)


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


@dataclass
class Sketch:
    """Sketches of K gradients of one layer."""

    shape: Shape
    matrices: TestMatrices
    range_sketch: Float[Tensor, "K Q L"]
    """``(G_k omega)^T`` (of G_k^T when transposed)."""
    corange_sketch: Float[Tensor, "K P M"]
    """``psi G_k``."""
    row_gramian: Float[Tensor, "K K"]
    """Sum over rows of the inner products of that row's K gradients; float64."""

    @staticmethod
    def empty(shape: Shape, bases: int, matrices: TestMatrices) -> "Sketch":
        """Return the sketch of nothing."""
        return Sketch(
            shape=shape,
            matrices=matrices,
            range_sketch=torch.zeros(bases, shape.width, shape.longer, device=matrices.device),
            corange_sketch=torch.zeros(bases, shape.corange_width, shape.shorter, device=matrices.device),
            row_gramian=torch.zeros(bases, bases, dtype=torch.float64, device=matrices.device),
        )

    def add(
        self,
        inputs: Float[Tensor, "S T I"],
        output_grads: Float[Tensor, "S T O"],
        weights: Float[Tensor, "K S"],
        *,
        paired: bool,
    ) -> None:
        """Add ``sum_s weights[k, s] D_s^T X_s`` to every basis; part of it may stay behind if memory runs out.

        The products are formed per sequence and weighted afterwards, so that K bases cost the tokens only once and
        every row's gradient norm comes for free.
        """
        left, right = (inputs, output_grads) if self.shape.transposed else (output_grads, inputs)
        halves = 2 if paired else 1
        of_omega_HRQT = self.matrices.omega_of(self.shape, right).mT.unflatten(0, (halves, -1))
        of_psi_HRPT = self.matrices.psi_of(self.shape, left).mT.unflatten(0, (halves, -1))
        left_HRTL = left.unflatten(0, (halves, -1))
        right_HRTM = right.unflatten(0, (halves, -1))
        weights_HKR = weights.unflatten(1, (halves, -1)).transpose(0, 1)
        range_sums, corange_sums = (sums.view(len(weights), -1) for sums in (self.range_sketch, self.corange_sketch))
        per_row = halves * (self.range_sketch[0].numel() + self.corange_sketch[0].numel())
        step = max(1, _TRANSIENT_ELEMENTS // per_row)
        for start in range(0, left_HRTL.shape[1], step):
            rows = slice(start, start + step)
            coranges = []
            for half in range(halves):  # whose rows lie together, so that no copy is made
                weights_Kr = weights_HKR[half, :, rows].float()
                range_sums.addmm_(weights_Kr, (of_omega_HRQT[half, rows] @ left_HRTL[half, rows].float()).flatten(1))
                corange_rN = (of_psi_HRPT[half, rows] @ right_HRTM[half, rows].float()).flatten(1)
                corange_sums.addmm_(weights_Kr, corange_rN)
                coranges.append(corange_rN)
            for g, one in enumerate(coranges):
                for h, other in enumerate(coranges[: g + 1]):
                    products_r = torch.linalg.vecdot(one, other).double() / self.shape.corange_width
                    between_KK = (weights_HKR[g, :, rows] * products_r) @ weights_HKR[h, :, rows].double().T
                    self.row_gramian += between_KK if g == h else between_KK + between_KK.T

    def inner_products(self, other: "Sketch") -> Float[Tensor, "K K"]:
        """Return unbiased estimates of ``<G_j, G'_k>`` between the gradients of two sketches; float64."""
        products = torch.einsum("jpm,kpm->jk", self.corange_sketch, other.corange_sketch)
        return products.double() / self.shape.corange_width

    def factorize(self, coefficients: Float[Tensor, " K"], rank: int) -> LowRank:
        """Return the best rank-r part of ``sum_k coefficients[k] G_k``: [1], algorithm 4; exact if its rank is <= r.

        Unlike [1], only the 2 r leading directions of the range sketch enter the least-squares fit: the others carry
        little of the best rank r, and each one adds the fit's noise (measured in docs/log.md).
        What it misses is estimated from what the least-squares fit of the co-range sketch leaves over.
        """
        c = coefficients.to(self.range_sketch)
        range_LQ = torch.einsum("k,kql->lq", c, self.range_sketch)
        corange_PM = torch.einsum("k,kpm->pm", c, self.corange_sketch)
        psi = self.matrices.psi(self.shape)

        width = min(self.shape.width, 2 * rank)
        q_LQ = torch.linalg.svd(range_LQ, full_matrices=False).U[:, :width]
        basis_PQ, triangle_QQ = torch.linalg.qr(psi.of(q_LQ.T).T)
        projected_QM = basis_PQ.T @ corange_PM
        fitted_QM = torch.linalg.solve_triangular(triangle_QQ, projected_QM, upper=True)
        left_over = (corange_PM - basis_PQ @ projected_QM).double().square().sum().item()
        rotation_QQ, values, right_QM = torch.linalg.svd(fitted_QM, full_matrices=False)
        return oriented(
            q_LQ @ rotation_QQ,
            values,
            right_QM,
            energy=corange_PM.double().square().sum().item() / self.shape.corange_width,
            missed=left_over * _error_factor(self.shape, width),
            shape=self.shape,
        ).cut(rank)

    @staticmethod
    def layout(shape: Shape, bases: int) -> dict[str, tuple[str, list[int]]]:
        """Return type and size of every tensor that `tensors` returns, by name."""
        return {
            "rows": ("F64", [bases, bases]),  # first, where a file's eight-byte numbers are aligned
            "range": ("F32", [bases, shape.width, shape.longer]),
            "corange": ("F32", [bases, shape.corange_width, shape.shorter]),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums, by name; what `from_tensors` takes."""
        return {"range": self.range_sketch, "corange": self.corange_sketch, "rows": self.row_gramian}

    @staticmethod
    def from_tensors(shape: Shape, matrices: TestMatrices, tensors: dict[str, Tensor]) -> "Sketch":
        """Return the sketch that gave these tensors."""
        return Sketch(shape, matrices, tensors["range"], tensors["corange"], tensors["rows"])


@dataclass
class DenseGradient:
    """K dense gradients of one layer: the exact mode, for small models and as the tests' oracle."""

    shape: Shape
    matrices: TestMatrices
    """Unused but for the device; both kinds are made and restored alike."""
    gradients: Float[Tensor, "K O I"]
    row_gramian: Float[Tensor, "K K"]

    @staticmethod
    def empty(shape: Shape, bases: int, matrices: TestMatrices) -> "DenseGradient":
        """Return the gradients of nothing."""
        return DenseGradient(
            shape,
            matrices,
            torch.zeros(bases, shape.out_features, shape.in_features, device=matrices.device),
            torch.zeros(bases, bases, dtype=torch.float64, device=matrices.device),
        )

    def add(
        self,
        inputs: Float[Tensor, "S T I"],
        output_grads: Float[Tensor, "S T O"],
        weights: Float[Tensor, "K S"],
        *,
        paired: bool,
    ) -> None:
        """Add ``sum_s weights[k, s] D_s^T X_s`` to every basis."""
        inputs, output_grads = inputs.float(), output_grads.float()
        update = torch.einsum("ks,sto,sti->koi", weights.float(), output_grads, inputs)
        halves = 2 if paired else 1
        grads_HRTO = output_grads.unflatten(0, (halves, -1))
        inputs_HRTI = inputs.unflatten(0, (halves, -1))
        # <D^T X, E^T Y> = sum over pairs of tokens of (D E^T) * (X Y^T): no gradient of a single row is formed.
        products_RHH = torch.stack(
            [
                torch.stack(
                    [
                        ((grads_HRTO[h] @ grads_HRTO[g].mT) * (inputs_HRTI[h] @ inputs_HRTI[g].mT)).sum((1, 2))
                        for g in range(halves)
                    ],
                    dim=1,
                )
                for h in range(halves)
            ],
            dim=1,
        ).double()
        self.row_gramian += weigh_row_products(weights.double().unflatten(1, (halves, -1)), products_RHH)
        self.gradients += update

    def inner_products(self, other: "DenseGradient") -> Float[Tensor, "K K"]:
        """Return ``<G_j, G'_k>``; float64."""
        return torch.einsum("joi,koi->jk", self.gradients.double(), other.gradients.double())

    def factorize(self, coefficients: Float[Tensor, " K"], rank: int) -> LowRank:
        """Return the best rank-r part of ``sum_k coefficients[k] G_k`` by a full singular value decomposition."""
        matrix = torch.einsum("k,koi->oi", coefficients.to(self.gradients), self.gradients)
        if self.shape.transposed:
            matrix = matrix.T
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        energy = values.double().square().sum().item()
        return oriented(left, values, right, energy=energy, missed=0.0, shape=self.shape).cut(rank)

    @staticmethod
    def layout(shape: Shape, bases: int) -> dict[str, tuple[str, list[int]]]:
        """Return type and size of every tensor that `tensors` returns, by name."""
        return {"rows": ("F64", [bases, bases]), "gradients": ("F32", [bases, shape.out_features, shape.in_features])}

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums, by name; what `from_tensors` takes."""
        return {"gradients": self.gradients, "rows": self.row_gramian}

    @staticmethod
    def from_tensors(shape: Shape, matrices: TestMatrices, tensors: dict[str, Tensor]) -> "DenseGradient":
        """Return the gradients that gave these tensors."""
        return DenseGradient(shape, matrices, tensors["gradients"], tensors["rows"])


LayerStatistics = Sketch | DenseGradient


def weigh_row_products(weights: Float[Tensor, "K H R"], products: Float[Tensor, "R H H"]) -> Float[Tensor, "K K"]:
    """Return the sum over rows of ``<g_rj, g_rk>``, where ``g_rk = sum_h weights[k, h, r] g_rh``."""
    return torch.einsum("jhr,rhg,kgr->jk", weights, products, weights)


def _error_factor(shape: Shape, width: int) -> float:
    """Return the expected squared error of the factorization over the squared residual of its least-squares fit.

    A fit of w directions has P - w degrees of freedom, so residual / (P - w) estimates what lies outside them; noise
    inside adds w / (P - w - 1) of that in expectation (theorem 4.3 of [1], for Gaussian test matrices).
    """
    if shape.corange_width == shape.longer:
        return 1.0 / shape.longer  # psi is a multiple of an orthogonal matrix, and the fit has no noise
    freedom = shape.corange_width - width
    return (1 + width / (freedom - 1)) / freedom


def oriented(
    left: Float[Tensor, "L N"],
    values: Float[Tensor, " N"],
    right: Float[Tensor, "N M"],
    *,
    energy: float,
    missed: float,
    shape: Shape,
) -> LowRank:
    """Undo the transposition, and fix the signs."""
    if shape.transposed:
        left, right = right.T, left.T
    return LowRank(*signed(left, values, right), energy, missed)


def signed(
    left: Float[Tensor, "O N"], values: Float[Tensor, " N"], right: Float[Tensor, "N I"]
) -> tuple[Float[Tensor, "O N"], Float[Tensor, " N"], Float[Tensor, "N I"]]:
    """Fix the sign that a singular vector pair leaves open: largest entry of right > 0."""
    largest = right.gather(1, right.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    return left * signs.T, values, right * signs

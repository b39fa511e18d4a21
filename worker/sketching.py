"""What is kept of each layer's weight gradients: two-sided sketches, or the dense gradients (`worker.gradients`).

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

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from worker.gradients import DenseGradient, rows_of
from worker.low_rank import LowRank, oriented
from worker.matrices import Shape, TestMatrices

_TRANSIENT_ELEMENTS = 2**20
"""Elements of the per-sequence products held at once; 4 MiB in float32."""


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

    def factorize(self, coefficients: Float[Tensor, " K"], rank: int, *, keep: int | None = None) -> LowRank:
        """Return the best rank-r part of ``sum_k coefficients[k] G_k``: [1], algorithm 4; exact if its rank is <= r.

        Unlike [1], only the 2 r leading directions of the range sketch enter the least-squares fit: the others carry
        little of the best rank r, and each one adds the fit's noise (measured in docs/log.md).
        What it misses is estimated from what the least-squares fit of the co-range sketch leaves over.
        ``keep`` up to 2 r of the fitted directions are returned instead of r.
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
        missed = left_over * _error_factor(self.shape, width)
        rotation_QQ, values, right_QM = torch.linalg.svd(fitted_QM, full_matrices=False)
        return oriented(
            q_LQ @ rotation_QQ,
            values,
            right_QM,
            energy=corange_PM.double().square().sum().item() / self.shape.corange_width,
            missed=missed,
            # Of what lies outside, the fit takes 1 part in P - w - 1 into each of w directions ([1], theorem 4.3).
            noise=missed / (self.shape.corange_width - 1) if self.shape.corange_width < self.shape.longer else 0.0,
            rows=rows_of(self.row_gramian, coefficients),
            shape=self.shape,
        ).cut(keep or rank)

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


LayerStatistics = Sketch | DenseGradient


def _error_factor(shape: Shape, width: int) -> float:
    """Return the expected squared error of the factorization over the squared residual of its least-squares fit.

    A fit of w directions has P - w degrees of freedom, so residual / (P - w) estimates what lies outside them; noise
    inside adds w / (P - w - 1) of that in expectation (theorem 4.3 of [1], for Gaussian test matrices).
    """
    if shape.corange_width == shape.longer:
        return 1.0 / shape.longer  # psi is a multiple of an orthogonal matrix, and the fit has no noise
    freedom = shape.corange_width - width
    return (1 + width / (freedom - 1)) / freedom

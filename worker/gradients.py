"""Dense weight gradients of one layer: the exact mode, and the oracle of the sketches.

For a frozen linear layer with inputs X and output gradients D, basis k has ``G_k = sum_s a_ks D_s^T X_s``. They are
linear in the data, so batches, folds and shards merge by addition.

Shape legend
    S  sequences, T  tokens of a padded sequence, R  rows (S = 2R when rows are chosen/rejected pairs), H  halves, S / R
    I  in_features, O  out_features; K  bases
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from worker.low_rank import LowRank, oriented
from worker.matrices import Shape, TestMatrices


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

    def factorize(self, coefficients: Float[Tensor, " K"], rank: int, *, keep: int | None = None) -> LowRank:
        """Return the best part of rank r, or ``keep``, of ``sum_k coefficients[k] G_k`` by a full SVD."""
        gradients = self.gradients.double()  # singular values that lie close need more digits than the sums have
        matrix = torch.einsum("k,koi->oi", coefficients.to(gradients), gradients)
        if self.shape.transposed:
            matrix = matrix.T
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        energy = values.square().sum().item()
        left, values, right = left.float(), values.float(), right.float()
        rows = rows_of(self.row_gramian, coefficients)
        return oriented(left, values, right, energy=energy, missed=0.0, rows=rows, shape=self.shape).cut(keep or rank)

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


def rows_of(row_gramian: Float[Tensor, "K K"], coefficients: Float[Tensor, " K"]) -> float:
    """Return the sum over rows of the squared norm of a row's ``sum_k coefficients[k] g_k``."""
    c = coefficients.to(row_gramian)
    return max(0.0, (c @ row_gramian @ c).item())


def weigh_row_products(weights: Float[Tensor, "K H R"], products: Float[Tensor, "R H H"]) -> Float[Tensor, "K K"]:
    """Return the sum over rows of ``<g_rj, g_rk>``, where ``g_rk = sum_h weights[k, h, r] g_rh``."""
    return torch.einsum("jhr,rhg,kgr->jk", weights, products, weights)

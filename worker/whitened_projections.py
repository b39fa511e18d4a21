"""A second pass for the direction of a whitened gradient, ``H = G (C + c tr(C)/I)^(-p)``.

Whitening acts on the inputs' side, so a range on the outputs' side serves G and H alike: Q spans the first pass's
sketch of G's columns, and ``B = Q^T G`` gives ``Q^T H`` for whatever C turns out to be. C is multiplied anew as well,
by a basis of ``C omega``, one power more than the first pass had, and of the rows of G's sketch: there whitening has to
be right. What Q misses is estimated from the probes of H, whose test matrix knows nothing of Q (`worker.second_pass`).

Shape legend
    S  sequences    T  tokens of a padded sequence    K  bases    I  in_features    O  out_features
    E  width of Q    N  width of the basis on the inputs' side
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from d2lora.initializations import Whitening
from worker.gradients import rows_of
from worker.low_rank import LowRank
from worker.moments import Moment
from worker.whitening import MomentSketch, descending, right_multiplied, whitener


@dataclass
class WhitenedProjection:
    """``B = Q^T G`` of one layer's combined gradient, and ``Z^T C`` of its inputs, summed over batches."""

    left: Float[Tensor, "O E"]
    """Q, orthonormal."""
    right: Float[Tensor, "I N"]
    """Z, orthonormal."""
    coefficients: Float[Tensor, " K"]
    """Of the bases in the combined gradient."""
    whitening: Whitening
    gradient: Float[Tensor, "E I"]
    moment: Float[Tensor, "N I"]

    @staticmethod
    def of(sketch: MomentSketch, coefficients: Float[Tensor, " K"], whitening: Whitening) -> "WhitenedProjection":
        """Return the projection of nothing, onto the ranges that the sketch has found."""
        columns = sketch.corange_sketch if sketch.shape.transposed else sketch.range_sketch
        columns_EO = torch.einsum("k,keo->eo", coefficients.to(columns), columns)
        probes = sketch.probes()
        rows_NI = torch.einsum("k,kni->ni", coefficients.to(probes), probes)
        left = torch.linalg.qr(columns_EO.mT).Q
        right = torch.linalg.qr(torch.cat([sketch.moment.products, rows_NI]).double().mT).Q.float()
        size = sketch.shape.in_features
        return WhitenedProjection(
            left, right, coefficients, whitening, *(columns.new_zeros(basis.shape[1], size) for basis in (left, right))
        )

    def add(
        self,
        inputs: Float[Tensor, "S T I"],
        output_grads: Float[Tensor, "S T O"],
        weights: Float[Tensor, "K S"],
        *,
        paired: bool,  # noqa: ARG002  # of `Sums`; a pair's two sequences are added alike
    ) -> None:
        """Add a batch; all of it or, if memory runs out, nothing."""
        tokens, device = inputs.float().flatten(0, 1), inputs.device
        combined_S = (self.coefficients.to(weights) @ weights).float()
        low_STE = (output_grads.float() @ self.left.to(device)) * combined_S[:, None, None]
        gradient = low_STE.flatten(0, 1).T @ tokens
        moment = (tokens @ self.right.to(device)).T @ tokens
        self.gradient += gradient.to(self.gradient.device)
        self.moment += moment.to(self.moment.device)

    def whiten(self, sketch: MomentSketch) -> Callable[[Tensor], Tensor]:
        """Return what multiplies rows by ``(C + c tr(C)/I)^(-p)``; the trace of C is that of the first pass."""
        return whitener(Moment(self.right, self.moment, sketch.moment.trace), self.whitening)

    def factorize(self, sketch: MomentSketch, rank: int) -> LowRank:
        """Return the best rank-r part of ``Q Q^T H``; ``sketch`` is the one that the ranges came from.

        ``missed`` is the estimated squared norm of H without that part, as after one pass.
        """
        whiten = self.whiten(sketch)
        probes = sketch.probes()
        probes_NI = whiten(torch.einsum("k,kni->ni", self.coefficients.to(probes), probes))
        reached_EI = whiten(self.gradient)
        outside = (probes_NI - sketch.probed(self.left) @ reached_EI).double().square().sum().item()
        energy = outside + reached_EI.double().square().sum().item()
        rotation, values, right = torch.linalg.svd(self.gradient, full_matrices=False)
        rows = rows_of(sketch.row_gramian, self.coefficients)
        gradient = LowRank(self.left @ rotation, values, right, energy, 0.0, rows=rows)
        direction = right_multiplied(gradient, whiten).cut(rank)
        return descending(replace(direction, missed=max(0.0, energy - direction.kept)), gradient)

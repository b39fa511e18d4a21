"""A second pass for a better direction: its range is known now, so what lies in it is gathered exactly.

The first pass leaves a range Q (the leading columns of G omega); the second one adds up ``B = Q^T G`` for the combined
gradient alone. That is the standard randomized singular value decomposition [1, algorithm 5.1] without the noise of the
least-squares fit, and all columns of Q can be used. What Q misses is estimated from the co-range sketch, whose test
matrix knows nothing of Q: ``|Psi (G - Q B)|^2 / P`` is unbiased [2, section 6].

Shape legend
    S  sequences    T  tokens of a padded sequence    K  bases
    L  the larger of out_features and in_features    M  the smaller    Q  range-sketch width    P  co-range-sketch width

References:
    [1] Halko, Martinsson, Tropp. Finding structure with randomness. 2011. arXiv:0909.4061
    [2] Tropp, Yurtsever, Udell, Cevher. Streaming low-rank matrix approximation. 2019. arXiv:1902.08651
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from d2lora.initializations import Phase, Whitening
from worker.batches import Batch
from worker.checkpointing import activation_checkpointing
from worker.factors import Direction, summed
from worker.gradients import rows_of
from worker.low_rank import LowRank, oriented
from worker.matrices import Shape
from worker.models import BaseModel
from worker.objectives import Basis
from worker.progress import PhaseCounter
from worker.sketching import Sketch
from worker.statistics import Statistics, gather
from worker.units import OnProgress
from worker.whitened_projections import WhitenedProjection
from worker.whitening import MomentSketch


@dataclass
class Projection:
    """``B = Q^T G`` of one layer's combined gradient, summed over batches."""

    shape: Shape
    basis: Float[Tensor, "L Q"]
    """Q, orthonormal."""
    coefficients: Float[Tensor, " K"]
    """Of the bases in the combined gradient."""
    sums: Float[Tensor, "Q M"]

    @staticmethod
    def of(sketch: Sketch, coefficients: Float[Tensor, " K"]) -> "Projection":
        """Return the projection of nothing, onto the range that the sketch has found."""
        range_LQ = torch.einsum("k,kql->lq", coefficients.to(sketch.range_sketch), sketch.range_sketch)
        basis = torch.linalg.qr(range_LQ).Q
        sums = torch.zeros(basis.shape[1], sketch.shape.shorter, device=basis.device)
        return Projection(sketch.shape, basis, coefficients, sums)

    def add(
        self,
        inputs: Float[Tensor, "S T I"],
        output_grads: Float[Tensor, "S T O"],
        weights: Float[Tensor, "K S"],
        *,
        paired: bool,  # noqa: ARG002  # of `Sums`; a pair's two sequences are added alike
    ) -> None:
        """Add a batch; all of it or, if memory runs out, nothing."""
        left, right = (inputs, output_grads) if self.shape.transposed else (output_grads, inputs)
        combined_S = (self.coefficients.to(weights) @ weights).float()
        low_STQ = (left.float() @ self.basis.to(left.device)) * combined_S[:, None, None]
        self.sums += (low_STQ.flatten(0, 1).T @ right.float().flatten(0, 1)).to(self.sums.device)

    def factorize(self, sketch: Sketch, rank: int) -> LowRank:
        """Return the best rank-r part of ``Q B``; ``sketch`` is the one that Q came from."""
        psi, p = sketch.matrices.psi(self.shape), self.shape.corange_width
        corange_PM = torch.einsum("k,kpm->pm", self.coefficients.to(sketch.corange_sketch), sketch.corange_sketch)
        left_over = corange_PM - psi.of(self.basis.T).T @ self.sums
        rotation, values, right = torch.linalg.svd(self.sums, full_matrices=False)
        return oriented(
            self.basis @ rotation,
            values,
            right,
            energy=corange_PM.double().square().sum().item() / p,
            missed=left_over.double().square().sum().item() / p,
            rows=rows_of(sketch.row_gramian, self.coefficients),
            shape=self.shape,
        ).cut(rank)


def inaccurate_layers(direction: Direction, above: float) -> list[str]:
    """Return the layers whose estimated relative sketch error is above the bound."""
    return [name for name, layer in direction.items() if layer.missed > above**2 * layer.energy]


def step_along(direction: Direction, *, eta: float, instead_of: Direction) -> float:
    """Return the step size for a refined direction, where ``eta`` was found for the one that it takes the place of.

    Where the loss curves alike in all directions, the best step is proportional to ``<G, D> / |D|^2``. That is 1 for
    a part of G itself, and eta stays; a refined whitened direction is shorter for its slope.
    """

    def steepness(of: Direction) -> float:
        squared = sum(layer.step_energy for layer in of.values())
        return sum(layer.descent for layer in of.values()) / squared if squared else 1.0

    return eta * (steepness(direction) / steepness(instead_of))


def refined(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    folds: Sequence[Statistics],
    coefficients: Float[Tensor, " K"],
    batches: Sequence[Batch],
    bases: Sequence[Basis],
    layers: Sequence[str],
    *,
    rank: int,
    whitening: Whitening | None = None,
    checkpointing: bool,
    on_progress: OnProgress,
) -> dict[str, LowRank]:
    """Return the rank-r direction of the named layers from another pass, whose backward ends at the lowest of them.

    With whitening it is that of the whitened gradient, and the first pass has gathered second moments.
    """

    def sketch(name: str) -> Sketch:
        whole = summed([fold.layers[name] for fold in folds])
        assert isinstance(whole, Sketch)
        return whole

    def projection(name: str) -> Projection | WhitenedProjection:
        first = sketch(name)
        if whitening is None:
            return Projection.of(first, coefficients)
        return WhitenedProjection.of(_with_moment(first), coefficients, whitening)

    projections = {name: projection(name) for name in layers}
    count = PhaseCounter(Phase.REFINEMENT, sum(len(batch.rows) for batch in batches), on_progress)
    with activation_checkpointing(base, enabled=checkpointing):
        gather(
            base,
            {name: targets[name] for name in layers},
            projections,
            batches,
            bases,
            on_batch=lambda batch, _: count(len(batch.rows)),
            mask_inputs=whitening is not None,
        )

    def direction(name: str) -> LowRank:
        found = projections[name]
        if isinstance(found, WhitenedProjection):
            return found.factorize(_with_moment(sketch(name)), rank)
        return found.factorize(sketch(name), rank)

    return {name: direction(name) for name in layers}


def _with_moment(sketch: Sketch) -> MomentSketch:
    assert isinstance(sketch, MomentSketch), "the pass has not gathered second moments"
    return sketch

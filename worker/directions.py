"""From the statistics of all folds, or of all but one, to the direction of a step.

Shape legend
    J  objectives    K  bases
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from d2lora.initializations import InitializationSpec, Objective, Phase
from worker.calibration import Held
from worker.combining import Mixture, combine, objective_gramian
from worker.factors import Direction, Products, factorize, whitened_gramians
from worker.objectives import Basis, Counts, objective_coefficients
from worker.progress import PhaseCounter
from worker.ranks import MOST, cut_to_ranks
from worker.report import noise_scale
from worker.side_by_side import SideBySide
from worker.statistics import Statistics
from worker.units import OnProgress

_ROUNDING = 1e-12
"""Of all layers' squared norms: what a layer has below this is rounding in float32, as where its gradient is zero."""


@dataclass(frozen=True)
class Pass:
    """What one pass over all rows of a dataset leaves behind, fold by fold."""

    objectives: Sequence[Objective]
    bases: tuple[Basis, ...]
    statistics: list[Statistics]
    held: Held
    """The batches that calibration scores."""
    place: str = ""
    """What the names of its objectives begin with; nothing, where there is one dataset."""

    @property
    def names(self) -> list[str]:
        """The objectives' names."""
        return [f"{self.place}{objective.type}" for objective in self.objectives]

    def counts(self, *, leave_out: int | None = None) -> Counts:
        """Return the normalizers over all folds, or over all but one."""
        return sum((fold.counts for index, fold in enumerate(self.statistics) if index != leave_out), Counts())

    def coefficients(self, *, leave_out: int | None = None) -> Float[Tensor, "J K"]:
        """Return what turns the bases into gradients of mean losses, over all folds or all but one."""
        return objective_coefficients(self.objectives, self.bases, self.counts(leave_out=leave_out))


def statistics_of(passes: Sequence[Pass]) -> list[Statistics]:
    """Return every fold's statistics, with the bases of all passes side by side."""
    if len(passes) == 1:
        return passes[0].statistics
    folds = zip(*(one.statistics for one in passes), strict=True)
    return [Statistics(SideBySide([part.layers for part in parts])) for parts in folds]


def coefficients_of(passes: Sequence[Pass], *, leave_out: int | None = None) -> Float[Tensor, "J K"]:
    """Return the same as `Pass.coefficients` for the objectives and bases of all passes; none takes another's rows."""
    return torch.block_diag(*(one.coefficients(leave_out=leave_out) for one in passes))


def names_of(passes: Sequence[Pass]) -> list[str]:
    """Return the names of all passes' objectives."""
    return [name for one in passes for name in one.names]


def combined_direction(
    passes: Sequence[Pass], products: Products, spec: InitializationSpec, *, leave_out: int | None = None
) -> tuple[Mixture, Direction]:
    """Return how the objectives are combined, and the rank-r direction, from all folds or all but one.

    Of layers that are to have ranks of their own, it has as many directions as one may get. Steps are as the gradient
    has them until `steps_of` makes them what the request asks for.
    """
    statistics = statistics_of(passes)
    coefficients = coefficients_of(passes, leave_out=leave_out)
    folds = [fold for fold in range(len(statistics)) if fold != leave_out]
    gramian = objective_gramian(products.folds, coefficients, folds)
    row_norms = torch.diagonal(coefficients @ products.rows @ coefficients.T)
    if spec.whitening is not None:
        own = whitened_gramians(statistics, spec.whitening, leave_out=leave_out)
        whitened = coefficients @ torch.stack(list(own.values())).sum(0) @ coefficients.T
        # Rows' own norms are not whitened; what they are for, telling a gradient from rounding, stays as it is.
        row_norms = row_norms * whitened.diagonal() / gramian.diagonal().clamp(min=torch.finfo(gramian.dtype).tiny)
        gramian = whitened
    mixture = combine(gramian, spec.combination, names=names_of(passes), row_norms=row_norms)
    return mixture, factorize(
        statistics,
        mixture.basis_coefficients(coefficients),
        rank=_rank_of_directions(spec),
        keep=MOST * spec.lora.r if spec.lora.ranks else None,
        leave_out=leave_out,
        whitening=spec.whitening,
    )


def steps_of(direction: Direction, spec: InitializationSpec) -> Direction:
    """Return the direction, cut to its ranks, with steps as the request wants them.

    Orthogonalized ones are of norm 1 over all layers, so that a step of size eta is as long for all rows as for some.
    """
    if spec.direction == "gradient":
        return direction
    least = _ROUNDING * sum(layer.rows for layer in direction.values())
    steps = {
        name: layer.orthogonalized(layer.rows**-0.5 if layer.rows > least else 0.0) for name, layer in direction.items()
    }
    norm = sum(layer.step_energy for layer in steps.values()) ** 0.5 or 1.0
    return {name: replace(layer, lengths=layer.step / norm) for name, layer in steps.items()}


def leave_one_out_directions(
    passes: Sequence[Pass], products: Products, spec: InitializationSpec, on_progress: OnProgress
) -> list[Direction]:
    """Return every fold's direction without its own rows, which take no part in ranks either."""
    folds = len(passes[0].statistics)
    count = PhaseCounter(Phase.FACTORS, folds, on_progress)
    directions = []
    for fold in range(folds):
        direction = combined_direction(passes, products, spec, leave_out=fold)[1]
        directions.append(cut_to_ranks(direction, spec.lora)[0] if spec.lora.ranks else direction)
        count()
    return directions


def noise_scales(passes: Sequence[Pass], products: Products) -> list[float | None]:
    """Return each objective's noise scale over its rows; None where the rows' own norms are not known."""
    gramian = products.folds.sum((0, 2))
    waiting = iter(coefficients_of(passes))
    scales = []
    for one_pass in passes:
        for own in one_pass.coefficients():
            # A row's prompt part is gathered in a backward of its own, so its norms are not known for that basis.
            unknown = Basis.SEQUENCE in one_pass.bases and bool(own[one_pass.bases.index(Basis.SEQUENCE)] != 0)
            scale = noise_scale(products.rows, gramian, next(waiting), one_pass.counts().rows)
            scales.append(None if unknown else scale)
    return scales


def _rank_of_directions(spec: InitializationSpec) -> int:
    """Return the rank that directions are made with; in exact mode retain rows restrain the whole gradient."""
    whole = spec.retain_dataset_id is not None and spec.statistics == "exact"
    return sys.maxsize if whole else spec.lora.r

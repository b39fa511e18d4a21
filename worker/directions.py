"""From the statistics of all folds, or of all but one, to the direction of a step.

Shape legend
    J  objectives    K  bases
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from d2lora.initializations import InitializationSpec, Objective, Phase
from worker.calibration import Held
from worker.combining import Mixture, combine, objective_gramian
from worker.factors import Direction, Products, factorize, whitened_gramians
from worker.objectives import Basis, Counts, objective_coefficients
from worker.progress import PhaseCounter
from worker.report import noise_scale
from worker.statistics import Statistics
from worker.units import OnProgress


@dataclass(frozen=True)
class Pass:
    """What one pass over all rows leaves behind, fold by fold."""

    bases: tuple[Basis, ...]
    statistics: list[Statistics]
    held: Held
    """The batches that calibration scores."""

    def counts(self, *, leave_out: int | None = None) -> Counts:
        """Return the normalizers over all folds, or over all but one."""
        return sum((fold.counts for index, fold in enumerate(self.statistics) if index != leave_out), Counts())


def combined_direction(
    one_pass: Pass,
    products: Products,
    objectives: Sequence[Objective],
    spec: InitializationSpec,
    *,
    leave_out: int | None = None,
) -> tuple[Mixture, Direction]:
    """Return how the objectives are combined, and the rank-r direction, from all folds or all but one."""
    coefficients = objective_coefficients(objectives, one_pass.bases, one_pass.counts(leave_out=leave_out))
    folds = [fold for fold in range(len(one_pass.statistics)) if fold != leave_out]
    names = [objective.type for objective in objectives]
    gramian = objective_gramian(products.folds, coefficients, folds)
    row_norms = torch.diagonal(coefficients @ products.rows @ coefficients.T)
    if spec.whitening is not None:
        own = whitened_gramians(one_pass.statistics, spec.whitening, leave_out=leave_out)
        whitened = coefficients @ torch.stack(list(own.values())).sum(0) @ coefficients.T
        # Rows' own norms are not whitened; what they are for, telling a gradient from rounding, stays as it is.
        row_norms = row_norms * whitened.diagonal() / gramian.diagonal().clamp(min=torch.finfo(gramian.dtype).tiny)
        gramian = whitened
    mixture = combine(gramian, spec.combination, names=names, row_norms=row_norms)
    return mixture, factorize(
        one_pass.statistics,
        mixture.basis_coefficients(coefficients),
        rank=_rank_of_directions(spec),
        leave_out=leave_out,
        whitening=spec.whitening,
    )


def leave_one_out_directions(
    one_pass: Pass,
    products: Products,
    objectives: Sequence[Objective],
    spec: InitializationSpec,
    on_progress: OnProgress,
) -> list[Direction]:
    """Return every fold's direction without its own rows."""
    folds = len(one_pass.statistics)
    count = PhaseCounter(Phase.FACTORS, folds, on_progress)
    directions = []
    for fold in range(folds):
        directions.append(combined_direction(one_pass, products, objectives, spec, leave_out=fold)[1])
        count()
    return directions


def noise_scales(one_pass: Pass, products: Products, objectives: Sequence[Objective]) -> list[float | None]:
    """Return each objective's noise scale over all rows; None where the rows' own norms are not known."""
    coefficients = objective_coefficients(objectives, one_pass.bases, one_pass.counts())
    gramian = products.folds.sum((0, 2))
    scales = []
    for row in coefficients:
        # A row's prompt part is gathered in a backward of its own, so its norms are not known for that basis.
        unknown = Basis.SEQUENCE in one_pass.bases and bool(row[one_pass.bases.index(Basis.SEQUENCE)] != 0)
        scales.append(None if unknown else noise_scale(products.rows, gramian, row, one_pass.counts().rows))
    return scales


def _rank_of_directions(spec: InitializationSpec) -> int:
    """Return the rank that directions are made with; in exact mode retain rows restrain the whole gradient."""
    whole = spec.retain_dataset_id is not None and spec.statistics == "exact"
    return sys.maxsize if whole else spec.lora.r

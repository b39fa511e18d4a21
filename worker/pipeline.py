"""From rows to an adapter: start reading here.

`build_adapter` is the algorithm of docs/method.md from top to bottom; `worker/initialization.py` puts files around it,
and `worker/sharding.py` lets several workers do the passes of a large job.

Shape legend
    J  objectives    K  bases
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from d2lora.initializations import HeldOut, InitializationSpec, Objective, Phase, Retained
from d2lora.settings import WorkerSettings
from worker.batches import Batch, assign_folds, distinct_rows, make_batches
from worker.calibration import Calibration, Evaluator, Held, alone, calibrate, calibration_batches, held_out
from worker.checkpointing import activation_checkpointing
from worker.combining import Mixture, combine, objective_gramian
from worker.data import Example, needed
from worker.factors import (
    Direction,
    Factors,
    Products,
    calibrated_step,
    factorize,
    inner_products,
    whitened_gramians,
)
from worker.matrices import Shape, TestMatrices
from worker.models import BaseModel, layer_sizes
from worker.objectives import (
    Basis,
    Counts,
    Scores,
    bases_of,
    objective_coefficients,
    resolve_objectives,
)
from worker.points import first_point
from worker.progress import PhaseCounter
from worker.report import noise_scale
from worker.retaining import Restraint, restrain
from worker.rounds import Rounds, Surroundings, further_rounds
from worker.second_pass import inaccurate_layers, refined
from worker.sketch_files import SketchFile
from worker.sketch_files import load as load_statistics
from worker.statistics import Statistics, gather
from worker.units import OnProgress
from worker.whitening import OVERSAMPLING as WHITENED_OVERSAMPLING

FOLDS = 4
OVERSAMPLING = 4
"""Range-sketch width in units of r: keeps 98.7 to 100 % of what the best rank-r factorization keeps."""


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


@dataclass(frozen=True)
class Gathered:
    """What a pass over some of the batches leaves behind."""

    sums: dict[int, Path]
    """A file of sums for every fold that the batches touch."""
    scores: list[Scores]
    """Of every batch's rows under the base model."""


@dataclass(frozen=True)
class BuiltAdapter:
    """The factors, and what was measured on the way to them."""

    factors: dict[str, Factors]
    direction: Direction
    objectives: list[Objective]
    mixture: Mixture
    layer_gramians: dict[str, Float[Tensor, "J J"]]
    """Inner products of the objectives' gradients, of one layer each."""
    noise_scales: list[float | None]
    folds: int
    calibration: Calibration | None
    eta: float
    """Size of the delivered step; 0 for the zero start."""
    reason: str
    """Why this start is delivered."""
    held_out: dict[str, HeldOut]
    leave_one_out: list[Direction]
    """Every fold's direction without its own rows, where further rounds may begin there."""
    refined: frozenset[str] = frozenset()
    """Layers whose direction is from a second pass."""
    further: Rounds | None = None
    """Rounds after the first; ``direction`` is then the whole update and ``eta`` is 1."""
    retained: Retained | None = None
    """What general text loses, if the request asks to retain any."""


def build_adapter(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    examples: Sequence[Example],
    *,
    settings: WorkerSettings,
    directory: Path,
    on_progress: OnProgress,
    restraint: Restraint | None = None,
) -> BuiltAdapter:
    """Return the adapter for these rows; statistics wait in ``directory`` between the stages.

    Raises:
        ObjectiveUnavailable: an objective needs what the rows do not have.
        NumericalFailure: a number is not finite, or the objectives cancel.
        OutOfMemory: a single row does not fit.
    """
    objectives = resolve_objectives(spec.objectives, examples[0].supervision)
    bases = bases_of(objectives)
    batches = deal_batches(base, spec, examples, settings=settings)
    gathered = gather_statistics(
        base, targets, spec, batches, bases, settings=settings, directory=directory, on_progress=on_progress
    )
    matrices = TestMatrices(spec.seed, base.device)
    scored = zip(batches, gathered.scores, strict=True)
    folds = [list(own) for _, own in groupby(scored, key=lambda pair: pair[0].fold)]
    chosen = calibration_batches([[len(batch.rows) for batch, _ in fold] for fold in folds], spec.seed)
    one_pass = Pass(
        bases,
        [load_statistics(path, matrices) for path in gathered.sums.values()],
        [[fold[index] for index in indices] for fold, indices in zip(folds, chosen, strict=True)],
    )
    built = adapter_from(
        one_pass,
        objectives,
        spec,
        evaluator=alone(base, targets, objectives, on_progress),
        on_progress=on_progress,
        restraint=restraint,
    )
    above = spec.second_pass_above
    if above is not None and (layers := inaccurate_layers(built.direction, above)):
        coefficients = built.mixture.basis_coefficients(objective_coefficients(objectives, bases, one_pass.counts()))
        better = refined(
            base,
            targets,
            one_pass.statistics,
            coefficients,
            batches,
            bases,
            layers,
            rank=spec.lora.r,
            checkpointing=settings.activation_checkpointing,
            on_progress=on_progress,
        )
        direction = {**built.direction, **better}
        factors = calibrated_step(direction, eta=built.eta, scaling=spec.lora.scaling)
        return replace(built, direction=direction, factors=factors, refined=frozenset(better))
    if spec.rounds == 1 or not built.eta:
        return built

    def direction_of(statistics: Statistics, own: tuple[Basis, ...]) -> tuple[Mixture, Direction]:
        products = inner_products([statistics], len(own))
        return combined_direction(Pass(own, [statistics], []), products, objectives, spec)

    around = Surroundings(
        base,
        targets,
        spec,
        objectives,
        kind_of_sums(spec),
        sketch_shapes(targets, spec),
        list(zip(batches, gathered.scores, strict=True)),
        one_pass.held,
        direction_of,
        settings.activation_checkpointing,
        directory,
    )
    return _continued(built, around, on_progress)


def _continued(first: BuiltAdapter, around: Surroundings, on_progress: OnProgress) -> BuiltAdapter:
    """Return the adapter after further rounds: the first round's own, where no other is accepted."""
    points = [first_point(direction, first.eta) for direction in first.leave_one_out]
    further = further_rounds(around, first_point(first.direction, first.eta), points, on_progress=on_progress)
    accepted = [one for one in further.rounds if one.calibration.accepted]
    if not accepted:
        return replace(first, further=further)
    return replace(
        first,
        factors=calibrated_step(further.point, eta=1.0, scaling=around.spec.lora.scaling),
        direction=further.point,
        eta=1.0,
        reason=f"{1 + len(accepted)} rounds lower the held-out objective, each by more than its standard error",
        held_out=accepted[-1].held_out,
        further=further,
    )


def deal_batches(
    base: BaseModel, spec: InitializationSpec, examples: Sequence[Example], *, settings: WorkerSettings
) -> list[Batch]:
    """Return the batches of all rows, fold after fold; every fold has some."""
    examples = needed(examples, resolve_objectives(spec.objectives, examples[0].supervision))
    folds = min(FOLDS, distinct_rows(examples))
    return make_batches(
        examples,
        assign_folds(examples, folds=folds, seed=spec.seed),
        max_tokens=tokens_per_batch(base, spec, settings),
        pad_token_id=pad_token(base),
    )


def tokens_per_batch(base: BaseModel, spec: InitializationSpec, settings: WorkerSettings) -> int:
    """Return how many padded tokens a batch may have."""
    return spec.max_tokens_per_batch or settings.tokens_per_batch(base.device.type)


def gather_statistics(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    batches: Sequence[Batch],
    bases: tuple[Basis, ...],
    *,
    settings: WorkerSettings,
    directory: Path,
    on_progress: OnProgress,
    made_from: str | None = None,
) -> Gathered:
    """Run one forward and one backward over the batches, and return the sums of each fold that they touch.

    ``made_from`` is the digest of the batches' file, if they are those of a shard.
    """
    matrices = TestMatrices(spec.seed, base.device)
    shapes = sketch_shapes(targets, spec)
    result = Gathered({}, [])
    count = PhaseCounter(Phase.STATISTICS, sum(len(batch.rows) for batch in batches), on_progress)
    with activation_checkpointing(base, enabled=settings.activation_checkpointing):
        for fold, run in groupby(batches, key=lambda batch: batch.fold):
            own = list(run)
            parts: list[Scores] = []

            def keep(part: Batch, scores: Scores, parts: list[Scores] = parts) -> None:
                parts.append(scores)
                count(len(part.rows))

            path = directory / f"fold-{fold}.safetensors"
            with SketchFile(
                path, kind_of_sums(spec), shapes, bases=len(bases), matrices=matrices, made_from=made_from
            ) as file:
                layers, mask = file.accumulators(), spec.whitening is not None
                file.finish(gather(base, targets, layers, own, bases, on_batch=keep, mask_inputs=mask))
            result.sums[fold] = path
            # Where memory ran out a batch came in parts; they are put together again.
            result.scores.extend(Scores.concatenate(parts).split([len(batch.rows) for batch in own]))
    return result


def adapter_from(
    one_pass: Pass,
    objectives: list[Objective],
    spec: InitializationSpec,
    *,
    evaluator: Evaluator,
    on_progress: OnProgress,
    restraint: Restraint | None = None,
) -> BuiltAdapter:
    """Return the adapter for the statistics of all rows, whoever gathered them; ``evaluator`` runs calibration.

    Raises:
        NumericalFailure: a number is not finite, or the objectives cancel.
    """
    products = inner_products(one_pass.statistics, len(one_pass.bases))
    mixture, direction = combined_direction(one_pass, products, objectives, spec)
    calibration, retained, directions = None, None, []
    if spec.start == "calibrated" and len(one_pass.statistics) > 1:
        directions = _leave_one_out_directions(one_pass, products, objectives, spec, on_progress)

        def search(others: Sequence[Direction]) -> Calibration:
            return calibrate(objectives, mixture, others, one_pass.held, evaluator)

        if restraint is None:
            calibration = search(directions)
        else:
            outcome = restrain(direction, directions, search, restraint, rank=spec.lora.r)
            calibration, direction, retained = outcome.calibration, outcome.direction, outcome.retained
    direction = {name: layer.cut(spec.lora.r) for name, layer in direction.items()}
    accepted = calibration.accepted if calibration else None
    eta = accepted.eta if accepted else 0.0

    coefficients = objective_coefficients(objectives, one_pass.bases, one_pass.counts())
    gramians = products.layers if spec.whitening is None else whitened_gramians(one_pass.statistics, spec.whitening)
    base_scores = Scores.concatenate([scores for fold in one_pass.held for _, scores in fold])
    return BuiltAdapter(
        factors=calibrated_step(direction, eta=eta, scaling=spec.lora.scaling),
        direction=direction,
        objectives=objectives,
        mixture=mixture,
        layer_gramians={name: coefficients @ own @ coefficients.T for name, own in gramians.items()},
        noise_scales=_noise_scales(one_pass, products, objectives),
        folds=len(one_pass.statistics),
        calibration=calibration,
        eta=eta,
        reason=_reason(spec, calibration),
        held_out=held_out(objectives, base_scores, accepted),
        leave_one_out=directions if spec.rounds > 1 else [],
        retained=retained,
    )


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


def pad_token(base: BaseModel) -> int:
    """Return the token that fills up batches; which one is of no consequence, since it is masked."""
    candidates = (base.tokenizer.pad_token_id, base.tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


def sketch_shape(module: nn.Module, *, rank: int, oversampling: int = OVERSAMPLING) -> Shape:
    """Return the sizes of the sketch that a layer gets."""
    out_features, in_features = layer_sizes(module)
    return Shape(out_features, in_features, min(oversampling * rank, out_features, in_features))


def sketch_shapes(targets: Mapping[str, nn.Module], spec: InitializationSpec) -> dict[str, Shape]:
    """Return the sizes of all layers' sketches."""
    oversampling = OVERSAMPLING if spec.whitening is None else WHITENED_OVERSAMPLING
    return {name: sketch_shape(module, rank=spec.lora.r, oversampling=oversampling) for name, module in targets.items()}


def _rank_of_directions(spec: InitializationSpec) -> int:
    """Return the rank that directions are made with; in exact mode retain rows restrain the whole gradient."""
    whole = spec.retain_dataset_id is not None and spec.statistics == "exact"
    return sys.maxsize if whole else spec.lora.r


def kind_of_sums(spec: InitializationSpec) -> str:
    """Return what is kept of every layer, as files of sums name it."""
    return spec.statistics if spec.whitening is None else f"{spec.statistics}+moment"


def _leave_one_out_directions(
    one_pass: Pass,
    products: Products,
    objectives: Sequence[Objective],
    spec: InitializationSpec,
    on_progress: OnProgress,
) -> list[Direction]:
    folds = len(one_pass.statistics)
    count = PhaseCounter(Phase.FACTORS, folds, on_progress)
    directions = []
    for fold in range(folds):
        directions.append(combined_direction(one_pass, products, objectives, spec, leave_out=fold)[1])
        count()
    return directions


def _noise_scales(one_pass: Pass, products: Products, objectives: Sequence[Objective]) -> list[float | None]:
    coefficients = objective_coefficients(objectives, one_pass.bases, one_pass.counts())
    gramian = products.folds.sum((0, 2))
    scales = []
    for row in coefficients:
        # A row's prompt part is gathered in a backward of its own, so its norms are not known for that basis.
        unknown = Basis.SEQUENCE in one_pass.bases and bool(row[one_pass.bases.index(Basis.SEQUENCE)] != 0)
        scales.append(None if unknown else noise_scale(products.rows, gramian, row, one_pass.counts().rows))
    return scales


def _reason(spec: InitializationSpec, calibration: Calibration | None) -> str:
    if spec.start == "zero":
        return "the request asks for lora_B = 0"
    if calibration is None:
        return "a single distinct row (of one label) leaves nothing to hold out, so no step can be supported"
    return calibration.reason

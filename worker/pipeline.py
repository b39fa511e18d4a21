"""From rows to an adapter: start reading here.

`build_adapter` is the algorithm of docs/method.md from top to bottom; `worker/initialization.py` puts files around it.

Shape legend
    J  objectives    K  bases
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from d2lora.initializations import HeldOut, InitializationSpec, Objective, Phase
from d2lora.settings import WorkerSettings
from worker.calibration import EVALUATIONS, Calibration, calibrate, held_out
from worker.combining import Mixture, combine, objective_gramian
from worker.data import Batch, Example, assign_folds, make_batches
from worker.factors import Direction, Factors, Products, calibrated_step, factorize, inner_products
from worker.models import BaseModel, layer_sizes
from worker.objectives import Basis, Counts, Scores, bases_of, objective_coefficients, resolve_objectives
from worker.report import noise_scale
from worker.sketch_files import SketchFile
from worker.sketch_files import load as load_statistics
from worker.sketching import Shape, TestMatrices
from worker.statistics import Statistics, activation_checkpointing, gather

OnProgress = Callable[[Phase, int, int], None]
"""Told (phase, done, total) at least once per batch; may raise, which stops the job."""

FOLDS = 4
CALIBRATION_ROWS = 256
"""Rows scored at every step of the line search; a seeded part of larger datasets."""
OVERSAMPLING = 4
"""Range-sketch width in units of r: keeps 98.7 to 100 % of what the best rank-r factorization keeps."""


@dataclass(frozen=True)
class Pass:
    """What one pass over the data leaves behind, fold by fold."""

    bases: tuple[Basis, ...]
    statistics: list[Statistics]
    scored: list[list[tuple[Batch, Scores]]]
    """Batches with their rows' scores under the base model."""

    def counts(self, *, leave_out: int | None = None) -> Counts:
        """Return the normalizers over all folds, or over all but one."""
        return sum((fold.counts for index, fold in enumerate(self.statistics) if index != leave_out), Counts())


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


def build_adapter(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    examples: Sequence[Example],
    *,
    settings: WorkerSettings,
    directory: Path,
    on_progress: OnProgress,
) -> BuiltAdapter:
    """Return the adapter for these rows; statistics wait in ``directory`` between the stages.

    Raises:
        ObjectiveUnavailable: an objective needs what the rows do not have.
        NumericalFailure: a number is not finite, or the objectives cancel.
        OutOfMemory: a single row does not fit.
    """
    objectives = resolve_objectives(spec.objectives, paired=examples[0].rejected is not None)
    one_pass = gather_statistics(
        base,
        targets,
        spec,
        examples,
        bases_of(objectives),
        settings=settings,
        directory=directory,
        on_progress=on_progress,
    )
    products = inner_products(one_pass.statistics, len(one_pass.bases))
    mixture, direction = combined_direction(one_pass, products, objectives, spec)

    rows = _calibration_rows(one_pass, spec.seed)
    calibration = None
    if spec.start == "calibrated" and len(one_pass.statistics) > 1:
        directions = _leave_one_out_directions(one_pass, products, objectives, spec, on_progress)
        count = _Counter(Phase.CALIBRATION, EVALUATIONS * sum(map(len, rows)), on_progress)
        calibration = calibrate(base, targets, objectives, mixture, directions, rows, on_batch=count)
    accepted = calibration.accepted if calibration else None
    eta = accepted.eta if accepted else 0.0

    coefficients = objective_coefficients(objectives, one_pass.bases, one_pass.counts())
    base_scores = Scores.concatenate([scores for fold in rows for _, scores in fold])
    return BuiltAdapter(
        factors=calibrated_step(direction, eta=eta, scaling=spec.lora.scaling),
        direction=direction,
        objectives=objectives,
        mixture=mixture,
        layer_gramians={name: coefficients @ own @ coefficients.T for name, own in products.layers.items()},
        noise_scales=_noise_scales(one_pass, products, objectives),
        folds=len(one_pass.statistics),
        calibration=calibration,
        eta=eta,
        reason=_reason(spec, calibration),
        held_out=held_out(objectives, base_scores, accepted),
    )


def gather_statistics(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    examples: Sequence[Example],
    bases: tuple[Basis, ...],
    *,
    settings: WorkerSettings,
    directory: Path,
    on_progress: OnProgress,
) -> Pass:
    """Run one forward and one backward over all rows, and return each fold's sums."""
    folds = min(FOLDS, len({example.digest for example in examples}))
    batches = make_batches(
        examples,
        assign_folds(examples, folds=folds, seed=spec.seed),
        max_tokens=spec.max_tokens_per_batch or settings.tokens_per_batch(base.device.type),
        pad_token_id=pad_token(base),
    )
    matrices = TestMatrices(spec.seed, base.device)
    shapes = {name: sketch_shape(module, rank=spec.lora.r) for name, module in targets.items()}
    result = Pass(bases, [], [])
    count = _Counter(Phase.STATISTICS, len(examples), on_progress)
    with activation_checkpointing(base, enabled=settings.activation_checkpointing):
        for fold in range(folds):
            scored: list[tuple[Batch, Scores]] = []

            def keep(batch: Batch, scores: Scores, scored: list[tuple[Batch, Scores]] = scored) -> None:
                scored.append((batch, scores))
                count(len(batch.rows))

            path = directory / f"fold-{fold}.safetensors"
            own = [batch for batch in batches if batch.fold == fold]
            with SketchFile(path, spec.statistics, shapes, bases=len(bases), matrices=matrices) as file:
                file.finish(gather(base, targets, file.accumulators(), own, bases, on_batch=keep))
            result.statistics.append(load_statistics(path, matrices))
            result.scored.append(scored)
    return result


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
    mixture = combine(
        objective_gramian(products.folds, coefficients, folds),
        spec.combination,
        names=names,
        row_norms=torch.diagonal(coefficients @ products.rows @ coefficients.T),
    )
    basis_coefficients = mixture.basis_coefficients(coefficients)
    return mixture, factorize(one_pass.statistics, basis_coefficients, rank=spec.lora.r, leave_out=leave_out)


def pad_token(base: BaseModel) -> int:
    """Return the token that fills up batches; which one is of no consequence, since it is masked."""
    candidates = (base.tokenizer.pad_token_id, base.tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


def sketch_shape(module: nn.Module, *, rank: int) -> Shape:
    """Return the sizes of the sketch that a layer gets."""
    out_features, in_features = layer_sizes(module)
    return Shape(out_features, in_features, min(OVERSAMPLING * rank, out_features, in_features))


def _leave_one_out_directions(
    one_pass: Pass,
    products: Products,
    objectives: Sequence[Objective],
    spec: InitializationSpec,
    on_progress: OnProgress,
) -> list[Direction]:
    folds = len(one_pass.statistics)
    count = _Counter(Phase.FACTORS, folds, on_progress)
    directions = []
    for fold in range(folds):
        directions.append(combined_direction(one_pass, products, objectives, spec, leave_out=fold)[1])
        count()
    return directions


def _calibration_rows(one_pass: Pass, seed: int) -> list[list[tuple[Batch, Scores]]]:
    """Return whole batches of every fold, in an order that does not follow length, until there are rows enough."""
    chosen = []
    for scored in one_pass.scored:
        order = random.Random(seed).sample(scored, len(scored))  # noqa: S311  # a choice of rows, no secret
        fold, rows = [], 0
        for batch, scores in order:
            if rows * len(one_pass.scored) >= CALIBRATION_ROWS:
                break
            fold.append((batch, scores))
            rows += len(batch.rows)
        chosen.append(fold)
    return chosen


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
        return "a single distinct row leaves nothing to hold out, so no step can be supported"
    return calibration.reason


class _Counter:
    """Tells how much of a phase is done."""

    def __init__(self, phase: Phase, total: int, on_progress: OnProgress) -> None:
        self._phase, self._total, self._on_progress = phase, total, on_progress
        self._done = 0
        on_progress(phase, 0, total)

    def __call__(self, amount: int = 1) -> None:
        self._done += amount
        self._on_progress(self._phase, min(self._done, self._total), self._total)

"""From rows to an adapter: start reading here.

`build_adapter` is the algorithm of docs/method.md from top to bottom; `worker/initialization.py` puts files around it,
and `worker/sharding.py` lets several workers do the passes of a large job.

Shape legend
    J  objectives    K  bases
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from d2lora.initializations import HeldOut, InitializationSpec, Objective, Retained
from d2lora.settings import WorkerSettings
from worker.batches import Batch
from worker.calibration import Evaluator, Examined, alone, calibrate, calibration_batches, held_out
from worker.combining import Mixture
from worker.data import Example
from worker.directions import (
    Pass,
    coefficients_of,
    combined_direction,
    leave_one_out_directions,
    names_of,
    noise_scales,
    statistics_of,
    steps_of,
)
from worker.factors import (
    Direction,
    Factors,
    calibrated_step,
    inner_products,
    whitened_gramians,
)
from worker.gathering import Gathered, deal_batches, gather_statistics, kind_of_sums, sketch_shapes
from worker.line_search import Calibration
from worker.matrices import TestMatrices
from worker.models import BaseModel
from worker.objectives import Basis, Scores, bases_of, resolve_objectives
from worker.points import first_point
from worker.ranks import Allocation, cut_to_ranks
from worker.retaining import Restraint, restrain
from worker.rounds import Rounds, Surroundings, further_rounds
from worker.second_pass import inaccurate_layers, refined, step_along
from worker.sketch_files import load as load_statistics
from worker.statistics import Statistics
from worker.units import OnProgress

OnPass = Callable[[Sequence[tuple[Batch, Scores]], Sequence[Path]], None]
"""Told of all batches of a pass with their scores, and of the file of every fold's sums."""


@dataclass(frozen=True)
class BuiltAdapter:
    """The factors, and what was measured on the way to them."""

    factors: dict[str, Factors]
    direction: Direction
    objectives: list[Objective]
    names: list[str]
    """Of the objectives, in reports; with several datasets, two may be of one type."""
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
    allocation: Allocation | None = None
    """Where layers have ranks of their own."""
    sample: Sequence[Batch] = ()
    """A few of the rows, those that the line search tries steps on."""


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
    on_pass: OnPass | None = None,
) -> BuiltAdapter:
    """Return the adapter for these rows; statistics wait in ``directory`` between the stages.

    ``on_pass`` is told of all batches with their scores, and of the file of every fold's sums.

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
    if on_pass is not None:
        on_pass(list(zip(batches, gathered.scores, strict=True)), list(gathered.sums.values()))
    one_pass = pass_of(base, spec, objectives, batches, gathered)
    built = adapter_from(
        [one_pass],
        spec,
        evaluators=[alone(base, targets, objectives)],
        on_progress=on_progress,
        restraint=restraint,
    )
    above = spec.second_pass_above
    if above is not None and (layers := inaccurate_layers(built.direction, above)):
        coefficients = built.mixture.basis_coefficients(one_pass.coefficients())
        better = refined(
            base,
            targets,
            one_pass.statistics,
            coefficients,
            batches,
            bases,
            layers,
            rank=spec.lora.r,
            whitening=spec.whitening,
            checkpointing=settings.activation_checkpointing,
            on_progress=on_progress,
        )
        direction = steps_of({**built.direction, **better}, spec)
        eta = built.eta  # for parts of the gradient itself, and orthogonalized ones, which are as long as before
        if spec.whitening is not None:
            eta = step_along(direction, eta=eta, instead_of=built.direction)
        factors = calibrated_step(direction, eta=eta, scaling=spec.lora.scaling)
        return replace(built, direction=direction, factors=factors, eta=eta, refined=frozenset(better))
    if spec.rounds == 1 or not built.eta:
        return built

    def direction_of(statistics: Statistics, own: tuple[Basis, ...]) -> tuple[Mixture, Direction]:
        products = inner_products([statistics], len(own))
        mixture, direction = combined_direction([Pass(objectives, own, [statistics], [])], products, spec)
        return mixture, steps_of(direction, spec)

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


def pass_of(
    base: BaseModel,
    spec: InitializationSpec,
    objectives: Sequence[Objective],
    batches: Sequence[Batch],
    gathered: Gathered,
    *,
    place: str = "",
) -> Pass:
    """Return what was gathered from all of a dataset's batches, with those of them that calibration scores."""
    matrices = TestMatrices(spec.seed, base.device)
    scored = zip(batches, gathered.scores, strict=True)
    folds = [list(own) for _, own in groupby(scored, key=lambda pair: pair[0].fold)]
    chosen = calibration_batches([[len(batch.rows) for batch, _ in fold] for fold in folds], spec.seed)
    return Pass(
        objectives,
        bases_of(objectives),
        [load_statistics(path, matrices) for path in gathered.sums.values()],
        [[fold[index] for index in indices] for fold, indices in zip(folds, chosen, strict=True)],
        place,
    )


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


def adapter_from(
    passes: Sequence[Pass],
    spec: InitializationSpec,
    *,
    evaluators: Sequence[Evaluator],
    on_progress: OnProgress,
    restraint: Restraint | None = None,
) -> BuiltAdapter:
    """Return the adapter for the statistics of all rows, whoever gathered them.

    There is a pass for every dataset, and an evaluator, which runs calibration on its rows.

    Raises:
        NumericalFailure: a number is not finite, or the objectives cancel.
    """
    statistics, coefficients = statistics_of(passes), coefficients_of(passes)
    products = inner_products(statistics, coefficients.shape[1])
    mixture, direction = combined_direction(passes, products, spec)
    asked = examined(passes, evaluators)
    calibration, retained, directions = None, None, []
    if spec.start == "calibrated" and len(statistics) > 1:
        directions = leave_one_out_directions(passes, products, spec, on_progress)

        search = partial(calibrate, asked, mixture, on_progress=on_progress)
        directions = [steps_of(one, spec) for one in directions]
        if restraint is None:
            calibration = search(directions)
        else:
            outcome = restrain(direction, directions, search, restraint, rank=spec.lora.r)
            calibration, direction, retained = outcome.calibration, outcome.direction, outcome.retained
    direction, allocation = cut_to_ranks(direction, spec.lora)
    direction = steps_of(direction, spec)
    accepted = calibration.accepted if calibration else None
    eta = accepted.eta if accepted else 0.0

    gramians = products.layers if spec.whitening is None else whitened_gramians(statistics, spec.whitening)
    return BuiltAdapter(
        factors=calibrated_step(direction, eta=eta, scaling=spec.lora.scaling),
        direction=direction,
        objectives=[objective for one in passes for objective in one.objectives],
        names=names_of(passes),
        mixture=mixture,
        layer_gramians={name: coefficients @ own @ coefficients.T for name, own in gramians.items()},
        noise_scales=noise_scales(passes, products),
        folds=len(statistics),
        calibration=calibration,
        eta=eta,
        reason=_reason(spec, calibration, datasets=len(spec.training)),
        held_out=held_out(asked, accepted),
        leave_one_out=directions if spec.rounds > 1 else [],
        retained=retained,
        allocation=allocation,
        sample=[batch for one in asked for fold in one.parted()[0].held for batch, _ in fold],
    )


def examined(passes: Sequence[Pass], evaluators: Sequence[Evaluator]) -> list[Examined]:
    """Return what a line search asks the rows of every pass, with an evaluator for each."""
    return [
        Examined(one.objectives, one.held, evaluator, one.place)
        for one, evaluator in zip(passes, evaluators, strict=True)
    ]


def _reason(spec: InitializationSpec, calibration: Calibration | None, *, datasets: int) -> str:
    if spec.start == "zero":
        return "the request asks for lora_B = 0"
    if calibration is None and datasets > 1:
        return "rows of every dataset, and of each of its labels, cannot be held out, so no step can be supported"
    if calibration is None:
        return "a single distinct row (of one label) leaves nothing to hold out, so no step can be supported"
    return calibration.reason

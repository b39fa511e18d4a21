"""Further rounds: the statistics again at the adapter just built, and a further step (docs/method.md, section 7).

A held-out row must not shape the adapter that it is scored under, so every fold that judges has a point of its own,
which the other folds have led to, and gathers these folds' gradients there. As few of the F folds judge as have
`JUDGING_ROWS` together: with J of them a round takes 1 + J (F - 1) / F passes, one of them at the delivered point.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from d2lora.errors import NumericalFailure
from d2lora.initializations import HeldOut, InitializationSpec, Objective, Phase, Sft
from worker.batches import Batch, groups_in
from worker.calibration import Held, failed_trial, score_step, trial
from worker.checkpointing import activation_checkpointing
from worker.combining import Mixture
from worker.factors import Direction
from worker.line_search import EVALUATIONS, Calibration, Trial, first_step, line_search
from worker.matrices import Shape, TestMatrices
from worker.mismatches import score_for
from worker.models import BaseModel
from worker.objectives import (
    Away,
    Basis,
    Scores,
    bases_of,
    needs_mismatches,
    row_losses,
    rows_measured,
    shift_of_mismatches,
)
from worker.points import Point, at, moved
from worker.progress import PhaseCounter
from worker.sketch_files import SketchFile
from worker.sketch_files import load as load_statistics
from worker.statistics import Statistics, gather
from worker.units import OnProgress

JUDGING_ROWS = 32
"""Rows that judge a further round, if there are so many; more of them would cost a pass per fold (docs/log.md)."""

DirectionOf = Callable[[Statistics, tuple[Basis, ...]], tuple[Mixture, Direction]]
"""Combines the objectives of one pass's sums, and cuts to rank r; NumericalFailure if there is no direction."""


@dataclass(frozen=True)
class Round:
    """One round after the first, and what came of it."""

    mixture: Mixture
    """Of the gradients at the point where the round began."""
    calibration: Calibration
    held_out: dict[str, HeldOut]
    """The base model, and the adapter after this round; after the round before, if this one was not accepted."""


@dataclass(frozen=True)
class Rounds:
    """All rounds after the first."""

    rounds: list[Round]
    point: Point
    """Where the last accepted step led."""
    folds: int
    """How many of the folds judged."""
    stopped: str
    """Why there is no further round."""


@dataclass(frozen=True)
class Surroundings:
    """What every round uses."""

    base: BaseModel
    targets: Mapping[str, nn.Module]
    spec: InitializationSpec
    objectives: Sequence[Objective]
    kind: str
    """Of sums, as their files name it."""
    shapes: Mapping[str, Shape]
    scored: Sequence[tuple[Batch, Scores]]
    """All batches, with their rows' scores under the base model, DPO's and KTO's reference."""
    held: Held
    direction_of: DirectionOf
    checkpointing: bool
    directory: Path


def further_rounds(
    around: Surroundings, point: Point, leave_one_out: Sequence[Point], *, on_progress: OnProgress
) -> Rounds:
    """Return the rounds after the first, which led to ``point`` and, without the rows of fold f, to the f-th other."""
    objectives, base, rank = around.objectives, around.base, around.spec.lora.r
    folds = judging_folds(around.held, objectives)
    around, leave_one_out = replace(around, held=around.held[:folds]), leave_one_out[:folds]
    sizes = [len(batch.rows) for fold in around.held for batch, _ in fold]
    scorings = EVALUATIONS + (folds - 1 if needs_mismatches(objectives) else 0)
    left_out = [None, *range(folds)]
    passed = sum(len(batch.rows) for fold in left_out for batch, _ in around.scored if batch.fold != fold)
    per_round = passed + scorings * sum(sizes)
    before_any = (2 if needs_mismatches(objectives) else 1) * sum(sizes)
    count = PhaseCounter(Phase.ROUNDS, before_any + (around.spec.rounds - 1) * per_round, on_progress)
    reference = _reference(around, count)
    flat = Scores.concatenate([scores for fold in reference for scores in fold])
    points = list(leave_one_out)
    rounds: list[Round] = []

    def scores_at(candidates: Sequence[Point]) -> Scores:
        lengths = iter(sizes)
        return Scores.concatenate(
            [
                score_step(
                    base,
                    around.targets,
                    candidate,
                    1.0,
                    [batch for batch, _ in fold],
                    objectives,
                    on_batch=lambda: count(next(lengths)),
                )
                for candidate, fold in zip(candidates, around.held, strict=True)
            ]
        )

    before = scores_at(points)
    for number in range(2, around.spec.rounds + 1):
        try:
            mixture, direction = _direction_at(around, point, None, reference, count)
            own = [_direction_at(around, one, fold, reference, count)[1] for fold, one in enumerate(points)]
        except NumericalFailure as failure:
            return Rounds(rounds, point, folds, f"round {number}: {failure}")
        calibration, after = _line_search(around, mixture, points, own, before, flat, scores_at)
        if accepted := calibration.accepted:
            before = after
            point = moved(point, direction, accepted.eta, rank=rank)
            points = [moved(one, step, accepted.eta, rank=rank) for one, step in zip(points, own, strict=True)]
        rounds.append(Round(mixture, calibration, _held_out(objectives, flat, before)))
        count.up_to(before_any + (number - 1) * per_round)
        if not accepted:
            return Rounds(rounds, point, folds, f"round {number}: {calibration.reason}")
    return Rounds(rounds, point, folds, "all rounds that were asked for were accepted")


def judging_folds(held: Held, objectives: Sequence[Objective]) -> int:
    """Return how many folds judge further rounds: as few as have rows enough, and all where these need each other.

    Rows that share a sequence count once, as in standard errors. KTO's reference point at a fold's own point is the
    mean over the rows of the other folds.
    """
    if needs_mismatches(objectives):
        return len(held)
    rows = 0
    for folds, fold in enumerate(held, start=1):
        rows += len(set(groups_in([batch for batch, _ in fold])))
        if rows >= JUDGING_ROWS:
            return folds
    return len(held)


def _line_search(
    around: Surroundings,
    mixture: Mixture,
    points: Sequence[Point],
    directions: Sequence[Direction],
    before: Scores,
    reference: Scores,
    scores_at: Callable[[Sequence[Point]], Scores],
) -> tuple[Calibration, Scores]:
    """Return the search from every fold's point along its direction, and the held-out scores that it ends with.

    Each trial is scored at rank r, so what the cut costs is measured too.
    """
    objectives = around.objectives
    groups = groups_in([batch for fold in around.held for batch, _ in fold])
    measured: dict[float, Scores] = {}

    def evaluate(eta: float) -> Trial:
        pairs = zip(points, directions, strict=True)
        try:
            stepped = scores_at([moved(one, step, eta, rank=around.spec.lora.r) for one, step in pairs])
        except NumericalFailure:  # the numbers are finite at the point itself, so the step is too long
            return failed_trial(eta, objectives)
        measured[eta] = stepped
        return trial(eta, objectives, mixture.scales, reference, stepped, groups=groups, before=before)

    slope = sum(layer.descent for step in directions for layer in step.values()) / len(directions)
    now, base = (
        first_step([row_losses(one, scores, reference).mean().item() for one in objectives], mixture.scales, slope)
        for scores in (before, reference)
    )
    # Some losses fall below zero; the base model's are all above.
    calibration = line_search(evaluate, max(now, base / 10), evaluations=EVALUATIONS)
    return calibration, measured[calibration.accepted.eta] if calibration.accepted else before


def _direction_at(
    around: Surroundings,
    point: Point,
    leave_out: int | None,
    reference: Sequence[Sequence[Scores]],
    count: PhaseCounter,
) -> tuple[Mixture, Direction]:
    """Return mixture and direction at a point, from the rows of all folds or of all but one."""
    own = [(batch, scores) for batch, scores in around.scored if batch.fold != leave_out]
    bases = bases_of(around.objectives, away=True)
    rows = {
        row: scores
        for batch, known in own
        for row, scores in zip(batch.rows, known.split([1] * len(batch.rows)), strict=True)
    }
    matrices = TestMatrices(around.spec.seed, around.base.device)
    path = around.directory / "round.safetensors"
    with (
        at(around.targets, point),
        activation_checkpointing(around.base, enabled=around.checkpointing),
        SketchFile(path, around.kind, around.shapes, bases=len(bases), matrices=matrices) as file,
    ):
        shift = _shift(around, leave_out, reference, count)

        def away(batch: Batch) -> Away:
            return Away(around.objectives, Scores.concatenate([rows[row] for row in batch.rows]), shift)

        counts = gather(
            around.base,
            around.targets,
            file.accumulators(),
            [batch for batch, _ in own],
            bases,
            on_batch=lambda batch, _: count(len(batch.rows)),
            mask_inputs=around.spec.whitening is not None,
            away=away,
        )
        file.finish(counts)
    result = around.direction_of(load_statistics(path, matrices), bases)
    path.unlink()
    return result


def _reference(around: Surroundings, count: PhaseCounter) -> list[list[Scores]]:
    """Return the held-out batches' scores under the base model, fold by fold, with all that the losses look at."""
    if not needs_mismatches(around.objectives):
        return [[scores for _, scores in fold] for fold in around.held]
    reference = []
    for fold in around.held:
        scores = []
        for batch, _ in fold:
            scores.append(score_for(around.objectives, around.base, batch))
            count(len(batch.rows))
        reference.append(scores)
    return reference


def _shift(
    around: Surroundings, leave_out: int | None, reference: Sequence[Sequence[Scores]], count: PhaseCounter
) -> float:
    """Return KTO's reference point under the model as it is, over the rows that calibration scores, of the folds used.

    The gradient does not look through it, but its size decides how much every row weighs.
    """
    if not needs_mismatches(around.objectives):
        return 0.0
    under_point, under_base = [], []
    for fold, (held, known) in enumerate(zip(around.held, reference, strict=True)):
        if fold == leave_out:
            continue
        for (batch, _), scores in zip(held, known, strict=True):
            under_point.append(score_for(around.objectives, around.base, batch))
            under_base.append(scores)
            count(len(batch.rows))
    return shift_of_mismatches(Scores.concatenate(under_point), Scores.concatenate(under_base))


def _held_out(objectives: Sequence[Objective], base: Scores, adapter: Scores) -> dict[str, HeldOut]:
    measured: dict[str, Objective] = {"nll": Sft()} | {one.type: one for one in objectives}
    return {
        name: HeldOut(
            base=row_losses(objective, base, base).mean().item(),
            adapter=row_losses(objective, adapter, base).mean().item(),
            rows=rows_measured(objective, base),
        )
        for name, objective in measured.items()
    }

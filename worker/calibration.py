"""How far to step: a forward-only line search on rows that the step was not made from (docs/method.md, section 4).

Every fold's rows are scored under the direction of the other folds, so all rows take part and none sees itself. A few,
the pilot rows, tell which step to try; all of them decide whether it is supported.

Shape legend
    R  rows    J  objectives
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from d2lora.errors import NumericalFailure
from d2lora.initializations import HeldOut, Objective, Phase, Sft
from worker.batches import Batch, groups_in
from worker.combining import Mixture
from worker.factors import Direction, adapted, calibrated_step
from worker.line_search import EVALUATIONS, Calibration, Change, Trial, first_step, line_search
from worker.mismatches import score_for
from worker.models import BaseModel
from worker.objectives import Scores, needs_mismatches, row_losses, rows_measured
from worker.progress import PhaseCounter
from worker.units import OnProgress

CALIBRATION_ROWS = 256
"""Rows that decide whether a step is supported; a seeded part of larger datasets."""
PILOT_ROWS = 32
"""Rows scored at every step of the line search; the steps that they find are as good as those of all rows."""

ScoredBatch = tuple[Batch, Scores]
"""With its rows' scores under the base model."""
Held = Sequence[Sequence[ScoredBatch]]
"""Of every fold, the batches that are scored."""
StepScores = Callable[[float], Scores]
"""Returns the scores of the held-out rows after a step of size eta; NumericalFailure if some are not finite."""
Scorer = Callable[[Held, PhaseCounter], StepScores]
"""Takes the rows to score, and what counts their batches."""
Evaluator = Callable[[Sequence[Direction]], Scorer]
"""Takes the directions to step along; ``directions[f]`` was made without the rows of fold f, and only they are scored
under it."""


@dataclass(frozen=True)
class Examined:
    """What one dataset's rows are asked in a line search."""

    objectives: Sequence[Objective]
    held: Held
    evaluator: Evaluator
    """Decides who runs the forward passes; nothing else is run."""
    place: str = ""
    """What the names of its objectives begin with."""

    @property
    def base_scores(self) -> Scores:
        """Return the scores of its rows under the base model."""
        return Scores.concatenate([scores for fold in self.held for _, scores in fold])

    @property
    def batches_in_order(self) -> list[Batch]:
        """Return those that are scored, as `base_scores` has their rows."""
        return [batch for fold in self.held for batch, _ in fold]

    @property
    def batches(self) -> int:
        """How many are scored at a step."""
        return sum(map(len, self.held))

    def parted(self) -> tuple["Examined", "Examined"]:
        """Return the pilot rows, evenly spread over every fold's lengths, and all others, which may be none.

        KTO's mismatched completions are those of a batch's other rows, so its batches stay whole.
        """
        if needs_mismatches(self.objectives):
            return self, replace(self, held=[[] for _ in self.held])
        wanted = -(-PILOT_ROWS // len(self.held))
        parts = [_parted(fold, wanted) for fold in self.held]
        return replace(self, held=[pilot for pilot, _ in parts]), replace(self, held=[rest for _, rest in parts])


def _parted(fold: Sequence[ScoredBatch], wanted: int) -> tuple[list[ScoredBatch], list[ScoredBatch]]:
    """Return as many rows as wanted, evenly spread, and the others."""
    rows = sum(len(batch.rows) for batch, _ in fold)
    picked = {(2 * index + 1) * rows // (2 * wanted) for index in range(wanted)} if wanted < rows else set(range(rows))
    pilot: list[ScoredBatch] = []
    rest: list[ScoredBatch] = []
    begin = 0
    for batch, scores in fold:
        own = range(len(batch.rows))
        inside = [row for row in own if begin + row in picked]
        outside = [row for row in own if begin + row not in picked]
        for part, indices in ((pilot, inside), (rest, outside)):
            if indices:
                part.append((batch.part(indices), scores.part(indices)))
        begin += len(own)
    return pilot, rest


def calibration_batches(sizes: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
    """Return which batches of every fold are scored: drawn one by one, whatever their length, until rows are enough.

    ``sizes`` are the rows of every fold's batches.
    """
    chosen = []
    for own in sizes:
        order = random.Random(seed).sample(range(len(own)), len(own))  # noqa: S311  # a choice of rows, no secret
        fold, rows = [], 0
        for index in order:
            if rows * len(sizes) >= CALIBRATION_ROWS:
                break
            fold.append(index)
            rows += own[index]
        chosen.append(sorted(fold))
    return chosen


def scorings(examined: Sequence[Examined]) -> int:
    """Return how many batches a line search scores where its first choice is supported."""
    return sum(EVALUATIONS * pilot.batches + rest.batches for pilot, rest in (one.parted() for one in examined))


def alone(base: BaseModel, targets: Mapping[str, nn.Module], objectives: Sequence[Objective]) -> Evaluator:
    """Return the evaluator that runs all forward passes in this process."""

    def evaluator(directions: Sequence[Direction]) -> Scorer:
        def scorer(held: Held, count: PhaseCounter) -> StepScores:
            def step_scores(eta: float) -> Scores:
                return Scores.concatenate(
                    [
                        score_step(
                            base, targets, direction, eta, [batch for batch, _ in fold], objectives, on_batch=count
                        )
                        for direction, fold in zip(directions, held, strict=True)
                        if fold
                    ]
                )

            return step_scores

        return scorer

    return evaluator


def calibrate(
    examined: Sequence[Examined],
    mixture: Mixture,
    directions: Sequence[Direction],
    *,
    on_progress: OnProgress,
    keeps: Callable[[float], bool] | None = None,
) -> Calibration:
    """Return the step size for these directions; ``directions[f]`` was made without the rows of fold f.

    A step is judged by all objectives of all datasets; ``mixture`` has them in this order. One that is not ``keeps`` is
    not accepted.
    """
    count = PhaseCounter(Phase.CALIBRATION, scorings(examined), on_progress)
    every = mixture.scales.split([len(one.objectives) for one in examined])
    scorers = [one.evaluator(directions) for one in examined]
    parts = [one.parted() for one in examined]
    on_pilot = [score(pilot.held, count) for score, (pilot, _) in zip(scorers, parts, strict=True)]
    # Mismatched completions are not scored by the pass.
    references = [
        own(0.0) if needs_mismatches(one.objectives) else one.base_scores
        for one, own in zip((pilot for pilot, _ in parts), on_pilot, strict=True)
    ]
    groups = [groups_in([*pilot.batches_in_order, *rest.batches_in_order]) for pilot, rest in parts]
    measured: dict[float, list[Scores]] = {}

    def judge(eta: float, before: Sequence[Scores], after: Sequence[Scores]) -> Trial:
        return together(
            [
                trial(
                    eta,
                    one.objectives,
                    scales,
                    reference,
                    stepped,
                    groups=own[: len(reference.chosen_logps)],  # the pilot rows come first
                    place=one.place,
                )
                for one, scales, reference, stepped, own in zip(examined, every, before, after, groups, strict=True)
            ]
        )

    def evaluate(eta: float) -> Trial:
        try:
            measured[eta] = [own(eta) for own in on_pilot]
        except NumericalFailure:  # the base model's own numbers are finite, so the step is too long
            return together([failed_trial(eta, one.objectives, one.place) for one in examined])
        return judge(eta, references, measured[eta])

    def confirm(found: Trial) -> Trial:
        before, after = list(references), list(measured[found.eta])
        try:
            for index, (scorer, (_, rest)) in enumerate(zip(scorers, parts, strict=True)):
                if rest.batches:
                    before[index] = Scores.concatenate([before[index], rest.base_scores])
                    after[index] = Scores.concatenate([after[index], scorer(rest.held, count)(found.eta)])
        except NumericalFailure:
            return together([failed_trial(found.eta, one.objectives, one.place) for one in examined])
        return judge(found.eta, before, after)

    known = [
        reference if needs_mismatches(one.objectives) else one.base_scores
        for one, reference in zip(examined, references, strict=True)
    ]
    losses = [
        row_losses(objective, scores, scores).mean().item()
        for one, scores in zip(examined, known, strict=True)
        for objective in one.objectives
    ]
    slope = sum(layer.descent for direction in directions for layer in direction.values()) / len(directions)
    return line_search(
        evaluate,
        first_step(losses, mixture.scales, slope),
        evaluations=EVALUATIONS,
        confirm=confirm if any(rest.batches for _, rest in parts) else None,
        keeps=keeps,
    )


def score_step(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    direction: Direction,
    eta: float,
    batches: Sequence[Batch],
    objectives: Sequence[Objective],
    *,
    on_batch: Callable[[], None],
) -> Scores:
    """Return the scores of the batches' rows after a step of size eta along the direction.

    Raises:
        NumericalFailure: a log-probability is not finite.
    """
    scores = []
    with adapted(targets, calibrated_step(direction, eta=eta, scaling=1.0), scaling=1.0):
        for batch in batches:
            scores.append(score_for(objectives, base, batch))
            on_batch()
    return Scores.concatenate(scores)


def held_out(examined: Sequence[Examined], accepted: Trial | None) -> dict[str, HeldOut]:
    """Return every objective, and every dataset's ``nll``, before and after the accepted step, or before twice."""
    result = {}
    for one in examined:
        base = one.base_scores
        measured: dict[str, Objective] = {"nll": Sft(), **{objective.type: objective for objective in one.objectives}}
        changes = {**accepted.nll, **accepted.objectives} if accepted else {}
        for kind, objective in measured.items():
            name = f"{one.place}{kind}"
            before = row_losses(objective, base, base).mean().item()
            after = before + (changes[name].mean if accepted else 0.0)
            result[name] = HeldOut(base=before, adapter=after, rows=rows_measured(objective, base))
    return result


def trial(
    eta: float,
    objectives: Sequence[Objective],
    scales: Float[Tensor, " J"],
    base: Scores,
    stepped: Scores,
    *,
    groups: Sequence[str],
    before: Scores | None = None,
    place: str = "",
) -> Trial:
    """Return the change from ``base`` to ``stepped``, the same rows scored after a step of size eta.

    ``scales`` are the weights of the un-normalized objectives, w_j / |G_j|. A step that does not begin at the base
    model is measured from ``before``. Rows of one of the ``groups`` are no independent samples. Names begin with
    ``place``.
    """
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    group_R = torch.tensor([places[group] for group in groups])

    def change(objective: Objective, start: Scores = before or base) -> Float[Tensor, " R"]:
        return row_losses(objective, stepped, base) - row_losses(objective, start, base)

    rows_JR = torch.stack([change(objective) for objective in objectives])
    return Trial(
        eta=eta,
        combined=_change(scales.double() @ rows_JR, group_R),
        objectives={
            f"{place}{one.type}": _change(rows, group_R) for one, rows in zip(objectives, rows_JR, strict=True)
        },
        nll={f"{place}nll": _change(change(Sft()), group_R)},
        since_base={one.type: _change(change(one, base), group_R) for one in objectives} if before else {},
    )


def failed_trial(eta: float, objectives: Sequence[Objective], place: str = "") -> Trial:
    """Return the trial of a step so large that log-probabilities are no longer finite."""
    worst = Change(float("inf"), 0.0)
    return Trial(eta, worst, {f"{place}{objective.type}": worst for objective in objectives}, {f"{place}nll": worst})


def together(trials: Sequence[Trial]) -> Trial:
    """Return one step's trial from those on every dataset, whose rows are independent samples."""
    return Trial(
        trials[0].eta,
        Change(sum(one.combined.mean for one in trials), math.hypot(*(one.combined.error for one in trials))),
        {name: change for one in trials for name, change in one.objectives.items()},
        {name: change for one in trials for name, change in one.nll.items()},
    )


def _change(rows_R: Float[Tensor, " R"], group_R: Int[Tensor, " R"]) -> Change:
    """Return the mean with its standard error, robust to what rows of a group have in common."""
    mean, groups = rows_R.mean(), int(group_R.max()) + 1
    if groups < 2:
        return Change(mean.item(), float("inf"))
    sums = rows_R.new_zeros(groups).index_add_(0, group_R, rows_R - mean)
    return Change(mean.item(), (groups / (groups - 1) * sums.square().sum()).sqrt().item() / len(rows_R))

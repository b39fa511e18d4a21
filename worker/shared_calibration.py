"""Calibration's forward passes, shared among workers.

The builder writes every fold's leave-one-out direction, and its held-out batches, into a file once. Each step size of
the line search then becomes tasks of a few batches each, which any worker scores.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2lora.errors import ChecksumMismatch, NumericalFailure
from d2lora.initializations import InitializationSpec, Objective, Phase
from d2lora.shards import EvaluationTask
from worker.batches import Batch
from worker.calibration import Evaluator, Held, Scorer, StepScores, score_step
from worker.factors import Direction
from worker.models import BaseModel
from worker.objectives import Scores, needs_mismatches, resolve_objectives
from worker.progress import PhaseCounter
from worker.shard_files import FORMAT, BasePin, check_format, read_direction, write_batches, write_direction
from worker.sharding import cut
from worker.units import OnProgress, Share

PIECES = 8
"""Tasks of one step size: enough for several workers, few enough that claiming them costs little."""


def shared(
    share: Share,
    base: BasePin,
    objectives: Sequence[Objective],
    *,
    directory: Path,
    pad_token_id: int,
) -> Evaluator:
    """Return the evaluator that lets any worker take part; its files lie in ``directory``."""

    def evaluator(directions: Sequence[Direction]) -> Scorer:
        names = [f"direction-{fold}.safetensors" for fold in range(len(directions))]
        for name, direction in zip(names, directions, strict=True):
            write_direction(directory / name, direction)
        parts = itertools.count()

        def scorer(held: Held, count: PhaseCounter) -> StepScores:
            part = next(parts)  # what was shared under a name stays what it is
            files = {name: directory / name for name in names}
            pieces: list[EvaluationTask] = []
            references: list[Scores] = []
            folds = [(fold, own) for fold, own in enumerate(held) if own]
            for fold, own in folds:
                rows = f"held-out-{part}-{fold}.safetensors"
                files[rows] = directory / rows
                batches = [batch for batch, _ in own]
                write_batches(files[rows], batches, base, pad_token_id=pad_token_id)
                runs = cut([int(batch.attention_mask.sum()) for batch in batches], -(-PIECES // len(folds)))
                pieces += [
                    EvaluationTask(eta=0.0, fold=fold, files=[names[fold], rows], batches=list(run)) for run in runs
                ]
                references += [_expected(objectives, [own[index][1] for index in run]) for run in runs]

            def step_scores(eta: float) -> Scores:
                tasks = [piece.model_copy(update={"eta": eta}) for piece in pieces]
                answers = share(files, tasks)
                count(sum(map(len, held)))
                return Scores.concatenate([_from_json(*pair) for pair in zip(answers, references, strict=True)])

            return step_scores

        return scorer

    return evaluator


def work_on(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    task: EvaluationTask,
    batches: Sequence[Batch],
    *,
    direction: Path,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Return the scores of a task's batches, as JSON."""
    objectives = resolve_objectives(spec.objectives, batches[0].supervision)
    own = [batches[index] for index in task.batches]
    try:
        scores = score_step(
            base,
            targets,
            read_direction(direction, base.device),
            task.eta,
            own,
            objectives,
            on_batch=PhaseCounter(Phase.CALIBRATION, len(own), on_progress),
        )
    except NumericalFailure:  # the line search has to know that the step is too long
        return {"format": FORMAT, "finite": False}
    values = {name: tensor.tolist() for name, tensor in scores.tensors().items()}
    return {"format": FORMAT, "finite": True, "scores": values}


def _expected(objectives: Sequence[Objective], parts: Sequence[Scores]) -> Scores:
    """Return scores of the same rows, with entries for all that a step's have."""
    scores = Scores.concatenate(parts)
    if not needs_mismatches(objectives):
        return scores
    return replace(scores, mismatched_logps=torch.zeros_like(scores.chosen_logps))


def _from_json(answer: Mapping[str, Any], expected: Scores) -> Scores:
    """Return what `work_on` measured; ``expected`` are scores of the same rows.

    Raises:
        FormatMismatch: another version of the worker did.
        NumericalFailure: some of it is not finite.
        ChecksumMismatch: it is not of these rows.
    """
    check_format(answer.get("format"), "a shard's scores")
    if answer.get("finite") is False:
        raise NumericalFailure("a log-probability is not finite after this step")
    values: Mapping[str, list[float]] = answer.get("scores", {})
    if values.keys() != expected.tensors().keys() or any(
        len(one) != len(expected.chosen_logps) for one in values.values()
    ):
        raise ChecksumMismatch("a shard's scores are not of the rows that were asked for")
    return Scores(
        **{name: torch.tensor(values[name], dtype=tensor.dtype) for name, tensor in expected.tensors().items()}
    )

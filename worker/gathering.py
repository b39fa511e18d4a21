"""The pass over a job's rows: batches dealt into folds, and every fold's sums in a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from torch import nn

from d2lora.initializations import InitializationSpec, Phase
from d2lora.settings import WorkerSettings
from worker.batches import Batch, assign_folds, distinct_rows, make_batches
from worker.checkpointing import activation_checkpointing
from worker.data import Example, needed
from worker.matrices import Shape, TestMatrices
from worker.models import BaseModel, layer_sizes
from worker.objectives import Basis, Scores, resolve_objectives
from worker.progress import PhaseCounter
from worker.sketch_files import SketchFile
from worker.statistics import gather
from worker.units import OnProgress
from worker.whitening import OVERSAMPLING as WHITENED_OVERSAMPLING

FOLDS = 4
OVERSAMPLING = 4
"""Range-sketch width in units of r; keeps 0.91 of the best rank-r energy of a mixture, 0.98 for SFT (docs/log.md)."""


@dataclass(frozen=True)
class Gathered:
    """What a pass over some of the batches leaves behind."""

    sums: dict[int, Path]
    """A file of sums for every fold that the batches touch."""
    scores: list[Scores]
    """Of every batch's rows under the base model."""


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
        pad_token_id=base.pad_token_id,
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


def sketch_shape(module: nn.Module, *, rank: int, oversampling: int = OVERSAMPLING) -> Shape:
    """Return the sizes of the sketch that a layer gets."""
    out_features, in_features = layer_sizes(module)
    return Shape(out_features, in_features, min(oversampling * rank, out_features, in_features))


def sketch_shapes(targets: Mapping[str, nn.Module], spec: InitializationSpec) -> dict[str, Shape]:
    """Return the sizes of all layers' sketches."""
    oversampling = OVERSAMPLING if spec.whitening is None else WHITENED_OVERSAMPLING
    return {name: sketch_shape(module, rank=spec.lora.r, oversampling=oversampling) for name, module in targets.items()}


def kind_of_sums(spec: InitializationSpec) -> str:
    """Return what is kept of every layer, as files of sums name it."""
    return spec.statistics if spec.whitening is None else f"{spec.statistics}+moment"

"""A large job in pieces: its batches are made once, cut into shards, gathered anywhere and added up again.

The batches do not depend on the cut, and sums are added in the order of the shards, so the adapter depends on the cut
only by float addition, and on who worked when not at all. What the runner moves between workers are the files of
`worker/shard_files.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from d2lora.errors import ChecksumMismatch
from d2lora.initializations import Frozen, InitializationSpec, Phase
from d2lora.settings import WorkerSettings
from d2lora.shards import StatisticsTask
from worker.batches import Batch
from worker.calibration import calibration_batches
from worker.data import Example
from worker.directions import Pass
from worker.evidence import Intake
from worker.gathering import deal_batches, gather_statistics, kind_of_sums, sketch_shapes
from worker.matrices import TestMatrices
from worker.models import BaseModel
from worker.objectives import Counts, Scores, bases_of, resolve_objectives
from worker.pipeline import OnPass
from worker.progress import PhaseCounter
from worker.shard_files import (
    FORMAT,
    BasePin,
    check_format,
    damaged,
    read_batches,
    read_scores,
    sha256,
    write_batches,
    write_scores,
)
from worker.sketch_files import SketchFile
from worker.sketch_files import load as load_statistics
from worker.units import OnProgress, ShardFiles, Split

_SCORES = "scores.safetensors"


class PlannedShard(Frozen):
    """What a shard's files must be, whoever made them."""

    rows_sha256: str
    """Of the file with the shard's batches; its statistics carry it."""
    folds: list[int]
    """Of every batch."""
    sizes: list[int]
    """Rows of every batch."""

    def rows_of(self, fold: int) -> int:
        """Return how many rows of a fold the shard has."""
        return sum(size for size, of in zip(self.sizes, self.folds, strict=True) if of == fold)


class Plan(Frozen):
    """What the worker that cut the job tells the one that builds the adapter."""

    format: int = FORMAT
    base: BasePin
    rows: Intake
    shards: list[PlannedShard]
    seconds: dict[str, float]
    """What cutting took, by phase."""


def count_tokens(examples: Iterable[Example]) -> int:
    """Return the tokens of all sequences, chosen and rejected."""
    return sum(
        len(sequence.input_ids) for one in examples for sequence in (one.chosen, one.rejected) if sequence is not None
    )


def cut(costs: Sequence[int], pieces: int) -> list[range]:
    """Return runs of indices of nearly equal cost, none of them empty, at most ``pieces``."""
    pieces = min(pieces, len(costs))
    reached = list(accumulate(costs, initial=0))
    bounds = [0]
    for piece in range(1, pieces):
        ideal = reached[-1] * piece / pieces
        # Every piece before and after this bound keeps an index of its own.
        candidates = range(bounds[-1] + 1, len(costs) - (pieces - piece) + 1)
        bounds.append(min(candidates, key=lambda bound: abs(reached[bound] - ideal)))
    bounds.append(len(costs))
    return [range(start, end) for start, end in pairwise(bounds)]


def split(
    base: BaseModel,
    spec: InitializationSpec,
    examples: Sequence[Example],
    rows: Intake,
    *,
    directory: Path,
    settings: WorkerSettings,
    on_progress: OnProgress,
    seconds: Callable[[], dict[str, float]],
) -> Split:
    """Write the plan and one file of batches per shard into ``directory``."""
    batches = deal_batches(base, spec, examples, settings=settings)
    tokens = [int(batch.attention_mask.sum()) for batch in batches]
    runs = cut(tokens, -(-sum(tokens) // settings.shard_tokens))
    count = PhaseCounter(Phase.READING, len(runs), on_progress)
    base_pin = BasePin.of(base)
    planned, shards = [], []
    for number, run in enumerate(runs):
        own = [batches[index] for index in run]
        path = directory / f"shard-{number}.safetensors"
        write_batches(path, own, base_pin, pad_token_id=base.pad_token_id)
        sizes = [len(batch.rows) for batch in own]
        planned.append(PlannedShard(rows_sha256=sha256(path), folds=[batch.fold for batch in own], sizes=sizes))
        shards.append((StatisticsTask(rows=sum(sizes), tokens=sum(tokens[index] for index in run)), path))
        count()
    plan = directory / "plan.json"
    content = Plan(base=base_pin, rows=rows, shards=planned, seconds=seconds())
    plan.write_text(content.model_dump_json() + "\n", encoding="utf-8")
    return Split(plan, shards)


def read_plan(path: Path) -> Plan:
    """Return the plan.

    Raises:
        FormatMismatch: another version of the worker wrote it.
        ChecksumMismatch: it is damaged.
    """
    text = path.read_bytes()
    try:
        check_format(_Version.model_validate_json(text).format, path.name)
        return Plan.model_validate_json(text)
    except ValidationError as error:
        raise damaged(path) from error


def gather_shard(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    batches: Sequence[Batch],
    *,
    made_from: str,
    directory: Path,
    settings: WorkerSettings,
    on_progress: OnProgress,
) -> list[Path]:
    """Return the files of a shard's statistics: sums of each fold that it touches, and its rows' scores."""
    objectives = resolve_objectives(spec.objectives, batches[0].supervision)
    gathered = gather_statistics(
        base,
        targets,
        spec,
        batches,
        bases_of(objectives),
        settings=settings,
        directory=directory,
        on_progress=on_progress,
        made_from=made_from,
    )
    scores = directory / _SCORES
    write_scores(scores, Scores.concatenate(gathered.scores), made_from=made_from)
    return [*gathered.sums.values(), scores]


def merge(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    plan: Plan,
    shards: Iterable[ShardFiles],
    *,
    directory: Path,
    on_progress: OnProgress,
    on_pass: OnPass | None = None,
) -> Pass:
    """Return the pass over all rows from those over its shards, given in the order of the plan.

    Shards are taken one by one, and a shard's files are not needed once the next is asked for; one layer's sums are in
    memory at a time.

    Raises:
        FormatMismatch: another version of the worker wrote a file.
        ChecksumMismatch: a file is damaged, missing or not of this shard.
    """
    objectives = resolve_objectives(spec.objectives, plan.rows.supervision)
    bases = bases_of(objectives)
    matrices = TestMatrices(spec.seed, base.device)
    shapes = sketch_shapes(targets, spec)
    folds = range(1 + max(fold for shard in plan.shards for fold in shard.folds))
    paths = [directory / f"merged-{fold}.safetensors" for fold in folds]
    chosen = _Chosen(plan, folds, spec.seed, everything=on_pass is not None)
    count = PhaseCounter(Phase.FACTORS, len(plan.shards), on_progress)
    totals = [Counts() for _ in folds]
    with ExitStack() as stack:
        sums = [
            stack.enter_context(SketchFile(path, kind_of_sums(spec), shapes, bases=len(bases), matrices=matrices))
            for path in paths
        ]
        waiting = iter(shards)
        for number, planned in enumerate(plan.shards):
            files = next(waiting, None)
            if files is None:
                raise ChecksumMismatch(f"the files of shard {number} of {len(plan.shards)} are missing")
            if sha256(files.rows) != planned.rows_sha256:
                raise damaged(files.rows)
            parts = {path.name: path for path in files.sums}
            for fold in sorted(set(planned.folds)):
                path = _part(parts, f"fold-{fold}.safetensors", number)
                counts = sums[fold].add_file(path, made_from=planned.rows_sha256)
                if counts.rows != planned.rows_of(fold):
                    raise damaged(path)
                totals[fold] += counts
            chosen.take(number, files.rows, _part(parts, _SCORES, number))
            count()
        for file, total in zip(sums, totals, strict=True):
            file.finish(total)
    if on_pass is not None:
        on_pass(chosen.scored, paths)
    return Pass(objectives, bases, [load_statistics(path, matrices) for path in paths], chosen.held)


class _Chosen:
    """The batches that calibration scores, picked out of the shards that hold them; on request all others too."""

    def __init__(self, plan: Plan, folds: Sequence[int], seed: int, *, everything: bool) -> None:
        self._shards, self._everything = plan.shards, everything
        # A batch's number inside its fold, counted over all shards, is what the choice is made of.
        places: list[list[tuple[int, int]]] = [[] for _ in folds]
        for number, shard in enumerate(plan.shards):
            for index, fold in enumerate(shard.folds):
                places[fold].append((number, index))
        sizes = [[plan.shards[number].sizes[index] for number, index in own] for own in places]
        picked = calibration_batches(sizes, seed)
        self._places = [[own[index] for index in indices] for own, indices in zip(places, picked, strict=True)]
        self._found: dict[tuple[int, int], tuple[Batch, Scores]] = {}

    def take(self, number: int, rows: Path, scores: Path) -> None:
        """Read what is needed of one shard."""
        planned = self._shards[number]
        wanted: Sequence[int] = [index for own in self._places for shard, index in own if shard == number]
        if self._everything:
            wanted = range(len(planned.sizes))
        if not wanted:
            return
        _, batches = read_batches(rows)
        by_batch = read_scores(scores, made_from=planned.rows_sha256, sizes=planned.sizes)
        self._found |= {(number, index): (batches[index], by_batch[index]) for index in wanted}

    @property
    def scored(self) -> list[tuple[Batch, Scores]]:
        """All batches that were read, in the order of the shards."""
        return [self._found[place] for place in sorted(self._found)]

    @property
    def held(self) -> list[list[tuple[Batch, Scores]]]:
        """The chosen batches of every fold."""
        return [[self._found[place] for place in own] for own in self._places]


class _Version(Frozen, extra="ignore"):
    """All that is looked at before the format is known."""

    format: int


def _part(parts: Mapping[str, Path], name: str, number: int) -> Path:
    if name not in parts:
        raise ChecksumMismatch(f"shard {number} lacks its file {name}")
    return parts[name]

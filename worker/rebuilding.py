"""An adapter from the statistics of an earlier job: rows that it has passed are not passed again.

Rows that it passed keep their folds; further ones are dealt to the folds that have the fewest. So an adapter of the
same rows is that of a fresh job, and with added rows it differs from that as another deal of the folds would.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from torch import nn

from d2lora.based_on import MOST_RANKS
from d2lora.errors import (
    ChecksumMismatch,
    FormatMismatch,
    FormatOutdated,
    ProblemItem,
    RequestInvalid,
    StatisticsTooNew,
)
from d2lora.initializations import InitializationSpec, Objective, Sft
from d2lora.settings import WorkerSettings
from worker.batches import Batch, assign_folds, distinct_rows, groups_of, make_batches
from worker.calibration import calibration_batches
from worker.data import Example, needed
from worker.directions import Pass
from worker.gathering import FOLDS, gather_statistics, kind_of_sums, sketch_shapes, tokens_per_batch
from worker.kept_statistics import Kept, batch_digests, kept_index, read_kept, rows_of, write_kept
from worker.matrices import TestMatrices
from worker.model_cache import Loader
from worker.models import BaseModel
from worker.objectives import Counts, Scores, bases_of, resolve_objectives
from worker.pipeline import OnPass
from worker.report import Reuse
from worker.shard_files import BasePin
from worker.sketch_files import SketchFile, shapes_of
from worker.sketch_files import load as load_statistics
from worker.subject import Subject, load_subject
from worker.units import BASE, KEPT, KEPT_INDEX, OnProgress


@dataclass(frozen=True)
class Rebuild:
    """What is left to do once the rows of an earlier job are taken from it."""

    kept: Kept
    batches: list[Batch]
    """Of all rows, fold after fold, as a fresh job makes them."""
    added: list[Batch]
    """Of the rows that have to be passed."""
    spec: InitializationSpec
    """That of the pass: the request with the rank of the sketches."""
    objectives: Sequence[Objective]
    reuse: Reuse
    decisive: str | None
    """Digest of what a fresh job would have otherwise: folds, or the sketches' rank."""


def kept_for(out: Path, spec: InitializationSpec) -> Kept | None:
    """Return the statistics that a request is based on; None if it is based on none.

    Raises:
        RequestInvalid: they have been removed, or an older version of the worker wrote them.
        StatisticsTooNew: a newer version of the worker wrote them.
        ChecksumMismatch: they are damaged.
    """
    if spec.based_on is None:
        return None
    if not (out / BASE / KEPT_INDEX).exists():
        raise _refusal("based_on", f"the statistics of {spec.based_on} have been removed; leave it out")
    try:
        return read_kept(out / BASE)
    except FormatOutdated as error:
        detail = f"the statistics of {spec.based_on} are of an older version, which this one cannot read; leave it out"
        raise _refusal("based_on", detail) from error
    except FormatMismatch as error:
        # Beginning anew, as with a shard of another version, would lead here again.
        detail = f"based_on: the statistics of {spec.based_on} are of a newer version; leave it out, or upgrade workers"
        raise StatisticsTooNew(detail) from error
    except ChecksumMismatch as error:
        raise error.within("based_on") from error


def load_same(
    kept: Kept | None, spec: InitializationSpec, settings: WorkerSettings, load: Loader, on_progress: OnProgress
) -> Subject:
    """Return the base model that statistics are of, or that of a request which is based on none.

    Raises:
        RequestInvalid: the request names other weights than the statistics are of.
    """
    if kept is None:
        return load_subject(spec, settings, load, on_progress)
    try:
        return load_subject(spec, settings, load, on_progress, kept.index.base)
    except ChecksumMismatch as error:
        why = f"its weights, configuration or tokenizer are not those that {spec.based_on} was made with"
        raise _refusal("base_model", why) from error


def plan_rebuild(
    kept: Kept,
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    examples: Sequence[Example],
    objectives: Sequence[Objective],
    *,
    settings: WorkerSettings,
) -> Rebuild:
    """Return what is left to do.

    Raises:
        RequestInvalid: naming the field on account of which the statistics cannot be gone on from.
    """
    index = kept.index
    at_rank = spec.model_copy(update={"lora": spec.lora.model_copy(update={"r": index.r})})
    if index.kind != kind_of_sums(spec):
        raise _refusal("statistics", f"those of {spec.based_on} are of kind {index.kind}, not {kind_of_sums(spec)}")
    if index.seed != spec.seed:
        raise _refusal("seed", f"{spec.based_on} was made with {index.seed}, which its sketches depend on")
    if spec.statistics == "sketch":
        _check_rank(spec, index.r)
    if shapes_of(kept.sums[0]) != sketch_shapes(targets, at_rank):
        raise _refusal("lora.target_modules", f"{spec.based_on} is for other layers")
    missing = [basis for basis in bases_of(objectives) if basis not in index.bases]
    if missing:
        why = f"{spec.based_on} has not gathered {', '.join(missing)}, which they need; it was made for others"
        raise _refusal("objectives", why)
    own = needed(examples, objectives)
    dealt = needed(examples, [Sft()]) if index.chosen_only else examples
    left = Counter(kept.rows.digests)
    left.subtract(example.digest for example in dealt)
    if gone := sum(count for count in left.values() if count > 0):
        why = f"{gone} of the {index.rows} rows of {spec.based_on} are not in it; rows can be added, not taken away"
        raise _refusal("dataset_id", why)
    known = dict(zip(kept.rows.digests, kept.rows.folds, strict=True))
    folds = deal(dealt, known, seed=spec.seed)
    fresh = assign_folds(own, folds=min(FOLDS, distinct_rows(own)), seed=spec.seed)
    max_tokens, pad = tokens_per_batch(base, spec, settings), base.pad_token_id
    passed = Counter(kept.rows.digests)
    added = []
    for number, example in enumerate(dealt):
        if passed[example.digest]:
            passed[example.digest] -= 1
        else:
            added.append(number)
    new = [dealt[number] for number in added]
    other = None
    if folds != fresh or index.r != spec.lora.r:
        other = hashlib.sha256(repr((sorted(zip([e.digest for e in dealt], folds, strict=True)), index.r)).encode())
    return Rebuild(
        kept=kept,
        batches=make_batches(dealt, folds, max_tokens=max_tokens, pad_token_id=pad),
        added=make_batches(new, [folds[number] for number in added], max_tokens=max_tokens, pad_token_id=pad),
        spec=at_rank,
        objectives=objectives,
        reuse=Reuse(based_on=str(spec.based_on), sketch_r=index.r, rows_reused=index.rows, rows_passed=len(added)),
        decisive=None if other is None else other.hexdigest(),
    )


def deal(examples: Sequence[Example], known: Mapping[str, int], *, seed: int) -> list[int]:
    """Return every example's fold: its own if it is known, else in the order of hash(seed, content) the emptiest.

    Rows that share a sequence are dealt together. Labels are dealt one by one, and a fold is begun only where every
    label reaches it.

    Raises:
        RequestInvalid: known rows that share a sequence, or share one with the same added row, are in different folds.
    """
    groups = groups_of(examples)
    fold_of: dict[str, int] = {}
    labels: dict[bool | None, dict[str, None]] = {}
    for example, group in zip(examples, groups, strict=True):
        labels.setdefault(example.desirable, {})[group] = None
        fold = known.get(example.digest)
        if fold is not None and fold_of.setdefault(group, fold) != fold:
            raise _refusal("dataset_id", "rows that share a completion would be held out from each other; start anew")
    begun = 1 + max(known.values())
    folds = min(FOLDS, *(begun + sum(group not in fold_of for group in own) for own in labels.values()))
    for own in labels.values():
        sizes = Counter(fold_of[group] for group in own if group in fold_of)
        new = [group for group in own if group not in fold_of]
        for group in sorted(new, key=lambda one: hashlib.sha256(f"{seed}:{one}".encode()).digest()):
            fold_of[group] = min(range(max(folds, begun)), key=lambda fold: (sizes[fold], fold))
            sizes[fold_of[group]] += 1
    return [fold_of[group] for group in groups]


def complete(
    rebuild: Rebuild,
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    *,
    settings: WorkerSettings,
    directory: Path,
    on_progress: OnProgress,
    on_pass: OnPass | None = None,
) -> Pass:
    """Pass the added rows, and return the pass over all of them; ``on_pass`` is told what `build_adapter` tells it."""
    kept, spec = rebuild.kept, rebuild.spec
    bases = tuple(kept.index.bases)
    matrices = TestMatrices(spec.seed, base.device)
    rows, sums = kept.rows, dict(enumerate(kept.sums))
    if rebuild.added:
        gathered = gather_statistics(
            base,
            targets,
            spec,
            rebuild.added,
            bases,
            settings=settings,
            directory=directory,
            on_progress=on_progress,
        )
        rows = rows.with_rows(rows_of(zip(rebuild.added, gathered.scores, strict=True)))
        shapes = sketch_shapes(targets, spec)
        for fold, path in gathered.sums.items():
            if fold not in sums:
                sums[fold] = path
                continue
            merged = directory / f"merged-{fold}.safetensors"
            with SketchFile(merged, kind_of_sums(spec), shapes, bases=len(bases), matrices=matrices) as file:
                file.finish(sum((file.add_file(part, made_from=None) for part in (sums[fold], path)), Counts()))
            sums[fold] = merged
    paths = [sums[fold] for fold in sorted(sums)]
    scored = [(batch, rows.scores_of(batch_digests(batch))) for batch in rebuild.batches]
    if on_pass is not None:
        on_pass(scored, paths)
    folds = [list(own) for _, own in groupby(scored, key=lambda pair: pair[0].fold)]
    chosen = calibration_batches([[len(batch.rows) for batch, _ in fold] for fold in folds], spec.seed)
    held = [[fold[index] for index in indices] for fold, indices in zip(folds, chosen, strict=True)]
    return Pass(rebuild.objectives, bases, [load_statistics(path, matrices) for path in paths], held)


def keep_pass(
    out: Path,
    base: BaseModel,
    spec: InitializationSpec,
    rebuild: Rebuild | None,
    scored: Sequence[tuple[Batch, Scores]],
    sums: Sequence[Path],
) -> None:
    """Leave the statistics of a pass over all rows in the unit's directory, for the job to keep."""
    if rebuild is not None:
        rank, bases, chosen_only = rebuild.spec.lora.r, rebuild.kept.index.bases, rebuild.kept.index.chosen_only
    else:
        objectives = resolve_objectives(spec.objectives, scored[0][0].supervision)
        rank, bases = spec.lora.r, list(bases_of(objectives))
        # Where objectives are left to the rows, SFT stands alone only if there is nothing to leave out.
        chosen_only = spec.objectives is not None and all(isinstance(one, Sft) for one in objectives)
    rows = rows_of(scored)
    index = kept_index(
        base=BasePin.of(base),
        rank=rank,
        rows=len(rows.digests),
        seed=spec.seed,
        kind=kind_of_sums(spec),
        bases=bases,
        chosen_only=chosen_only,
        sums=len(sums),
    )
    directory = out / KEPT
    directory.mkdir()
    for name, path in zip(index.sums, sums, strict=True):
        try:
            os.link(path, directory / name)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, directory / name)
    write_kept(directory, index, rows)


def _check_rank(spec: InitializationSpec, sketched: int) -> None:
    if spec.lora.r > MOST_RANKS * sketched:
        raise _refusal("lora.r", f"the sketches of {spec.based_on} are for ranks up to {MOST_RANKS * sketched}")
    if spec.lora.ranks is not None and spec.lora.r > sketched:
        raise _refusal(
            "lora.ranks", f"the sketches of {spec.based_on} allow ranks of their own up to lora.r {sketched}"
        )


def _refusal(field: str, why: str) -> RequestInvalid:
    detail = f"{field}: {why}"
    return RequestInvalid(detail, errors=[ProblemItem(detail=detail, pointer=f"#/{field.replace('.', '/')}")])

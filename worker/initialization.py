"""One initialization from files to files: load, read, build, evaluate, write.

`initialize` does all of it. A large job may be cut instead: then `run_shard` works on the pieces, and `finish` builds
the adapter from what they left.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import assert_never

from d2lora.datasets import DatasetFile, read_rows
from d2lora.initializations import InitializationSpec, Phase, Result
from d2lora.methods import PeftMethod, Warmup
from d2lora.roles import FIELDS, Role, check_given
from d2lora.settings import WorkerSettings
from d2lora.shards import EvaluationTask, ShardTask, StatisticsTask
from worker import models
from worker.adapters import write_adapter
from worker.calibration import alone
from worker.clock import Clock
from worker.data import Example, encode_rows, needed
from worker.evaluation import measure, read_evaluation, read_extra, seen_before
from worker.evidence import Intake, intake, make_gradient_report
from worker.failures import translated_errors
from worker.gathering import tokens_per_batch
from worker.model_cache import Loader
from worker.objectives import resolve_objectives
from worker.output_scale import scaled_as_asked
from worker.peft_initialization import initialize_by_peft
from worker.peft_methods import rows_read
from worker.pipeline import BuiltAdapter, adapter_from, build_adapter
from worker.rebuilding import Rebuild, complete, keep_pass, kept_for, load_same, plan_rebuild
from worker.retaining import restraint_from
from worker.shard_files import damaged, read_batches, sha256
from worker.sharding import count_tokens, gather_shard, merge, read_plan, split
from worker.shared_calibration import shared, work_on
from worker.subject import Subject, length_limit, load_subject
from worker.units import ROWS, OnProgress, ShardFiles, ShardOutput, Share, Split
from worker.warmup_initialization import GeneralRows, initialize_by_warmup, read_general_rows


@translated_errors()
def initialize(
    spec: InitializationSpec,
    dataset: DatasetFile,
    extras: Mapping[Role, DatasetFile],
    *,
    out: Path,
    settings: WorkerSettings,
    on_progress: OnProgress,
    load: Loader = models.load,
    may_split: bool = False,
) -> Result | Split:
    """Write the adapter's files into the existing directory ``out``, ``manifest.json`` last.

    ``extras`` are the datasets that the request names besides its own. If the job may be split, has more than
    ``settings.shard_tokens`` tokens and asks for one pass, ``out`` gets the files of a `Split` instead, and the model
    has not run.

    Raises:
        D2LoraError: the request, the rows, the model or the numbers do not allow an adapter; ``out`` has no manifest.
    """
    check_given(spec, extras)
    clock = Clock(on_progress)
    kept = kept_for(out, spec)
    subject = load_same(kept, spec, settings, load, clock)
    base, targets = subject.base, subject.targets
    clock(Phase.READING, 0, 1)
    max_length, warnings = length_limit(base, spec)
    warnings += subject.warnings
    encoded = encode_rows(read_rows(dataset), base.tokenizer, max_length=max_length)
    # All that can be refused is refused before the pass.
    objectives = resolve_objectives(spec.objectives, encoded.examples[0].supervision)
    evaluation = read_evaluation(base, spec, extras)
    retain = read_extra(base, spec, extras, Role.RETAIN)
    general = read_general_rows(subject, spec, extras)
    learned_from = _rows_used(spec, encoded.examples, general, retain)
    warnings += seen_before(evaluation or [], learned_from, FIELDS[Role.EVALUATION])
    digests = {role: sha256(extra.path) for role, extra in extras.items()}
    files = [("dataset", dataset), *((str(role), extra) for role, extra in extras.items())]
    columns = {name: dict(file.columns) for name, file in files if file.columns}
    rows = intake(encoded, sha256=sha256(dataset.path), extras=digests, columns=columns, warnings=warnings)
    rebuild: Rebuild | None = None
    if kept is not None:
        rebuild = plan_rebuild(kept, base, targets, spec, encoded.examples, objectives, settings=settings)
        rows = rows.model_copy(update={"reuse": rebuild.reuse, "decisive": rebuild.decisive})
    clock(Phase.READING, 1, 1)

    if general is not None:
        with _statistics_directory(out) as directory:
            return initialize_by_warmup(
                subject,
                spec,
                encoded,
                rows,
                general,
                evaluation,
                out=out,
                directory=directory,
                settings=settings,
                clock=clock,
            )
    if not isinstance(spec.method, str):
        return initialize_by_peft(subject, spec, encoded, rows, evaluation, out=out, settings=settings, clock=clock)
    # Later passes depend on what the earlier ones found, and retain rows are measured here, so such jobs stay whole.
    whole = spec.rounds > 1 or spec.second_pass_above is not None or retain is not None or rebuild is not None
    if may_split and not whole and count_tokens(needed(encoded.examples, objectives)) > settings.shard_tokens:
        return split(
            base,
            spec,
            encoded.examples,
            rows,
            directory=out,
            settings=settings,
            on_progress=clock,
            seconds=clock.seconds,
        )
    restraint = restraint_from(
        base,
        targets,
        spec,
        retain,
        max_tokens=tokens_per_batch(base, spec, settings),
        pad_token_id=base.pad_token_id,
        on_progress=clock,
    )
    keep = partial(keep_pass, out, base, spec, rebuild) if spec.keep_statistics else None
    with _statistics_directory(out) as directory:
        if rebuild is None:
            built = build_adapter(
                base,
                targets,
                spec,
                encoded.examples,
                settings=settings,
                directory=directory,
                on_progress=clock,
                restraint=restraint,
                on_pass=keep,
            )
        else:
            one_pass = complete(
                rebuild, base, targets, settings=settings, directory=directory, on_progress=clock, on_pass=keep
            )
            evaluators = [alone(base, targets, objectives)]
            built = adapter_from([one_pass], spec, evaluators=evaluators, on_progress=clock, restraint=restraint)
    return _deliver(subject, spec, rows, built, evaluation, shards=1, out=out, settings=settings, clock=clock)


@translated_errors()
def run_shard(
    spec: InitializationSpec,
    task: ShardTask,
    directory: Path,
    *,
    settings: WorkerSettings,
    on_progress: OnProgress,
    load: Loader = models.load,
) -> ShardOutput:
    """Return what a task leaves behind; its input files lie in ``directory`` under their names.

    Raises:
        FormatMismatch: another version of the worker wrote an input.
        ChecksumMismatch: an input is damaged, or the base model's weights are not those of the job's first worker.
        D2LoraError: the model or the numbers do not allow it.
    """
    match task:
        case StatisticsTask():
            path = directory / ROWS
            pinned, batches = read_batches(path)
            if task.rows != sum(len(batch.rows) for batch in batches):
                raise damaged(path)
            subject = load_subject(spec, settings, load, on_progress, pinned)
            files = gather_shard(
                subject.base,
                subject.targets,
                spec,
                batches,
                made_from=sha256(path),
                directory=directory,
                settings=settings,
                on_progress=on_progress,
            )
            return ShardOutput(files, None)
        case EvaluationTask():
            direction, path = (directory / name for name in task.files)
            pinned, batches = read_batches(path)
            if max(task.batches) >= len(batches):
                raise damaged(path)
            subject = load_subject(spec, settings, load, on_progress, pinned)
            scores = work_on(
                subject.base, subject.targets, spec, task, batches, direction=direction, on_progress=on_progress
            )
            return ShardOutput([], scores)
        case _:
            assert_never(task)


@translated_errors()
def finish(
    spec: InitializationSpec,
    plan: Path,
    shards: Iterable[ShardFiles],
    extras: Mapping[Role, DatasetFile],
    *,
    out: Path,
    settings: WorkerSettings,
    on_progress: OnProgress,
    share: Share,
    load: Loader = models.load,
) -> Result:
    """Write the adapter's files into the existing directory ``out``, as `initialize` would have.

    ``shards`` come in the order of the split; each one's files are read when it is asked for, and not afterwards.

    Raises:
        FormatMismatch: another version of the worker wrote an input.
        ChecksumMismatch: an input is damaged or missing, or the weights are not those of the job's first worker.
        D2LoraError: the model or the numbers do not allow an adapter; ``out`` has no manifest.
    """
    check_given(spec, extras)
    planned = read_plan(plan)
    clock = Clock(on_progress, planned.seconds)
    subject = load_subject(spec, settings, load, clock, planned.base)
    base, targets = subject.base, subject.targets
    clock(Phase.READING, 0, 1)
    evaluation = read_evaluation(base, spec, extras)
    clock(Phase.READING, 1, 1)

    objectives = resolve_objectives(spec.objectives, planned.rows.supervision)
    with _statistics_directory(out) as directory:
        keep = partial(keep_pass, out, base, spec, None) if spec.keep_statistics else None
        one_pass = merge(base, targets, spec, planned, shards, directory=directory, on_progress=clock, on_pass=keep)
        evaluator = shared(share, planned.base, objectives, directory=directory, pad_token_id=base.pad_token_id)
        built = adapter_from([one_pass], spec, evaluators=[evaluator], on_progress=clock)
    shards_used = len(planned.shards)
    return _deliver(
        subject, spec, planned.rows, built, evaluation, shards=shards_used, out=out, settings=settings, clock=clock
    )


def _rows_used(
    spec: InitializationSpec, examples: list[Example], general: GeneralRows | None, retain: list[Example] | None
) -> list[Example]:
    """Return the rows of all datasets that have a part in the adapter."""
    if isinstance(spec.method, Warmup):
        assert general is not None
        return general.chosen + (examples if spec.method.start == "gradient" else [])
    if isinstance(spec.method, PeftMethod):
        return rows_read(spec.method, examples, seed=spec.seed)
    return examples + (retain or [])


@contextmanager
def _statistics_directory(out: Path) -> Iterator[Path]:
    """Inside ``out``, so that whoever cleans up after a killed process finds these too."""
    with tempfile.TemporaryDirectory(prefix=".statistics-", dir=out) as directory:
        yield Path(directory)


def _deliver(
    subject: Subject,
    spec: InitializationSpec,
    rows: Intake,
    built: BuiltAdapter,
    evaluation: Sequence[Example] | None,
    *,
    shards: int,
    out: Path,
    settings: WorkerSettings,
    clock: Clock,
) -> Result:
    """Evaluate the adapter and write its files."""
    built = scaled_as_asked(built, subject, spec)
    measured = measure(subject, spec, built.factors, built.objectives, evaluation, settings=settings, clock=clock)
    clock(Phase.PUBLISHING, 0, 1)
    report = make_gradient_report(subject, spec, rows, built, measured, shards=shards, seconds=clock.seconds())
    files = write_adapter(out, config=subject.config, factors=built.factors, report=report)
    return Result(files=files, summary=report.summary)

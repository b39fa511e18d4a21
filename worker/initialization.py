"""One initialization from files to files: load, read, build, evaluate, write.

`initialize` does all of it. A large job may be cut instead: then `run_shard` works on the pieces, and `finish` builds
the adapter from what they left.
"""

import errno
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import assert_never

from peft import LoraConfig
from safetensors import SafetensorError
from torch import nn

from d2lora.datasets import DatasetFile, read_rows
from d2lora.errors import ChecksumMismatch, DeviceFailure, OutOfMemory, ScratchFull
from d2lora.initializations import HeldOut, InitializationSpec, Objective, Phase, Result
from d2lora.settings import WorkerSettings
from d2lora.shards import EvaluationTask, ShardTask, StatisticsTask
from worker import models
from worker.adapters import write_adapter
from worker.data import Encoded, Example, encode_rows
from worker.devices import is_device_failure
from worker.evaluation import evaluate
from worker.evidence import Intake, intake, make_report
from worker.factors import Factors
from worker.model_cache import Loader
from worker.models import BaseModel
from worker.objectives import resolve_objectives
from worker.peft_evidence import make_peft_report
from worker.peft_methods import build_peft_adapter
from worker.pipeline import BuiltAdapter, adapter_from, build_adapter, pad_token
from worker.shard_files import BasePin, damaged, read_batches, sha256
from worker.sharding import count_tokens, gather_shard, merge, pin, read_plan, split
from worker.shared_calibration import shared, work_on
from worker.statistics import is_out_of_memory
from worker.targets import lora_config, resolve_targets
from worker.units import ROWS, OnProgress, ShardFiles, ShardOutput, Share, Split


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Turn exhausted memory and disks, and broken accelerators, into our errors, whichever library noticed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} or "os error 28" in str(error):
            raise ScratchFull("no room left for statistics or adapter; free space and run again") from error
        raise
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory("memory is used up; lower max_tokens_per_batch or r, or use a larger machine") from error
        if is_device_failure(error):
            raise DeviceFailure("the accelerator failed; another process has to try again") from error
        raise


@dataclass
class _Clock:
    """Passes progress on and remembers when it came; ``earlier`` are seconds by phase that another worker spent."""

    on_progress: OnProgress
    earlier: dict[str, float] = field(default_factory=dict)
    marks: list[tuple[Phase, float]] = field(default_factory=list)

    def __call__(self, phase: Phase, done: int, total: int) -> None:
        self.marks.append((phase, time.monotonic()))
        self.on_progress(phase, done, total)

    def seconds(self) -> dict[str, float]:
        """Return the seconds between marks, added up by the phase that the earlier mark names."""
        seconds = dict(self.earlier)
        for (phase, start), (_, end) in pairwise(self.marks):
            seconds[phase] = seconds.get(phase, 0.0) + end - start
        return {phase: round(value, 3) for phase, value in seconds.items()}


@dataclass(frozen=True)
class _Subject:
    """The base model and where its adapter goes."""

    base: BaseModel
    config: LoraConfig
    targets: Mapping[str, nn.Module]


@dataclass(frozen=True)
class _Evaluation:
    """Rows that only measure the delivered adapter."""

    examples: list[Example]
    sha256: str


@_translated_errors()
def initialize(
    spec: InitializationSpec,
    dataset: DatasetFile,
    eval_dataset: DatasetFile | None,
    *,
    out: Path,
    settings: WorkerSettings,
    on_progress: OnProgress,
    load: Loader = models.load,
    may_split: bool = False,
) -> Result | Split:
    """Write the adapter's files into the existing directory ``out``, ``manifest.json`` last.

    If the job may be split and has more than ``settings.shard_tokens`` tokens, ``out`` gets the files of a `Split`
    instead, and the model has not run.

    Raises:
        D2LoraError: the request, the rows, the model or the numbers do not allow an adapter; ``out`` has no manifest.
    """
    clock = _Clock(on_progress)
    subject = _load(spec, settings, load, clock)
    base, targets = subject.base, subject.targets
    clock(Phase.READING, 0, 1)
    max_length, warnings = _context(base, spec)
    encoded = encode_rows(read_rows(dataset), base.tokenizer, max_length=max_length)
    # All that can be refused is refused before the pass.
    resolve_objectives(spec.objectives, encoded.examples[0].supervision)
    evaluation = _read_evaluation(base, spec, eval_dataset)
    rows = intake(encoded, sha256=sha256(dataset.path), warnings=warnings)
    clock(Phase.READING, 1, 1)

    if not isinstance(spec.method, str):
        return _initialize_by_peft(subject, spec, encoded, rows, evaluation, out=out, settings=settings, clock=clock)
    if may_split and count_tokens(encoded.examples) > settings.shard_tokens:
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
    with _statistics_directory(out) as directory:
        built = build_adapter(
            base, targets, spec, encoded.examples, settings=settings, directory=directory, on_progress=clock
        )
    return _deliver(subject, spec, rows, built, evaluation, shards=1, out=out, settings=settings, clock=clock)


@_translated_errors()
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
            subject = _load(spec, settings, load, on_progress, pinned)
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
            subject = _load(spec, settings, load, on_progress, pinned)
            scores = work_on(
                subject.base, subject.targets, spec, task, batches, direction=direction, on_progress=on_progress
            )
            return ShardOutput([], scores)
        case _:
            assert_never(task)


@_translated_errors()
def finish(
    spec: InitializationSpec,
    plan: Path,
    shards: Iterable[ShardFiles],
    eval_dataset: DatasetFile | None,
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
    planned = read_plan(plan)
    clock = _Clock(on_progress, planned.seconds)
    subject = _load(spec, settings, load, clock, planned.base)
    base, targets = subject.base, subject.targets
    clock(Phase.READING, 0, 1)
    evaluation = _read_evaluation(base, spec, eval_dataset)
    clock(Phase.READING, 1, 1)

    objectives = resolve_objectives(spec.objectives, planned.rows.supervision)
    with _statistics_directory(out) as directory:
        one_pass = merge(base, targets, spec, planned, shards, directory=directory, on_progress=clock)
        evaluator = shared(
            share, planned.base, objectives, directory=directory, pad_token_id=pad_token(base), on_progress=clock
        )
        built = adapter_from(one_pass, objectives, spec, evaluator=evaluator, on_progress=clock)
    shards_used = len(planned.shards)
    return _deliver(
        subject, spec, planned.rows, built, evaluation, shards=shards_used, out=out, settings=settings, clock=clock
    )


def _load(
    spec: InitializationSpec,
    settings: WorkerSettings,
    load: Loader,
    on_progress: OnProgress,
    pinned: BasePin | None = None,
) -> _Subject:
    """Return the base model, if pinned with the weights and in the type that the job's first worker had."""
    on_progress(Phase.LOADING, 0, 1)

    def loaded(revision: str | None, dtype: str) -> BaseModel:
        return load(
            spec.base_model,
            revision=revision,
            dtype=dtype,
            device=settings.device,
            quantization=spec.quantization,
        )

    base = loaded(spec.revision, spec.dtype)
    if pinned is not None and pin(base) != pinned:
        # A branch has moved on since, or this machine would choose another type.
        del base
        base = loaded(pinned.revision or spec.revision, pinned.dtype)
        if pin(base) != pinned:
            raise ChecksumMismatch("base_model: its weights are not those that the job was begun with")
    config = lora_config(base.model, spec.lora, base_model=spec.base_model, revision=spec.revision)
    targets = resolve_targets(base.model, config)
    on_progress(Phase.LOADING, 1, 1)
    return _Subject(base, config, targets)


def _read_evaluation(base: BaseModel, spec: InitializationSpec, dataset: DatasetFile | None) -> _Evaluation | None:
    if dataset is None:
        return None
    encoded = encode_rows(read_rows(dataset), base.tokenizer, max_length=_context(base, spec)[0])
    resolve_objectives(spec.objectives, encoded.examples[0].supervision)
    return _Evaluation(encoded.examples, sha256(dataset.path))


@contextmanager
def _statistics_directory(out: Path) -> Iterator[Path]:
    """Inside ``out``, so that whoever cleans up after a killed process finds these too."""
    with tempfile.TemporaryDirectory(prefix=".statistics-", dir=out) as directory:
        yield Path(directory)


def _deliver(
    subject: _Subject,
    spec: InitializationSpec,
    rows: Intake,
    built: BuiltAdapter,
    evaluation: _Evaluation | None,
    *,
    shards: int,
    out: Path,
    settings: WorkerSettings,
    clock: _Clock,
) -> Result:
    """Evaluate the adapter and write its files."""
    base, targets = subject.base, subject.targets
    measured = _measure(subject, spec, built.factors, built.objectives, evaluation, settings=settings, clock=clock)
    clock(Phase.PUBLISHING, 0, 1)
    report = make_report(
        base,
        targets,
        spec,
        rows,
        built,
        measured,
        eval_dataset_sha256=evaluation.sha256 if evaluation else None,
        shards=shards,
        seconds=clock.seconds(),
    )
    files = write_adapter(out, config=subject.config, factors=built.factors, report=report)
    return Result(files=files, summary=report.summary)


def _initialize_by_peft(
    subject: _Subject,
    spec: InitializationSpec,
    encoded: Encoded,
    rows: Intake,
    evaluation: _Evaluation | None,
    *,
    out: Path,
    settings: WorkerSettings,
    clock: _Clock,
) -> Result:
    """Let PEFT initialize the adapter, evaluate it as ours, and write its files."""
    base, targets = subject.base, subject.targets
    adapter = build_peft_adapter(
        base, targets, subject.config, spec, encoded.examples, settings=settings, on_progress=clock
    )
    # Every objective that the rows allow, so that the figures stand beside those of our own method.
    objectives = resolve_objectives(None, rows.supervision)
    measured = _measure(subject, spec, adapter.factors, objectives, evaluation, settings=settings, clock=clock)
    clock(Phase.PUBLISHING, 0, 1)
    report = make_peft_report(
        base,
        targets,
        spec,
        rows,
        adapter,
        measured,
        eval_dataset_sha256=evaluation.sha256 if evaluation else None,
        seconds=clock.seconds(),
    )
    files = write_adapter(out, config=adapter.config, factors=adapter.factors, report=report)
    return Result(files=files, summary=report.summary)


def _measure(
    subject: _Subject,
    spec: InitializationSpec,
    factors: Mapping[str, Factors],
    objectives: Sequence[Objective],
    evaluation: _Evaluation | None,
    *,
    settings: WorkerSettings,
    clock: _Clock,
) -> dict[str, HeldOut] | None:
    """Return what base and adapter score on the evaluation rows, if there are any."""
    if evaluation is None:
        return None
    return evaluate(
        subject.base,
        subject.targets,
        spec,
        factors,
        objectives,
        evaluation.examples,
        settings=settings,
        on_progress=clock,
    )


def _context(base: BaseModel, spec: InitializationSpec) -> tuple[int, list[str]]:
    """Return the longest sequence that both the request and the model allow, and what to say about it."""
    limit = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit >= spec.max_length:
        return spec.max_length, []
    return limit, [f"max_length {spec.max_length} is above the model's context; {limit} was used"]

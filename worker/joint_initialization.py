"""An initialization from several datasets: read each, build one adapter, write."""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from d2lora.datasets import DatasetFile, read_rows
from d2lora.errors import D2LoraError, RequestInvalid
from d2lora.initializations import InitializationSpec, Phase, Result
from d2lora.settings import WorkerSettings
from worker import models
from worker.adapters import write_adapter
from worker.clock import Clock
from worker.data import Encoded, encode_rows
from worker.evidence import Intake, intake, make_gradient_report
from worker.failures import translated_errors
from worker.joint import build_joint_adapter
from worker.left_out import in_words
from worker.model_cache import Loader
from worker.objectives import resolve_objectives
from worker.report import DatasetReport
from worker.shard_files import sha256
from worker.subject import length_limit, load_subject
from worker.units import OnProgress


@translated_errors()
def initialize_jointly(
    spec: InitializationSpec,
    datasets: Sequence[DatasetFile],
    *,
    out: Path,
    settings: WorkerSettings,
    on_progress: OnProgress,
    load: Loader = models.load,
) -> Result:
    """Write the adapter's files into the existing directory ``out``, ``manifest.json`` last.

    ``datasets`` come in the order of the request. The job is never cut into shards.

    Raises:
        D2LoraError: the request, the rows, the model or the numbers do not allow an adapter; ``out`` has no manifest.
    """
    if len(datasets) != len(spec.training):
        raise RequestInvalid(f"datasets: the request names {len(spec.training)}, and {len(datasets)} were given")
    clock = Clock(on_progress)
    subject = load_subject(spec, settings, load, clock)
    base = subject.base
    clock(Phase.READING, 0, len(datasets))
    max_length, warnings = length_limit(base, spec)
    warnings += [in_words(one) for one in subject.left_out]
    every: list[Encoded] = []
    rows: list[Intake] = []
    for (place, asked), dataset in zip(spec.training.items(), datasets, strict=True):
        try:
            encoded = encode_rows(read_rows(dataset), base.tokenizer, max_length=max_length)
            resolve_objectives(asked.objectives, encoded.examples[0].supervision)
        except D2LoraError as error:
            raise error.within(place.removesuffix(".")) from error
        every.append(encoded)
        columns = {place: dict(dataset.columns)} if dataset.columns else {}
        rows.append(intake(encoded, sha256=sha256(dataset.path), extras={}, columns=columns, warnings=[]))
        clock(Phase.READING, len(every), len(datasets))
    # Inside of `out`, so that whoever cleans up after a killed process finds these too.
    with tempfile.TemporaryDirectory(prefix=".statistics-", dir=out) as directory:
        built = build_joint_adapter(
            base,
            subject.targets,
            spec,
            [encoded.examples for encoded in every],
            settings=settings,
            directory=Path(directory),
            on_progress=clock,
        )
    clock(Phase.PUBLISHING, 0, 1)
    together = all_rows(spec, rows, warnings=warnings)
    report = make_gradient_report(subject, spec, together, built, None, shards=1, seconds=clock.seconds())
    report = report.model_copy(update={"datasets": _dataset_reports(spec, rows)})
    files = write_adapter(out, config=subject.config, factors=built.factors, report=report)
    return Result(files=files, summary=report.summary)


def all_rows(spec: InitializationSpec, parts: Sequence[Intake], *, warnings: list[str]) -> Intake:
    """Return what became of the rows of all datasets together."""
    dropped: Counter[str] = Counter()
    for one in parts:
        dropped.update(one.dropped)
    return Intake(
        sha256=hashlib.sha256("".join(f"{one.sha256}\n" for one in parts).encode()).hexdigest(),
        extras={},
        columns={place: columns for one in parts for place, columns in one.columns.items()},
        read=sum(one.read for one in parts),
        used=sum(one.used for one in parts),
        truncated=sum(one.truncated for one in parts),
        dropped=dict(dropped),
        supervision=parts[0].supervision,
        mean_tokens={
            f"{place}{side}": mean
            for place, one in zip(spec.training, parts, strict=True)
            for side, mean in one.mean_tokens.items()
        },
        warnings=warnings,
    )


def _dataset_reports(spec: InitializationSpec, parts: Sequence[Intake]) -> list[DatasetReport]:
    return [
        DatasetReport(dataset_id=named.dataset_id, sha256=one.sha256, rows=one.counts, mean_tokens=one.mean_tokens)
        for named, one in zip(spec.training.values(), parts, strict=True)
    ]

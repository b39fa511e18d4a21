"""An initialization from several datasets: read each, build one adapter or one for each, write."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from d2lora.datasets import DatasetFile, read_rows
from d2lora.errors import D2LoraError, RequestInvalid
from d2lora.initializations import InitializationSpec, Phase, Result
from d2lora.settings import WorkerSettings
from worker import models
from worker.adapters import write_adapter, write_collection
from worker.clock import Clock
from worker.data import Encoded, encode_rows
from worker.evidence import Intake, intake
from worker.failures import translated_errors
from worker.joint import build_jointly
from worker.joint_evidence import collection_report, folders_of, joint_report, own_reports
from worker.model_cache import Loader
from worker.objectives import resolve_objectives
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
    warnings += subject.warnings
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
        joint = build_jointly(
            base,
            subject.targets,
            spec,
            [encoded.examples for encoded in every],
            settings=settings,
            directory=Path(directory),
            on_progress=clock,
        )
    clock(Phase.PUBLISHING, 0, 1)
    if spec.adapters is None:
        (built,) = joint.adapters
        report = joint_report(subject, spec, rows, built, warnings=warnings, seconds=clock.seconds())
        files = write_adapter(out, config=subject.config, factors=built.factors, report=report)
    else:
        reports = own_reports(subject, spec, rows, joint.adapters, warnings=warnings, seconds=clock.seconds())
        report = collection_report(subject, spec, rows, joint, reports, warnings=warnings, seconds=clock.seconds())
        folders = {}
        for folder, built, own in zip(folders_of(spec), joint.adapters, reports, strict=True):
            (out / folder).mkdir()
            folders[folder] = write_adapter(out / folder, config=subject.config, factors=built.factors, report=own)
        files = write_collection(out, report, folders)
    return Result(files=files, summary=report.summary)

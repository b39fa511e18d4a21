"""An initialization from several datasets: read each, build one adapter or one for each, write."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from d2lora.datasets import DatasetFile, read_rows
from d2lora.errors import D2LoraError, RequestInvalid
from d2lora.initializations import HeldOut, InitializationSpec, Objective, Phase, Result
from d2lora.roles import Role, check_given, evaluation_field
from d2lora.settings import WorkerSettings
from worker import models
from worker.adapters import write_adapter, write_collection
from worker.clock import Clock
from worker.data import Encoded, Example, encode_rows
from worker.evaluation import evaluate, read_further, seen_before
from worker.evidence import Intake, intake
from worker.failures import translated_errors
from worker.joint import Joint, build_jointly
from worker.joint_evidence import collection_report, folders_of, joint_report, own_reports
from worker.model_cache import Loader
from worker.models import BaseModel
from worker.objectives import resolve_objectives
from worker.output_scale import scaled_as_asked
from worker.shard_files import sha256
from worker.subject import Subject, length_limit, load_subject
from worker.units import OnProgress


@dataclass(frozen=True)
class _Evaluation:
    """Rows that took no part in an adapter, and what it is measured by on them."""

    objectives: list[Objective]
    examples: list[Example]


@translated_errors()
def initialize_jointly(
    spec: InitializationSpec,
    datasets: Sequence[DatasetFile],
    evaluations: Mapping[int, DatasetFile],
    *,
    out: Path,
    settings: WorkerSettings,
    on_progress: OnProgress,
    load: Loader = models.load,
) -> Result:
    """Write the adapter's files into the existing directory ``out``, ``manifest.json`` last.

    ``datasets`` come in the order of the request, and ``evaluations`` by the place of the dataset whose objectives
    they measure. The job is never cut into shards.

    Raises:
        D2LoraError: the request, the rows, the model or the numbers do not allow an adapter; ``out`` has no manifest.
    """
    if len(datasets) != len(spec.training):
        raise RequestInvalid(f"datasets: the request names {len(spec.training)}, and {len(datasets)} were given")
    check_given(spec, {}, evaluations)
    clock = Clock(on_progress)
    subject = load_subject(spec, settings, load, clock)
    base = subject.base
    clock(Phase.READING, 0, len(datasets))
    max_length, warnings = length_limit(base, spec)
    warnings += subject.warnings
    every: list[Encoded] = []
    rows: list[Intake] = []
    held: dict[str, _Evaluation] = {}
    for index, ((place, asked), dataset) in enumerate(zip(spec.training.items(), datasets, strict=True)):
        try:
            encoded = encode_rows(read_rows(dataset), base.tokenizer, max_length=max_length)
            objectives = resolve_objectives(asked.objectives, encoded.examples[0].supervision)
        except D2LoraError as error:
            raise error.within(place.removesuffix(".")) from error
        extras: dict[Role, str] = {}
        if index in evaluations:
            examples = _read_evaluation(base, spec, index, evaluations[index])
            held[place] = _Evaluation(objectives, examples)
            extras[Role.EVALUATION] = sha256(evaluations[index].path)
        every.append(encoded)
        columns = {place: dict(dataset.columns)} if dataset.columns else {}
        rows.append(intake(encoded, sha256=sha256(dataset.path), extras=extras, columns=columns, warnings=[]))
        clock(Phase.READING, len(every), len(datasets))
    for index, place in enumerate(spec.training):
        if place in held:
            trained = every if spec.adapters is None else every[index : index + 1]
            rows_of_all = (example for encoded in trained for example in encoded.examples)
            warnings += seen_before(held[place].examples, rows_of_all, evaluation_field(index))
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
    joint = replace(joint, adapters=[scaled_as_asked(built, subject, spec) for built in joint.adapters])
    measured = _measure(subject, spec, joint, held, settings=settings, clock=clock)
    clock(Phase.PUBLISHING, 0, 1)
    if spec.adapters is None:
        (built,) = joint.adapters
        report = joint_report(subject, spec, rows, built, measured, warnings=warnings, seconds=clock.seconds())
        files = write_adapter(out, config=subject.config, factors=built.factors, report=report)
    else:
        seconds = clock.seconds()
        reports = own_reports(subject, spec, rows, joint.adapters, measured, warnings=warnings, seconds=seconds)
        report = collection_report(subject, spec, rows, joint, reports, warnings=warnings, seconds=seconds)
        folders = {}
        for folder, built, own in zip(folders_of(spec), joint.adapters, reports, strict=True):
            (out / folder).mkdir()
            folders[folder] = write_adapter(out / folder, config=subject.config, factors=built.factors, report=own)
        files = write_collection(out, report, folders)
    return Result(files=files, summary=report.summary)


def _read_evaluation(base: BaseModel, spec: InitializationSpec, index: int, file: DatasetFile) -> list[Example]:
    """Return the rows that measure on a dataset's objectives; raise unless they allow those that are asked for."""
    assert spec.datasets is not None
    field = evaluation_field(index)
    examples = read_further(base, spec, file, field)
    try:
        resolve_objectives(spec.datasets[index].objectives, examples[0].supervision)
    except D2LoraError as error:
        raise error.within(field) from error
    return examples


def _measure(
    subject: Subject,
    spec: InitializationSpec,
    joint: Joint,
    held: Mapping[str, _Evaluation],
    *,
    settings: WorkerSettings,
    clock: Clock,
) -> dict[str, dict[str, HeldOut]]:
    """Return what base and adapter score on each evaluation, by its place; figures are named as their objectives."""
    adapters = joint.adapters if spec.adapters else joint.adapters * len(spec.training)
    total, done = sum(len(one.examples) for one in held.values()), 0

    def report(phase: Phase, part: int, parts: int) -> None:
        clock(phase, done + rows * part // parts, total)

    measured = {}
    for place, built in zip(spec.training, adapters, strict=True):
        if place not in held:
            continue
        objectives, examples = held[place].objectives, held[place].examples
        rows = len(examples)
        figures = evaluate(
            subject.base,
            subject.targets,
            spec,
            built.factors,
            objectives,
            examples,
            settings=settings,
            on_progress=report,
        )
        measured[place] = {f"{place}{name}": one for name, one in figures.items()}
        done += rows
    return measured

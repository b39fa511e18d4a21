"""What reports say of adapters from several datasets."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from d2lora.initializations import HeldOut, InitializationSpec
from d2lora.roles import Role
from worker.evidence import Intake, make_gradient_report, make_report
from worker.joint import Joint
from worker.pipeline import BuiltAdapter
from worker.report import DatasetReport, Report, pairwise_cosines
from worker.subject import Subject


def joint_report(
    subject: Subject,
    spec: InitializationSpec,
    rows: Sequence[Intake],
    built: BuiltAdapter,
    measured: Mapping[str, dict[str, HeldOut]],
    *,
    warnings: list[str],
    seconds: dict[str, float],
) -> Report:
    """Return the report of the one adapter for all datasets; ``measured`` is keyed as ``spec.training``."""
    together = _all_rows(spec, rows, warnings=warnings)
    evaluation = {name: one for own in measured.values() for name, one in own.items()} or None
    report = make_gradient_report(subject, spec, together, built, evaluation, shards=1, seconds=seconds)
    return report.model_copy(update={"datasets": _dataset_reports(spec, rows)})


def own_reports(
    subject: Subject,
    spec: InitializationSpec,
    rows: Sequence[Intake],
    adapters: Sequence[BuiltAdapter],
    measured: Mapping[str, dict[str, HeldOut]],
    *,
    warnings: list[str],
    seconds: dict[str, float],
) -> list[Report]:
    """Return the report of each dataset's own adapter; ``measured`` is keyed as ``spec.training``."""
    reports = []
    for place, described, own, built in zip(spec.training, _dataset_reports(spec, rows), rows, adapters, strict=True):
        said = own.model_copy(update={"warnings": warnings})
        report = make_gradient_report(subject, spec, said, built, measured.get(place), shards=1, seconds=seconds)
        # Which rows are held out depends on the other datasets' copies of them.
        decisive = "\n".join([place, report.summary.fingerprint, *(one.sha256 for one in rows)])
        fingerprint = hashlib.sha256(decisive.encode()).hexdigest()
        summary = report.summary.model_copy(update={"fingerprint": fingerprint})
        reports.append(report.model_copy(update={"summary": summary, "datasets": [described]}))
    return reports


def collection_report(
    subject: Subject,
    spec: InitializationSpec,
    rows: Sequence[Intake],
    joint: Joint,
    reports: Sequence[Report],
    *,
    warnings: list[str],
    seconds: dict[str, float],
) -> Report:
    """Return what is said of all datasets' own adapters together; ``reports`` are theirs."""
    together = _all_rows(spec, rows, warnings=warnings)
    summaries = [report.summary for report in reports]
    reasons = [
        f"{place.removesuffix('.')}: {one.start_reason}" for place, one in zip(spec.training, summaries, strict=True)
    ]
    cosines = pairwise_cosines(joint.cosines, joint.names)
    return make_report(
        subject,
        spec,
        together,
        used=together.used,
        seconds=seconds,
        summary={
            "start": "calibrated" if any(one.start == "calibrated" for one in summaries) else "zero",
            "start_reason": "; ".join(reasons),
            "objectives": joint.names,
            "objectives_reason": summaries[0].objectives_reason,
            "weights": {name: weight for one in summaries for name, weight in one.weights.items()},
            "cosines": {pair: value for pair, value in cosines.items() if value is not None},
            "held_out": {name: measured for one in summaries for name, measured in one.held_out.items()},
            "evaluation": {name: measured for one in summaries for name, measured in (one.evaluation or {}).items()}
            or None,
        },
        objectives=[objective for report in reports for objective in report.objectives],
        datasets=_dataset_reports(spec, rows),
        folders={
            folder: dataset.dataset_id for folder, dataset in zip(folders_of(spec), spec.training.values(), strict=True)
        },
    )


def folders_of(spec: InitializationSpec) -> list[str]:
    """Return the folders of all datasets' own adapters."""
    return [f"datasets-{index}" for index in range(len(spec.training))]


def _all_rows(spec: InitializationSpec, parts: Sequence[Intake], *, warnings: list[str]) -> Intake:
    """Return what became of the rows of all datasets together."""
    dropped: Counter[str] = Counter()
    for one in parts:
        dropped.update(one.dropped)
    evaluations = [one.extras[Role.EVALUATION] for one in parts if one.extras]
    return Intake(
        sha256=_digest(one.sha256 for one in parts),
        extras={Role.EVALUATION: _digest(evaluations)} if evaluations else {},
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


def _digest(digests: Iterable[str]) -> str:
    """Return one digest for several files."""
    return hashlib.sha256("".join(f"{one}\n" for one in digests).encode()).hexdigest()


def _dataset_reports(spec: InitializationSpec, parts: Sequence[Intake]) -> list[DatasetReport]:
    return [
        DatasetReport(
            dataset_id=named.dataset_id,
            sha256=one.sha256,
            evaluation_sha256=one.extras.get(Role.EVALUATION),
            rows=one.counts,
            mean_tokens=one.mean_tokens,
        )
        for named, one in zip(spec.training.values(), parts, strict=True)
    ]

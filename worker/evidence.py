"""From what was built to what the report says of it.

`Intake` is what the report knows of the rows; a job that is cut into shards carries it from its first worker to its
last.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from d2lora.initializations import Frozen, HeldOut, InitializationSpec, ResultSummary
from d2lora.roles import MEASURING, Role, without_dataset_ids
from d2lora.supervision import Supervision
from worker.data import Encoded, Example
from worker.line_search import Calibration, Trial
from worker.models import BaseModel, weight_norm
from worker.pipeline import BuiltAdapter
from worker.ranks import Allocation
from worker.report import (
    CalibrationReport,
    ObjectiveReport,
    RanksReport,
    Report,
    Reuse,
    RoundReport,
    RoundsReport,
    TrialReport,
    hardware,
    layer_report,
    pairwise_cosines,
    round_to,
    versions,
)
from worker.subject import Subject


class Intake(Frozen):
    """What became of a dataset's rows on their way to tokens."""

    sha256: str
    """Of the dataset's file."""
    extras: dict[Role, str]
    """sha256 of the files of all other datasets."""
    columns: dict[str, dict[str, str]]
    """Of ``dataset`` and the others, where the names in the file are not the fields' own."""
    read: int
    used: int
    truncated: int
    dropped: dict[str, int]
    """Reason -> number of rows."""
    supervision: Supervision
    mean_tokens: dict[str, float]
    warnings: list[str]
    reuse: Reuse | None = None
    decisive: str | None = None
    """Digest of what decides the adapter beside the request and the rows, if anything does."""

    @property
    def counts(self) -> dict[str, int]:
        """What a report says of the rows."""
        return {"read": self.read, "used": self.used, "truncated": self.truncated, **self.dropped}


def intake(
    encoded: Encoded,
    *,
    sha256: str,
    extras: dict[Role, str],
    columns: dict[str, dict[str, str]],
    warnings: list[str],
) -> Intake:
    """Return the summary of encoded rows."""
    return Intake(
        sha256=sha256,
        extras=extras,
        columns=columns,
        read=encoded.rows_read,
        used=len(encoded.examples),
        truncated=encoded.truncated,
        dropped=encoded.dropped,
        supervision=encoded.examples[0].supervision,
        mean_tokens=_mean_tokens(encoded.examples),
        warnings=warnings,
    )


def make_report(
    subject: Subject,
    spec: InitializationSpec,
    rows: Intake,
    *,
    used: int,
    seconds: dict[str, float],
    summary: Mapping[str, Any],
    warnings: Sequence[str] = (),
    **evidence: Any,
) -> Report:
    """Return a report with what it says of every adapter, whatever its method, filled in.

    ``used`` counts the rows that the adapter was made from; ``summary`` and ``evidence`` are the fields of the summary
    and of the report that only the method knows.
    """
    base = subject.base
    unsaid: dict[str, Any] = {"objectives": [], "weights": {}, "cosines": {}, "held_out": {}}
    return Report(
        summary=ResultSummary(
            rows_used=used,
            rows_truncated=rows.truncated,
            rows_dropped=sum(rows.dropped.values()),
            fingerprint=fingerprint(spec, rows, base),
            warnings=[*rows.warnings, *warnings],
            **unsaid | dict(summary),
        ),
        base_model=base.name,
        base_identity=base.identity,
        base_configuration_sha256=base.configuration_sha256,
        base_license=base.license,
        dataset_sha256=rows.sha256,
        extra_dataset_sha256=rows.extras,
        spec=spec,
        left_out=subject.left_out,
        rows={**rows.counts, "used": used},
        mean_tokens=rows.mean_tokens,
        seconds=seconds,
        versions=versions(),
        hardware=hardware(base.device),
        **evidence,
    )


def make_gradient_report(
    subject: Subject,
    spec: InitializationSpec,
    rows: Intake,
    built: BuiltAdapter,
    evaluation: dict[str, HeldOut] | None,
    *,
    shards: int,
    seconds: dict[str, float],
) -> Report:
    """Return the report of a built adapter."""
    names = built.names
    mixture = built.mixture
    cosines = pairwise_cosines(mixture.cosines, names)
    return make_report(
        subject,
        spec,
        rows,
        used=rows.used,
        seconds=seconds,
        summary={
            "start": "calibrated" if built.eta > 0 else "zero",
            "start_reason": built.reason,
            "objectives": names,
            "objectives_reason": _why_these(spec, rows),
            "weights": {name: round_to(one) for name, one in zip(names, mixture.weights.tolist(), strict=True)},
            "cosines": {pair: value for pair, value in cosines.items() if value is not None},
            "held_out": built.held_out,
            "evaluation": evaluation,
            "retained": built.retained,
        },
        shards=shards,
        reuse=rows.reuse,
        objectives=[
            ObjectiveReport(
                type=objective.type,
                dataset_id=spec.training[name.removesuffix(objective.type)].dataset_id if spec.datasets else None,
                gradient_norm=round_to(norm),
                weight=round_to(weight),
                noise_scale=noise,
            )
            for objective, name, norm, weight, noise in zip(
                built.objectives,
                names,
                mixture.norms.tolist(),
                mixture.weights.tolist(),
                built.noise_scales,
                strict=True,
            )
        ],
        calibration=_first_calibration(built),
        rounds=_rounds_report(built),
        ranks=_ranks_report(built),
        warnings=_of_ranks(built.allocation),
        layers={
            name: layer_report(
                layer,
                built.layer_gramians[name],
                names,
                eta=built.eta,
                weight_norm=weight_norm(subject.targets[name]),
                passes=2 if name in built.refined else 1,
            )
            for name, layer in built.direction.items()
        },
    )


def _why_these(spec: InitializationSpec, rows: Intake) -> str:
    asked = [dataset.objectives is not None for dataset in spec.training.values()]
    if all(asked):
        return "as requested"
    if any(asked):
        return "as requested, and where nothing is, all that the rows allow"
    if spec.datasets is not None:
        return "all that the rows of each dataset allow"
    if rows.supervision is Supervision.COMPLETION:
        return "rows without rejected completions or labels allow no other"
    return "all that the rows allow"


def _first_calibration(built: BuiltAdapter) -> CalibrationReport | None:
    if built.calibration is None:
        return None
    return _calibration_report(built.calibration, folds=built.folds, rows=_rows_scored(built.held_out))


def _rows_scored(held_out: Mapping[str, HeldOut]) -> int:
    """Return the rows of all datasets together; objectives of one dataset share them, and SFT may look at fewer."""
    of_dataset: dict[str, int] = {}
    for name, measured in held_out.items():
        place = name.rpartition(".")[0]
        of_dataset[place] = max(measured.rows, of_dataset.get(place, 0))
    return sum(of_dataset.values())


def _calibration_report(calibration: Calibration, *, folds: int, rows: int) -> CalibrationReport:
    return CalibrationReport(
        folds=folds,
        rows=rows,
        trials=[_trial_report(one) for one in calibration.trials],
        accepted_eta=calibration.accepted.eta if calibration.accepted else None,
        reason=calibration.reason,
        pilot=[_trial_report(one) for one in calibration.pilot],
    )


def _trial_report(trial: Trial) -> TrialReport:
    return TrialReport(
        eta=trial.eta,
        combined_change=_finite(trial.combined.mean),
        combined_standard_error=trial.combined.error,
        changes={name: _finite(change.mean) for name, change in trial.objectives.items()},
        standard_errors={name: change.error for name, change in trial.objectives.items()},
    )


def _rounds_report(built: BuiltAdapter) -> RoundsReport | None:
    if built.further is None:
        return None

    def named(values: Tensor) -> dict[str, float]:
        return {name: round_to(value) for name, value in zip(built.names, values.tolist(), strict=True)}

    return RoundsReport(
        rounds=[
            RoundReport(
                gradient_norms=named(one.mixture.norms),
                weights=named(one.mixture.weights),
                calibration=_calibration_report(
                    one.calibration, folds=built.further.folds, rows=_rows_scored(one.held_out)
                ),
                held_out=one.held_out,
            )
            for one in built.further.rounds
        ],
        stopped=built.further.stopped,
    )


def _of_ranks(spent: Allocation | None) -> list[str]:
    if spent is None or len(set(spent.ranks.values())) == 1:
        return []
    largest = max(spent.ranks.values())
    return [f"layers have ranks of their own, up to {largest}: check that your server reads rank_pattern and allows it"]


def _ranks_report(built: BuiltAdapter) -> RanksReport | None:
    if (spent := built.allocation) is None:
        return None
    energy = sum(layer.energy for layer in built.direction.values())
    return RanksReport(
        smallest=min(spent.ranks.values()),
        largest=max(spent.ranks.values()),
        parameters=spent.parameters,
        budget=spent.budget,
        energy_kept=round_to(min(1.0, spent.gain / energy)),
        uniform_energy_kept=round_to(min(1.0, spent.uniform_gain / energy)),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean_tokens(examples: Sequence[Example]) -> dict[str, float]:
    names = {None: "chosen", True: "desirable", False: "undesirable"}
    means = {
        names[label]: fmean(sum(one.chosen.completion_mask) for one in examples if one.desirable is label)
        for label in names
        if any(one.desirable is label for one in examples)
    }
    if examples[0].rejected is not None:
        means["rejected"] = fmean(sum(one.rejected.completion_mask) for one in examples if one.rejected is not None)
    return {name: round(value, 2) for name, value in means.items()}


def fingerprint(spec: InitializationSpec, rows: Intake, base: BaseModel) -> str:
    """Return the sha256 over all that decides the adapter; equal requests have equal fingerprints."""
    # How statistics were come by decides nothing.
    decisive = without_dataset_ids(
        spec.model_dump(exclude={"base_model", "revision", "metadata", "keep_statistics", "based_on"})
    )
    # Requests without these keep the fingerprint that they had before there were any.
    if spec.adapters is None:
        decisive.pop("adapters", None)
    if spec.lora.ranks is None:
        del decisive["lora"]["ranks"]
    content = {
        "spec": decisive,
        "base": base.identity,
        "dataset": rows.sha256,
        "extras": {role: digest for role, digest in rows.extras.items() if role not in MEASURING},
        "columns": {name: own for name, own in rows.columns.items() if name not in MEASURING},
        "dtype": str(base.model.dtype),
        "versions": versions(),
    }
    if base.configuration_sha256 is not None:
        content["base_configuration"] = base.configuration_sha256
    if rows.decisive is not None:
        content["decisive"] = rows.decisive
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""One initialization from files to files: load, read, build, evaluate, write."""

import errno
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from safetensors import SafetensorError
from torch import nn

from d2lora.datasets import DatasetFile, read_rows
from d2lora.errors import OutOfMemory, StorageFull
from d2lora.initializations import HeldOut, InitializationSpec, Objective, Phase, Result, ResultSummary, Sft
from d2lora.settings import WorkerSettings
from worker.adapters import write_adapter
from worker.data import Encoded, Example, encode_rows, make_batches
from worker.factors import adapted
from worker.models import BaseModel, load, weight_norm
from worker.objectives import Scores, needs_prompt, resolve_objectives, row_losses
from worker.pipeline import BuiltAdapter, OnProgress, build_adapter, pad_token
from worker.report import (
    CalibrationReport,
    ObjectiveReport,
    Report,
    TrialReport,
    hardware,
    layer_report,
    pairwise_cosines,
    round_to,
    versions,
)
from worker.statistics import is_out_of_memory, score
from worker.targets import lora_config, resolve_targets


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Turn exhausted memory and disks into our errors, whichever library noticed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} or "os error 28" in str(error):
            raise StorageFull("no room left for statistics or adapter; free space and run again") from error
        raise
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory("memory is used up; lower max_tokens_per_batch or r, or use a larger machine") from error
        raise


@_translated_errors()
def initialize(
    spec: InitializationSpec,
    dataset: DatasetFile,
    eval_dataset: DatasetFile | None,
    *,
    out: Path,
    settings: WorkerSettings,
    on_progress: OnProgress,
) -> Result:
    """Write the adapter's files into the existing directory ``out``, ``manifest.json`` last.

    Raises:
        D2LoraError: the request, the rows, the model or the numbers do not allow an adapter; ``out`` has no manifest.
    """
    marks: list[tuple[Phase, float]] = []

    def timed(phase: Phase, done: int, total: int) -> None:
        marks.append((phase, time.monotonic()))
        on_progress(phase, done, total)

    timed(Phase.LOADING, 0, 1)
    base = load(
        spec.base_model,
        revision=spec.revision,
        dtype=spec.dtype,
        device=settings.device,
        quantization=spec.quantization,
    )
    config = lora_config(base.model, spec.lora, base_model=spec.base_model, revision=spec.revision)
    targets = resolve_targets(base.model, config)
    timed(Phase.LOADING, 1, 1)

    timed(Phase.READING, 0, 1)
    max_length, warnings = _context(base, spec)
    encoded = encode_rows(read_rows(dataset), base.tokenizer, max_length=max_length)
    encoded_eval = None
    if eval_dataset is not None:
        encoded_eval = encode_rows(read_rows(eval_dataset), base.tokenizer, max_length=max_length)
        # Before the pass, so that an evaluation that cannot be made costs nothing.
        resolve_objectives(spec.objectives, paired=encoded_eval.examples[0].rejected is not None)
    timed(Phase.READING, 1, 1)

    # Inside ``out``, so that whoever cleans up after a killed process finds these too.
    with tempfile.TemporaryDirectory(prefix=".statistics-", dir=out) as directory:
        built = build_adapter(
            base, targets, spec, encoded.examples, settings=settings, directory=Path(directory), on_progress=timed
        )
    evaluation = None
    if encoded_eval is not None:
        evaluation = evaluate(base, targets, spec, built, encoded_eval.examples, settings=settings, on_progress=timed)
    timed(Phase.PUBLISHING, 0, 1)
    report = _report(
        base,
        targets,
        spec,
        encoded,
        built,
        evaluation,
        dataset_sha256=_sha256(dataset),
        eval_dataset_sha256=_sha256(eval_dataset) if eval_dataset else None,
        warnings=warnings,
        seconds=_laps(marks),
    )
    files = write_adapter(out, config=config, factors=built.factors, report=report)
    return Result(files=files, summary=report.summary)


def evaluate(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    built: BuiltAdapter,
    examples: Sequence[Example],
    *,
    settings: WorkerSettings,
    on_progress: OnProgress,
) -> dict[str, HeldOut]:
    """Return the objectives, and ``nll``, of base and delivered adapter on rows that took no part in it."""
    batches = make_batches(
        examples,
        [0] * len(examples),
        max_tokens=spec.max_tokens_per_batch or settings.tokens_per_batch(base.device.type),
        pad_token_id=pad_token(base),
    )
    paired = examples[0].rejected is not None
    objectives: list[Objective] = [one for one in built.objectives if paired or one.type == "sft"]
    with_prompt = needs_prompt(objectives)
    on_progress(Phase.EVALUATION, 0, 2 * len(batches))
    before, after = [], []
    for done, batch in enumerate(batches, start=1):
        before.append(score(base, batch, with_prompt=with_prompt))
        with adapted(targets, built.factors, scaling=spec.lora.scaling):
            after.append(score(base, batch, with_prompt=with_prompt))
        on_progress(Phase.EVALUATION, 2 * done, 2 * len(batches))
    reference, adapter = Scores.concatenate(before), Scores.concatenate(after)
    measured: dict[str, Objective] = {"nll": Sft()} | {one.type: one for one in objectives}
    return {
        name: HeldOut(
            base=row_losses(objective, reference, reference).mean().item(),
            adapter=row_losses(objective, adapter, reference).mean().item(),
            rows=len(examples),
        )
        for name, objective in measured.items()
    }


def _report(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    encoded: Encoded,
    built: BuiltAdapter,
    evaluation: dict[str, HeldOut] | None,
    *,
    dataset_sha256: str,
    eval_dataset_sha256: str | None,
    warnings: list[str],
    seconds: dict[str, float],
) -> Report:
    names = [objective.type for objective in built.objectives]
    mixture = built.mixture
    summary = ResultSummary(
        start="calibrated" if built.eta > 0 else "zero",
        start_reason=built.reason,
        objectives=names,
        objectives_reason="as requested" if spec.objectives else _why_these(encoded.examples),
        weights={name: round_to(weight) for name, weight in zip(names, mixture.weights.tolist(), strict=True)},
        cosines={pair: value for pair, value in pairwise_cosines(mixture.cosines, names).items() if value is not None},
        held_out=built.held_out,
        evaluation=evaluation,
        rows_used=len(encoded.examples),
        rows_truncated=encoded.truncated,
        rows_dropped=sum(encoded.dropped.values()),
        fingerprint=fingerprint(
            spec, base_identity=base.identity, dataset_sha256=dataset_sha256, dtype=str(base.model.dtype)
        ),
        warnings=warnings,
    )
    return Report(
        summary=summary,
        base_model=base.name,
        base_identity=base.identity,
        base_license=base.license,
        dataset_sha256=dataset_sha256,
        eval_dataset_sha256=eval_dataset_sha256,
        spec=spec,
        rows={
            "read": encoded.rows_read,
            "used": len(encoded.examples),
            "truncated": encoded.truncated,
            **encoded.dropped,
        },
        mean_tokens=_mean_tokens(encoded.examples),
        objectives=[
            ObjectiveReport(type=name, gradient_norm=round_to(norm), weight=round_to(weight), noise_scale=noise)
            for name, norm, weight, noise in zip(
                names, mixture.norms.tolist(), mixture.weights.tolist(), built.noise_scales, strict=True
            )
        ],
        calibration=_calibration_report(built),
        layers={
            name: layer_report(
                layer, built.layer_gramians[name], names, eta=built.eta, weight_norm=weight_norm(targets[name])
            )
            for name, layer in built.direction.items()
        },
        seconds=seconds,
        versions=versions(),
        hardware=hardware(base.device),
    )


def _why_these(examples: Sequence[Example]) -> str:
    if examples[0].rejected is None:
        return "rows without rejected completions allow no other"
    return "all that the rows allow"


def _calibration_report(built: BuiltAdapter) -> CalibrationReport | None:
    if built.calibration is None:
        return None
    return CalibrationReport(
        folds=built.folds,
        rows=built.held_out["nll"].rows,
        trials=[
            TrialReport(
                eta=trial.eta,
                combined_change=_finite(trial.combined.mean),
                combined_standard_error=trial.combined.error,
                changes={name: _finite(change.mean) for name, change in trial.objectives.items()},
                standard_errors={name: change.error for name, change in trial.objectives.items()},
            )
            for trial in built.calibration.trials
        ],
        accepted_eta=built.eta or None,
        reason=built.reason,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean_tokens(examples: Sequence[Example]) -> dict[str, float]:
    means = {"chosen": fmean(sum(example.chosen.completion_mask) for example in examples)}
    if examples[0].rejected is not None:
        means["rejected"] = fmean(sum(one.rejected.completion_mask) for one in examples if one.rejected is not None)
    return {name: round(value, 2) for name, value in means.items()}


def fingerprint(spec: InitializationSpec, *, base_identity: str, dataset_sha256: str, dtype: str) -> str:
    """Return the sha256 over all that decides the adapter; equal requests have equal fingerprints."""
    decisive = spec.model_dump(exclude={"base_model", "revision", "dataset_id", "eval_dataset_id", "metadata"})
    content = {
        "spec": decisive,
        "base": base_identity,
        "dataset": dataset_sha256,
        "dtype": dtype,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _context(base: BaseModel, spec: InitializationSpec) -> tuple[int, list[str]]:
    """Return the longest sequence that both the request and the model allow, and what to say about it."""
    limit = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit >= spec.max_length:
        return spec.max_length, []
    return limit, [f"max_length {spec.max_length} is above the model's context; {limit} was used"]


def _laps(marks: Sequence[tuple[Phase, float]]) -> dict[str, float]:
    """Return the seconds between marks, added up by the phase that the earlier mark names."""
    seconds: dict[str, float] = {}
    for (phase, start), (_, end) in pairwise(marks):
        seconds[phase] = seconds.get(phase, 0.0) + end - start
    return {phase: round(value, 3) for phase, value in seconds.items()}


def _sha256(file: DatasetFile) -> str:
    with file.path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

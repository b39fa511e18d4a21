"""An initialization by a warm-up: read the general rows, start, train, evaluate, write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2lora.datasets import DatasetFile, read_rows
from d2lora.errors import ObjectiveUnavailable
from d2lora.initializations import Dpo, HeldOut, InitializationSpec, Objective, Orpo, Phase, Result, Sft
from d2lora.methods import Warmup
from d2lora.roles import FIELDS, Role
from d2lora.settings import WorkerSettings
from d2lora.supervision import rows_needed
from worker.adapters import write_adapter
from worker.clock import Clock
from worker.data import Encoded, Example, encode_rows
from worker.evaluation import evaluate, measure
from worker.evidence import Intake, make_gradient_report, make_report
from worker.factors import Factors
from worker.models import weight_norm
from worker.objectives import resolve_objectives
from worker.output_scale import scaled_as_asked
from worker.pipeline import BuiltAdapter, build_adapter
from worker.report import Report, WarmupReport, round_to
from worker.subject import Subject, length_limit
from worker.warmup import Warmed, check_warm_up, warm_up, warm_up_rows

_TRAINERS = {"sft": "SFTTrainer", "dpo": "DPOTrainer", "orpo": "ORPOTrainer"}


@dataclass(frozen=True)
class GeneralRows:
    """What became of the rows that the warm-up trains on."""

    encoded: Encoded
    chosen: list[Example]
    """Those that its steps see, in their order."""


def read_general_rows(
    subject: Subject, spec: InitializationSpec, extras: Mapping[Role, DatasetFile]
) -> GeneralRows | None:
    """Return the rows of a warm-up, or None if the method is another.

    Raises:
        ObjectiveUnavailable: the trainer cannot learn from rows of this form.
        ModelUnsupported: the base cannot be trained on.
    """
    method = spec.method
    if not isinstance(method, Warmup):
        return None
    check_warm_up(subject.base)
    file = extras[Role.WARMUP]
    encoded = encode_rows(read_rows(file), subject.base.tokenizer, max_length=length_limit(subject.base, spec)[0])
    if method.trainer not in encoded.examples[0].supervision.objectives:
        raise ObjectiveUnavailable(
            f"{FIELDS[Role.WARMUP]}: trainer {method.trainer} needs {rows_needed(method.trainer)}"
        )
    return GeneralRows(encoded, warm_up_rows(encoded.examples, method, spec.seed))


def initialize_by_warmup(
    subject: Subject,
    spec: InitializationSpec,
    encoded: Encoded,
    rows: Intake,
    general: GeneralRows,
    evaluation: Sequence[Example] | None,
    *,
    out: Path,
    directory: Path,
    settings: WorkerSettings,
    clock: Clock,
) -> Result:
    """Train the adapter on the general rows, evaluate it as any other, and write its files."""
    method = spec.method
    assert isinstance(method, Warmup)
    base, targets = subject.base, subject.targets
    built = None
    if method.start == "gradient":
        built = build_adapter(
            base, targets, spec, encoded.examples, settings=settings, directory=directory, on_progress=clock
        )
        built = scaled_as_asked(built, subject, spec)
    warmed = warm_up(
        base,
        subject.config,
        method,
        general.chosen,
        start=built.factors if built else None,
        seed=spec.seed,
        directory=directory,
        on_progress=clock,
    )
    loss = _losses(subject, spec, method, warmed, general.chosen, settings=settings, clock=clock)
    # Every objective that the rows allow, so that the figures stand beside those of other methods.
    objectives = built.objectives if built else resolve_objectives(None, rows.supervision)
    measured = measure(subject, spec, warmed.factors, objectives, evaluation, settings=settings, clock=clock)
    clock(Phase.PUBLISHING, 0, 1)
    warmup = _warmup_report(subject, spec, method, warmed, general, rows.extras[Role.WARMUP], loss)
    report = _report(subject, spec, rows, built, measured, clock.seconds(), warmup)
    files = write_adapter(out, config=subject.config, factors=warmed.factors, report=report)
    return Result(files=files, summary=report.summary)


def _losses(
    subject: Subject,
    spec: InitializationSpec,
    method: Warmup,
    warmed: Warmed,
    rows: Sequence[Example],
    *,
    settings: WorkerSettings,
    clock: Clock,
) -> dict[str, float]:
    """Return what base, start and end of the warm-up score on the rows that it saw."""
    objectives: dict[str, Objective] = {
        "sft": Sft(),
        "dpo": Dpo(beta=method.coefficient),
        "orpo": Orpo(beta=method.coefficient, nll="full_sequence"),
    }

    def score(factors: Mapping[str, Factors]) -> HeldOut:
        wanted = [objectives[method.trainer]]
        measured = evaluate(
            subject.base, subject.targets, spec, factors, wanted, rows, settings=settings, on_progress=clock
        )
        return measured[method.trainer]

    end = score(warmed.factors)
    start = score(warmed.start).adapter if method.start == "gradient" else end.base
    return {"base": round_to(end.base), "start": round_to(start), "end": round_to(end.adapter)}


def _report(
    subject: Subject,
    spec: InitializationSpec,
    rows: Intake,
    built: BuiltAdapter | None,
    evaluation: dict[str, HeldOut] | None,
    seconds: dict[str, float],
    warmup: WarmupReport,
) -> Report:
    """Return the report: of our own start it has the evidence, of PEFT's there is none."""
    reason = f"{warmup.steps} steps of TRL's {warmup.trainer} on general rows, from "
    if built is None:
        summary = {
            "start": "warmup",
            "start_reason": reason + "PEFT's default start",
            "objectives_reason": "the warm-up has its own, that of its trainer",
            "evaluation": evaluation,
        }
        return make_report(subject, spec, rows, used=0, seconds=seconds, summary=summary, warmup=warmup)
    report = make_gradient_report(subject, spec, rows, built, evaluation, shards=1, seconds=seconds)
    reason += f"the gradient method's {'calibrated' if built.eta > 0 else 'zero'} start"
    # What was held out measured the start, which is not what is delivered.
    changes = {"start": "warmup", "start_reason": reason, "held_out": {}}
    return report.model_copy(update={"summary": report.summary.model_copy(update=changes), "warmup": warmup})


def _warmup_report(
    subject: Subject,
    spec: InitializationSpec,
    method: Warmup,
    warmed: Warmed,
    general: GeneralRows,
    sha256: str,
    loss: dict[str, float],
) -> WarmupReport:
    encoded = general.encoded
    magnitudes = {}
    for name, layer in warmed.factors.items():
        norm = weight_norm(subject.targets[name])
        update = spec.lora.scaling * (layer.lora_B @ layer.lora_A).norm().item()
        magnitudes[name] = round_to(update / norm) if norm else 0.0
    return WarmupReport(
        trainer=_TRAINERS[method.trainer],
        start=method.start,
        steps=method.steps,
        learning_rate=method.learning_rate,
        batch_size=method.batch_size,
        beta=None if method.trainer == "sft" else method.coefficient,
        dataset_sha256=sha256,
        rows={
            "read": encoded.rows_read,
            "used": len(general.chosen),
            "truncated": encoded.truncated,
            **encoded.dropped,
        },
        loss=loss,
        step_losses=[round_to(value) for value in warmed.losses],
        relative_magnitudes=magnitudes,
    )

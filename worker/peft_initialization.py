"""An initialization by one of PEFT's methods: build, evaluate, write."""

from collections.abc import Sequence
from pathlib import Path

from d2lora.initializations import InitializationSpec, Phase, Result
from d2lora.settings import WorkerSettings
from worker.adapters import write_adapter
from worker.clock import Clock
from worker.data import Encoded, Example
from worker.evaluation import measure
from worker.evidence import Intake
from worker.objectives import resolve_objectives
from worker.peft_evidence import make_peft_report
from worker.peft_methods import build_peft_adapter
from worker.subject import Subject


def initialize_by_peft(
    subject: Subject,
    spec: InitializationSpec,
    encoded: Encoded,
    rows: Intake,
    evaluation: Sequence[Example] | None,
    *,
    out: Path,
    settings: WorkerSettings,
    clock: Clock,
) -> Result:
    """Let PEFT initialize the adapter, evaluate it as ours, and write its files."""
    adapter = build_peft_adapter(
        subject.base, subject.targets, subject.config, spec, encoded.examples, settings=settings, on_progress=clock
    )
    # Every objective that the rows allow, so that the figures stand beside those of our own method.
    objectives = resolve_objectives(None, rows.supervision)
    measured = measure(subject, spec, adapter.factors, objectives, evaluation, settings=settings, clock=clock)
    clock(Phase.PUBLISHING, 0, 1)
    report = make_peft_report(subject, spec, rows, adapter, measured, seconds=clock.seconds())
    files = write_adapter(out, config=adapter.config, factors=adapter.factors, report=report)
    return Result(files=files, summary=report.summary)

"""What the command line shows: jobs, datasets, summaries, progress."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from d2lora.datasets import Dataset
from d2lora.initializations import Initialization, ResultSummary
from d2lora.initializations import Progress as JobProgress

err = Console(stderr=True)


def print_job(job: Initialization, *, as_json: bool) -> None:
    """Print one job: a line and its summary, or JSON."""
    if as_json:
        print(job.model_dump_json())
        return
    progress = f"  {job.progress.phase} {job.progress.done}/{job.progress.total}" if job.progress else ""
    error = f"  {job.error.code}: {job.error.detail}" if job.error else ""
    print(f"{job.id}  {job.state}{progress}{error}")
    if job.result is not None:
        print_summary(job.result.summary)


def print_dataset(dataset: Dataset, *, as_json: bool) -> None:
    """Print one dataset: a line, or JSON."""
    if as_json:
        print(dataset.model_dump_json())
        return
    created = dataset.created_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"{dataset.id}  {created}  {dataset.rows} rows of {dataset.row_schema}, {dataset.size} bytes")


def print_summary(summary: ResultSummary) -> None:
    """Print what a job's result says about its adapter."""
    print(f"start: {summary.start} ({summary.start_reason})")
    weights = ", ".join(f"{name} {weight:.3f}" for name, weight in summary.weights.items())
    print(
        f"objectives ({summary.objectives_reason}): {weights}"
        + "".join(f"; cos({pair}) {value:+.3f}" for pair, value in summary.cosines.items())
    )
    for name, value in summary.held_out.items():
        print(f"held out, cross-validated: {name} {value.base:.4f} -> {value.adapter:.4f} on {value.rows} rows")
    for name, value in (summary.evaluation or {}).items():
        print(f"evaluation dataset: {name} {value.base:.4f} -> {value.adapter:.4f} on {value.rows} rows")
    if summary.retained is not None:
        kept = summary.retained
        print(f"retain rows: nll {kept.base:.4f} -> {kept.adapter:.4f} on {kept.rows} rows")
    print(f"rows: {summary.rows_used} used, {summary.rows_truncated} truncated, {summary.rows_dropped} dropped")
    for warning in summary.warnings:
        print(f"warning: {warning}")


@contextmanager
def progress_bar() -> Iterator[Callable[[JobProgress | None], None]]:
    """Show progress on standard error: a bar on a terminal, a line per phase elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    seen: str | None = None
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        bar = bars.add_task("waiting", total=None, left="")

        def show(progress: JobProgress | None) -> None:
            nonlocal seen
            if progress is None:
                return
            left = f"{progress.seconds_left:.0f} s left" if progress.seconds_left else ""
            bars.update(
                bar, description=progress.phase, completed=progress.done, total=progress.total or None, left=left
            )
            if progress.phase != seen and not err.is_terminal:
                err.print(progress.phase, highlight=False)
            seen = progress.phase

        yield show

"""Claim, run, settle: the one place where a job is worked on, whoever wakes it."""

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from d2lora.datasets import DatasetFile
from d2lora.errors import D2LoraError, InternalError, OutOfMemory
from d2lora.initializations import InitializationSpec, Phase, Progress, Result
from d2lora.settings import WorkerSettings
from d2lora.storage import ObjectStorage, initialization_prefix
from d2lora.store import Claim, Standing, Store, StoredDataset
from worker.publishing import publish

log = logging.getLogger(__name__)

OnProgress = Callable[[Phase, int, int], None]
Build = Callable[[InitializationSpec, DatasetFile, DatasetFile | None, Path, OnProgress], Result]
"""Writes the adapter's files into a directory; calls back at least once per batch, which may raise to stop it."""


_JOB_PREFIX = "d2lora-job-"


def remove_leftovers() -> None:
    """Remove the directories of jobs whose worker on this machine was killed; they hold data rows."""
    for path in Path(tempfile.gettempdir()).glob(f"{_JOB_PREFIX}*"):
        owner = path.name.removeprefix(_JOB_PREFIX).partition("-")[0]
        if owner.isdecimal() and not _is_alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


class Stopped(BaseException):
    """The job must stop now; not an Exception, so that no handler inside the build swallows it."""


@dataclass
class _Watch:
    """What the heartbeat learns and the build reports, shared between their threads."""

    standing: Standing = Standing.HELD
    progress: Progress | None = None
    phase_started: dict[Phase, float] = field(default_factory=dict)


def run_next(
    store: Store,
    storage: ObjectStorage,
    build: Build,
    settings: WorkerSettings,
    *,
    worker: str,
    stop: threading.Event,
    initialization_id: str | None = None,
) -> bool:
    """Claim one job and work on it to its end; False if there was none to claim.

    When ``stop`` is set, the job is handed back at its next sign of progress and another worker takes it.
    """
    claim = store.claim(
        worker, lease=settings.lease, max_attempts=settings.max_attempts, initialization_id=initialization_id
    )
    if claim is None:
        return False
    log.info("job_claimed id=%s attempt=%d", claim.id, claim.attempt)
    started = time.monotonic()
    prefix = initialization_prefix(claim.tenant, claim.id, claim.attempt)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{_JOB_PREFIX}{os.getpid()}-") as directory:
            with _heartbeat(store, claim, settings) as watch:
                result = _build(claim, storage, build, Path(directory), watch, stop)
                publish(result, Path(directory), storage, prefix)
            outcome = "succeeded" if store.succeed(claim, result, prefix) else "superseded"
        if outcome == "superseded":
            storage.delete_prefix(prefix)
    except Stopped:
        outcome = _settle_stopped(store, claim, watch, stop)
    except D2LoraError as error:
        outcome = _settle_failed(store, claim, error, settings)
    except MemoryError:
        outcome = _settle_failed(store, claim, OutOfMemory("the worker's memory is used up"), settings)
    except Exception:
        # The traceback may show paths and values that are nobody else's business; it stays in the log.
        log.exception("job_crashed id=%s attempt=%d", claim.id, claim.attempt)
        outcome = _settle_failed(store, claim, InternalError("an internal error; the worker's log has it"), settings)
    log.info("job_%s id=%s attempt=%d seconds=%.1f", outcome, claim.id, claim.attempt, time.monotonic() - started)
    return True


def _build(
    claim: Claim, storage: ObjectStorage, build: Build, directory: Path, watch: _Watch, stop: threading.Event
) -> Result:
    def on_progress(phase: Phase, done: int, total: int) -> None:
        if stop.is_set() or watch.standing is not Standing.HELD:
            raise Stopped
        began = watch.phase_started.setdefault(phase, time.monotonic())
        left = (time.monotonic() - began) / done * (total - done) if done else None
        watch.progress = Progress(phase=phase, done=done, total=total, seconds_left=left)

    inputs = directory / "inputs"
    inputs.mkdir()
    dataset = _fetch(claim.dataset, storage, inputs / "dataset")
    evaluation = None
    if claim.eval_dataset is not None:
        evaluation = _fetch(claim.eval_dataset, storage, inputs / "eval_dataset")
    result = build(claim.spec, dataset, evaluation, directory, on_progress)
    on_progress(Phase.PUBLISHING, 0, 1)
    return result


def _fetch(stored: StoredDataset, storage: ObjectStorage, path: Path) -> DatasetFile:
    storage.get_file(stored.key, path, stored.dataset.sha256)
    return DatasetFile(path, stored.dataset.format, stored.dataset.columns)


@contextmanager
def _heartbeat(store: Store, claim: Claim, settings: WorkerSettings) -> Iterator[_Watch]:
    """Renew the lease and store progress while the block runs."""
    watch = _Watch()
    done = threading.Event()

    def beat() -> None:
        renewed = time.monotonic()
        while not done.wait(min(settings.heartbeat_seconds, settings.lease_seconds / 3)):
            try:
                watch.standing = store.renew(claim, lease=settings.lease, progress=watch.progress)
                renewed = time.monotonic()
            except Exception:
                log.exception("heartbeat_failed id=%s attempt=%d", claim.id, claim.attempt)
                if time.monotonic() - renewed > settings.lease_seconds:
                    watch.standing = Standing.LOST  # somebody else may hold it by now
            if watch.standing is Standing.LOST:
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join()


def _settle_stopped(store: Store, claim: Claim, watch: _Watch, stop: threading.Event) -> str:
    if watch.standing is Standing.LOST:
        return "lost"
    if watch.standing is Standing.CANCELLING:
        return "cancelled" if store.cancelled(claim) else "lost"
    assert stop.is_set()
    return "handed_back" if store.hand_back(claim) else "lost"


def _settle_failed(store: Store, claim: Claim, error: D2LoraError, settings: WorkerSettings) -> str:
    problem = error.problem()
    log.warning("job_error id=%s attempt=%d code=%s", claim.id, claim.attempt, problem.code)
    if not error.retryable:
        return "failed" if store.fail(claim, problem) else "lost"
    settled = store.retry(claim, problem, max_attempts=settings.max_attempts, pause=settings.lease / 3)
    return "retrying" if settled else "lost"

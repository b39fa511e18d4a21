"""Claim, run, settle: the one place where a unit of work is done, whoever wakes it.

A unit is a job or a shard of one (docs/decisions/0002-the-cluster.md).
"""

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

from d2lora.claims import Claim, Outcome, Plan, ShardClaim, Standing
from d2lora.errors import (
    D2LoraError,
    DeviceFailure,
    FormatMismatch,
    FormatOutdated,
    InternalError,
    OutOfMemory,
    StoreUnavailable,
)
from d2lora.initializations import Phase, Progress, Result
from d2lora.leases import Leases
from d2lora.settings import WorkerSettings
from d2lora.storage import ObjectStorage, initialization_prefix
from worker.files import Files
from worker.publishing import publish
from worker.sharing import Sharing
from worker.units import OnProgress, ShardFiles, Split, Work

log = logging.getLogger(__name__)

_JOB_PREFIX = "d2lora-job-"
_STANDING_SECONDS = 1.0
"""How often a running unit asks whether it should stop, between two renewals of its lease."""


class Stopped(BaseException):
    """The unit must stop now; not an Exception, so that no handler inside the work swallows it."""


class Recycle(Exception):
    """The unit is settled, but this process is of no use any longer and should end."""


@dataclass
class _Watch:
    """What the heartbeat learns and the work reports, shared between their threads."""

    standing: Standing = Standing.HELD
    progress: Progress | None = None
    phase_started: dict[Phase, float] = field(default_factory=dict)
    asked: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Runner:
    """Does one unit after another with the same means."""

    leases: Leases
    storage: ObjectStorage
    work: Work
    settings: WorkerSettings
    worker: str
    stop: threading.Event
    """When it is set, the unit is handed back at its next sign of progress and another worker takes it."""

    def run_next(self, initialization_id: str | None = None) -> bool:
        """Claim one unit, of this job if one is named, and work on it to its end; False if there was none to claim.

        Raises:
            Recycle: the process should end.
        """
        if self.stop.is_set():
            return False
        claim = self.leases.claim(
            self.worker,
            lease=self.settings.lease,
            max_attempts=self.settings.max_attempts,
            queues=self.settings.queues,
            initialization_id=initialization_id,
        )
        if claim is not None:
            self._run(claim)
        return claim is not None

    def _run(self, claim: Claim | ShardClaim) -> None:
        name = _name(claim)
        log.info("claimed %s", name)
        started = time.monotonic()
        watch, recycle = _Watch(), False
        try:
            with tempfile.TemporaryDirectory(prefix=f"{_JOB_PREFIX}{os.getpid()}-") as directory:
                outcome = self._do(claim, Path(directory), watch)
        except Stopped:
            outcome = self._settle_stopped(claim, watch)
        except FormatMismatch as error:
            outcome = self._settle_format(claim, error)
        except StoreUnavailable:
            log.warning("store_unavailable %s", name)
            outcome = self._settle(lambda: self.leases.hand_back(claim, pause=self.settings.lease / 3), "handed_back")
        except D2LoraError as error:
            outcome, recycle = self._settle_failed(claim, error), isinstance(error, DeviceFailure)
        except MemoryError:
            outcome = self._settle_failed(claim, OutOfMemory("the worker's memory is used up"))
        except Exception:
            # The traceback may show paths and values that are nobody else's business; it stays in the log.
            log.exception("crashed %s", name)
            outcome = self._settle_failed(claim, InternalError("an internal error; the worker's log has it"))
        log.info("%s %s seconds=%.1f", outcome, name, time.monotonic() - started)
        if recycle:
            raise Recycle

    def _do(self, claim: Claim | ShardClaim, directory: Path, watch: _Watch) -> str:
        files = Files(self.storage, directory)
        if isinstance(claim, ShardClaim):
            return self._do_shard(claim, files, watch)
        if claim.plan is not None:
            return self._build(claim, claim.plan, files, watch)
        return self._do_whole(claim, files, watch)

    def _do_whole(self, claim: Claim, files: Files, watch: _Watch) -> str:
        with self._heartbeat(claim, watch):
            progress = self._progress(claim, watch)
            dataset, evaluation = files.dataset(claim.dataset), files.dataset(claim.eval_dataset)
            done = self.work.initialize(claim.spec, dataset, evaluation, files.directory, progress)
            progress(Phase.PUBLISHING, 0, 1)
            if not isinstance(done, Split):
                return self._publish(claim, done, files)
            plan, shards = files.put_split(claim, done)
        return self._settle(lambda: self.leases.split(claim, plan, shards), "split")

    def _do_shard(self, claim: ShardClaim, files: Files, watch: _Watch) -> str:
        with self._heartbeat(claim, watch):
            progress = self._progress(claim, watch)
            for file in claim.inputs:
                files.get(file)
            output = self.work.run_shard(claim.spec, claim.task, files.directory, progress)
            outcome = Outcome(files=files.put_shard(claim, output.files), scores=output.scores)
        return self._settle(lambda: self.leases.finish_shard(claim, outcome), "finished")

    def _build(self, claim: Claim, plan: Plan, files: Files, watch: _Watch) -> str:
        with self._heartbeat(claim, watch):
            progress = self._progress(claim, watch)
            share = Sharing(
                claim,
                self.leases,
                files,
                settings=self.settings,
                worker=self.worker,
                check=lambda: self._check(claim, watch),
                help_out=lambda shard, directory: self._help(shard, directory, claim, watch),
            )
            evaluation = files.dataset(claim.eval_dataset)
            plan_file = files.get(plan)
            shards = self._shards(claim, files, progress)
            result = self.work.finish(claim.spec, plan_file, shards, evaluation, files.directory, share, progress)
            progress(Phase.PUBLISHING, 0, 1)
            return self._publish(claim, result, files)

    def _shards(self, claim: Claim, files: Files, progress: OnProgress) -> Iterator[ShardFiles]:
        """Give a job's shards one by one; a shard's files are gone once the next is asked for."""
        for number, shard in enumerate(claim.shards):
            progress(Phase.READING, number, len(claim.shards))
            below = f"shard-{number}"
            (rows,) = (files.get(file, below) for file in shard.inputs)
            yield ShardFiles(rows, [files.get(file, below) for file in shard.outcome.files])
            shutil.rmtree(files.directory / below)

    def _help(self, shard: ShardClaim, directory: Path, claim: Claim, watch: _Watch) -> None:
        """Do a shard of the builder's own job; if somebody else has taken it over, they finish it."""
        own = _Watch()

        def progress(phase: Phase, done: int, total: int) -> None:
            self._check(claim, watch)
            if own.standing is not Standing.HELD:
                raise _TakenOver
            own.progress = Progress(phase=phase, done=done, total=total)

        try:
            with self._heartbeat(shard, own):
                output = self.work.run_shard(shard.spec, shard.task, directory, progress)
            self._settle(lambda: self.leases.finish_shard(shard, Outcome(scores=output.scores)), "finished")
        except _TakenOver:
            log.info("taken_over %s", _name(shard))

    def _publish(self, claim: Claim, result: Result, files: Files) -> str:
        prefix = initialization_prefix(claim.tenant, claim.id, claim.attempt)
        publish(result, files.directory, self.storage, prefix)
        outcome = self._settle(lambda: self.leases.succeed(claim, result, prefix), "succeeded")
        if outcome == "lost":
            self.storage.delete_prefix(prefix)
        return outcome

    def _progress(self, claim: Claim | ShardClaim, watch: _Watch) -> OnProgress:
        def on_progress(phase: Phase, done: int, total: int) -> None:
            self._check(claim, watch)
            began = watch.phase_started.setdefault(phase, time.monotonic())
            left = (time.monotonic() - began) / done * (total - done) if done else None
            watch.progress = Progress(phase=phase, done=done, total=total, seconds_left=left)

        return on_progress

    def _check(self, claim: Claim | ShardClaim, watch: _Watch) -> None:
        """Raise Stopped if the unit should not go on."""
        if not self.stop.is_set() and time.monotonic() - watch.asked > _STANDING_SECONDS:
            watch.asked = time.monotonic()
            try:
                watch.standing = self.leases.standing(claim)
            except StoreUnavailable:
                log.warning("standing_unknown %s", _name(claim))  # the heartbeat decides how long that is bearable
        if self.stop.is_set() or watch.standing is not Standing.HELD:
            raise Stopped

    @contextmanager
    def _heartbeat(self, claim: Claim | ShardClaim, watch: _Watch) -> Iterator[None]:
        """Renew the lease and store progress while the block runs."""
        done = threading.Event()

        def beat() -> None:
            renewed = time.monotonic()
            while not done.wait(min(self.settings.heartbeat_seconds, self.settings.lease_seconds / 3)):
                try:
                    watch.standing = self.leases.renew(claim, lease=self.settings.lease, progress=watch.progress)
                    renewed = time.monotonic()
                except Exception as error:  # whatever it is, this thread has to go on
                    known = isinstance(error, StoreUnavailable)
                    log.warning("heartbeat_failed %s", _name(claim), exc_info=not known)
                    if time.monotonic() - renewed > self.settings.lease_seconds:
                        watch.standing = Standing.LOST  # somebody else may hold it by now
                if watch.standing is Standing.LOST:
                    return

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _settle_stopped(self, claim: Claim | ShardClaim, watch: _Watch) -> str:
        if watch.standing is Standing.LOST:
            return "lost"
        if watch.standing is Standing.CANCELLING:
            assert isinstance(claim, Claim)
            return self._settle(lambda: self.leases.cancelled(claim), "cancelled")
        assert self.stop.is_set()
        return self._settle(lambda: self.leases.hand_back(claim), "handed_back")

    def _settle_format(self, claim: Claim | ShardClaim, error: FormatMismatch) -> str:
        """During an upgrade: an older version leaves a newer one's files to it, a newer one begins the job anew."""
        log.warning("format_mismatch %s: %s", _name(claim), error.detail)
        if isinstance(error, FormatOutdated):
            return self._settle(lambda: self.leases.restart(claim), "restarted")
        return self._settle(lambda: self.leases.hand_back(claim, pause=self.settings.lease / 3), "handed_back")

    def _settle_failed(self, claim: Claim | ShardClaim, error: D2LoraError) -> str:
        problem = error.problem()
        log.warning("failed %s code=%s", _name(claim), problem.code)
        if not error.retryable:
            return self._settle(lambda: self.leases.fail(claim, problem), "failed")
        attempts, pause = self.settings.max_outage_attempts, self.settings.lease / 3
        return self._settle(lambda: self.leases.retry(claim, problem, max_attempts=attempts, pause=pause), "retrying")

    def _settle(self, verb: Callable[[], bool], outcome: str) -> str:
        """Return ``outcome``, or "lost" if the claim no longer counted; a database that is away is waited for.

        When the wait takes longer than the lease, the lease settles the unit.
        """
        end = time.monotonic() + self.settings.lease_seconds
        while True:
            try:
                return outcome if verb() else "lost"
            except StoreUnavailable:
                if time.monotonic() > end:
                    return "abandoned"
                time.sleep(_STANDING_SECONDS)


class _TakenOver(BaseException):
    """A part of a build is somebody else's by now; not an Exception, so that no handler swallows it."""


def _name(claim: Claim | ShardClaim) -> str:
    shard = f" shard={claim.number}" if isinstance(claim, ShardClaim) else ""
    return f"id={claim.id}{shard} attempt={claim.attempt}"


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

"""Claim, run, settle: the one place where a unit of work is done, whoever wakes it.

A unit is a job or a shard of one (docs/decisions/0002-the-cluster.md).
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from d2lora.claims import Claim, Outcome, Plan, ShardClaim, Standing
from d2lora.errors import (
    D2LoraError,
    DeviceFailure,
    FormatMismatch,
    FormatOutdated,
    InternalError,
    ModelUnavailable,
    OutOfMemory,
    ScratchFull,
    ShardGone,
    StoreUnavailable,
)
from d2lora.initializations import Phase, Result
from d2lora.leases import Leases
from d2lora.scratch import room_for, scratch_directory
from d2lora.settings import WorkerSettings
from d2lora.storage import ObjectStorage, initialization_prefix
from worker.files import Files, build_prefix, shard_prefix, split_prefix
from worker.publishing import publish
from worker.sharing import Sharing
from worker.units import ShardFiles, Split, Work
from worker.watch import Stopped, Watch, exit_at_once

log = logging.getLogger(__name__)


class Recycle(Exception):
    """The unit is settled, but this process is of no use any longer and should end."""


@dataclass(frozen=True)
class Runner:
    """Does one unit after another with the same means."""

    leases: Leases
    storage: ObjectStorage
    work: Work
    settings: WorkerSettings
    worker: str
    stop: threading.Event
    """When it is set, the unit is handed back at once and another worker takes it."""
    on_hang: Callable[[], None] = exit_at_once

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
        watch, error = Watch(claim, self.leases, self.settings, self.stop, on_hang=self.on_hang), None
        try:
            with room_for("the files of a job"), scratch_directory("job") as directory, watch:
                outcome = self._do(claim, Files(self.storage, directory), watch)
        except Stopped:
            outcome = self._settle_stopped(claim, watch)
        except D2LoraError as raised:
            outcome, error = self._settle_failed(claim, raised), raised
        except MemoryError:
            outcome = self._settle_failed(claim, OutOfMemory("the worker's memory is used up"))
        except Exception:
            # The traceback may show paths and values that are nobody else's business; it stays in the log.
            log.exception("crashed %s", name)
            outcome = self._settle_failed(claim, InternalError("an internal error; the worker's log has it"))
        log.info("%s %s seconds=%.1f", outcome, name, time.monotonic() - started)
        if isinstance(error, DeviceFailure):
            raise Recycle
        if isinstance(error, ScratchFull):
            self.stop.wait(self.settings.lease_seconds / 3)  # otherwise this worker claims, and fails, the most

    def _do(self, claim: Claim | ShardClaim, files: Files, watch: Watch) -> str:
        if isinstance(claim, ShardClaim):
            return self._do_shard(claim, files, watch)
        if claim.plan is not None:
            return self._build(claim, claim.plan, files, watch)
        return self._do_whole(claim, files, watch)

    def _do_whole(self, claim: Claim, files: Files, watch: Watch) -> str:
        datasets, extras = [files.dataset(stored) for stored in claim.datasets], files.extras(claim)
        if claim.statistics is not None:
            files.based_on(claim.statistics, watch.check)
        done: Result | Split
        if len(datasets) > 1:
            evaluations = files.evaluations(claim)
            done = self.work.initialize_jointly(claim.spec, datasets, evaluations, files.directory, watch.progress)
        else:
            done = self.work.initialize(claim.spec, datasets[0], extras, files.directory, watch.progress)
        if not isinstance(done, Split):
            return self._publish(claim, done, files, watch)
        with self._unless_lost(split_prefix(claim)) as settled:
            plan, shards = files.put_split(claim, done, watch.check)
            settled.append(self._settle(lambda: self.leases.split(claim, plan, shards), "split"))
        return settled[0]

    def _do_shard(self, claim: ShardClaim, files: Files, watch: Watch) -> str:
        for file in claim.inputs:
            files.get(file)
        output = self.work.run_shard(claim.spec, claim.task, files.directory, watch.progress)
        with self._unless_lost(shard_prefix(claim)) as settled:
            outcome = Outcome(files=files.put_shard(claim, output.files, watch.check), scores=output.scores)
            settled.append(self._settle(lambda: self.leases.finish_shard(claim, outcome), "finished"))
        return settled[0]

    def _build(self, claim: Claim, plan: Plan, files: Files, watch: Watch) -> str:
        share = Sharing(
            claim,
            self.leases,
            files,
            settings=self.settings,
            worker=self.worker,
            check=watch.check,
            help_out=lambda shard, directory: self._help(shard, directory, watch),
        )
        extras = files.extras(claim)
        shards = self._shards(claim, files, watch)
        with self._unless_lost(build_prefix(claim)) as settled:
            at = files.directory
            result = self.work.finish(claim.spec, files.get(plan), shards, extras, at, share, watch.progress)
            settled.append(self._publish(claim, result, files, watch))
        return settled[0]

    def _shards(self, claim: Claim, files: Files, watch: Watch) -> Iterator[ShardFiles]:
        """Give a job's shards one by one; a shard's files are gone once the next is asked for."""
        for number, shard in enumerate(claim.shards):
            watch.progress(Phase.READING, number, len(claim.shards))
            below = f"shard-{number}"
            (rows,) = (files.get(file, below) for file in shard.inputs)
            yield ShardFiles(rows, [files.get(file, below) for file in shard.outcome.files])
            shutil.rmtree(files.directory / below)

    def _help(self, shard: ShardClaim, directory: Path, watch: Watch) -> None:
        """Do a shard of the builder's own job; if somebody else has taken it over, they finish it."""
        own = Watch(shard, self.leases, self.settings, self.stop, on_hang=self.on_hang)

        def progress(phase: Phase, done: int, total: int) -> None:
            watch.check()
            own.progress(phase, done, total)

        try:
            with own:
                output = self.work.run_shard(shard.spec, shard.task, directory, progress)
            self._settle(lambda: self.leases.finish_shard(shard, Outcome(scores=output.scores)), "finished")
        except Stopped:
            watch.check()  # if the build itself should stop, it does here
            log.info("taken_over %s", _name(shard))

    def _publish(self, claim: Claim, result: Result, files: Files, watch: Watch) -> str:
        watch.publish()
        prefix = initialization_prefix(claim.tenant, claim.id, claim.attempt)
        statistics, beside = files.kept(prefix) if claim.spec.keep_statistics else (None, [])
        publish(result, files.directory, self.storage, prefix, beside)
        outcome = self._settle(lambda: self.leases.succeed(claim, result, prefix, statistics), "succeeded")
        if outcome == "lost":
            self.storage.delete_prefix(prefix)
        return outcome

    @contextmanager
    def _unless_lost(self, prefix: str) -> Iterator[list[str]]:
        """Remove what was stored below a prefix if the claim turns out to be lost: nobody would look for it later."""
        settled: list[str] = []
        try:
            yield settled
        except Stopped:
            self.storage.delete_prefix(prefix)
            raise
        if settled == ["lost"]:
            self.storage.delete_prefix(prefix)

    def _settle_stopped(self, claim: Claim | ShardClaim, watch: Watch) -> str:
        if watch.handed_back:
            return "handed_back"
        if watch.standing is Standing.LOST:
            return "lost"
        if watch.standing is Standing.CANCELLING:
            assert isinstance(claim, Claim)
            return self._settle(lambda: self.leases.cancelled(claim), "cancelled")
        assert self.stop.is_set()
        return self._settle(lambda: self.leases.hand_back(claim), "handed_back")

    def _settle_failed(self, claim: Claim | ShardClaim, error: D2LoraError) -> str:
        """Settle a unit that ended in an error: by its kind, again, anew, by somebody else, or not at all."""
        pause, outages = self.settings.lease / 3, self.settings.max_outage_attempts
        problem = error.problem()
        log.warning("failed %s code=%s detail=%s", _name(claim), problem.code, problem.detail)
        match error:
            case StoreUnavailable():  # our own fault alone, and unbounded: nothing can be settled meanwhile
                return self._settle(lambda: self.leases.hand_back(claim, pause=pause), "handed_back")
            # During an upgrade an older version leaves a newer one's files to it, and a newer one begins the job anew;
            # so does an older one in the end, for after a rollback nobody else will.
            case FormatMismatch() if not isinstance(error, FormatOutdated) and claim.attempt < 3 * outages:
                return self._settle(lambda: self.leases.hand_back(claim, pause=pause), "handed_back")
            case FormatMismatch():
                return self._settle(lambda: self.leases.restart(claim), "restarted")
            # A shard's own attempts begin anew with the job.
            case ShardGone() if (claim.made_by if isinstance(claim, ShardClaim) else claim.attempt) < outages:
                return self._settle(lambda: self.leases.restart(claim), "restarted")
            case ModelUnavailable():  # a wrong ID looks the same where the hub is out of reach for good
                outages = self.settings.max_attempts
        if error.retryable:
            return self._settle(
                lambda: self.leases.retry(claim, problem, max_attempts=outages, pause=pause), "retrying"
            )
        return self._settle(lambda: self.leases.fail(claim, problem), "failed")

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
                time.sleep(1)


def _name(claim: Claim | ShardClaim) -> str:
    shard = f" shard={claim.number}" if isinstance(claim, ShardClaim) else ""
    return f"id={claim.id}{shard} attempt={claim.attempt}"

"""Keeping a claim while its unit is worked on, and telling the work when to stop."""

import logging
import os
import threading
import time
from collections.abc import Callable

from d2lora.claims import Claim, ShardClaim, Standing
from d2lora.errors import StoreUnavailable
from d2lora.initializations import Phase, Progress
from d2lora.leases import Leases
from d2lora.settings import WorkerSettings

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
"""How often a unit asks whether it should go on, between two renewals of its lease."""


class Stopped(BaseException):
    """The unit must stop now; not an Exception, so that no handler inside the work swallows it."""


def exit_at_once() -> None:
    """End this process, whatever its main thread hangs in; whoever runs it starts another."""
    os._exit(1)


class Watch:
    """Renews the lease while its block runs. The work reports progress to it, which raises when it is to stop."""

    def __init__(
        self,
        claim: Claim | ShardClaim,
        leases: Leases,
        settings: WorkerSettings,
        stop: threading.Event,
        *,
        on_hang: Callable[[], None] = exit_at_once,
    ) -> None:
        self.claim, self.standing, self.handed_back = claim, Standing.HELD, False
        self._leases, self._settings, self._stop, self._on_hang = leases, settings, stop, on_hang
        self._progress: Progress | None = None
        self._began: dict[Phase, float] = {}
        self._asked = self._started = time.monotonic()
        self._is_publishing = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Watch":  # noqa: PYI034  # the shape checks of the tests cannot read Self
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def progress(self, phase: Phase, done: int, total: int) -> None:
        """Note how far the unit is.

        Raises:
            Stopped: it should not go on.
        """
        self.check()
        began = self._began.setdefault(phase, time.monotonic())
        left = (time.monotonic() - began) / done * (total - done) if done else None
        self._progress = Progress(phase=phase, done=done, total=total, seconds_left=left)

    def publish(self) -> None:
        """Begin the last step, which a wish to stop lets end; raises as `progress` does."""
        self.progress(Phase.PUBLISHING, 0, 1)
        self._is_publishing = True

    def check(self) -> None:
        """Raise Stopped if the unit should not go on."""
        if not self._stop.is_set() and time.monotonic() - self._asked > _LOOK_SECONDS:
            self._asked = time.monotonic()
            try:
                self.standing = self._leases.standing(self.claim)
            except StoreUnavailable:
                log.warning("standing_unknown id=%s", self.claim.id)  # whoever took it over is found out later
        if self._stop.is_set() or self.standing is not Standing.HELD:
            raise Stopped

    def _beat(self) -> None:
        pause = min(self._settings.heartbeat_seconds, self._settings.lease_seconds / 3)
        renewed = time.monotonic()
        while not self._done.wait(min(pause, _LOOK_SECONDS)):
            try:
                if self._stop.is_set() and not self._is_publishing:
                    # At once, not at the next sign of progress: a model that loads for minutes gives none.
                    self.handed_back = self._leases.hand_back(self.claim)
                    self.standing = Standing.LOST
                elif time.monotonic() - renewed >= pause:
                    self.standing = self._leases.renew(self.claim, lease=self._settings.lease, progress=self._progress)
                    renewed = time.monotonic()
            except Exception as error:  # whatever it is, this thread has to go on
                # After an outage the claim may still be ours, however long it took: the database decides.
                known = isinstance(error, StoreUnavailable)
                log.warning("heartbeat_failed id=%s", self.claim.id, exc_info=not known)
            if self.standing is Standing.LOST:
                return
            if time.monotonic() - self._started > self._settings.job_hours * 3600:
                log.error("hung id=%s hours=%.1f", self.claim.id, self._settings.job_hours)
                self._on_hang()

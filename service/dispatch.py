"""Passing jobs on to workers, and tidying up after them; done by one API replica at a time.

Wake-ups go from the outbox to the broker. The reconciler covers whatever else can be lost: messages, workers, and
files that nobody needs any longer. Without a broker wake-ups are dropped, since workers look for themselves.
"""

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from d2lora.errors import BrokerUnavailable, D2LoraError, StoreUnavailable
from d2lora.outbox import Outbox
from d2lora.queue import Publisher
from d2lora.settings import BrokerSettings, DispatchSettings
from d2lora.storage import ObjectStorage, initialization_prefix, shards_prefix

log = logging.getLogger(__name__)

_AWAY_SECONDS = 1.0


class Dispatcher:
    """The leader's work; `run` it in a thread."""

    def __init__(
        self, outbox: Outbox, storage: ObjectStorage, publisher: Publisher | None, settings: DispatchSettings
    ) -> None:
        self._outbox, self._storage, self._publisher, self._settings = outbox, storage, publisher, settings
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._away: str | None = None
        self.leads = False

    def run(self, stop: threading.Event) -> None:
        """Lead if nobody else does, until ``stop`` is set."""
        led = reconciled = 0.0
        pause = self._settings.publish_seconds
        while not stop.wait(pause):
            pause = self._settings.publish_seconds
            try:
                if time.monotonic() - led > self._settings.leader_seconds / 3:
                    self.leads = self._lead()
                    led = time.monotonic()
                if not self.leads:
                    continue
                self.publish()
                if time.monotonic() - reconciled > self._settings.reconcile_seconds:
                    reconciled = time.monotonic()
                    self.reconcile()
                self._away = None
            except (BrokerUnavailable, StoreUnavailable) as error:
                if self._away != error.code:
                    log.warning(error.code)  # once; nothing is lost, what is to be done stays in the database
                self._away = error.code
                pause = _AWAY_SECONDS
            except Exception:
                log.exception("dispatch_failed")
                pause = _AWAY_SECONDS
        if self.leads:
            with suppress(StoreUnavailable):
                self._outbox.resign(self._holder)

    def publish(self) -> int:
        """Publish what is due and return how many; one that is published twice claims nothing the second time."""
        wake_ups = self._outbox.due()
        sent = []
        try:
            for wake_up in wake_ups:
                if self._publisher is not None:
                    self._publisher.publish(wake_up.queue, wake_up.initialization_id)
                sent.append(wake_up)
        finally:
            if sent:
                self._outbox.published(sent)
        return len(sent)

    def reconcile(self) -> None:
        """Wake what was forgotten, end what nobody will, remove what nobody needs."""
        ended = self._outbox.end_cancelling()
        expired = 0
        if self._settings.retention_days is not None:
            expired = self._outbox.expire(retention=timedelta(days=self._settings.retention_days))
        tidied = self._tidy()
        woken = 0 if self._publisher is None else self._wake_forgotten(self._publisher)
        if ended or expired or tidied or woken:
            log.info("reconciled woken=%d cancelled=%d expired=%d tidied=%d", woken, ended, expired, tidied)

    def _wake_forgotten(self, publisher: Publisher) -> int:
        silent_for = timedelta(seconds=2 * self._settings.reconcile_seconds)
        return sum(
            self._outbox.forgotten(queue, waiting=publisher.waiting(queue), silent_for=silent_for)
            for queue in self._outbox.queues()
        )

    def _tidy(self) -> int:
        # Only some time after the end: a worker that was given up on may still write until it notices.
        leftovers = self._outbox.leftovers(settled_for=timedelta(seconds=self._settings.tidy_seconds))
        for leftover in leftovers:
            prefixes = [
                initialization_prefix(leftover.tenant, leftover.id, attempt)
                for attempt in range(1, leftover.attempts + 1)
            ]
            prefixes.append(shards_prefix(leftover.tenant, leftover.id))
            try:
                for prefix in prefixes:
                    if prefix != leftover.kept:
                        self._storage.delete_prefix(prefix)
            except D2LoraError as error:
                log.warning("tidy_failed id=%s code=%s", leftover.id, error.code)
                return 0  # the storage is away; another time
            self._outbox.cleaned(leftover)
        return len(leftovers)

    def _lead(self) -> bool:
        leads = self._outbox.lead(self._holder, lease=timedelta(seconds=self._settings.leader_seconds))
        if leads != self.leads:
            log.info("leader=%s holder=%s", leads, self._holder)
        return leads


@contextmanager
def dispatching(
    outbox: Outbox, storage: ObjectStorage, broker: BrokerSettings, settings: DispatchSettings
) -> Iterator[Dispatcher]:
    """Run a dispatcher in a thread while the block runs."""
    publisher = None if broker.url is None else Publisher(broker)
    dispatcher = Dispatcher(outbox, storage, publisher, settings)
    stop = threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=(stop,), name="dispatcher", daemon=True)
    thread.start()
    try:
        yield dispatcher
    finally:
        stop.set()
        thread.join(timeout=5)  # a broker that hangs must not keep the service from ending
        if publisher is not None and not thread.is_alive():
            publisher.close()

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
from d2lora.outbox import Leftover, Outbox
from d2lora.queue import Publisher
from d2lora.settings import BrokerSettings, DispatchSettings
from d2lora.storage import ObjectStorage, initialization_prefix, shards_prefix, statistics_prefix

log = logging.getLogger(__name__)

_AWAY_SECONDS = 1.0
_FAILURES = 3
"""Jobs and datasets whose files cannot be removed before tidying waits for better times."""


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
                if time.monotonic() - reconciled > self._settings.reconcile_seconds:
                    reconciled = time.monotonic()
                    self.reconcile()
                self.publish()
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
        """Wake what was forgotten, and end what nobody will."""
        ended = self._outbox.end_cancelling()  # first, since it needs no broker
        woken = 0 if self._publisher is None else self._wake_forgotten(self._publisher)
        if woken or ended:
            log.info("reconciled woken=%d cancelled=%d", woken, ended)

    def tidy(self) -> None:
        """Expire what is old, and remove what nobody needs."""
        expired = 0
        if self._settings.retention_days is not None:
            expired = self._outbox.expire(retention=timedelta(days=self._settings.retention_days))
        tidied = failed = 0
        # Only some time after the end: a worker that was given up on may still write until it notices.
        for leftover in self._outbox.leftovers(settled_for=timedelta(seconds=self._settings.tidy_seconds)):
            try:
                self._remove(leftover)
            except D2LoraError as error:
                log.warning("tidy_failed id=%s code=%s", leftover.id, error.code)
                failed += 1
                if failed == _FAILURES:
                    break  # it is the storage, not this job's files
                continue
            self._outbox.cleaned(leftover)
            tidied += 1
        for dataset in self._outbox.deleted_datasets():
            try:
                self._storage.delete_prefix(dataset.key)
            except D2LoraError as error:
                log.warning("tidy_failed id=%s code=%s", dataset.id, error.code)
                failed += 1
                if failed >= _FAILURES:
                    break
                continue
            self._outbox.forget(dataset)
        if expired or tidied:
            log.info("tidied expired=%d jobs=%d", expired, tidied)

    def run_tidying(self, stop: threading.Event) -> None:
        """Tidy while this replica leads, until ``stop`` is set; a storage that hangs holds nothing else up."""
        while not stop.wait(self._settings.reconcile_seconds):
            if not self.leads:
                continue
            try:
                self.tidy()
            except StoreUnavailable:
                log.warning("tidy_failed code=%s", StoreUnavailable.code)
            except Exception:
                log.exception("tidy_failed")

    def _remove(self, leftover: Leftover) -> None:
        prefixes = [
            initialization_prefix(leftover.tenant, leftover.id, attempt) for attempt in range(1, leftover.attempts + 1)
        ]
        for prefix in [*prefixes, shards_prefix(leftover.tenant, leftover.id)]:
            if prefix != leftover.kept:
                self._storage.delete_prefix(prefix)
        if leftover.kept is not None and not leftover.keeps_statistics:
            self._storage.delete_prefix(statistics_prefix(leftover.kept))

    def _wake_forgotten(self, publisher: Publisher) -> int:
        silent_for = timedelta(seconds=2 * self._settings.reconcile_seconds)
        return sum(
            self._outbox.forgotten(queue, waiting=publisher.waiting(queue), silent_for=silent_for)
            for queue in self._outbox.queues()
        )

    def _lead(self) -> bool:
        leads = self._outbox.lead(self._holder, lease=timedelta(seconds=self._settings.leader_seconds))
        if leads != self.leads:
            log.info("leader=%s holder=%s", leads, self._holder)
        return leads


@contextmanager
def dispatching(
    outbox: Outbox, storage: ObjectStorage, broker: BrokerSettings, settings: DispatchSettings
) -> Iterator[Dispatcher]:
    """Run a dispatcher in threads while the block runs."""
    publisher = None if broker.url is None else Publisher(broker)
    dispatcher = Dispatcher(outbox, storage, publisher, settings)
    stop = threading.Event()
    threads = [
        threading.Thread(target=work, args=(stop,), name="dispatcher", daemon=True)
        for work in (dispatcher.run, dispatcher.run_tidying)
    ]
    for thread in threads:
        thread.start()
    try:
        yield dispatcher
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=5)  # a broker or storage that hangs must not keep the service from ending
        if publisher is not None and not threads[0].is_alive():
            publisher.close()

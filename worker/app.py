"""The Celery side of a worker: a message wakes it up, `worker.runner` does the rest.

One parent consumes messages and never imports torch; one child, started fresh (CUDA does not survive a fork), works.
"""

import logging
import os
import signal
import sys
import threading
from typing import Any

import billiard
from celery import Celery, signals
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from celery.worker.state import maybe_shutdown

from d2lora.queue import celery_settings
from d2lora.settings import QUEUES, BrokerSettings, WorkerSettings
from worker.heartbeat import heartbeat_file

log = logging.getLogger(__name__)

STOP_SIGNAL = signal.SIGUSR2
"""Tells the child to hand its work back."""

_START_SECONDS = 180
"""A child imports torch before it is ready; the default of 4 s would kill it, and its successors, for ever."""


class PatientConsumer(Consumer):  # type: ignore[misc]  # Celery has no types
    """Looks for a broker that is away every few seconds; Celery's own pause grows to half a minute of idle workers."""

    def ensure_connected(self, conn: Any) -> Any:
        """Return the connection once it stands; a shutdown ends the wait."""

        def complain(error: Exception, _seconds: float) -> None:
            log.warning("broker_unavailable error=%s", type(error).__name__)

        return conn.ensure_connection(
            complain, None, interval_start=1, interval_step=1, interval_max=5, callback=maybe_shutdown
        )


class FrankRequest(Request):  # type: ignore[misc]  # Celery has no types
    """Lets a failed acknowledgement break the connection, so that the consumer makes a fresh one.

    Celery would log it and go on with a channel that counts the message as still being worked on: with a prefetch of
    one, the worker would live and never take another.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "connection_errors": ()})


def make_app(broker: BrokerSettings, settings: WorkerSettings) -> Celery:
    """Return the Celery application of a worker."""
    app = Celery("d2lora", include=["worker.tasks"])
    longest = int(settings.job_hours * 3600)
    app.conf.update(
        # A message is acknowledged after its work, and outlives in the broker whatever happens to the worker; a copy
        # that Redis hands out meanwhile claims nothing.
        celery_settings(broker, visibility_seconds=longest + 3600),
        task_acks_late=True,
        # The database counts attempts; the broker would repeat a poisoned message for ever.
        task_reject_on_worker_lost=False,
        # The last resort against a child that hangs; only the process pool can enforce it.
        task_time_limit=longest,
        worker_consumer="worker.app:PatientConsumer",
        # A child that died leaves no result to wait for: the database has it. By default its parent would take no
        # message for 10 seconds, though the next child is ready before.
        worker_lost_wait=1.0,
        # Threads can be neither limited in time nor killed; one child, since it has the GPU or the cores to itself.
        worker_pool="prefork",
        worker_concurrency=1,
        worker_pool_start_method="spawn",
        worker_proc_alive_timeout=_START_SECONDS,
        # A prefetched message would wait behind a long job although other workers are idle.
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        # After a broken connection to Redis the job goes on; by default its child would be killed.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # Memory fragments over many models.
        worker_max_tasks_per_child=200,
        # Our events are on standard error already.
        worker_redirect_stdouts=False,
    )
    return app


def consume(broker: BrokerSettings, settings: WorkerSettings) -> int:
    """Work on jobs as messages arrive, until SIGTERM or SIGINT; return the exit code."""
    app = make_app(broker, settings)
    signals.worker_shutting_down.connect(_stop_children(settings.grace_seconds), weak=False)
    signals.setup_logging.connect(set_up_logging, weak=False)  # Celery then leaves the loggers alone
    queues = settings.queues or list(QUEUES)
    with heartbeat_file(settings.heartbeat_file):
        # Worker processes neither meet nor gossip: what they would tell each other is in the database.
        alone = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        app.worker_main(["--quiet", "worker", "--queues", ",".join(queues), *alone])
    return 0


def set_up_logging(**_: object) -> None:
    """Write our events to standard error, and of the libraries' only warnings."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name in ("celery", "kombu", "amqp"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _stop_children(grace_seconds: float) -> Any:
    """Return a handler that lets the child hand its work back at once, and kills it if it has not after the grace."""

    def send(number: int) -> None:
        for child in billiard.active_children():
            if child.pid is not None:
                try:
                    os.kill(child.pid, number)
                except ProcessLookupError:
                    continue

    def stop(**_: object) -> None:
        log.info("worker_stopping")
        send(STOP_SIGNAL)
        last_resort = threading.Timer(grace_seconds, send, [signal.SIGKILL])
        last_resort.daemon = True
        last_resort.start()

    return stop

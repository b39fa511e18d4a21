"""The only Celery task, and what its process keeps between messages."""

import logging
import os
import signal
import threading
from contextlib import ExitStack
from functools import cache
from typing import Any

from celery import shared_task, signals

from d2lora.errors import StoreUnavailable
from d2lora.queue import MESSAGE_FORMAT, TASK
from worker.app import STOP_SIGNAL, set_up_logging
from worker.process import RealWork, open_runner
from worker.runner import Recycle, Runner

log = logging.getLogger(__name__)

_stop = threading.Event()
_open = ExitStack()


@cache
def _runner() -> Runner:
    return _open.enter_context(open_runner(stop=_stop))


signals.setup_logging.connect(set_up_logging, weak=False)


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]  # Celery has no types
def _prepare(**_: Any) -> None:
    """Make a new child ready: the first message should not wait for imports."""
    signal.signal(STOP_SIGNAL, lambda *_: _stop.set())
    runner = _runner()
    assert isinstance(runner.work, RealWork)
    runner.work.warm_up()
    log.info("worker_ready name=%s", runner.worker)


@signals.worker_process_shutdown.connect  # type: ignore[untyped-decorator]  # Celery has no types
def _close(**_: Any) -> None:
    """Give the connections back."""
    _open.close()


@shared_task(name=TASK, Request="worker.app:FrankRequest")  # type: ignore[untyped-decorator]  # Celery has no types
def work(initialization_id: str, message_format: int, **_: Any) -> None:
    """Claim one unit of an initialization, if one is free, and work on it to its end."""
    if message_format > MESSAGE_FORMAT:
        log.warning("message_ignored format=%d", message_format)  # the dispatcher sends another in time
        return
    try:
        _runner().run_next(initialization_id)
    except StoreUnavailable:
        log.warning("store_unavailable")  # nothing was claimed; the dispatcher tells again
    except Recycle:
        log.warning("worker_recycled")
        os._exit(1)  # the parent starts a fresh child; the unit is settled, so the message may go

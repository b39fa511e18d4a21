"""``/livez`` and ``/readyz``: for whoever restarts the service, and for whoever sends it traffic."""

import threading

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request

from d2lora.errors import StorageUnavailable
from d2lora.initializations import Frozen
from service.dependencies import StorageDependency, StoreDependency
from service.problems import responses

router = APIRouter(tags=["health"])

_DEADLINE_SECONDS = 4.0
_AT_ONCE = 4
"""Probes that may wait for an answer; each that hangs keeps a thread."""


def new_probes() -> threading.BoundedSemaphore:
    """Return what an application counts its waiting probes with."""
    return threading.BoundedSemaphore(_AT_ONCE)


class Health(Frozen):
    """The answer when all is well."""

    status: str = "ok"
    """Nothing else; what is not well is a problem."""


@router.get("/livez", operation_id="getLiveness")
async def livez() -> Health:
    """Answer while the process runs; looks at nothing else."""
    return Health()


@router.get("/readyz", operation_id="getReadiness", responses=responses(StorageUnavailable, keyed=False))
async def readyz(request: Request, store: StoreDependency, storage: StorageDependency) -> Health:
    """Answer when database and storage can be used, within a few seconds either way."""
    probes: threading.BoundedSemaphore = request.app.state.probes

    def ping() -> None:
        # A probe that was given up on still waits in its thread: more of them would only wait as well.
        if not probes.acquire(blocking=False):
            raise StorageUnavailable("database or storage does not answer")
        try:
            store.ping()
            storage.ping()
        finally:
            probes.release()

    try:
        with anyio.fail_after(_DEADLINE_SECONDS):
            await anyio.to_thread.run_sync(ping, abandon_on_cancel=True)
    except TimeoutError as error:
        raise StorageUnavailable("database or storage does not answer") from error
    return Health()

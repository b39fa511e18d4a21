"""``/livez`` and ``/readyz``: for whoever restarts the service, and for whoever sends it traffic."""

from functools import cache

import anyio
import anyio.to_thread
from fastapi import APIRouter

from d2lora.errors import StorageUnavailable
from d2lora.initializations import Frozen
from service.dependencies import StorageDependency, StoreDependency
from service.problems import responses

router = APIRouter(tags=["health"])

_DEADLINE_SECONDS = 4.0


class Health(Frozen):
    """The answer when all is well."""

    status: str = "ok"


@router.get("/livez", operation_id="getLiveness")
async def livez() -> Health:
    """Answer while the process runs; looks at nothing else."""
    return Health()


@router.get("/readyz", operation_id="getReadiness", responses=responses(StorageUnavailable))
async def readyz(store: StoreDependency, storage: StorageDependency) -> Health:
    """Answer when database and storage can be used, within a few seconds either way."""

    def ping() -> None:
        store.ping()
        storage.ping()

    try:
        with anyio.fail_after(_DEADLINE_SECONDS):
            # Threads of their own, and few: those that hang must leave the others' requests alone.
            await anyio.to_thread.run_sync(ping, limiter=_limiter(), abandon_on_cancel=True)
    except TimeoutError as error:
        raise StorageUnavailable("database or storage does not answer") from error
    return Health()


@cache
def _limiter() -> anyio.CapacityLimiter:
    return anyio.CapacityLimiter(2)

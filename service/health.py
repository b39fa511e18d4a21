"""``/livez`` and ``/readyz``: for whoever restarts the service, and for whoever sends it traffic."""

from fastapi import APIRouter

from d2lora.errors import StorageUnavailable
from d2lora.initializations import Frozen
from service.dependencies import StorageDependency, StoreDependency
from service.problems import responses

router = APIRouter(tags=["health"])


class Health(Frozen):
    """The answer when all is well."""

    status: str = "ok"


@router.get("/livez", operation_id="getLiveness")
def livez() -> Health:
    """Answer while the process runs; looks at nothing else."""
    return Health()


@router.get("/readyz", operation_id="getReadiness", responses=responses(StorageUnavailable))
def readyz(store: StoreDependency, storage: StorageDependency) -> Health:
    """Answer when database and storage can be used."""
    store.ping()
    storage.ping()
    return Health()

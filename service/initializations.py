"""``/v1/initializations``: a request becomes a job, and a job an adapter."""

import re
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from d2lora.based_on import obstacle
from d2lora.datasets import Dataset
from d2lora.errors import (
    Conflict,
    IdempotencyMismatch,
    ModelError,
    NotFound,
    ObjectiveUnavailable,
    ProblemItem,
    RequestInvalid,
    RequestTooLarge,
    StorageUnavailable,
)
from d2lora.initializations import Adapter, AdapterFile, Frozen, Initialization, InitializationSpec, Objective, State
from d2lora.methods import Warmup
from d2lora.models import parameters_of, queue_of
from d2lora.roles import FIELDS, FOR_THE_OBJECTIVES, Role, evaluation_dataset_ids, evaluation_field, extra_dataset_ids
from d2lora.store import Event, Store
from d2lora.supervision import rows_needed
from service.auth import Tenant
from service.dependencies import PageCursor, PageLimit, SettingsDependency, StorageDependency, StoreDependency
from service.models import check_base_model
from service.problems import field_pointer, responses
from service.requests import check_target_modules, check_text

router = APIRouter(prefix="/v1/initializations", tags=["initializations"])

_URL_LIFE = timedelta(minutes=15)
_RETRY_AFTER_SECONDS = 2


_EVENT_NUMBER = re.compile(r"[0-9]{1,9}")
EventNumber = Annotated[int, Query(ge=0, lt=2**31, description="number of the last event that was seen; 0 for all")]


class InitializationPage(Frozen):
    """A page of initializations, newest first."""

    data: list[Initialization]
    """Those of this page."""
    next_cursor: str | None
    """What the next page is asked for with; null on the last one."""


class EventPage(Frozen):
    """What has happened so far."""

    data: list[Event]
    """In the order of their numbers; all there are."""


def _existing(initialization_id: str, tenant: Tenant, store: StoreDependency) -> Initialization:
    """Return the initialization, or NotFound while the answer's status can still say so."""
    return store.get(tenant, initialization_id)


@router.post(
    "",
    status_code=202,
    operation_id="createInitialization",
    responses=responses(
        RequestInvalid, ObjectiveUnavailable, IdempotencyMismatch, ModelError, NotFound, RequestTooLarge
    ),
)
def create_initialization(
    spec: InitializationSpec,
    response: Response,
    tenant: Tenant,
    store: StoreDependency,
    settings: SettingsDependency,
    idempotency_key: Annotated[
        str | None,
        Header(min_length=1, max_length=255, description="of your making: the same key with the same body queues once"),
    ] = None,
) -> Initialization:
    """Queue an initialization; a repeated Idempotency-Key returns the first one again."""
    check_text(spec)
    initialization = store.repeated(tenant, spec, idempotency_key)
    if initialization is None:
        check_target_modules(spec)
        _check_datasets(spec, tenant, store)
        _check_base(spec, tenant, store)
        try:
            check_base_model(spec.base_model, settings.models)
        except ModelError as error:
            error.errors = [ProblemItem(detail=error.detail, pointer="#/base_model")]
            raise
        queue = queue_of(parameters_of(spec.base_model), settings.models)
        initialization, _ = store.create(tenant, spec, queue=queue, idempotency_key=idempotency_key)
    response.headers["location"] = f"/v1/initializations/{initialization.id}"
    return initialization


@router.get("", operation_id="listInitializations", responses=responses(RequestInvalid))
def list_initializations(
    tenant: Tenant,
    store: StoreDependency,
    limit: PageLimit = 20,
    cursor: PageCursor = None,
    state: Annotated[State | None, Query(description="those in this state alone")] = None,
) -> InitializationPage:
    """Return the initializations, newest first."""
    data, following = store.page(tenant, limit=limit, cursor=cursor, state=state)
    return InitializationPage(data=data, next_cursor=following)


@router.get("/{initialization_id}", operation_id="getInitialization", responses=responses(NotFound))
def get_initialization(
    initialization_id: str, response: Response, tenant: Tenant, store: StoreDependency
) -> Initialization:
    """Return one initialization, with its progress while it runs."""
    initialization = store.get(tenant, initialization_id)
    if not initialization.state.is_terminal:
        response.headers["retry-after"] = str(_RETRY_AFTER_SECONDS)
    return initialization


@router.get("/{initialization_id}/adapter", operation_id="getAdapter", responses=responses(NotFound, Conflict))
def get_adapter(
    initialization_id: str, request: Request, tenant: Tenant, store: StoreDependency, storage: StorageDependency
) -> Adapter:
    """Return where the files of a succeeded initialization are, with their checksums."""
    prefix = store.files_prefix(tenant, initialization_id)
    result = store.get(tenant, initialization_id).result
    assert result is not None
    files = []
    for file in result.files:
        signed = storage.sign(prefix + file.name, _URL_LIFE)
        own = str(request.url_for("get_file", initialization_id=initialization_id, name=file.name))
        expires = datetime.now(UTC) + _URL_LIFE if signed else None
        files.append(AdapterFile(**file.model_dump(), url=signed or own, url_expires_at=expires))
    return Adapter(initialization_id=initialization_id, files=files)


@router.get(
    "/{initialization_id}/files/{name:path}",
    operation_id="getFile",
    responses={
        **responses(NotFound, Conflict, StorageUnavailable),
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
    },
    response_class=StreamingResponse,
)
def get_file(
    initialization_id: str, name: str, tenant: Tenant, store: StoreDependency, storage: StorageDependency
) -> StreamingResponse:
    """Return the bytes of one file, where the storage has no addresses of its own."""
    prefix = store.files_prefix(tenant, initialization_id)
    result = store.get(tenant, initialization_id).result
    known = {file.name: file for file in result.files} if result else {}
    if name not in known:
        raise NotFound(f"initialization {initialization_id} has no file {name!r}")
    stream = storage.open(prefix + name)

    def chunks() -> Iterator[bytes]:
        with stream:
            while chunk := stream.read(2**18):
                yield chunk

    headers = {"content-length": str(known[name].size), "etag": f'"{known[name].sha256}"'}
    return StreamingResponse(chunks(), media_type="application/octet-stream", headers=headers)


@router.post(
    "/{initialization_id}/cancel",
    status_code=202,
    operation_id="cancelInitialization",
    responses=responses(NotFound, Conflict),
)
def cancel_initialization(initialization_id: str, tenant: Tenant, store: StoreDependency) -> Initialization:
    """Cancel an initialization: at once if it is queued, within one batch if it runs."""
    return store.cancel(tenant, initialization_id)


@router.get("/{initialization_id}/events", operation_id="listEvents", responses=responses(NotFound))
def list_events(initialization_id: str, tenant: Tenant, store: StoreDependency, after: EventNumber = 0) -> EventPage:
    """Return what has happened to an initialization, after the event of that number."""
    return EventPage(data=store.events(tenant, initialization_id, after=after))


@router.get(
    "/{initialization_id}/events/stream",
    operation_id="streamEvents",
    responses=responses(NotFound),
    response_class=EventSourceResponse,
)
async def stream_events(
    initialization_id: str,
    request: Request,
    tenant: Tenant,
    _: Annotated[Initialization, Depends(_existing)],
    store: StoreDependency,
    last_event_id: Annotated[str | None, Header(description="number of the last event that was seen")] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Send events as they happen, and progress in between, until the initialization has ended.

    Events are named by their type and numbered as in `/events`; progress comes as `progress`, without a number.
    """
    seen = int(last_event_id) if last_event_id and _EVENT_NUMBER.fullmatch(last_event_id) else 0
    progress = None
    while not request.app.state.stopping.is_set():
        initialization = await run_in_threadpool(store.get, tenant, initialization_id)
        for event in await run_in_threadpool(store.events, tenant, initialization_id, after=seen):
            seen = event.seq
            yield ServerSentEvent(data=event.model_dump(mode="json"), event=event.type, id=str(event.seq))
        if initialization.progress is not None and initialization.progress != progress:
            progress = initialization.progress
            yield ServerSentEvent(data=progress.model_dump(mode="json"), event="progress")
        if initialization.state.is_terminal:
            return
        await anyio.sleep(0.5)


def _check_datasets(spec: InitializationSpec, tenant: str, store: Store) -> None:
    """Raise, naming the field, unless the datasets exist and allow the objectives."""
    for place, training in spec.training.items():
        field = f"{place}dataset_id"
        dataset = _dataset(training.dataset_id, field, tenant, store)
        _check_objectives(training.objectives, dataset, field, f"{place}objectives")
    for index, dataset_id in evaluation_dataset_ids(spec).items():
        field = evaluation_field(index)
        dataset = _dataset(dataset_id, field, tenant, store)
        asked = (spec.datasets or [])[index].objectives
        _check_objectives(asked, dataset, field, f"datasets[{index}].objectives")
    for role, dataset_id in extra_dataset_ids(spec).items():
        dataset = _dataset(dataset_id, FIELDS[role], tenant, store)
        if role in FOR_THE_OBJECTIVES:
            _check_objectives(spec.objectives, dataset, FIELDS[role], "objectives")
        if isinstance(spec.method, Warmup) and role is Role.WARMUP:
            _check_trainer(spec.method.trainer, dataset)


def _check_trainer(trainer: str, dataset: Dataset) -> None:
    if trainer not in dataset.objectives:
        detail = f"method.warmup_dataset_id: trainer {trainer} needs {rows_needed(trainer)}"
        raise ObjectiveUnavailable(detail, errors=[ProblemItem(detail=detail, pointer="#/method/warmup_dataset_id")])


def _check_base(spec: InitializationSpec, tenant: str, store: Store) -> None:
    """Raise, naming the field, unless the request can go on from the job that it is based on."""
    if spec.based_on is None:
        return
    try:
        found = obstacle(spec, store.get(tenant, spec.based_on))
    except NotFound:
        found = "based_on", f"there is no initialization {spec.based_on!r}"
    if found is not None:
        field, why = found
        detail = f"{field}: {why}"
        raise RequestInvalid(detail, errors=[ProblemItem(detail=detail, pointer=field_pointer(field))])


def _dataset(dataset_id: str, field: str, tenant: str, store: Store) -> Dataset:
    try:
        return store.dataset(tenant, dataset_id).dataset
    except NotFound as error:
        detail = f"{field}: there is no dataset {dataset_id!r}"
        raise RequestInvalid(detail, errors=[ProblemItem(detail=detail, pointer=field_pointer(field))]) from error


def _check_objectives(objectives: Sequence[Objective] | None, dataset: Dataset, field: str, asked: str) -> None:
    """Raise unless the dataset that ``field`` names allows the objectives that the field ``asked`` has."""
    for index, objective in enumerate(objectives or []):
        if objective.type not in dataset.objectives:
            detail = f"{asked}: {objective.type} needs {rows_needed(objective.type)}, which {field} does not have"
            errors = [ProblemItem(detail=detail, pointer=f"{field_pointer(asked)}/{index}")]
            raise ObjectiveUnavailable(detail, errors=errors)

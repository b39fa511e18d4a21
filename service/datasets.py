"""``/v1/datasets``: rows in, checked to the last one before anything is kept."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from d2lora.datasets import Dataset, DatasetFile, DatasetLimits, Format, inspect
from d2lora.errors import (
    Conflict,
    D2LoraError,
    DatasetInvalid,
    NotFound,
    RequestInvalid,
    RequestTooLarge,
    StorageFull,
    StorageUnavailable,
)
from d2lora.initializations import Frozen
from d2lora.scratch import is_full, scratch_directory
from d2lora.settings import ServiceSettings
from d2lora.storage import ObjectStorage, dataset_key
from d2lora.store import Store, new_id
from service.auth import Tenant
from service.dependencies import PageCursor, PageLimit, SettingsDependency, StorageDependency, StoreDependency
from service.problems import responses

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])

_FORMATS = {
    "application/jsonl": Format.JSONL,
    "application/x-ndjson": Format.JSONL,
    "application/json": Format.JSON,
    "text/csv": Format.CSV,
    "application/vnd.apache.parquet": Format.PARQUET,
}
_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            media: {"schema": {"type": "string", "format": "binary"}, "example": example}
            for media, example in {
                "application/jsonl": '{"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}\n',
                "application/x-ndjson": '{"text": "Two and two are four."}\n',
                "application/json": '[{"prompt": "2+2=", "completion": " 4"}]',
                "text/csv": "prompt,completion\n2+2=, 4\n",
                "application/vnd.apache.parquet": "(bytes)",
            }.items()
        },
    }
}


class DatasetPage(Frozen):
    """A page of datasets, newest first."""

    data: list[Dataset]
    """Those of this page."""
    next_cursor: str | None
    """What the next page is asked for with; null on the last one."""


@router.post(
    "",
    status_code=201,
    operation_id="createDataset",
    responses=responses(DatasetInvalid, RequestInvalid, RequestTooLarge, StorageFull, StorageUnavailable),
    openapi_extra=_UPLOAD,
)
async def create_dataset(
    request: Request,
    response: Response,
    tenant: Tenant,
    store: StoreDependency,
    storage: StorageDependency,
    settings: SettingsDependency,
    *,
    format: Annotated[Format | None, Query(description="instead of the Content-Type")] = None,  # noqa: A002  # the parameter's name
    column: Annotated[list[str] | None, Query(description="`ours:theirs`, for files with other column names")] = None,
) -> Dataset:
    """Store a file of rows, sent as the body, after every row has been read and found good."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestInvalid("Content-Encoding: send the file as it is; compressed bodies are not taken")
    kind = format or _format_of(request)
    columns = _columns(column or [])
    with _room_for_uploads(), scratch_directory("upload") as directory:
        path = directory / "dataset"
        await _receive(request, path, settings.service)
        file = DatasetFile(path, kind, columns)
        dataset = await run_in_threadpool(_keep, tenant, file, store, storage, settings.service)
    response.headers["location"] = f"/v1/datasets/{dataset.id}"
    return dataset


@router.get("", operation_id="listDatasets", responses=responses(RequestInvalid))
def list_datasets(
    tenant: Tenant,
    store: StoreDependency,
    limit: PageLimit = 20,
    cursor: PageCursor = None,
) -> DatasetPage:
    """Return the datasets, newest first."""
    data, following = store.datasets(tenant, limit=limit, cursor=cursor)
    return DatasetPage(data=data, next_cursor=following)


@router.get("/{dataset_id}", operation_id="getDataset", responses=responses(NotFound))
def get_dataset(dataset_id: str, tenant: Tenant, store: StoreDependency) -> Dataset:
    """Return one dataset."""
    return store.dataset(tenant, dataset_id).dataset


@router.delete("/{dataset_id}", status_code=204, operation_id="deleteDataset", responses=responses(NotFound, Conflict))
def delete_dataset(dataset_id: str, tenant: Tenant, store: StoreDependency) -> None:
    """Delete a dataset that no unfinished initialization names, and all statistics kept of it; adapters stay."""
    store.delete_dataset(tenant, dataset_id)


def _format_of(request: Request) -> Format:
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media not in _FORMATS:
        raise RequestInvalid(f"Content-Type: must be one of {', '.join(_FORMATS)}, or give the parameter format")
    return _FORMATS[media]


def _columns(pairs: list[str]) -> dict[str, str]:
    split = [pair.partition(":") for pair in pairs]
    if not all(separator and ours and theirs for ours, separator, theirs in split):
        raise RequestInvalid("column: must be written ours:theirs, such as prompt:question")
    columns = {ours: theirs for ours, _, theirs in split}
    if len(columns) < len(pairs):
        raise RequestInvalid("column: each of ours may be mapped once")
    return columns


@contextmanager
def _room_for_uploads() -> Iterator[None]:
    """Turn this machine's full disk into our error; one of the storage's is that already."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise StorageFull("no room left to take the dataset; try again later") from error
        raise


async def _receive(request: Request, path: Path, settings: ServiceSettings) -> None:
    """Write the body to a file, no further than the limit."""
    limit, size = settings.max_dataset_bytes, 0
    with path.open("wb") as file:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise RequestTooLarge(f"the dataset is over {limit} bytes")
            await run_in_threadpool(file.write, chunk)


def _keep(tenant: str, file: DatasetFile, store: Store, storage: ObjectStorage, settings: ServiceSettings) -> Dataset:
    summary = inspect(file, DatasetLimits(max_rows=settings.max_dataset_rows, max_row_bytes=settings.max_row_bytes))
    moment = datetime.now(UTC)
    dataset = Dataset(
        id=new_id("ds", moment),
        created_at=moment,
        format=file.format,
        columns=dict(file.columns),
        **summary.model_dump(),
    )
    key = dataset_key(tenant, dataset.id)
    store.announce_dataset(tenant, dataset, key)  # so that its bytes are found, should this process be killed
    try:
        storage.put_file(key, file.path, dataset.sha256)
        store.add_dataset(tenant, dataset, key)
    except BaseException:
        with suppress(D2LoraError):  # what cannot be done now, the dispatcher does later
            store.withdraw_dataset(dataset.id)
            storage.delete_prefix(key)
        raise
    return dataset

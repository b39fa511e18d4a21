"""A client for the service's HTTP API.

with Client("http://127.0.0.1:8000", api_key="...") as client:
    dataset = client.upload_dataset(Path("rows.jsonl"))
    job = client.submit(InitializationSpec(base_model="...", dataset_id=dataset.id))
    client.wait(job.id)
    client.pull(job.id, Path("adapter"))
"""

import hashlib
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from d2lora.datasets import Dataset, Format
from d2lora.errors import ChecksumMismatch, Conflict, D2LoraError, NotFound, Problem, ServiceUnreachable, from_problem
from d2lora.initializations import Adapter, AdapterFile, Initialization, InitializationSpec, State

_MEDIA_TYPES = {
    Format.JSONL: "application/jsonl",
    Format.JSON: "application/json",
    Format.CSV: "text/csv",
    Format.PARQUET: "application/vnd.apache.parquet",
}
_TRIES = 5
_TRY_AGAIN = {429, 502, 503, 504}
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_CHECKING_SECONDS = 900.0
"""How long the service may check the rows of an upload before it answers."""

_Answer = TypeVar("_Answer", bound=BaseModel)


class Client:
    """One service and one API key; use it as a context manager, or close it.

    Every verb raises the `d2lora.errors` class that the service's problem names, and ServiceUnreachable when there is
    no answer after several tries.
    """

    def __init__(
        self, url: str, *, api_key: str, timeout: float = 60.0, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout, transport=transport)
        self._upload_timeout = httpx.Timeout(timeout, read=max(timeout, _CHECKING_SECONDS))
        self._authorization = {"authorization": f"Bearer {api_key}"}
        # Addresses in an answer may lead elsewhere, such as to an object store; the key must not follow.
        self._origin = _origin(httpx.URL(url))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def upload_dataset(
        self,
        path: Path,
        *,
        format: Format | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> Dataset:
        """Upload a file of rows; ``columns`` maps our column names to the file's.

        When an answer is lost, the dataset may be there already: it is looked for before the file is sent again.

        Raises:
            ServiceUnreachable: also when the answer is late, and the upload may still arrive.
        """
        kind = format or Format.of(path)
        for attempt in range(1, _TRIES + 1):
            try:
                return self._upload(path, kind, columns or {})
            except _AnswerLost as lost:
                if lost.late:
                    raise ServiceUnreachable(
                        f"{path.name}: there is no answer in time; the upload may still arrive, so look for it among "
                        "the datasets before you repeat it"
                    ) from lost
                time.sleep(_pause(attempt, lost.retry_after))
                arrived = self.find_dataset(path, format=kind, columns=columns)
                if arrived is not None:
                    return arrived
                if attempt == _TRIES:
                    raise lost.error from lost
        raise AssertionError("the last try returns or raises")

    def _upload(self, path: Path, kind: Format, columns: Mapping[str, str]) -> Dataset:
        with path.open("rb") as file:
            response = self._send(
                "POST",
                "/v1/datasets",
                params=[("column", f"{ours}:{theirs}") for ours, theirs in columns.items()],
                headers={"content-type": _MEDIA_TYPES[kind]},
                file=file,
                timeout=self._upload_timeout,
            )
        return _read(Dataset, response)

    def find_dataset(
        self, path: Path, *, format: Format | None = None, columns: Mapping[str, str] | None = None
    ) -> Dataset | None:
        """Return the oldest dataset that was uploaded from such a file in the same way, if there is one."""
        kind, mapping = format or Format.of(path), dict(columns or {})
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found = None
        for dataset in self.datasets():
            if (dataset.sha256, dataset.format, dataset.columns) == (digest, kind, mapping):
                found = dataset
        return found

    def datasets(self) -> Iterator[Dataset]:
        """Yield all datasets, newest first."""
        return self._every(Dataset, "/v1/datasets")

    def delete_dataset(self, dataset_id: str) -> None:
        """Delete a dataset, and all statistics kept of it.

        Raises:
            Conflict: an initialization that has not ended needs it.
        """
        self._send("DELETE", _path("datasets", dataset_id))

    def submit(self, spec: InitializationSpec, *, idempotency_key: str | None = None) -> Initialization:
        """Ask for an adapter. Without a key of yours a fresh one makes the tries of this call count once."""
        response = self._send(
            "POST",
            "/v1/initializations",
            json=spec.model_dump(mode="json"),
            headers={"idempotency-key": idempotency_key or secrets.token_hex(16)},
        )
        return _read(Initialization, response)

    def get(self, initialization_id: str) -> Initialization:
        """Return an initialization."""
        return _read(Initialization, self._send("GET", _path("initializations", initialization_id)))

    def initializations(self, *, state: State | None = None) -> Iterator[Initialization]:
        """Yield all initializations, newest first."""
        return self._every(Initialization, "/v1/initializations", {"state": state} if state else {})

    def cancel(self, initialization_id: str) -> Initialization:
        """Cancel an initialization."""
        response = self._send("POST", _path("initializations", initialization_id, "/cancel"))
        return _read(Initialization, response)

    def wait(
        self,
        initialization_id: str,
        *,
        on_update: Callable[[Initialization], None] | None = None,
        poll: float = 1.0,
        timeout: float | None = None,
    ) -> Initialization:
        """Return the initialization when it has ended, in whichever state.

        Raises:
            TimeoutError: it has not ended after ``timeout`` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            initialization = self.get(initialization_id)
            if on_update is not None:
                on_update(initialization)
            if initialization.state.is_terminal:
                return initialization
            if end is not None and time.monotonic() > end:
                raise TimeoutError(f"{initialization_id} is still {initialization.state} after {timeout:g} seconds")
            time.sleep(poll)

    def adapter(self, initialization_id: str) -> Adapter:
        """Return where the files of a succeeded initialization are."""
        return _read(Adapter, self._send("GET", _path("initializations", initialization_id, "/adapter")))

    def pull(self, initialization_id: str, directory: Path) -> list[Path]:
        """Download the adapter into a directory that appears only when every checksum is right.

        Raises:
            Conflict: the directory exists and is not empty, or the initialization has not succeeded.
            ChecksumMismatch: a file is not what the service says it is.
        """
        need_free(directory)
        adapter = self.adapter(initialization_id)
        directory.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.absolute().parent, prefix=f".{directory.name}-"))
        try:
            for file in adapter.files:
                path = _below(temporary, file.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._download(file, path)
            _check_manifest(temporary)
            temporary.chmod(0o755)  # mkdtemp's is for the owner alone
            if directory.exists():
                directory.rmdir()
            temporary.rename(directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return [_below(directory, file.name) for file in adapter.files]

    def _download(self, file: AdapterFile, path: Path) -> None:
        digest, size = hashlib.sha256(), 0
        url = httpx.URL(file.url)
        headers = self._authorization if _origin(url) == self._origin else {}
        try:
            with self._http.stream("GET", url, headers=headers) as response, path.open("wb") as output:
                if response.is_error:
                    response.read()
                    raise _error(response)
                for chunk in response.iter_bytes():
                    digest.update(chunk)
                    size += len(chunk)
                    output.write(chunk)
        except httpx.TransportError as error:
            raise ServiceUnreachable(f"{file.name} could not be downloaded: {error}") from error
        if size != file.size or digest.hexdigest() != file.sha256:
            raise ChecksumMismatch(f"{file.name} is not what the service says it is; pull again")

    def _every(self, kind: type[_Answer], path: str, params: Mapping[str, str] = {}) -> Iterator[_Answer]:
        """Yield what all pages of a list hold."""
        cursor = None
        while True:
            asked = {**params, "limit": "100", **({"cursor": cursor} if cursor else {})}
            response = self._send("GET", path, params=asked)
            page = _read(_Page, response)
            yield from (_understood(kind, one, response) for one in page.data)
            cursor = page.next_cursor
            if cursor is None:
                return

    def _send(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, file: Any = None, **arguments: Any
    ) -> httpx.Response:
        """Send a request, again after a pause when the service is away or busy; all but uploads are safe to repeat.

        Raises:
            _AnswerLost: the file may have been taken, so sending it again may store it twice.
        """
        unsure = False  # an earlier try may have been carried out, and its answer lost
        for attempt in range(1, _TRIES + 1):
            if file is not None:
                file.seek(0)
            last = attempt == _TRIES
            try:
                response = self._http.request(
                    method, path, headers={**(headers or {}), **self._authorization}, content=file, **arguments
                )
            except httpx.TransportError as error:
                away = ServiceUnreachable(f"{self._http.base_url}: {error}")
                unsure = unsure or not isinstance(error, _NOT_SENT)
                if unsure and file is not None:
                    raise _AnswerLost(away, late=isinstance(error, httpx.ReadTimeout)) from error
                if last:
                    raise away from error
                time.sleep(_pause(attempt))
                continue
            if response.status_code in _TRY_AGAIN and not last:
                retry_after = response.headers.get("retry-after")
                unsure = unsure or response.status_code != httpx.codes.TOO_MANY_REQUESTS
                if unsure and file is not None:
                    late = response.status_code == httpx.codes.GATEWAY_TIMEOUT
                    raise _AnswerLost(_error(response), late=late, retry_after=retry_after)
                time.sleep(_pause(attempt, retry_after))
                continue
            if not response.is_success:  # a redirection too: it leads to no answer of ours
                problem = _error(response)
                if method == "DELETE" and unsure and isinstance(problem, NotFound):
                    return response  # gone, as was asked
                raise problem
            return response
        raise AssertionError("the last try returns or raises")


def need_free(directory: Path) -> None:
    """Raise `Conflict` unless an adapter can be pulled there: it does not exist, or is empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise Conflict(f"{directory} exists and is not an empty directory")


class _AnswerLost(Exception):
    """What was sent may have been carried out, and nobody knows."""

    def __init__(self, error: D2LoraError, *, late: bool, retry_after: str | None = None) -> None:
        super().__init__(error.detail)
        self.error = error
        self.late = late  # it may yet be carried out
        self.retry_after = retry_after


class _Page(BaseModel):
    data: list[Any]
    next_cursor: str | None


def _read(model: type[_Answer], response: httpx.Response) -> _Answer:
    """Return an answer as a resource."""
    try:
        answer = response.json()
    except ValueError as error:
        raise _foreign(response) from error
    return _understood(model, answer, response)


def _understood(model: type[_Answer], answer: Any, response: httpx.Response) -> _Answer:
    """Return what an answer holds as a resource; fields that a newer service knows are left out."""
    try:
        return model.model_validate(answer, extra="ignore")
    except ValueError as error:
        raise _foreign(response) from error


def _foreign(response: httpx.Response) -> ServiceUnreachable:
    return ServiceUnreachable(
        f"{response.url} answered {response.status_code}, but not as d2lora does; is it its address?"
    )


def _error(response: httpx.Response) -> D2LoraError:
    try:
        return from_problem(Problem.model_validate(response.json(), extra="ignore"))
    except ValueError:  # not this service, or something in front of it
        return ServiceUnreachable(f"{response.url} answered {response.status_code} without a problem object")


def _path(kind: str, identifier: str, rest: str = "") -> str:
    """Return where a resource is; an ID is one step of the path, whatever it holds.

    Raises:
        NotFound: the ID is empty, or a step that a path goes back or stays by.
    """
    if identifier in {"", ".", ".."}:
        raise NotFound(f"{identifier!r} is no ID")
    return f"/v1/{kind}/{quote(identifier, safe='')}{rest}"


def _below(directory: Path, name: str) -> Path:
    """Return where a file goes: its name may lead into a folder of the directory, and never out of it."""
    steps = [Path(step).name for step in name.split("/")]
    return directory.joinpath(*(step for step in steps if step not in {"", ".", ".."}))


def _check_manifest(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    for entry in manifest["files"]:
        content = _below(directory, entry["name"])
        if not content.is_file():
            raise ChecksumMismatch(f"{entry['name']} is in the manifest, but was not delivered; pull again")
        with content.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise ChecksumMismatch(f"{entry['name']} is not what the manifest says it is; pull again")


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _pause(attempt: int, retry_after: str | None = None) -> float:
    if retry_after and retry_after.isdecimal():
        return min(30.0, float(retry_after))
    return min(5.0, 0.2 * 2**attempt)

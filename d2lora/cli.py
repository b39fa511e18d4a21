"""The command ``d2lora``.

Exit codes: 0 all is well; 1 the job failed or the request was refused; 2 wrong usage, or something is missing on this
machine; 3 the service cannot be reached; 4 the job was cancelled, or the time to wait is over; 130 interrupted.
"""

import json
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich import print_json

from d2lora.client import Client, need_free
from d2lora.datasets import DatasetFile, Format, inspect
from d2lora.display import print_dataset, print_job, print_summary, progress_bar
from d2lora.errors import D2LoraError, Problem, ServiceUnreachable, from_problem
from d2lora.initializations import Progress, Result, State
from d2lora.options import build_spec, by_dataset, with_spec_options
from d2lora.roles import Role
from d2lora.supervisor import Child, api_key_file, free_port, is_taken, running, supervise, wait_until_ready

app = typer.Typer(
    help="Initialization as a service: LoRA adapters that already point the right way.",
    epilog="Exit codes: 0 ok, 1 failed or refused, 2 usage or environment, 3 service unreachable, "
    "4 cancelled or timed out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

datasets = typer.Typer(help="The datasets that the service keeps.", no_args_is_help=True)
app.add_typer(datasets, name="datasets")

DATA_DIR = Path(".d2lora")
DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option(envvar="D2LORA_URL", help="the service's address")]
ApiKey = Annotated[str | None, typer.Option(envvar="D2LORA_API_KEY", help="else .d2lora/api_key", show_default=False)]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="ours=theirs, such as prompt=question; repeatable; 1.prompt=question is for the first --dataset",
    ),
]
Further = Annotated[
    list[Path] | None,
    typer.Option("--dataset", help="a file of rows whose objectives join in, on their own normalizers; repeatable"),
]
FileFormat = Annotated[Format | None, typer.Option("--format", help="else by the file's suffix")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for a script")]


def main() -> None:
    """Run the command line; every error becomes a line on standard error and an exit code."""
    try:
        app()
    except ServiceUnreachable as error:
        _fail(error, 3)
    except D2LoraError as error:
        _fail(error, 1)
    except TimeoutError as error:
        _stop(str(error), 4)
    except OSError as error:  # of which a TimeoutError is one
        _stop(str(error), 2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def up(
    data_dir: Annotated[Path, typer.Option(help="database, objects and API key live here")] = DATA_DIR,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    allow_model: Annotated[list[str] | None, typer.Option(help="hub IDs or patterns; on loopback all")] = None,
    model_root: Annotated[list[Path] | None, typer.Option(help="where local models lie; on loopback anywhere")] = None,
) -> None:
    """Start the whole service on this machine: API, database, object store and one worker."""
    _need_rooms("service", "worker")
    if host not in {"127.0.0.1", "::1", "localhost"} and not (allow_model or model_root):
        _stop(f"--host {host} lets others in: say which models they may name, with --allow-model or --model-root", 2)
    data_dir = data_dir.absolute()
    data_dir.mkdir(parents=True, exist_ok=True)
    data_dir.chmod(0o700)
    key = api_key_file(data_dir)
    if port and is_taken(host, port):
        _stop(f"--port {port}: something listens there already; give another, or 0 for a free one", 2)
    port = port or free_port()
    hub_ids = allow_model or ([] if model_root else ["*"])
    roots = model_root or ([] if allow_model else [Path("/")])
    environment = {
        "D2LORA_DATABASE_URL": f"sqlite:///{data_dir / 'd2lora.db'}",
        "D2LORA_STORAGE_ROOT": str(data_dir / "objects"),
        "D2LORA_SERVICE_HOST": host,
        "D2LORA_SERVICE_PORT": str(port),
        "D2LORA_SERVICE_API_KEYS": json.dumps({"local": key}),
        # On one machine a beat costs nothing: progress is fresh, and a killed worker's job is soon taken up again.
        "D2LORA_WORKER_HEARTBEAT_SECONDS": "1",
        "D2LORA_WORKER_LEASE_SECONDS": "15",
        "D2LORA_MODELS_ALLOWED": json.dumps(hub_ids),
        "D2LORA_MODELS_ROOTS": json.dumps([str(root.absolute()) for root in roots]),
    }
    service = Child("service", [sys.executable, "-m", "service"], environment)
    worker = Child("worker", [sys.executable, "-m", "worker", "run"], environment)
    # Without this a SIGTERM would end this process and skip the block that stops the children.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with running([service, worker]):
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        try:
            assert service.process is not None
            wait_until_ready(url, service.process)
        except RuntimeError as error:
            _stop(str(error), 1)
        print(f"d2lora is up at {url}")
        print(f"API key: {key}  (also in {data_dir / 'api_key'})")
        print(f"try: d2lora submit MODEL rows.jsonl --url {url} --wait --out adapter", flush=True)
        code = supervise(service, worker)
    sys.exit(code)


@app.command()
def validate(data: Path, column: Columns = None, format: FileFormat = None, as_json: AsJson = False) -> None:
    """Check a dataset file on this machine, to its last row."""
    summary = inspect(_dataset_file(data, column, format))
    if as_json:
        print_json(summary.model_dump_json())
        return
    print(f"{data}: {summary.rows} rows of {summary.row_schema}; objectives: {', '.join(summary.objectives)}")


@app.command()
@with_spec_options
def init(
    model: Annotated[str, typer.Argument(help="hub ID, directory, or .gguf file")],
    data: Path,
    options: dict[str, Any],
    extras: dict[Role, Path],
    evaluations: list[Path],
    out: Annotated[Path, typer.Option(help="directory for the adapter; must not exist, or be empty")],
    dataset: Further = None,
    column: Columns = None,
    format: FileFormat = None,
    as_json: AsJson = False,
) -> None:
    """Build one adapter on this machine, without a service."""
    _need_rooms("worker")
    _need_writable(out)
    (file, *others), measuring = _training_files([data, *(dataset or [])], evaluations, column, format)
    files = _extra_files(extras)
    further = [f"local-{number}" for number in range(1, 1 + len(others))]
    based_on, options["based_on"] = options["based_on"], options["based_on"] and "local"
    locally = dict.fromkeys(files, "local")
    spec = build_spec(model, "local", options, locally, further, ["local"] * len(measuring))
    if measuring and not others:
        files[Role.EVALUATION] = measuring.pop()
    request = {
        "spec": spec.model_dump(mode="json"),
        "dataset": _described(file),
        "further": [_described(other) for other in others],
        "evaluations": [_described(file) for file in measuring],
        "extras": {role: _described(file) for role, file in files.items()},
        "based_on": based_on,
        "out": str(out),
    }
    result = _run_init(request)
    if as_json:
        print_json(result.model_dump_json())
    else:
        print_summary(result.summary)
        print(f"adapter: {out}")


def _run_init(request: dict[str, Any]) -> Result:
    """Run the worker's one shot as a child, show its progress, and return its result."""
    command = [sys.executable, "-m", "worker", "init"]
    # In a process group of its own, so that a Ctrl-C reaches it once: from here.
    child = subprocess.Popen(  # noqa: S603  # our own module
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(request))
        child.stdin.close()
        answer: dict[str, Any] = {}
        with progress_bar() as show:
            for line in child.stdout:
                answer = json.loads(line)
                if "progress" in answer:
                    show(Progress.model_validate(answer["progress"]))
        child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)
        child.wait()
        raise
    if "problem" in answer:
        raise from_problem(Problem.model_validate(answer["problem"]))
    if "result" not in answer:
        _stop(f"the worker ended with {child.returncode} and no result", 1)
    return Result.model_validate(answer["result"])


@app.command()
@with_spec_options
def submit(
    model: Annotated[str, typer.Argument(help="hub ID, directory, or .gguf file, as the service sees it")],
    data: Path,
    options: dict[str, Any],
    extras: dict[Role, Path],
    evaluations: list[Path],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    wait_: Annotated[bool, typer.Option("--wait", help="until it has ended")] = False,
    out: Annotated[Path | None, typer.Option(help="with --wait: pull the adapter into this directory")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="the same key submits once")] = None,
    dataset: Further = None,
    column: Columns = None,
    format: FileFormat = None,
    as_json: AsJson = False,
) -> None:
    """Upload a dataset and ask the service for an adapter."""
    if out is not None:
        if not wait_:
            _stop("--out: the adapter is pulled at the end of the job; give --wait as well", 2)
        need_free(out)  # and not only when the job has run
        _need_writable(out)
    rows, measuring = _training_files([data, *(dataset or [])], evaluations, column, format)
    files = _extra_files(extras)
    unknown = [f"unknown-{number}" for number in range(1, len(rows))]
    nowhere = dict.fromkeys(files, "unknown")
    build_spec(model, "unknown", options, nowhere, unknown, ["unknown"] * len(measuring))  # before any upload
    with _client(url, api_key) as client:

        def upload(file: DatasetFile) -> str:
            way: dict[str, Any] = {"format": file.format, "columns": file.columns}
            # A key submits once if the request is the same, which names datasets by their IDs.
            known = client.find_dataset(file.path, **way) if idempotency_key else None
            return (known or client.upload_dataset(file.path, **way)).id

        dataset_id, *further = [upload(file) for file in rows]
        uploaded = {role: upload(file) for role, file in files.items()}
        spec = build_spec(model, dataset_id, options, uploaded, further, [upload(file) for file in measuring])
        job = client.submit(spec, idempotency_key=idempotency_key)
        if not wait_:
            print(job.model_dump_json() if as_json else job.id)
            return
        _finish(client, job.id, out=out, timeout=None, as_json=as_json)


@app.command()
def status(initialization_id: str, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show one initialization."""
    with _client(url, api_key) as client:
        print_job(client.get(initialization_id), as_json=as_json)


@app.command("list")
def list_(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    state: Annotated[State | None, typer.Option()] = None,
    as_json: AsJson = False,
) -> None:
    """Show all initializations, newest first."""
    with _client(url, api_key) as client:
        for job in client.initializations(state=state):
            print_job(job, as_json=as_json)


@app.command()
def wait(
    initialization_id: str,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Annotated[float | None, typer.Option(help="seconds")] = None,
    as_json: AsJson = False,
) -> None:
    """Show progress until an initialization has ended."""
    with _client(url, api_key) as client:
        _finish(client, initialization_id, out=None, timeout=timeout, as_json=as_json)


@app.command()
def pull(
    initialization_id: str,
    out: Annotated[Path, typer.Option(help="directory for the adapter; must not exist, or be empty")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Download an adapter and verify its checksums."""
    with _client(url, api_key) as client:
        for path in client.pull(initialization_id, out):
            print(path)


@app.command()
def cancel(initialization_id: str, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Cancel an initialization."""
    with _client(url, api_key) as client:
        print_job(client.cancel(initialization_id), as_json=as_json)


@datasets.command("list")
def list_datasets(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show all datasets, newest first."""
    with _client(url, api_key) as client:
        for dataset in client.datasets():
            print_dataset(dataset, as_json=as_json)


@datasets.command("delete")
def delete_datasets(dataset_ids: list[str], url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Delete datasets, and all statistics kept of them; adapters stay. One that an unfinished job needs is refused."""
    with _client(url, api_key) as client:
        for dataset_id in dataset_ids:
            client.delete_dataset(dataset_id)
            print(dataset_id)


def _finish(client: Client, job_id: str, *, out: Path | None, timeout: float | None, as_json: bool) -> None:
    """Wait for a job, show how it ended, and exit with a code that says so."""
    with progress_bar() as show:
        job = client.wait(job_id, on_update=lambda job: show(job.progress), timeout=timeout)
    if as_json and job.state is not State.SUCCEEDED:
        print_job(job, as_json=True)  # scripts read standard output, however the job has ended
    if job.error is not None:
        raise from_problem(job.error)
    if job.state is not State.SUCCEEDED:
        _stop(f"{job.id} is {job.state}", 4)
    if out is not None:
        client.pull(job.id, out)
    print_job(job, as_json=as_json)


def _client(url: str, api_key: str | None) -> Client:
    key = api_key
    if key is None and (DATA_DIR / "api_key").is_file():
        key = (DATA_DIR / "api_key").read_text(encoding="utf-8").strip()
    if not key:
        _stop(f"no API key: give --api-key, set D2LORA_API_KEY, or run where {DATA_DIR}/api_key is", 2)
    if not (key.isascii() and key.isprintable()):
        _stop("the API key holds what no key can, such as a line break", 2)
    try:
        return Client(url, api_key=key)
    except httpx.InvalidURL as error:
        _stop(f"--url {url}: {error}", 2)


def _training_files(
    paths: list[Path], evaluations: list[Path], columns: list[str] | None, format_: Format | None
) -> tuple[list[DatasetFile], list[DatasetFile]]:
    """Return what is learnt from, and what measures on the objectives of one and the other: rows that look alike."""
    own = by_dataset(columns or [], len(paths), "--column")
    if len(evaluations) > len(paths):
        _stop(f"--eval: there are {len(evaluations)} of them, and {len(paths)} files to learn from", 2)
    return (
        [_dataset_file(path, mapping, format_) for path, mapping in zip(paths, own, strict=True)],
        [_dataset_file(path, mapping, None) for path, mapping in zip(evaluations, own, strict=False)],
    )


def _extra_files(extras: dict[Role, Path]) -> dict[Role, DatasetFile]:
    return {role: _dataset_file(path, None, None) for role, path in extras.items()}


def _described(file: DatasetFile) -> dict[str, Any]:
    return {"path": str(file.path), "format": file.format, "columns": dict(file.columns)}


def _dataset_file(path: Path, columns: list[str] | None, format_: Format | None) -> DatasetFile:
    if not path.is_file():
        _stop(f"there is no file {path}", 2)
    path.open("rb").close()  # what cannot be read is said at once
    mapping: dict[str, str] = {}
    for pair in columns or []:
        ours, separator, theirs = pair.partition("=")
        if not (ours and separator and theirs):
            _stop(f"--column {pair}: must be written ours=theirs", 2)
        if ours in mapping:
            _stop(f"--column {pair}: {ours} is mapped to {mapping[ours]} already", 2)
        mapping[ours] = theirs
    return DatasetFile(path, format_ or Format.of(path), mapping)


def _need_writable(out: Path) -> None:
    """Raise OSError unless a directory can be made there."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=place).cleanup()


def _need_rooms(*names: str) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        _stop(f"this command needs a checkout of d2lora or its image; {', '.join(missing)} cannot be imported here", 2)


def _fail(error: D2LoraError, code: int) -> NoReturn:
    print(f"{error.code}: {error.detail}", file=sys.stderr)
    for item in error.errors:
        places = [("row", item.row), ("field", item.field), ("at", item.pointer)]
        place = ", ".join(f"{name} {value}" for name, value in places if value is not None)
        print(f"  {place}: {item.detail}", file=sys.stderr)
    sys.exit(code)


def _stop(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

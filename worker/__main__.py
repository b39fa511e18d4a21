"""``python -m worker run``: work on jobs until told to stop. ``python -m worker init``: one adapter, no service.

``init`` reads one JSON object from standard input (spec, dataset, eval_dataset, out) and writes JSON lines to standard
output: ``{"progress": ...}`` while it works, then ``{"result": ...}`` or ``{"problem": ...}``; it exits with 0 or 1.
"""

import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from d2lora.database import migrate
from d2lora.datasets import DatasetFile, Format
from d2lora.errors import D2LoraError, InternalError, RequestInvalid
from d2lora.initializations import InitializationSpec, Phase, Progress, Result
from d2lora.settings import DatabaseSettings, StorageSettings, WorkerSettings
from d2lora.storage import ObjectStorage, open_storage
from d2lora.store import Store
from worker.runner import Build, OnProgress, remove_leftovers, run_next

log = logging.getLogger("worker")


def main() -> int:
    """Return the exit code of the command that the arguments name."""
    # Standard output belongs to the JSON lines of `init`; and no library's progress bar belongs into a log.
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    os.environ.setdefault("TQDM_DISABLE", "1")
    match sys.argv[1:]:
        case ["run"]:
            return run()
        case ["init"]:
            return init()
        case _:
            sys.stderr.write("usage: python -m worker run | init\n")
            return 2


def run() -> int:
    """Work on jobs until SIGTERM, SIGINT, or the end of standard input if it is a pipe from a supervisor."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if os.environ.get("D2LORA_SUPERVISED"):
        threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
    settings = WorkerSettings()
    migrate(DatabaseSettings())
    remove_leftovers()
    with Store(DatabaseSettings()) as store:
        serve(store, open_storage(StorageSettings()), build_with(settings), settings, stop=stop)
    return 0


def serve(
    store: Store, storage: ObjectStorage, build: Build, settings: WorkerSettings, *, stop: threading.Event
) -> None:
    """Run jobs one after another until ``stop`` is set."""
    worker = f"{socket.gethostname()}:{os.getpid()}"
    log.info("worker_ready name=%s", worker)
    while not stop.is_set():
        try:
            worked = run_next(store, storage, build, settings, worker=worker, stop=stop)
        except Exception:
            log.exception("store_unreachable")  # the lease covers whatever was claimed
            worked = False
        if not worked:
            stop.wait(settings.poll_seconds)
    log.info("worker_stopped name=%s", worker)


def build_with(settings: WorkerSettings) -> Build:
    """Return the real build; torch is imported when the first job needs it."""

    def build(
        spec: InitializationSpec,
        dataset: DatasetFile,
        eval_dataset: DatasetFile | None,
        out: Path,
        on_progress: OnProgress,
    ) -> Result:
        on_progress(Phase.LOADING, 0, 1)
        from worker.initialization import initialize  # noqa: PLC0415  # seconds of imports

        return initialize(spec, dataset, eval_dataset, out=out, settings=settings, on_progress=on_progress)

    return build


def init() -> int:
    """Build one adapter into a directory that appears only when all of it is there."""
    try:
        result = _init(json.load(sys.stdin))
    except D2LoraError as error:
        return _finish(error)
    except KeyboardInterrupt:
        return 130
    except Exception:
        log.exception("crashed")
        return _finish(InternalError("an internal error; its traceback is on standard error"))
    _say({"result": result.model_dump(mode="json")})
    return 0


def _init(request: dict[str, Any]) -> Result:
    try:
        spec = InitializationSpec.model_validate(request["spec"])
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise RequestInvalid(faults) from error
    out = Path(request["out"])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestInvalid(f"out: {str(out)!r} exists and is not an empty directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        build = build_with(WorkerSettings())
        evaluation = request.get("eval_dataset")
        result = build(spec, _file(request["dataset"]), evaluation and _file(evaluation), workplace, _say_progress)
        workplace.chmod(0o755)  # mkdtemp's is for the owner alone
        if out.exists():
            out.rmdir()
        workplace.rename(out)
    except BaseException:
        shutil.rmtree(workplace, ignore_errors=True)
        raise
    return result


def _file(value: dict[str, Any]) -> DatasetFile:
    path = Path(value["path"])
    if not path.is_file():
        raise RequestInvalid(f"dataset: there is no file {str(path)!r}")
    return DatasetFile(path, Format(value["format"]), value.get("columns") or {})


def _say_progress(phase: Phase, done: int, total: int) -> None:
    _say({"progress": Progress(phase=phase, done=done, total=total).model_dump(mode="json")})


def _finish(error: D2LoraError) -> int:
    _say({"problem": error.problem().model_dump(mode="json")})
    return 1


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _watch_parent(stop: threading.Event) -> None:
    """Stop when the supervisor is gone: its end of the pipe closes however it died."""
    sys.stdin.buffer.read()
    stop.set()


if __name__ == "__main__":
    sys.exit(main())

"""``python -m worker run``: work on jobs until told to stop; ``alive``: whether it does; ``init``: one adapter alone.

``init`` reads one JSON object from standard input (spec, dataset, further datasets, extras by role, evaluations of
several datasets, based_on, out) and writes JSON lines to standard output: ``{"progress": ...}`` while it works, then
``{"result": ...}`` or ``{"problem": ...}``; it exits with 0 or 1.
"""

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from d2lora.database import migrate
from d2lora.datasets import DatasetFile, Format
from d2lora.errors import D2LoraError, InternalError, RequestInvalid, StoreUnavailable
from d2lora.initializations import InitializationSpec, Phase, Progress, Result
from d2lora.roles import Role, evaluation_field
from d2lora.settings import BrokerSettings, DatabaseSettings, WorkerSettings
from worker.heartbeat import heartbeat_file, is_fresh
from worker.process import RealWork, open_runner
from worker.runner import Recycle, Runner
from worker.units import BASE, KEPT, KEPT_INDEX, Split

log = logging.getLogger("worker")


def main() -> int:
    """Return the exit code of the command that the arguments name."""
    # Standard output belongs to the JSON lines of `init`; and no library's progress bar belongs into a log.
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    os.environ.setdefault("TQDM_DISABLE", "1")
    match sys.argv[1:]:
        case ["run"]:
            return run()
        case ["alive"]:
            return alive()
        case ["init"]:
            return init()
        case _:
            sys.stderr.write("usage: python -m worker run | alive | init\n")
            return 2


def run() -> int:
    """Work on jobs until SIGTERM, SIGINT, or the end of standard input if it is a pipe from a supervisor.

    With a broker, messages bring the work; without one, the database is asked again and again.
    """
    migrate(DatabaseSettings())
    broker, settings = BrokerSettings(), WorkerSettings()
    if broker.url is not None:
        from worker.app import consume  # noqa: PLC0415  # a single machine needs no Celery

        return consume(broker, settings)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if os.environ.get("D2LORA_SUPERVISED"):
        threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
    with open_runner(stop=stop) as runner, heartbeat_file(settings.heartbeat_file):
        return serve(runner)


def serve(runner: Runner) -> int:
    """Work on one unit after another until the runner's ``stop`` is set; return the exit code."""
    log.info("worker_ready name=%s", runner.worker)
    while not runner.stop.is_set():
        try:
            worked = runner.run_next()
        except Recycle:
            log.warning("worker_recycled")
            return 1  # whoever runs this process starts a fresh one
        except StoreUnavailable:
            log.warning("store_unavailable")
            worked = False
        if not worked:
            runner.stop.wait(runner.settings.poll_seconds)
    log.info("worker_stopped name=%s", runner.worker)
    return 0


def alive() -> int:
    """Return 0 if the worker on this machine has touched its heartbeat file lately."""
    path = WorkerSettings().heartbeat_file
    if path is None:
        sys.stderr.write("D2LORA_WORKER_HEARTBEAT_FILE is not set, so nothing can be told\n")
        return 2
    return 0 if is_fresh(path) else 1


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
        work = RealWork(WorkerSettings(), may_split=False)
        dataset = _file("dataset", request["dataset"])
        further = [_file("further", file) for file in request.get("further", [])]
        extras = {Role(role): _file(role, file) for role, file in request.get("extras", {}).items()}
        evaluations = {
            index: _file(evaluation_field(index), file) for index, file in enumerate(request.get("evaluations", []))
        }
        base = None if request.get("based_on") is None else _linked(Path(request["based_on"]), workplace)
        result: Result | Split
        if further:
            result = work.initialize_jointly(spec, [dataset, *further], evaluations, workplace, _say_progress)
        else:
            result = work.initialize(spec, dataset, extras, workplace, _say_progress)
        assert isinstance(result, Result)
        if base is not None:
            base.unlink()
        workplace.chmod(0o755)  # mkdtemp's is for the owner alone
        if out.exists():
            out.rmdir()
        workplace.rename(out)
    except BaseException:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave the directory
        shutil.rmtree(workplace, ignore_errors=True)
        signal.signal(signal.SIGINT, handler)
        raise
    return result


def _linked(earlier: Path, workplace: Path) -> Path:
    """Return where the statistics beside an earlier adapter are found by the request that is based on it."""
    if not (earlier / KEPT / KEPT_INDEX).is_file():
        raise RequestInvalid(f"based_on: {str(earlier)!r} has no statistics; it was made without keep_statistics")
    (workplace / BASE).symlink_to((earlier / KEPT).absolute())
    return workplace / BASE


def _file(name: str, value: dict[str, Any]) -> DatasetFile:
    path = Path(value["path"])
    if not path.is_file():
        raise RequestInvalid(f"{name}: there is no file {str(path)!r}")
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
    while os.read(0, 4096):  # not sys.stdin, whose lock an exiting interpreter would wait for
        pass
    stop.set()


if __name__ == "__main__":
    sys.exit(main())

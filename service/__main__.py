"""``python -m service``: serve; ``migrate``: the database alone; ``openapi --write|--check FILE``: the API's text."""

import difflib
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import uvicorn
import yaml
from fastapi import FastAPI
from pydantic import SecretStr

from d2lora.database import migrate
from d2lora.settings import DatabaseSettings, ServiceSettings
from service.app import create_app
from service.settings import Settings


class _Server(uvicorn.Server):
    """Tells the app's event streams to end when the server stops; left alone, it would wait for their clients."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop."""
        self._app.state.stopping.set()
        super().handle_exit(sig, frame)


def main() -> int:
    """Return the exit code of the command that the arguments name."""
    match sys.argv[1:]:
        case []:
            return serve()
        case ["migrate"]:
            migrate(DatabaseSettings())
            return 0
        case ["openapi", "--write", path]:
            Path(path).write_text(openapi(), encoding="utf-8")
            return 0
        case ["openapi", "--check", path]:
            return check(Path(path))
        case _:
            sys.stderr.write("usage: python -m service [migrate | openapi --write|--check FILE]\n")
            return 2


def serve() -> int:
    """Bring the database up to date and serve until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if os.environ.get("D2LORA_SUPERVISED"):
        threading.Thread(target=_watch_parent, daemon=True).start()
    settings = Settings()
    app = create_app(settings)
    migrate(settings.database)
    config = uvicorn.Config(
        app,
        host=settings.service.host,
        port=settings.service.port,
        timeout_graceful_shutdown=20,
        access_log=False,
        log_config=None,
        server_header=False,
    )
    _Server(app, config).run()
    return 0


def openapi() -> str:
    """Return the API's description as YAML, the same on every machine."""
    service = ServiceSettings(api_keys={"nobody": SecretStr("unused")})
    return yaml.safe_dump(
        create_app(Settings(service=service)).openapi(), sort_keys=False, allow_unicode=True, width=120
    )


def check(path: Path) -> int:
    """Return 0 if the file holds the API's description, else 1 with the difference on standard error."""
    committed = path.read_text(encoding="utf-8") if path.exists() else ""
    difference = list(
        difflib.unified_diff(committed.splitlines(), openapi().splitlines(), "committed", "generated", lineterm="")
    )
    for line in difference[:40]:
        sys.stderr.write(line + "\n")
    if difference:
        sys.stderr.write(f"{path} is not what the service serves; run: make openapi\n")
    return int(bool(difference))


def _watch_parent() -> None:
    """Stop when the supervisor is gone: its end of the pipe closes however it died."""
    while os.read(0, 4096):  # not sys.stdin, whose lock an exiting interpreter would wait for
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())

"""The composition root: settings in, application out."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from d2lora import __version__
from d2lora.scratch import remove_leftovers
from d2lora.storage import open_storage
from d2lora.store import Store
from service import datasets, health, initializations, limits, problems
from service.auth import KeyRing
from service.dispatch import dispatching
from service.metrics import serving_metrics
from service.settings import Settings

_DESCRIPTION = """\
Initialization as a service: a base model and a small dataset in, a LoRA adapter out that already points the right way.

Upload rows to `/v1/datasets`, ask for an adapter at `/v1/initializations`, wait until it has succeeded, and fetch its
files from `/v1/initializations/{id}/adapter`. Errors are `application/problem+json` with a stable `code`.
"""


def create_app(settings: Settings) -> FastAPI:
    """Return the application; it opens its store when it starts and closes it when it stops.

    Raises:
        SystemExit: no API key is set.
    """
    keys = KeyRing(settings.service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        remove_leftovers("upload")
        with (
            Store(settings.database) as store,
            dispatching(store.outbox, app.state.storage, settings.broker, settings.dispatch) as dispatcher,
            serving_metrics(settings.service.metrics_port, settings.service.host, store.outbox, dispatcher),
        ):
            app.state.store = store
            app.state.probes = health.new_probes()
            yield

    app = FastAPI(
        title="d2lora",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        # The built-in pages load their scripts from elsewhere, which an isolated network cannot.
        docs_url=None,
        redoc_url=None,
    )
    app.state.stopping = threading.Event()
    app.state.settings = settings
    app.state.keys = keys
    app.state.storage = open_storage(settings.storage)
    limits.install(app, settings.service.max_request_bytes)
    problems.install(app)  # the outermost, so that every answer has a request ID
    for module in (datasets, initializations, health):
        app.include_router(module.router)
    return app

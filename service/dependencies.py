"""What endpoints need: parameters that several have, and what is taken from the app that was composed in `service.app`.

Async, although nothing is awaited: a thread could be waited for.
"""

from typing import Annotated

from fastapi import Depends, Query, Request

from d2lora.storage import ObjectStorage
from d2lora.store import Store
from service.settings import Settings


async def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


async def _storage(request: Request) -> ObjectStorage:
    storage: ObjectStorage = request.app.state.storage
    return storage


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


StoreDependency = Annotated[Store, Depends(_store)]
StorageDependency = Annotated[ObjectStorage, Depends(_storage)]
SettingsDependency = Annotated[Settings, Depends(_settings)]

PageLimit = Annotated[int, Query(ge=1, le=100, description="how many a page has at most")]
PageCursor = Annotated[str | None, Query(max_length=256, description="`next_cursor` of the page before")]

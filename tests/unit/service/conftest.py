"""The service in process, on a real database and a real object store."""

import pytest
from fastapi.testclient import TestClient

from d2lora.database import migrate
from d2lora.settings import DatabaseSettings, ModelSettings, ServiceSettings, StorageSettings
from service.app import create_app
from service.settings import Settings

KEYS = {"acme": "key-of-acme", "other": "key-of-other"}


@pytest.fixture
def settings(tmp_path):
    return Settings(
        service=ServiceSettings(api_keys=KEYS, max_dataset_bytes=10_000, max_request_bytes=5_000, max_dataset_rows=50),
        database=DatabaseSettings(url=f"sqlite:///{tmp_path / 'd2lora.db'}"),
        storage=StorageSettings(root=tmp_path / "objects"),
        models=ModelSettings(allowed=["allowed/*"], roots=[tmp_path / "models"]),
    )


@pytest.fixture
def app(settings):
    migrate(settings.database)
    return create_app(settings)


@pytest.fixture
def client(app):
    with TestClient(app, headers={"authorization": f"Bearer {KEYS['acme']}"}, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def as_other():
    return {"authorization": f"Bearer {KEYS['other']}"}


@pytest.fixture
def upload(client):
    def upload(content=b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', *, media="application/jsonl", **params):
        return client.post("/v1/datasets", content=content, headers={"content-type": media}, params=params)

    return upload

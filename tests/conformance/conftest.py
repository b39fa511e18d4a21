"""Every implementation of a seam, under the same tests."""

import hashlib
from datetime import UTC, datetime

import pytest

from d2lora.database import migrate
from d2lora.datasets import Dataset
from d2lora.initializations import InitializationSpec
from d2lora.settings import DatabaseSettings
from d2lora.storage import LocalStorage
from d2lora.store import Store


@pytest.fixture(params=["sqlite"])
def database(request, tmp_path):
    settings = DatabaseSettings(url=f"sqlite:///{tmp_path / 'state' / 'd2lora.db'}")
    migrate(settings)
    return settings


@pytest.fixture
def store(database):
    with Store(database) as store:
        yield store


@pytest.fixture(params=["local"])
def storage(request, tmp_path):
    return LocalStorage(tmp_path / "objects")


def add_dataset(store, tenant="acme", dataset_id="ds_1", content=b"rows"):
    dataset = Dataset(
        id=dataset_id,
        created_at=datetime.now(UTC),
        format="jsonl",
        row_schema="preference",
        rows=1,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        objectives=["sft", "dpo", "orpo"],
    )
    store.add_dataset(tenant, dataset, f"t/{tenant}/datasets/{dataset_id}")
    return dataset


@pytest.fixture
def spec(store):
    add_dataset(store)
    return InitializationSpec(base_model="some/model", dataset_id="ds_1")

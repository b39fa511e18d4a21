"""Every implementation of a seam, under the same tests."""

import hashlib
import secrets
from datetime import UTC, datetime

import psycopg
import pytest
from psycopg import sql

from cluster import servers
from cluster.processes import Guard
from cluster.servers import serving
from d2lora.database import migrate
from d2lora.datasets import Dataset
from d2lora.initializations import InitializationSpec
from d2lora.settings import DatabaseSettings, StorageSettings
from d2lora.storage import open_storage
from d2lora.store import Store


@pytest.fixture(scope="session")
def guard():
    with Guard() as guard:
        yield guard


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory, guard):
    """A real PostgreSQL server."""
    with serving(servers.postgresql(tmp_path_factory.mktemp("postgresql"), guard)) as server:
        yield server


@pytest.fixture(scope="session")
def postgresql_database(postgresql):
    """A database with the newest schema, for all tests in turn: each of its own would be three hundred files."""
    settings = DatabaseSettings(url=postgresql.create_database("test"))
    migrate(settings)
    return settings


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """An empty database with the newest schema."""
    if request.param == "sqlite":
        settings = DatabaseSettings(url=f"sqlite:///{tmp_path / 'state' / 'd2lora.db'}")
        migrate(settings)
        return settings
    settings = request.getfixturevalue("postgresql_database")
    with psycopg.connect(settings.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("SET lock_timeout = '5s'")  # of a test that has left a transaction open
        rows = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        tables = [sql.Identifier(name) for (name,) in rows if name != "alembic_version"]
        connection.execute(sql.SQL("TRUNCATE {} RESTART IDENTITY").format(sql.SQL(", ").join(tables)))
    return settings


@pytest.fixture
def store(database):
    with Store(database) as store:
        yield store


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory, guard):
    """A real S3-compatible server with credentials."""
    with serving(servers.seaweedfs(tmp_path_factory.mktemp("s3"), guard)) as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path, monkeypatch):
    """An empty object store."""
    if request.param == "local":
        return open_storage(StorageSettings(root=tmp_path / "objects"))
    server = request.getfixturevalue("s3_server")
    for name, value in server.credentials.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{secrets.token_hex(6)}"
    server.client().create_bucket(Bucket=bucket)
    return open_storage(StorageSettings(bucket=bucket, endpoint_url=server.url()))


def describe_dataset(dataset_id="ds_1", content=b"rows"):
    return Dataset(
        id=dataset_id,
        created_at=datetime.now(UTC),
        format="jsonl",
        row_schema="preference",
        rows=1,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        objectives=["sft", "dpo", "orpo"],
    )


def add_dataset(store, tenant="acme", dataset_id="ds_1", content=b"rows"):
    dataset = describe_dataset(dataset_id, content)
    store.add_dataset(tenant, dataset, f"t/{tenant}/datasets/{dataset_id}")
    return dataset


@pytest.fixture
def spec(store):
    add_dataset(store)
    return InitializationSpec(base_model="some/model", dataset_id="ds_1")

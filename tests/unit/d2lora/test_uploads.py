"""Uploads whose answer is lost, and datasets that are there already."""

import hashlib
from datetime import UTC, datetime

import httpx
import pytest

from d2lora.client import Client
from d2lora.errors import D2LoraError, DatasetInvalid, ServiceUnreachable, StorageUnavailable

ROWS = b'{"text": "a"}\n'


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("d2lora.client._pause", lambda *_: 0)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROWS)
    return path


def described(dataset_id, content=ROWS, **changes):
    return {
        "id": dataset_id,
        "created_at": datetime.now(UTC).isoformat(),
        "format": "jsonl",
        "row_schema": "text",
        "rows": 1,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "objectives": ["sft"],
        **changes,
    }


class Service:
    """Meets uploads with these outcomes in turn, and takes those that come after; lists what it has, newest first."""

    def __init__(self, *outcomes, arrives=False, has=()):
        self.outcomes, self.arrives = list(outcomes), arrives
        self.datasets, self.uploads, self.timeouts = list(has), [], []

    def __call__(self, request):
        if request.method == "GET":
            return httpx.Response(200, json={"data": self.datasets, "next_cursor": None})
        self.uploads.append(request.read())
        self.timeouts.append(request.extensions["timeout"])
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if outcome is None or self.arrives:
            self.datasets.insert(0, described(f"ds_{len(self.uploads)}"))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome or httpx.Response(201, json=self.datasets[0])

    def client(self):
        return Client("http://service", api_key="k", transport=httpx.MockTransport(self))


def refused(error):
    return httpx.Response(error.status, json=error.problem().model_dump(mode="json"))


LOST = [httpx.ReadError("reset"), httpx.WriteError("reset"), httpx.Response(502), refused(StorageUnavailable("away"))]


@pytest.mark.parametrize("lost", LOST)
def test_an_upload_that_has_arrived_is_not_sent_again(rows, lost):
    service = Service(lost, arrives=True)

    with service.client() as client:
        assert client.upload_dataset(rows).id == "ds_1"

    assert len(service.uploads) == 1


@pytest.mark.parametrize("lost", LOST)
def test_an_upload_that_has_not_arrived_is_sent_again_whole(rows, lost):
    service = Service(lost, has=[described("ds_9", b"other")])

    with service.client() as client:
        assert client.upload_dataset(rows).id == "ds_2"

    assert service.uploads == [ROWS, ROWS]


@pytest.mark.parametrize("outcome", [httpx.ConnectError("refused"), httpx.Response(429)])
def test_an_upload_that_nobody_took_is_sent_again_unseen(rows, outcome):
    service = Service(outcome, has=[described("ds_9")])

    with service.client() as client:
        assert client.upload_dataset(rows).id == "ds_2"


@pytest.mark.parametrize("status", [429, 503])
def test_an_upload_waits_as_long_as_the_service_asks_for(rows, monkeypatch, status):
    asked = []
    monkeypatch.setattr("d2lora.client._pause", lambda _, retry_after=None: asked.append(retry_after) or 0)
    service = Service(httpx.Response(status, headers={"retry-after": "7"}))

    with service.client() as client:
        assert client.upload_dataset(rows).id == "ds_2"

    assert asked == ["7"]


@pytest.mark.parametrize("late", [httpx.ReadTimeout("late"), httpx.Response(504)])
def test_an_upload_whose_answer_is_late_is_not_sent_again(rows, late):
    service = Service(late)

    with service.client() as client, pytest.raises(ServiceUnreachable, match=r"rows.jsonl: .* may still arrive"):
        client.upload_dataset(rows)

    assert len(service.uploads) == 1


def test_an_upload_that_never_arrives_is_given_up(rows):
    service = Service(*[httpx.ReadError("reset")] * 9)

    with service.client() as client, pytest.raises(ServiceUnreachable, match="reset"):
        client.upload_dataset(rows)

    assert len(service.uploads) == 5


def test_an_upload_that_is_refused_is_an_error_at_once(rows):
    service = Service(refused(DatasetInvalid("no good")))

    with service.client() as client, pytest.raises(D2LoraError, match="no good"):
        client.upload_dataset(rows)

    assert len(service.uploads) == 1


def test_the_answer_to_an_upload_is_waited_for_as_long_as_rows_may_be_checked(rows):
    service = Service()

    with service.client() as client:
        client.upload_dataset(rows)

    assert service.timeouts == [{"connect": 60.0, "read": 900.0, "write": 60.0, "pool": 60.0}]


def test_the_oldest_dataset_of_the_same_bytes_format_and_columns_is_found(rows):
    mapping = {"text": "body"}
    has = [
        described("ds_5", b"other"),
        described("ds_4"),
        described("ds_3"),
        described("ds_2", columns=mapping),
        described("ds_1", format="json"),
    ]

    with Service(has=has).client() as client:
        assert client.find_dataset(rows).id == "ds_3"
        assert client.find_dataset(rows, columns=mapping).id == "ds_2"
        assert client.find_dataset(rows, format="json").id == "ds_1"
        assert client.find_dataset(rows, format="csv") is None

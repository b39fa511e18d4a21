"""The command line and the client against the service itself."""

import httpx
import pytest
from typer.testing import CliRunner

from d2lora import cli
from d2lora.client import Client
from tests.unit.service.conftest import KEYS


@pytest.fixture
def d2lora(client, monkeypatch):
    """Run a command, whose requests the service in this process answers."""

    def answer(request):
        headers = dict(request.headers)
        response = client.request(request.method, str(request.url), content=request.read(), headers=headers)
        return httpx.Response(response.status_code, content=response.content, headers=dict(response.headers))

    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(
        cli, "_client", lambda *_: Client("http://testserver", api_key=KEYS["acme"], transport=transport)
    )

    def run(*arguments):
        done = CliRunner().invoke(cli.app, [*map(str, arguments)])
        assert done.exception is None, done.exception
        return done.output.strip()

    return run


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "completion": "b"}\n')
    return path


def test_the_same_key_submits_once_with_one_dataset(d2lora, client, rows):
    arguments = ["submit", "allowed/model", rows, "--column", "prompt=question", "--idempotency-key", "k"]

    first, second = d2lora(*arguments), d2lora(*arguments)

    assert first.startswith("init_")
    assert second == first
    assert len(client.get("/v1/datasets").json()["data"]) == 1
    assert len(client.get("/v1/initializations").json()["data"]) == 1


def test_the_same_key_submits_once_also_after_a_later_upload_of_the_same_file(d2lora, client, rows):
    arguments = ["submit", "allowed/model", rows, "--column", "prompt=question"]

    first = d2lora(*arguments, "--idempotency-key", "k")
    other = d2lora(*arguments)

    assert other != first
    assert len(client.get("/v1/datasets").json()["data"]) == 2
    assert d2lora(*arguments, "--idempotency-key", "k") == first

import hashlib
import json
from datetime import UTC, datetime

import httpx
import pytest

from d2lora import errors
from d2lora.client import Client
from d2lora.errors import ChecksumMismatch, Conflict, D2LoraError, NotFound, Problem, ServiceUnreachable, from_problem
from d2lora.initializations import InitializationSpec

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
MANIFEST = json.dumps(
    {
        "version": 1,
        "files": [{"name": n, "size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in FILES.items()],
    }
).encode()
CONTENTS = {**FILES, "manifest.json": MANIFEST}
JOB = {
    "id": "init_1",
    "state": "queued",
    "attempt": 0,
    "created_at": datetime.now(UTC).isoformat(),
    "spec": {"base_model": "m", "dataset_id": "ds_1"},
}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("d2lora.client._pause", lambda *_: 0)


def client_of(handler):
    return Client("http://service", api_key="secret", transport=httpx.MockTransport(handler))


def adapter_answer(*, change=None, elsewhere=False):
    """A service with one adapter, whose files lie there or elsewhere, and of which one may be damaged."""
    seen = []

    def handler(request):
        seen.append(request)
        if request.url.path.endswith("/adapter"):
            origin = "http://objects" if elsewhere else "http://service"
            files = [
                {"name": n, "size": len(c), "sha256": hashlib.sha256(c).hexdigest(), "url": f"{origin}/files/{n}"}
                for n, c in CONTENTS.items()
            ]
            return httpx.Response(200, json={"initialization_id": "init_1", "files": files})
        name = request.url.path.rpartition("/")[2]
        return httpx.Response(200, content=(change or {}).get(name, CONTENTS[name]))

    handler.seen = seen
    return handler


def test_a_pulled_adapter_is_whole(tmp_path):
    with client_of(adapter_answer()) as client:
        paths = client.pull("init_1", tmp_path / "a" / "adapter")

    assert {path.name: path.read_bytes() for path in paths} == CONTENTS
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["adapter"]


def serving(contents):
    """A service with one adapter of these files."""

    def describe(name, content):
        digest = hashlib.sha256(content).hexdigest()
        return {"name": name, "size": len(content), "sha256": digest}

    files = [describe(name, content) for name, content in contents.items()]
    every = {**contents, "manifest.json": json.dumps({"version": 1, "files": files}).encode()}

    def handler(request):
        if request.url.path.endswith("/adapter"):
            listed = [
                {**describe(name, content), "url": f"http://service/{number}"}
                for number, (name, content) in enumerate(every.items())
            ]
            return httpx.Response(200, json={"initialization_id": "init_1", "files": listed})
        return httpx.Response(200, content=list(every.values())[int(request.url.path[1:])])

    return handler


def test_files_in_folders_are_pulled_into_folders(tmp_path):
    contents = {"datasets-0/adapter_config.json": b"{}", "datasets-1/adapter_config.json": b"[]", "report.json": b"1"}

    with client_of(serving(contents)) as client:
        paths = client.pull("init_1", tmp_path / "adapter")

    found = {str(path.relative_to(tmp_path / "adapter")): path.read_bytes() for path in paths}
    assert {name: content for name, content in found.items() if name != "manifest.json"} == contents


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..", "a/..//../x"])
def test_no_file_is_pulled_to_a_place_outside_the_directory(tmp_path, name):
    with client_of(serving({name: b"1", "report.json": b"2"})) as client:
        try:
            client.pull("init_1", tmp_path / "in" / "adapter")
        except (D2LoraError, OSError):
            assert not (tmp_path / "in" / "adapter").exists()

    outside = [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and path.parts[len(tmp_path.parts) :][:2] != ("in", "adapter")
    ]
    assert outside == []


@pytest.mark.parametrize("damaged", [{"adapter_model.safetensors": b"weightx"}, {"adapter_model.safetensors": b""}])
def test_a_damaged_file_leaves_nothing_behind(tmp_path, damaged):
    with client_of(adapter_answer(change=damaged)) as client, pytest.raises(ChecksumMismatch, match="adapter_model"):
        client.pull("init_1", tmp_path / "adapter")

    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_use_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("x")

    with client_of(adapter_answer()) as client, pytest.raises(Conflict):
        client.pull("init_1", tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("elsewhere", [True, False])
def test_the_key_is_sent_to_the_service_alone(tmp_path, elsewhere):
    handler = adapter_answer(elsewhere=elsewhere)

    with client_of(handler) as client:
        client.pull("init_1", tmp_path / "adapter")

    for request in handler.seen:
        assert ("authorization" in request.headers) is (request.url.host == "service")


def test_a_service_that_comes_back_is_asked_again_with_the_same_key():
    keys = []

    def handler(request):
        keys.append(request.headers["idempotency-key"])
        if len(keys) == 1:
            raise httpx.ConnectError("refused")
        if len(keys) == 2:
            return httpx.Response(503, headers={"retry-after": "1"})
        return httpx.Response(202, json=JOB)

    with client_of(handler) as client:
        job = client.submit(InitializationSpec(base_model="m", dataset_id="ds_1"))

    assert job.id == "init_1"
    assert len(keys) == 3
    assert len(set(keys)) == 1


def test_a_service_that_stays_away_is_unreachable():
    def handler(request):
        raise httpx.ConnectError("refused")

    with client_of(handler) as client, pytest.raises(ServiceUnreachable, match="refused"):
        client.get("init_1")


def test_a_problem_becomes_the_error_it_was():
    problem = NotFound("there is none").problem()

    def handler(request):
        return httpx.Response(404, json=problem.model_dump(mode="json"))

    with client_of(handler) as client, pytest.raises(NotFound, match="there is none"):
        client.get("init_1")


def test_an_answer_that_is_no_problem_is_no_crash():
    with (
        client_of(lambda _: httpx.Response(500, text="<html>")) as client,
        pytest.raises(ServiceUnreachable, match="500"),
    ):
        client.get("init_1")


def test_waiting_ends_with_the_job_or_with_the_time():
    states = iter(["queued", "running", "succeeded"])

    def handler(request):
        return httpx.Response(200, json={**JOB, "state": next(states)})

    with client_of(handler) as client:
        assert client.wait("init_1", poll=0).state == "succeeded"
    with client_of(lambda _: httpx.Response(200, json=JOB)) as client, pytest.raises(TimeoutError):
        client.wait("init_1", poll=0, timeout=0.01)


def test_pages_are_followed():
    def handler(request):
        if "cursor" in request.url.params:
            return httpx.Response(200, json={"data": [{**JOB, "id": "init_2"}], "next_cursor": None})
        return httpx.Response(200, json={"data": [JOB], "next_cursor": "c"})

    with client_of(handler) as client:
        assert [job.id for job in client.initializations()] == ["init_1", "init_2"]


def all_errors():
    pending = [D2LoraError]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if cls not in {errors.UnknownProblem, D2LoraError}:
            yield cls


@pytest.mark.parametrize("cls", list(all_errors()))
def test_every_error_survives_the_wire_and_pickling(cls):
    import pickle

    error = cls("what is wrong")

    for copy in (from_problem(error.problem()), pickle.loads(pickle.dumps(error))):
        assert type(copy) is cls
        assert (copy.detail, copy.errors) == (error.detail, error.errors)


def test_codes_are_unique_and_the_tree_is_drawn():
    codes = [cls.code for cls in all_errors()]

    assert len(set(codes)) == len(codes)
    for cls in all_errors():
        assert cls.__name__ in errors.__doc__


def test_a_code_of_a_newer_service_keeps_its_words():
    import pickle

    problem = Problem(title="t", status=418, detail="d", code="teapot")

    for error in (from_problem(problem), pickle.loads(pickle.dumps(from_problem(problem)))):
        assert (error.code, error.status, error.detail) == ("teapot", 418, "d")
        assert error.problem().code == "teapot"


def test_fields_of_a_newer_service_are_left_out():
    newer = {**JOB, "field_of_the_future": 1, "spec": {**JOB["spec"], "another": {"deep": True}}}
    with client_of(lambda _: httpx.Response(200, json=newer)) as client:
        job = client.get("init_1")

    assert (job.id, job.spec.base_model) == ("init_1", "m")


def test_a_dataset_is_deleted_and_one_in_use_is_not():
    asked = []

    def handler(request):
        asked.append((request.method, request.url.path))
        if request.url.path.endswith("ds_1"):
            return httpx.Response(204)
        return httpx.Response(409, json=Conflict("dataset ds_2 is in use by init_1").problem().model_dump(mode="json"))

    with client_of(handler) as client:
        client.delete_dataset("ds_1")
        with pytest.raises(Conflict, match="in use by init_1"):
            client.delete_dataset("ds_2")

    assert asked == [("DELETE", "/v1/datasets/ds_1"), ("DELETE", "/v1/datasets/ds_2")]


GONE = httpx.Response(404, json=NotFound("there is no dataset 'ds_1'").problem().model_dump(mode="json"))


@pytest.mark.parametrize("lost", [httpx.ReadError("reset"), httpx.ReadTimeout("late"), httpx.Response(504)])
def test_a_deletion_whose_answer_was_lost_has_succeeded_when_the_thing_is_gone(lost):
    with client_of(answering(lost, GONE)) as client:
        client.delete_dataset("ds_1")


@pytest.mark.parametrize("refused", [[], [httpx.ConnectError("refused")], [httpx.Response(429)]])
def test_a_deletion_that_was_not_carried_out_before_finds_nothing_to_delete(refused):
    with client_of(answering(*refused, GONE)) as client, pytest.raises(NotFound, match="ds_1"):
        client.delete_dataset("ds_1")


def test_what_another_request_does_not_find_is_an_error_at_every_try():
    with client_of(answering(httpx.ReadError("reset"), GONE)) as client, pytest.raises(NotFound):
        client.get("init_1")


def answering(*outcomes):
    """A service that answers, or breaks off, in this order."""
    following = iter(outcomes)

    def handler(request):
        outcome = next(following)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return handler


def test_datasets_are_listed_page_by_page():
    dataset = {
        "id": "ds_1",
        "created_at": datetime.now(UTC).isoformat(),
        "format": "jsonl",
        "row_schema": "text",
        "rows": 1,
        "size": 10,
        "sha256": "0" * 64,
        "objectives": ["sft"],
    }

    def handler(request):
        assert request.url.path == "/v1/datasets"
        if "cursor" in request.url.params:
            return httpx.Response(200, json={"data": [{**dataset, "id": "ds_2"}], "next_cursor": None})
        return httpx.Response(200, json={"data": [dataset], "next_cursor": "c"})

    with client_of(handler) as client:
        assert [one.id for one in client.datasets()] == ["ds_1", "ds_2"]


@pytest.mark.parametrize("answer", [httpx.Response(200, text="<html>"), httpx.Response(200, json={"data": 1})])
def test_an_answer_of_something_else_is_no_crash(answer):
    with client_of(lambda _: answer) as client:
        for ask in (lambda: client.get("init_1"), lambda: list(client.initializations())):
            with pytest.raises(ServiceUnreachable, match="not as d2lora does"):
                ask()


def test_a_redirection_is_no_success():
    elsewhere = httpx.Response(307, headers={"location": "https://elsewhere/v1/datasets"})
    with client_of(lambda _: elsewhere) as client, pytest.raises(ServiceUnreachable, match="answered 307"):
        client.delete_dataset("ds_1")


def test_an_id_is_one_step_of_the_path_whatever_it_holds():
    asked = []

    def handler(request):
        asked.append(request.url.raw_path)
        return httpx.Response(204)

    with client_of(handler) as client:
        client.delete_dataset("a/../b?c#d")
        for name in ("", ".", ".."):
            with pytest.raises(NotFound, match="is no ID"):
                client.delete_dataset(name)

    assert asked == [b"/v1/datasets/a%2F..%2Fb%3Fc%23d"]

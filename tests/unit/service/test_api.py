import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from d2lora.errors import StorageFull, StoreUnavailable
from d2lora.initializations import HeldOut, Result, ResultFile, ResultSummary
from d2lora.roles import FIELDS
from d2lora.scratch import scratch_directory
from d2lora.settings import ServiceSettings
from service.auth import KeyRing

PAIR = b'{"prompt": "a", "completion": "b"}\n'


def request_for(dataset_id, **changes):
    return {"base_model": "allowed/model", "dataset_id": dataset_id, **changes}


def problem_of(response, status, code):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem["code"]) == (status, code), problem
    assert problem["request_id"] == response.headers["x-request-id"]
    return problem


def nothing_is_stored(settings, client):
    files = [path for path in settings.storage.root.rglob("*") if path.is_file()]
    return not files and client.get("/v1/datasets").json()["data"] == []


@pytest.fixture
def succeeded(app, client, upload, tmp_path):
    """A job that has ended, with one file."""
    import hashlib
    from datetime import timedelta

    job = client.post("/v1/initializations", json=request_for(upload().json()["id"])).json()
    claim = app.state.store.leases.claim("w", lease=timedelta(seconds=60), max_attempts=3)
    path = tmp_path / "adapter_config.json"
    path.write_bytes(b"{}")
    file = ResultFile(name=path.name, size=2, sha256=hashlib.sha256(b"{}").hexdigest())
    summary = ResultSummary(
        start="zero",
        start_reason="r",
        objectives=["sft"],
        objectives_reason="r",
        weights={"sft": 1},
        cosines={},
        held_out={"sft": HeldOut(base=1, adapter=1, rows=1)},
        rows_used=1,
        rows_truncated=0,
        rows_dropped=0,
        fingerprint="f",
    )
    prefix = f"t/acme/initializations/{job['id']}/1/"
    app.state.storage.put_file(prefix + file.name, path, file.sha256)
    assert app.state.store.leases.succeed(claim, Result(files=[file], summary=summary), prefix)
    return job["id"]


def test_a_dataset_is_stored_and_described(upload, client):
    response = upload()

    assert response.status_code == 201
    dataset = response.json()
    assert response.headers["location"] == f"/v1/datasets/{dataset['id']}"
    assert dataset["objectives"] == ["sft", "dpo", "orpo"]
    assert client.get(response.headers["location"]).json() == dataset
    assert client.get("/v1/datasets").json() == {"data": [dataset], "next_cursor": None}


def test_a_mapping_and_a_format_can_be_given(upload):
    response = upload(b"q,a\n1+1,2\n", media="text/plain", format="csv", column=["prompt:q", "completion:a"])

    assert response.status_code == 201
    assert response.json()["columns"] == {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("content", "code", "row", "field"),
    [
        (b"", "dataset_empty", None, None),
        (PAIR + b'{"question": "x"}\n', "schema_unknown", 2, None),
        (PAIR + b'{"text": "x"}\n', "schema_mixed", 2, None),
        (b'{"chosen": "x", "rejected": "x"}\n', "chosen_equals_rejected", 1, "rejected"),
        (PAIR + b'{"prompt": "a", "completion": " "}\n', "completion_empty", 2, "completion"),
        (PAIR + b'{"prompt": \n', "dataset_syntax_invalid", 2, None),
        (PAIR + b'{"prompt": "\xff"}\n', "dataset_encoding_invalid", 2, None),
        (PAIR + b'{"prompt": 1, "completion": "b"}\n', "dataset_invalid", 2, "prompt"),
        (PAIR * 51, "dataset_invalid", 51, None),
    ],
)
def test_bad_rows_are_named_and_nothing_is_kept(upload, client, settings, content, code, row, field):
    problem = problem_of(upload(content), 422, code)

    if row is not None:
        assert (problem["errors"][0]["row"], problem["errors"][0]["field"]) == (row, field)
    assert nothing_is_stored(settings, client)


def test_what_would_be_read_otherwise_than_meant_is_refused(upload, client, settings):
    twice = upload(b'{"q": "a", "completion": "b"}\n', column=["prompt:q", "prompt:r"])
    packed = client.post(
        "/v1/datasets", content=PAIR, headers={"content-type": "application/jsonl", "content-encoding": "gzip"}
    )

    assert "column: each of ours may be mapped once" in problem_of(twice, 422, "request_invalid")["detail"]
    assert "Content-Encoding" in problem_of(packed, 422, "request_invalid")["detail"]
    assert nothing_is_stored(settings, client)


def test_a_dataset_over_the_limit_is_refused_declared_or_not(upload, client, settings):
    problem_of(upload(PAIR * 400), 413, "request_too_large")
    problem_of(upload(iter([PAIR] * 400)), 413, "request_too_large")

    assert nothing_is_stored(settings, client)


def test_an_unknown_media_type_is_refused_with_the_known_ones(upload):
    assert "application/jsonl" in problem_of(upload(media="application/zip"), 422, "request_invalid")["detail"]


def test_a_dataset_that_the_database_refuses_leaves_no_object(app, upload, client, settings, monkeypatch):
    def broken(*_arguments):
        raise RuntimeError("a secret inside")

    monkeypatch.setattr(app.state.store, "add_dataset", broken)
    problem = problem_of(upload(), 500, "internal_error")
    monkeypatch.undo()

    assert "secret" not in json.dumps(problem)
    assert nothing_is_stored(settings, client)


def test_an_upload_is_known_before_it_is_stored_so_that_a_kill_leaves_nothing_for_ever(
    app, upload, client, settings, monkeypatch
):
    def killed(*_arguments):
        raise StoreUnavailable("away")

    store = app.state.store
    for verb in ("add_dataset", "withdraw_dataset"):
        monkeypatch.setattr(store, verb, killed)
    problem_of(upload(), 503, "store_unavailable")
    monkeypatch.undo()

    (left,) = [path for path in settings.storage.root.rglob("*") if path.is_file()]
    assert client.get("/v1/datasets").json()["data"] == []
    assert store.outbox.deleted_datasets() == []
    store.withdraw_dataset(left.name)  # as if a day had passed
    assert [one.key for one in store.outbox.deleted_datasets()] == [str(left.relative_to(settings.storage.root))]


def test_an_upload_that_could_not_be_stored_leaves_nothing(app, upload, client, settings, monkeypatch):
    def full(*_arguments, **_named):
        raise StorageFull("full")

    monkeypatch.setattr(app.state.storage, "put_file", full)
    problem_of(upload(), 507, "storage_full")

    assert nothing_is_stored(settings, client)
    assert len(app.state.store.outbox.deleted_datasets()) == 1


def test_a_disk_without_room_for_an_upload_is_said_to_be_full(upload, client, settings, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("d2lora.scratch.tempfile.TemporaryDirectory", full)

    problem_of(upload(), 507, "storage_full")
    assert nothing_is_stored(settings, client)


def test_the_upload_of_a_service_that_was_killed_is_removed_at_the_next_start(app, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    script = """
import os
from d2lora.scratch import scratch_directory
with scratch_directory("upload") as path:
    (path / "dataset").write_text("a row")
    print(path, flush=True)
    os._exit(9)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    left = Path(killed.stdout.strip())
    assert (left / "dataset").is_file()

    with TestClient(app), scratch_directory("upload") as own:
        assert [path.name for path in tmp_path.glob("d2lora-upload-*")] == [own.name]


def test_a_request_becomes_a_queued_job(upload, client):
    response = client.post("/v1/initializations", json=request_for(upload().json()["id"]))

    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/v1/initializations/{job['id']}"
    assert (job["state"], job["spec"]["lora"]["r"], job["spec"]["start"]) == ("queued", 16, "calibrated")
    again = client.get(response.headers["location"])
    assert again.json() == job
    assert "retry-after" in again.headers
    assert client.get("/v1/initializations").json() == {"data": [job], "next_cursor": None}
    assert [event["type"] for event in client.get(f"{response.headers['location']}/events").json()["data"]] == [
        "queued"
    ]


def test_the_request_of_the_documentation_is_accepted(upload, client):
    request = {
        "base_model": "allowed/model",
        "revision": None,
        "eval_dataset_id": None,
        "method": "gradient",
        "objectives": [{"type": "sft"}, {"type": "dpo", "beta": 0.1}, {"type": "orpo", "beta": 0.1}],
        "combination": {"type": "mgda"},
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "use_rslora": False},
        "start": "calibrated",
        "statistics": "sketch",
        "max_length": 1024,
        "seed": 0,
        "metadata": {},
    }

    assert client.post("/v1/initializations", json={**request, "dataset_id": upload().json()["id"]}).status_code == 202


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"lora": {"r": 0}}, "#/lora/r"),
        ({"lora": {"rank": 8}}, "#/lora/rank"),
        ({"gama": 1}, "#/gama"),
        ({"objectives": [{"type": "ppo"}]}, "#/objectives/0"),
        ({"objectives": [{"type": "sft"}, {"type": "dpo", "beta": -1}]}, "#/objectives/1/beta"),
        ({"objectives": [{"type": "dpo", "loss_type": "discopop"}]}, "#/objectives/0/loss_type"),
        ({"objectives": [{"type": "dpo", "loss_type": "robust"}]}, "#/objectives/0/label_smoothing"),
        ({"objectives": [{"type": "dpo", "label_smoothing": 0.1}]}, "#/objectives/0/label_smoothing"),
        (
            {"objectives": [{"type": "dpo", "loss_type": "exo_pair", "label_smoothing": 0.5}]},
            "#/objectives/0/label_smoothing",
        ),
        ({"objectives": [{"type": "kto", "desirable_weight": 0}]}, "#/objectives/0/desirable_weight"),
        ({"objectives": []}, "#/objectives"),
        ({"combination": {"type": "best"}}, "#/combination"),
        ({"seed": "x"}, "#/seed"),
        ({"max_length": 1}, "#/max_length"),
        ({"method": "loftq"}, "#/method"),
        ({"method": {"type": "pissa", "niter": -1}}, "#/method/niter"),
        ({"method": "pissa", "start": "zero", "rounds": 2}, "#/rounds"),
        ({"objectives": [{"type": "sft"}, {"type": "sft"}]}, "#/objectives"),
        ({"combination": {"type": "fixed", "weights": [1]}}, "#/combination/weights"),
        ({"dataset_id": None}, "#/dataset_id"),
        ({"datasets": [{"dataset_id": "ds_1"}] * 2, "dataset_id": None}, "#/datasets/1/dataset_id"),
        ({"revision": "a\0"}, "#/revision"),
        ({"metadata": {"a": "\ud800"}}, "#/metadata/a"),
        ({"metadata": {"\ud800": "a"}}, "#/metadata"),
        ({"lora": {"target_modules": "\ud800"}}, "#/lora/target_modules"),
        ({"lora": {"target_modules": ["a", "b\0"]}}, "#/lora/target_modules/1"),
        ({"lora": {"target_modules": "(("}}, "#/lora/target_modules"),
        ({"lora": {"target_modules": ""}}, "#/lora/target_modules"),
        ({"lora": {"target_modules": []}}, "#/lora/target_modules"),
    ],
)
def test_a_field_at_fault_is_pointed_at(upload, client, change, pointer):
    # Not by the parameter json, which refuses what half of a surrogate pair holds.
    content = json.dumps(request_for(upload().json()["id"]) | change).encode()
    response = client.post("/v1/initializations", content=content, headers={"content-type": "application/json"})

    problem = problem_of(response, 422, "request_invalid")
    assert "Value error" not in problem["detail"]
    assert [item["pointer"] for item in problem["errors"]] == [pointer]
    assert client.get("/v1/initializations").json()["data"] == []


def test_a_field_that_the_method_would_ignore_is_refused(upload, client):
    refused = client.post("/v1/initializations", json=request_for(upload().json()["id"], method="pissa", start="zero"))
    accepted = client.post("/v1/initializations", json=request_for(upload().json()["id"], method="pissa"))

    assert "start: not used by method pissa" in problem_of(refused, 422, "request_invalid")["detail"]
    spec = client.get(f"/v1/initializations/{accepted.json()['id']}").json()["spec"]
    assert spec["method"] == {"type": "pissa", "niter": None}
    assert "start" not in spec


def test_weights_that_do_not_match_the_objectives_are_refused(upload, client):
    change = {"objectives": [{"type": "sft"}], "combination": {"type": "fixed", "weights": [1, 1]}}

    response = client.post("/v1/initializations", json=request_for(upload().json()["id"], **change))

    assert "one weight per entry" in problem_of(response, 422, "request_invalid")["detail"]


def test_labeled_rows_allow_kto_and_no_others_do(upload, client):
    rows = [{"prompt": "a", "completion": " b", "label": True}, {"prompt": "a", "completion": " c", "label": False}]
    labeled, pairs = upload("\n".join(map(json.dumps, rows))).json(), upload().json()
    kto = [{"type": "kto", "desirable_weight": 1.33}]

    accepted = client.post("/v1/initializations", json=request_for(labeled["id"], objectives=kto))
    refused = client.post("/v1/initializations", json=request_for(pairs["id"], objectives=kto))

    assert (labeled["row_schema"], labeled["objectives"]) == ("unpaired_preference", ["sft", "kto"])
    assert accepted.status_code == 202
    assert "kto needs rows with a label" in problem_of(refused, 422, "objective_unavailable")["detail"]


def test_dpo_on_rows_without_rejected_is_refused(upload, client):
    sft, full = upload(PAIR).json()["id"], upload().json()["id"]

    own = client.post("/v1/initializations", json=request_for(sft, objectives=[{"type": "sft"}, {"type": "dpo"}]))
    evaluation = client.post(
        "/v1/initializations", json=request_for(full, eval_dataset_id=sft, objectives=[{"type": "orpo"}])
    )

    assert problem_of(own, 422, "objective_unavailable")["errors"][0]["pointer"] == "#/objectives/1"
    assert "eval_dataset_id" in problem_of(evaluation, 422, "objective_unavailable")["detail"]


@pytest.mark.parametrize("field", ["dataset_id", *(field for field in FIELDS.values() if "." not in field)])
def test_an_unknown_dataset_is_pointed_at(upload, client, field):
    response = client.post("/v1/initializations", json={**request_for(upload().json()["id"]), field: "ds_none"})

    assert problem_of(response, 422, "request_invalid")["errors"][0]["pointer"] == f"#/{field}"


def test_rows_that_a_warm_ups_trainer_cannot_use_and_unknown_ones_are_pointed_at(upload, client):
    full, plain = upload().json()["id"], upload(PAIR).json()["id"]

    def ask(trainer, dataset_id):
        method = {"type": "warmup", "warmup_dataset_id": dataset_id, "trainer": trainer}
        return client.post("/v1/initializations", json=request_for(full, method=method))

    accepted = ask("dpo", full)
    assert accepted.status_code == 202
    assert accepted.json()["spec"]["method"]["from"] == "default"
    for answer, code in ((ask("orpo", plain), "objective_unavailable"), (ask("sft", "ds_none"), "request_invalid")):
        assert problem_of(answer, 422, code)["errors"][0]["pointer"] == "#/method/warmup_dataset_id"


def submit_model(client, upload, name):
    return client.post("/v1/initializations", json={**request_for(upload().json()["id"]), "base_model": str(name)})


def test_models_must_be_on_the_list_or_below_a_root(upload, client, tmp_path):
    outside = tmp_path / "elsewhere"
    outside.mkdir()

    for name in ("not-allowed/model", outside, tmp_path / "models" / ".." / "elsewhere", "/no/such/place", "./x"):
        assert (
            problem_of(submit_model(client, upload, name), 422, "model_not_allowed")["errors"][0]["pointer"]
            == "#/base_model"
        )
    assert submit_model(client, upload, "allowed/anything").status_code == 202


@pytest.mark.parametrize("name", ["/a\0b", "~nobody-of-this-name/x", "/" + "a" * 1000, "./" + "a" * 1000])
def test_what_no_path_can_be_is_no_model(upload, client, name):
    assert submit_model(client, upload, name).status_code == 422


def test_a_name_that_is_too_long_for_a_file_may_be_one_of_the_list(upload, client):
    assert submit_model(client, upload, "allowed/" + "a" * 400).status_code == 202


def test_a_model_that_may_not_be_read_is_not_found(upload, client, tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)

    def refuse(_):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)

    problem_of(submit_model(client, upload, tmp_path / "models" / "mine"), 422, "model_not_found")


def test_local_models_are_looked_at_before_they_are_accepted(upload, client, tmp_path):
    root = tmp_path / "models"
    for name, files in {
        "good": ["config.json", "model.safetensors"],
        "gguf": ["a.gguf"],
        "two": ["a.gguf", "b.gguf"],
        "pickle": ["config.json", "pytorch_model.bin"],
        "empty": [],
    }.items():
        (root / name).mkdir(parents=True)
        for file in files:
            (root / name / file).write_bytes(b"")
    (root / "link").symlink_to(tmp_path)

    assert submit_model(client, upload, root / "good").status_code == 202
    assert submit_model(client, upload, root / "gguf").status_code == 202
    assert submit_model(client, upload, root / "gguf" / "a.gguf").status_code == 202
    problem_of(submit_model(client, upload, root / "pickle"), 422, "weights_unsafe")
    problem_of(submit_model(client, upload, root / "two"), 422, "model_unsupported")
    problem_of(submit_model(client, upload, root / "empty"), 422, "model_not_found")
    problem_of(submit_model(client, upload, root / "missing"), 422, "model_not_found")
    problem_of(submit_model(client, upload, root / "link"), 422, "model_not_allowed")


def test_a_repeated_key_returns_the_first_job(upload, client):
    request, headers = request_for(upload().json()["id"]), {"idempotency-key": "k"}

    first = client.post("/v1/initializations", json=request, headers=headers)
    second = client.post("/v1/initializations", json=request, headers=headers)
    other = client.post("/v1/initializations", json={**request, "seed": 1}, headers=headers)

    assert first.json()["id"] == second.json()["id"]
    problem_of(other, 422, "idempotency_mismatch")


def test_a_queued_job_is_cancelled_and_an_ended_one_is_not(upload, client, succeeded):
    job = client.post("/v1/initializations", json=request_for(upload().json()["id"])).json()

    assert client.post(f"/v1/initializations/{job['id']}/cancel").json()["state"] == "cancelled"
    problem_of(client.post(f"/v1/initializations/{succeeded}/cancel"), 409, "conflict")


def test_an_adapter_is_listed_and_delivered(client, succeeded):
    adapter = client.get(f"/v1/initializations/{succeeded}/adapter").json()

    (file,) = adapter["files"]
    response = client.get(file["url"])
    assert response.content == b"{}"
    assert response.headers["content-length"] == "2"
    assert response.headers["etag"] == f'"{file["sha256"]}"'


@pytest.mark.parametrize("name", ["nothing", "..%2f..%2fd2lora.db", "manifest.json"])
def test_only_the_results_own_files_are_delivered(client, succeeded, name):
    assert client.get(f"/v1/initializations/{succeeded}/files/{name}").status_code == 404


def test_an_adapter_exists_only_after_success(upload, client):
    job = client.post("/v1/initializations", json=request_for(upload().json()["id"])).json()

    problem_of(client.get(f"/v1/initializations/{job['id']}/adapter"), 409, "conflict")


def test_events_are_streamed_until_the_job_has_ended(client, succeeded):
    with client.stream(
        "GET", f"/v1/initializations/{succeeded}/events/stream", headers={"last-event-id": "1"}
    ) as response:
        lines = list(response.iter_lines())

    assert [line for line in lines if line.startswith("event:")] == ["event: running", "event: succeeded"]
    assert [line for line in lines if line.startswith("id:")] == ["id: 2", "id: 3"]


ROUTES = [
    ("GET", "/v1/datasets/{dataset}"),
    ("GET", "/v1/initializations/{job}"),
    ("GET", "/v1/initializations/{job}/adapter"),
    ("GET", "/v1/initializations/{job}/files/adapter_config.json"),
    ("GET", "/v1/initializations/{job}/events"),
    ("GET", "/v1/initializations/{job}/events/stream"),
    ("POST", "/v1/initializations/{job}/cancel"),
]


@pytest.mark.parametrize(("method", "route"), ROUTES)
def test_another_tenants_things_do_not_exist(client, succeeded, as_other, method, route):
    dataset = client.get("/v1/datasets").json()["data"][0]["id"]

    response = client.request(method, route.format(job=succeeded, dataset=dataset), headers=as_other)

    problem_of(response, 404, "not_found")


def test_lists_show_a_tenants_own_things_alone(client, succeeded, as_other):
    for route in ("/v1/datasets", "/v1/initializations"):
        assert client.get(route, headers=as_other).json()["data"] == []
        assert len(client.get(route).json()["data"]) == 1


def test_another_tenants_dataset_cannot_be_used(client, upload, as_other):
    response = client.post("/v1/initializations", json=request_for(upload().json()["id"]), headers=as_other)

    problem_of(response, 422, "request_invalid")


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic a2V5", "Bearer "])
@pytest.mark.parametrize(
    ("method", "route"), [*ROUTES, ("POST", "/v1/datasets"), ("GET", "/v1/datasets"), ("POST", "/v1/initializations")]
)
def test_no_route_answers_without_a_valid_key(client, header, method, route):
    client.headers.pop("authorization")

    response = client.request(method, route, headers={} if header is None else {"authorization": header})

    problem_of(response, 401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"


def test_an_event_number_that_no_database_holds_is_refused(client, succeeded):
    events = f"/v1/initializations/{succeeded}/events"

    problem_of(client.get(events, params={"after": 2**31}), 422, "request_invalid")
    assert client.get(events, params={"after": 2**31 - 1}).json() == {"data": []}


@pytest.mark.parametrize("number", ["9" * 5000, "2147483648", "-1", "x"])
def test_a_last_event_id_that_is_no_number_of_ours_counts_as_none(client, succeeded, number):
    headers = {"last-event-id": number}

    response = client.get(f"/v1/initializations/{succeeded}/events/stream", headers=headers)

    assert response.status_code == 200
    assert "event: queued" in response.text


def test_numbers_of_a_request_are_finite(upload, client):
    request = json.dumps(request_for(upload().json()["id"], objectives=[{"type": "orpo", "beta": float("inf")}]))

    response = client.post("/v1/initializations", content=request, headers={"content-type": "application/json"})

    problem = problem_of(response, 422, "request_invalid")
    assert problem["errors"][0]["pointer"].endswith("/beta")


def test_malformed_keys_are_not_said_in_the_error(monkeypatch):
    for given in ('{"acme": "secret-of-acme"', '{"acme": ["secret-of-acme"]}'):
        monkeypatch.setenv("D2LORA_SERVICE_API_KEYS", given)
        with pytest.raises(ValueError, match="api_keys") as caught:
            ServiceSettings()
        assert "secret-of-acme" not in str(caught.value)


def test_a_service_without_keys_does_not_start():
    with pytest.raises(SystemExit, match="D2LORA_SERVICE_API_KEYS"):
        KeyRing(ServiceSettings(api_keys={}))


def test_keys_name_their_tenants():
    ring = KeyRing(ServiceSettings(api_keys={"a": SecretStr("1"), "b": SecretStr("2")}))

    assert (ring.tenant("1"), ring.tenant("2"), ring.tenant("3")) == ("a", "b", None)


@pytest.mark.parametrize(
    ("method", "route", "content", "status", "code"),
    [
        ("GET", "/nowhere", None, 404, "not_found"),
        ("PUT", "/v1/datasets", None, 405, "method_not_allowed"),
        ("POST", "/v1/initializations", b"{", 422, "request_invalid"),
        ("POST", "/v1/initializations", b"\xff\xfe", 422, "request_invalid"),
        ("POST", "/v1/initializations", b'{"base_model": "\xe9"}', 422, "request_invalid"),
        ("POST", "/v1/initializations", b"[" * 4000, 422, "request_invalid"),
        ("POST", "/v1/initializations", b"[]", 422, "request_invalid"),
        ("POST", "/v1/initializations", b'{"a": "' + b"x" * 6000 + b'"}', 413, "request_too_large"),
        ("GET", "/v1/initializations?limit=0", None, 422, "request_invalid"),
        ("GET", "/v1/initializations?cursor=xx", None, 422, "request_invalid"),
        ("GET", "/v1/initializations?state=lost", None, 422, "request_invalid"),
    ],
)
def test_every_error_is_a_problem(client, method, route, content, status, code):
    response = client.request(method, route, content=content, headers={"content-type": "application/json"})

    problem_of(response, status, code)


def test_a_sane_request_id_is_kept_and_another_is_replaced(client):
    assert client.get("/livez", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert client.get("/livez", headers={"x-request-id": "a b\t"}).headers["x-request-id"] != "a b\t"


def test_health_needs_no_key_and_tells_when_the_database_is_gone(client, app):
    client.headers.pop("authorization")
    assert client.get("/livez").status_code == client.get("/readyz").status_code == 200

    with app.state.store._engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE initializations RENAME TO gone")

    assert client.get("/livez").status_code == 200
    problem_of(client.get("/readyz"), 503, "store_unavailable")
    with app.state.store._engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE gone RENAME TO initializations")


def test_a_storage_that_hangs_makes_the_service_unready_and_leaves_it_alive(client, app, monkeypatch):
    hanging, asked = threading.Event(), []

    def ping():
        asked.append(1)
        hanging.wait(20)

    monkeypatch.setattr("service.health._DEADLINE_SECONDS", 0.3)
    monkeypatch.setattr(app.state.storage, "ping", ping)

    for _ in range(50):  # more than the threads that requests share
        problem_of(client.get("/readyz"), 503, "storage_unavailable")
        assert client.get("/livez").status_code == 200
        assert client.get("/v1/initializations").status_code == 200
        monkeypatch.setattr("service.health._DEADLINE_SECONDS", 0.05)

    assert len(asked) == 4  # the others would only have kept a thread each
    hanging.set()
    end = time.monotonic() + 10
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < end

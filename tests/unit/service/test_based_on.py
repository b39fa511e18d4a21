"""Requests that are based on an earlier one, and the deletion of datasets, over HTTP."""

import hashlib
import time
from datetime import timedelta

import pytest

from d2lora.claims import StoredFile, StoredStatistics
from d2lora.settings import DispatchSettings
from service.dispatch import Dispatcher
from tests.conformance.test_store import RESULT
from tests.unit.service.test_api import problem_of, request_for

TIDY = DispatchSettings(tidy_seconds=0.001)


@pytest.fixture
def dataset(upload):
    return upload().json()["id"]


@pytest.fixture
def finished(app, client, dataset, tmp_path):
    """Returns a job that has succeeded, with what it keeps of its statistics."""

    def finish(*, keeps=True, **changes):
        spec = request_for(dataset, keep_statistics=keeps, lora={"r": 4}, **changes)
        job = client.post("/v1/initializations", json=spec).json()
        claim = app.state.store.leases.claim("w", lease=timedelta(seconds=60), max_attempts=3)
        prefix = f"t/acme/initializations/{job['id']}/1/"
        path = tmp_path / "part"
        path.write_bytes(b"{}")
        digest = hashlib.sha256(b"{}").hexdigest()
        for name in ("manifest.json", "statistics/index.json"):
            app.state.storage.put_file(prefix + name, path, digest)
        file = StoredFile(name="index.json", key=f"{prefix}statistics/index.json", sha256=digest)
        statistics = StoredStatistics(r=4, rows=1, size=2, files=[file]) if keeps else None
        assert app.state.store.leases.succeed(claim, RESULT, prefix, statistics)
        return job["id"]

    return finish


def keys(settings):
    root = settings.storage.root
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def ask(client, dataset, earlier, **changes):
    spec = request_for(dataset, based_on=earlier, **{"lora": {"r": 4}, **changes})
    return client.post("/v1/initializations", json=spec)


def test_a_request_can_be_based_on_a_finished_one(client, dataset, finished):
    earlier = finished()

    accepted = ask(client, dataset, earlier, lora={"r": 8, "lora_alpha": 1}, combination={"type": "mean"})

    assert accepted.status_code == 202, accepted.text
    assert accepted.json()["spec"]["based_on"] == earlier
    assert client.get(f"/v1/initializations/{earlier}").json()["statistics"] == {"r": 4, "rows": 1, "size": 2}


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"seed": 1}, "#/seed"),
        ({"base_model": "allowed/other"}, "#/base_model"),
        ({"dtype": "float32"}, "#/dtype"),
        ({"quantization": "4bit"}, "#/quantization"),
        ({"max_length": 100}, "#/max_length"),
        ({"statistics": "exact"}, "#/statistics"),
        ({"whitening": {}}, "#/whitening"),
        ({"lora": {"r": 9}}, "#/lora/r"),
        ({"lora": {"r": 5, "ranks": "budget"}}, "#/lora/ranks"),
        ({"lora": {"r": 4, "target_modules": ["q_proj"]}}, "#/lora/target_modules"),
    ],
)
def test_what_the_statistics_are_not_of_is_pointed_at(client, dataset, finished, changes, pointer):
    problem = problem_of(ask(client, dataset, finished(), **changes), 422, "request_invalid")

    assert [one["pointer"] for one in problem["errors"]] == [pointer]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "kaiming"}, "based_on"),
        ({"rounds": 2}, "based_on"),
        ({"second_pass_above": 0.1}, "based_on"),
    ],
)
def test_what_statistics_are_of_no_use_to_is_refused(client, dataset, finished, changes, named):
    assert named in str(problem_of(ask(client, dataset, finished(), **changes), 422, "request_invalid")["errors"])


def test_jobs_that_are_unknown_unfinished_or_keep_nothing_are_no_base(client, dataset, finished):
    waiting = client.post("/v1/initializations", json=request_for(dataset, keep_statistics=True)).json()["id"]
    cases = {"init_none": "there is no", waiting: "is queued"}
    client.post(f"/v1/initializations/{waiting}/cancel")
    cases[waiting] = "is cancelled"
    cases[finished(keeps=False)] = "keeps no statistics"

    for earlier, why in cases.items():
        problem = problem_of(ask(client, dataset, earlier), 422, "request_invalid")
        assert problem["errors"][0]["pointer"] == "#/based_on"
        assert why in problem["detail"]


def test_another_tenants_job_is_no_base(client, upload, finished, as_other):
    earlier = finished()
    theirs = client.post(
        "/v1/datasets", content=b'{"text": "a"}\n', headers={"content-type": "application/jsonl", **as_other}
    ).json()["id"]

    refused = client.post("/v1/initializations", json=request_for(theirs, based_on=earlier), headers=as_other)

    assert "there is no initialization" in problem_of(refused, 422, "request_invalid")["detail"]


def test_a_key_knows_a_request_by_what_it_is_based_on(client, dataset, finished):
    earlier, headers = finished(), {"idempotency-key": "k"}
    spec = request_for(dataset, lora={"r": 4})
    first = client.post("/v1/initializations", json={**spec, "based_on": earlier}, headers=headers)
    again = client.post("/v1/initializations", json={**spec, "based_on": earlier}, headers=headers)
    other = client.post("/v1/initializations", json=spec, headers=headers)

    assert again.json()["id"] == first.json()["id"]
    problem_of(other, 422, "idempotency_mismatch")


def test_a_repeated_key_returns_its_job_though_what_the_request_names_is_gone(app, client, dataset, finished):
    earlier = finished()
    spec, key = request_for(dataset, lora={"r": 4}, based_on=earlier), {"idempotency-key": "again"}
    first = client.post("/v1/initializations", json=spec, headers=key).json()
    claim = app.state.store.leases.claim("w", lease=timedelta(seconds=60), max_attempts=3)
    assert app.state.store.leases.succeed(claim, RESULT, "t/acme/x/")
    assert client.delete(f"/v1/datasets/{dataset}").status_code == 204

    again = client.post("/v1/initializations", json=spec, headers=key)

    assert again.status_code == 202
    assert again.json()["id"] == first["id"]
    other = request_for(dataset, lora={"r": 4}, based_on=earlier, seed=1)
    problem_of(client.post("/v1/initializations", json=other, headers=key), 422, "idempotency_mismatch")


def test_a_dataset_is_deleted_with_its_bytes_and_all_statistics_of_it(app, client, settings, dataset, finished):
    earlier = finished()
    assert f"t/acme/datasets/{dataset}" in keys(settings)

    assert client.delete(f"/v1/datasets/{dataset}").status_code == 204
    problem_of(client.get(f"/v1/datasets/{dataset}"), 404, "not_found")
    problem_of(client.delete(f"/v1/datasets/{dataset}"), 404, "not_found")
    time.sleep(0.01)
    Dispatcher(app.state.store.outbox, app.state.storage, None, TIDY).tidy()

    assert keys(settings) == {f"t/acme/initializations/{earlier}/1/manifest.json"}


def test_statistics_of_a_deleted_dataset_are_no_base(client, upload, dataset, finished):
    earlier = finished()
    client.delete(f"/v1/datasets/{dataset}")
    other = upload().json()["id"]

    problem = problem_of(ask(client, other, earlier), 422, "request_invalid")

    assert "its dataset was deleted" in problem["detail"]


def test_a_dataset_in_use_stays(client, dataset):
    job = client.post("/v1/initializations", json=request_for(dataset)).json()["id"]

    assert job in problem_of(client.delete(f"/v1/datasets/{dataset}"), 409, "conflict")["detail"]

    assert client.get(f"/v1/datasets/{dataset}").status_code == 200


def test_another_tenants_dataset_cannot_be_deleted(client, dataset, as_other):
    problem_of(client.delete(f"/v1/datasets/{dataset}", headers=as_other), 404, "not_found")

    assert client.get(f"/v1/datasets/{dataset}").status_code == 200


def test_statistics_stay_while_their_dataset_does(app, settings, finished):
    earlier = finished()
    time.sleep(0.01)

    Dispatcher(app.state.store.outbox, app.state.storage, None, TIDY).tidy()

    assert f"t/acme/initializations/{earlier}/1/statistics/index.json" in keys(settings)

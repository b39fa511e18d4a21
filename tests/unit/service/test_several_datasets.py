import hashlib
from datetime import timedelta
from urllib.parse import quote

import pytest

from d2lora.initializations import Result, ResultFile, ResultSummary
from tests.unit.service.test_api import PAIR, problem_of


def submit(client, *datasets):
    request = {"base_model": "allowed/model", "datasets": list(datasets)}
    return client.post("/v1/initializations", json=request)


def test_a_request_of_several_datasets_becomes_a_job(upload, client):
    plain, pairs = upload(PAIR).json()["id"], upload().json()["id"]
    asked = [
        {"dataset_id": plain, "objectives": [{"type": "sft"}]},
        {"dataset_id": pairs, "objectives": [{"type": "dpo", "beta": 0.2}]},
    ]

    response = submit(client, *asked)

    assert response.status_code == 202
    spec = client.get(response.headers["location"]).json()["spec"]
    assert spec["dataset_id"] is None
    assert [one["dataset_id"] for one in spec["datasets"]] == [plain, pairs]
    assert spec["datasets"][1]["objectives"][0]["beta"] == 0.2


def test_an_unknown_dataset_and_an_objective_that_its_rows_do_not_allow_are_pointed_at(upload, client):
    plain, pairs = upload(PAIR).json()["id"], upload().json()["id"]

    unknown = submit(client, {"dataset_id": pairs}, {"dataset_id": "ds_none"})
    impossible = submit(
        client, {"dataset_id": pairs}, {"dataset_id": plain, "objectives": [{"type": "sft"}, {"type": "dpo"}]}
    )

    problem = problem_of(unknown, 422, "request_invalid")
    assert problem["errors"][0]["pointer"] == "#/datasets/1/dataset_id"
    assert problem["detail"] == "datasets[1].dataset_id: there is no dataset 'ds_none'"
    problem = problem_of(impossible, 422, "objective_unavailable")
    assert problem["errors"][0]["pointer"] == "#/datasets/1/objectives/1"
    assert "datasets[1].objectives: dpo needs rows with chosen and rejected completions" in problem["detail"]
    sft, dpo = [{"type": "sft"}], [{"type": "dpo"}]
    first = {"dataset_id": plain, "objectives": sft, "eval_dataset_id": pairs}
    for evaluation, pointer, said in [
        ("ds_none", "#/datasets/1/eval_dataset_id", "datasets[1].eval_dataset_id: there is no dataset 'ds_none'"),
        (plain, "#/datasets/1/objectives/0", "which datasets[1].eval_dataset_id does not have"),
    ]:
        response = submit(client, first, {"dataset_id": pairs, "objectives": dpo, "eval_dataset_id": evaluation})
        assert response.json()["errors"][0]["pointer"] == pointer
        assert said in response.json()["detail"]
    assert client.get("/v1/initializations").json()["data"] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_id": "ds_1"}, "name one dataset here, or several in datasets"),
        ({"datasets": None}, "name one dataset here, or several in datasets"),
        ({"rounds": 3}, "rounds: not offered together with datasets"),
    ],
)
def test_exactly_one_way_to_name_the_rows_is_accepted(upload, client, changes, said):
    datasets = [{"dataset_id": upload().json()["id"]}, {"dataset_id": upload(PAIR).json()["id"]}]

    response = client.post("/v1/initializations", json={"base_model": "allowed/model", "datasets": datasets, **changes})

    assert said in problem_of(response, 422, "request_invalid")["detail"]


def test_a_repeated_key_knows_the_datasets_and_their_objectives(upload, client):
    plain, pairs = upload(PAIR).json()["id"], upload().json()["id"]
    key = {"idempotency-key": "k"}

    def ask(*datasets):
        request = {"base_model": "allowed/model", "datasets": list(datasets)}
        return client.post("/v1/initializations", json=request, headers=key)

    first = ask({"dataset_id": plain}, {"dataset_id": pairs})
    again = ask({"dataset_id": plain}, {"dataset_id": pairs})
    swapped = ask({"dataset_id": pairs}, {"dataset_id": plain})
    narrowed = ask({"dataset_id": plain}, {"dataset_id": pairs, "objectives": [{"type": "orpo"}]})

    assert again.json()["id"] == first.json()["id"]
    for other in (swapped, narrowed):
        problem_of(other, 422, "idempotency_mismatch")


def test_the_files_of_each_datasets_adapter_are_served_from_their_folders(app, upload, client, tmp_path):
    datasets = [{"dataset_id": upload().json()["id"]}, {"dataset_id": upload(PAIR).json()["id"]}]
    request = {"base_model": "allowed/model", "datasets": datasets, "adapters": "per_dataset"}
    job = client.post("/v1/initializations", json=request).json()
    claim = app.state.store.leases.claim("w", lease=timedelta(seconds=60), max_attempts=3)
    prefix, files = f"t/acme/initializations/{job['id']}/1/", []
    for name in ("datasets-0/adapter_config.json", "datasets-1/adapter_config.json", "manifest.json"):
        path = tmp_path / "file"
        path.write_text(name)
        files.append(ResultFile(name=name, size=len(name), sha256=hashlib.sha256(name.encode()).hexdigest()))
        app.state.storage.put_file(prefix + name, path, files[-1].sha256)
    summary = ResultSummary(
        start="zero",
        start_reason="r",
        objectives=["sft"],
        objectives_reason="r",
        weights={},
        cosines={},
        held_out={},
        rows_used=1,
        rows_truncated=0,
        rows_dropped=0,
        fingerprint="f",
    )
    assert app.state.store.leases.succeed(claim, Result(files=files, summary=summary), prefix)

    listed = client.get(f"/v1/initializations/{job['id']}/adapter").json()["files"]

    assert [client.get(file["url"]).text for file in listed] == [file["name"] for file in listed]
    for other in ("datasets-2/adapter_config.json", "datasets-0", "datasets-0/../manifest.json", "../../x"):
        assert client.get(f"/v1/initializations/{job['id']}/files/{quote(other, safe='')}").status_code == 404, other

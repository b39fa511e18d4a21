"""Requests that name several datasets."""

import json

import httpx
import pytest
import typer
from pydantic import ValidationError
from typer.testing import CliRunner

from d2lora import cli
from d2lora.client import Client
from d2lora.initializations import Dpo, InitializationSpec, Sft, TrainingDataset
from d2lora.options import build_spec
from d2lora.roles import without_dataset_ids
from tests.unit.d2lora.test_cli import options

TWO = [{"dataset_id": "ds_1", "objectives": [{"type": "sft"}]}, {"dataset_id": "ds_2"}]


def request(**changes):
    return InitializationSpec.model_validate({"base_model": "m", "datasets": TWO, **changes})


def test_one_dataset_is_all_that_an_adapter_is_made_from():
    spec = InitializationSpec(base_model="m", dataset_id="ds_1", objectives=[Sft()])

    assert spec.training == {"": TrainingDataset(dataset_id="ds_1", objectives=[Sft()])}


def test_several_datasets_have_places_and_objectives_of_their_own():
    assert request().training == {
        "datasets[0].": TrainingDataset(dataset_id="ds_1", objectives=[Sft()]),
        "datasets[1].": TrainingDataset(dataset_id="ds_2"),
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_id": "ds_1"}, "dataset_id: name one dataset here, or several in datasets"),
        ({"datasets": None}, "dataset_id: name one dataset here, or several in datasets"),
        ({"datasets": TWO[:1]}, "at least 2 items"),
        ({"datasets": [{"dataset_id": f"ds_{number}"} for number in range(9)]}, "at most 8 items"),
        ({"datasets": [TWO[0], TWO[0]]}, r"datasets\[1\]\.dataset_id: each dataset may appear once"),
        (
            {"datasets": [TWO[0], {"dataset_id": "ds_2", "objectives": [{"type": "dpo"}, {"type": "dpo", "beta": 1}]}]},
            r"datasets\[1\]\.objectives: each type may appear once",
        ),
        ({"datasets": [TWO[0], {"dataset_id": "ds_2", "weight": 2}]}, "Extra inputs are not permitted"),
        ({"objectives": [{"type": "sft"}]}, "objectives: not offered together with datasets"),
        ({"eval_dataset_id": "e"}, "eval_dataset_id: of several datasets each has one of its own"),
        ({"datasets": [TWO[0], {"dataset_id": "ds_2", "eval_dataset_id": ""}]}, "at least 1 character"),
        ({"retain_dataset_id": "g"}, "retain_dataset_id: not offered together with datasets"),
        ({"whitening": {}}, "whitening: not offered together with datasets"),
        ({"second_pass_above": 0.5}, "second_pass_above: not offered together with datasets"),
        ({"rounds": 2}, "rounds: not offered together with datasets"),
        ({"method": "pissa"}, "datasets: not used by method pissa"),
        ({"method": {"type": "warmup", "warmup_dataset_id": "g", "from": "gradient"}}, "datasets: not used by method"),
        ({"combination": {"type": "fixed", "weights": [1, 1]}}, "one weight per entry of objectives"),
        ({"datasets": None, "dataset_id": "ds_1", "adapters": "per_dataset"}, "adapters: a single dataset has one"),
        (
            {
                "datasets": [{**TWO[1], "objectives": [{"type": "sft"}]}, TWO[0]],
                "adapters": "per_dataset",
                "combination": {"type": "fixed", "weights": [1, 1]},
            },
            "fixed weights are those of one adapter",
        ),
    ],
)
def test_what_makes_no_sense_with_several_datasets_is_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        request(**changes)


def test_fixed_weights_are_those_of_all_datasets_objectives_in_order():
    datasets = [TWO[0], {"dataset_id": "ds_2", "objectives": [{"type": "sft"}, {"type": "dpo"}]}]

    spec = request(datasets=datasets, combination={"type": "fixed", "weights": [1, 2, 3]})

    assert [one.type for dataset in spec.training.values() for one in dataset.objectives] == ["sft", "sft", "dpo"]


def test_ids_are_no_part_of_what_decides_the_adapter_and_objectives_are():
    def decisive(spec):
        return without_dataset_ids(spec.model_dump())

    others = [{**one, "dataset_id": one["dataset_id"] + "0", "eval_dataset_id": "ds_9"} for one in TWO]

    assert decisive(request()) == decisive(request(datasets=others))
    assert decisive(request()) != decisive(request(datasets=TWO[::-1]))
    assert "datasets" not in decisive(InitializationSpec(base_model="m", dataset_id="ds_1"))


def test_files_and_numbered_objectives_become_datasets():
    given = options(objective=["sft", "1.dpo:beta=0.3", "1.sft"], adapters="per_dataset")

    spec = build_spec("m", "ds_1", given, further=["ds_2", "ds_3"], evaluations=["ds_4", "ds_5"])

    assert (spec.dataset_id, spec.adapters) == (None, "per_dataset")
    assert spec.datasets == [
        TrainingDataset(dataset_id="ds_1", objectives=[Sft()], eval_dataset_id="ds_4"),
        TrainingDataset(dataset_id="ds_2", objectives=[Dpo(beta=0.3), Sft()], eval_dataset_id="ds_5"),
        TrainingDataset(dataset_id="ds_3"),
    ]
    with pytest.raises(typer.BadParameter, match=r"--objective 3\.sft: there are 3 datasets"):
        build_spec("m", "ds_1", options(objective=["3.sft"]), further=["ds_2", "ds_3"])


def test_a_file_may_describe_the_datasets_and_options_win_over_it(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"datasets": [{"objectives": [{"type": "sft"}]}, {"objectives": [{"type": "orpo"}]}]}))

    spec = build_spec("m", "ds_1", options(spec=path, objective=["1.dpo"]), further=["ds_2"])

    assert [dataset.objectives for dataset in spec.training.values()] == [[Sft()], [Dpo()]]
    with pytest.raises(typer.BadParameter, match="datasets has 2 entries, and 3 files"):
        build_spec("m", "ds_1", options(spec=path), further=["ds_2", "ds_3"])


def test_submit_uploads_every_file_with_its_own_columns_and_names_them_in_order(tmp_path, monkeypatch):
    uploads, requests = [], []

    def handler(request):
        if request.url.path == "/v1/datasets":
            uploads.append((request.read(), request.url.params.get_list("column")))
            dataset = {
                "id": f"ds_{len(uploads)}",
                "format": "jsonl",
                "size": 1,
                "sha256": "0" * 64,
                "rows": 1,
                "row_schema": "prompt_completion",
                "objectives": ["sft"],
                "created_at": "2026-01-01T00:00:00Z",
            }
            return httpx.Response(201, json=dataset)
        requests.append(json.loads(request.content))
        job = {"id": "init_1", "state": "queued", "attempt": 0, "created_at": "2026-01-01T00:00:00Z"}
        return httpx.Response(202, json={**job, "spec": requests[0]})

    transport = httpx.MockTransport(handler)
    monkeypatch.setattr(cli, "_client", lambda *_: Client("http://service", api_key="k", transport=transport))
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"question": "{name}", "completion": "c"}}\n')
    a, b, c, d = (str(tmp_path / f"{name}.jsonl") for name in ("a", "b", "c", "d"))
    chosen = ["--column", "1.prompt=question", "--objective", "1.sft", "--adapters", "per_dataset"]

    done = CliRunner().invoke(cli.app, ["submit", "m", a, "--dataset", b, "--eval", c, "--eval", d, *chosen])

    assert done.exception is None, done.exception
    assert done.output == "init_1\n"
    assert [(json.loads(rows)["question"], columns) for rows, columns in uploads] == [
        ("a", []),
        ("b", ["prompt:question"]),
        ("c", []),
        ("d", ["prompt:question"]),
    ]
    spec = InitializationSpec.model_validate(requests[0])
    assert [(one.dataset_id, one.objectives) for one in spec.datasets] == [("ds_1", None), ("ds_2", [Sft()])]
    assert spec.adapters == "per_dataset"
    assert [one.eval_dataset_id for one in spec.datasets] == ["ds_3", "ds_4"]


def test_more_evaluations_than_datasets_are_refused_before_anything_is_uploaded(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "c"}\n')

    done = CliRunner().invoke(
        cli.app, ["submit", "m", str(path), "--eval", str(path), "--eval", str(path), "--api-key", "k"]
    )

    assert done.exit_code == 2
    assert "--eval: there are 2 of them, and 1 files to learn from" in done.output

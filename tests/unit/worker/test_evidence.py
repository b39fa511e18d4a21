"""What reports say, from files to files."""

import json
from pathlib import Path

import pytest

from d2lora.datasets import DatasetFile, Format
from d2lora.initializations import InitializationSpec, LoraSpec
from d2lora.settings import WorkerSettings
from tests.support.models import tiny_llama, tiny_tokenizer
from worker.initialization import initialize
from worker.joint_initialization import initialize_jointly

SETTINGS = WorkerSettings(device="cpu")


@pytest.fixture
def base_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def pairs(path, count):
    rows = [{"prompt": f"item {n}:", "chosen": " yes yes", "rejected": f" no {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetFile(path, Format.JSONL)


def test_trials_are_scored_on_the_rows_of_all_datasets(base_model, tmp_path):
    files = [pairs(tmp_path / f"{count}.jsonl", count) for count in (12, 20)]
    named = [{"dataset_id": "a"}, {"dataset_id": "b", "objectives": [{"type": "dpo"}]}]
    spec = InitializationSpec.model_validate({"base_model": base_model, "datasets": named, "lora": LoraSpec(r=4)})
    (tmp_path / "out").mkdir()

    initialize_jointly(spec, files, {}, out=tmp_path / "out", settings=SETTINGS, on_progress=lambda *_: None)

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["calibration"]["rows"] == 32


def test_another_tokenizer_beside_the_same_weights_is_another_fingerprint(base_model, tmp_path):
    dataset = pairs(tmp_path / "rows.jsonl", 6)

    def report(name):
        spec = InitializationSpec(base_model=base_model, dataset_id="ds", lora=LoraSpec(r=4), start="zero")
        (tmp_path / name).mkdir()
        initialize(spec, dataset, {}, out=tmp_path / name, settings=SETTINGS, on_progress=lambda *_: None)
        return json.loads((tmp_path / name / "report.json").read_text())

    first, again = report("first"), report("again")
    path = Path(base_model) / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": {"type": "Lowercase"}}))
    other = report("other")

    assert again["summary"]["fingerprint"] == first["summary"]["fingerprint"]
    assert other["base_identity"] == first["base_identity"]
    assert other["base_configuration_sha256"] != first["base_configuration_sha256"]
    assert other["summary"]["fingerprint"] != first["summary"]["fingerprint"]

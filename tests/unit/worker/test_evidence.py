"""What reports say, from files to files."""

import json

import pytest

from d2lora.datasets import DatasetFile, Format
from d2lora.initializations import InitializationSpec, LoraSpec
from d2lora.settings import WorkerSettings
from tests.support.models import tiny_llama, tiny_tokenizer
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

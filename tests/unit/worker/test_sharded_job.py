import hashlib
import json
import threading
from datetime import UTC, datetime

import pytest

from d2lora.datasets import Dataset
from d2lora.initializations import InitializationSpec, LoraSpec, State
from d2lora.settings import WorkerSettings
from d2lora.storage import dataset_key, initialization_prefix
from tests.support.models import tiny_llama, tiny_tokenizer
from worker.process import RealWork
from worker.runner import Runner

SETTINGS = WorkerSettings(device="cpu", max_tokens_per_batch=160, lease_seconds=120)
ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def spec(store, storage, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"item {n}:", "chosen": " yes yes", "rejected": f" no {n}"} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    dataset = Dataset(
        id="ds_1",
        created_at=datetime.now(UTC),
        format="jsonl",
        row_schema="preference",
        rows=len(rows),
        size=path.stat().st_size,
        sha256=sha256,
        objectives=["sft", "dpo", "orpo"],
    )
    storage.put_file(dataset_key("acme", "ds_1"), path, sha256)
    store.add_dataset("acme", dataset, dataset_key("acme", "ds_1"))
    return InitializationSpec(base_model=str(tmp_path / "model"), dataset_id="ds_1", lora=LoraSpec(r=4))


def runner(store, storage, settings, name):
    return Runner(
        store.leases,
        storage,
        RealWork(settings, may_split=True),
        settings,
        worker=name,
        stop=threading.Event(),
    )


def test_a_large_job_goes_through_queue_and_storage_in_shards_to_the_same_adapter(store, storage, spec, tmp_path):
    (whole, _), (cut, _) = store.create("acme", spec), store.create("acme", spec)
    at_once = runner(store, storage, SETTINGS, "one")
    in_shards = runner(store, storage, SETTINGS.model_copy(update={"shard_tokens": 250}), "two")

    at_once.run_next(whole.id)
    units = 0
    while in_shards.run_next(cut.id):
        units += 1

    results = {}
    for job in (whole, cut):
        done = store.get("acme", job.id)
        assert done.state is State.SUCCEEDED, done.error
        prefix = initialization_prefix("acme", job.id, done.attempt)
        for name in (ADAPTER, "report.json"):
            entry = next(file for file in done.result.files if file.name == name)
            storage.get_file(prefix + name, tmp_path / f"{job.id}-{name}", entry.sha256)
        results[job.id] = json.loads((tmp_path / f"{job.id}-report.json").read_text())
    assert results[whole.id]["shards"] == 1
    assert results[cut.id]["shards"] == units - 2 > 3  # one unit cut the job, one built the adapter
    assert results[cut.id]["summary"]["start"] == "calibrated"
    for name, layer in results[whole.id]["layers"].items():
        assert results[cut.id]["layers"][name]["singular_values"] == pytest.approx(layer["singular_values"], rel=1e-4)

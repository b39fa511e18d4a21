import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from d2lora.initializations import InitializationSpec, LoraSpec, Phase, State
from tests.end_to_end.conftest import alive, wait_for

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def rows(tmp_path):
    def write(count):
        path = tmp_path / f"{count}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"prompt": f"item {i}:", "chosen": " yes yes", "rejected": f" no {i}"}) + "\n"
                for i in range(count)
            )
        )
        return path

    return write


def submit(client, model, path, **changes):
    dataset = client.upload_dataset(path)
    return client.submit(InitializationSpec(base_model=model, dataset_id=dataset.id, lora=LoraSpec(r=2), **changes))


def test_a_dataset_goes_in_and_an_adapter_that_loads_comes_out(shared_up, tiny_model, rows, tmp_path):
    seen = []
    with shared_up.client() as client:
        job = submit(client, tiny_model, rows(24), max_tokens_per_batch=64)
        done = client.wait(job.id, poll=0.05, on_update=lambda now: seen.append(now.progress), timeout=300)
        client.pull(job.id, tmp_path / "adapter")

    assert done.state is State.SUCCEEDED, done.error
    assert done.result.summary.held_out["nll"].adapter < done.result.summary.held_out["nll"].base
    assert {progress.phase for progress in seen if progress} & set(Phase)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "adapter"))
    assert any(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)


def test_pefts_own_start_comes_out_of_the_same_service(shared_up, tiny_model, rows, tmp_path):
    with shared_up.client() as client:
        job = submit(client, tiny_model, rows(12), method="lora_ga")
        done = client.wait(job.id, poll=0.05, timeout=300)
        client.pull(job.id, tmp_path / "adapter")

    assert done.state is State.SUCCEEDED, done.error
    assert any("rank 4" in warning for warning in done.result.summary.warnings)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_two_datasets_go_in_and_one_adapter_or_one_for_each_comes_out_with_figures_for_both(
    shared_up, tiny_model, rows, tmp_path
):
    with shared_up.client() as client:
        *ids, measuring = (client.upload_dataset(rows(count)).id for count in (12, 16, 5))
        asked = [
            {"dataset_id": dataset_id, "objectives": [{"type": kind}], "eval_dataset_id": measuring}
            for dataset_id, kind in zip(ids, ("sft", "dpo"), strict=True)
        ]
        spec = InitializationSpec.model_validate({"base_model": tiny_model, "datasets": asked, "lora": {"r": 2}})
        jobs = [client.submit(spec.model_copy(update={"adapters": kind})) for kind in (None, "per_dataset")]
        for job in jobs:
            done = client.wait(job.id, poll=0.05, timeout=300)
            assert done.state is State.SUCCEEDED, done.error
            assert [one.dataset_id for one in done.spec.datasets] == ids
            held_out = done.result.summary.held_out
            assert (held_out["datasets[0].sft"].rows, held_out["datasets[1].dpo"].rows) == (12, 16)
            evaluation = done.result.summary.evaluation
            assert (evaluation["datasets[0].sft"].rows, evaluation["datasets[1].dpo"].rows) == (5, 5)
        one, each = (client.pull(job.id, tmp_path / job.id) for job in jobs)

    assert {path.name for path in one} == {path.name for path in each}
    for adapter in (tmp_path / jobs[0].id, *(tmp_path / jobs[1].id / f"datasets-{index}" for index in (0, 1))):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(adapter))


def test_the_command_line_lists_datasets_and_deletes_those_that_no_job_needs(shared_up, tiny_model, rows):
    def datasets(*arguments):
        command = [sys.executable, "-m", "d2lora.cli", "datasets", *arguments]
        where = ["--url", shared_up.url, "--api-key", shared_up.key]
        return subprocess.run([*command, *where], capture_output=True, text=True, check=False, timeout=300)

    with shared_up.client() as client:
        free = [client.upload_dataset(rows(count)).id for count in (3, 4)]
        job = submit(client, tiny_model, rows(2000), max_tokens_per_batch=64)

        deleted = datasets("delete", *free)
        needed = datasets("delete", job.spec.dataset_id)
        client.cancel(job.id)
        listed = datasets("list")

    assert (deleted.returncode, deleted.stdout.split()) == (0, free)
    assert (needed.returncode, needed.stdout) == (1, "")
    assert f"is in use by {job.id}" in needed.stderr
    assert f"{job.spec.dataset_id}  " in listed.stdout
    assert "2000 rows of preference" in listed.stdout
    assert not any(dataset_id in listed.stdout for dataset_id in free)


def test_a_killed_worker_is_started_again_and_its_job_is_finished_once(up, tiny_model, rows):
    with up.client() as client:
        job = submit(client, tiny_model, rows(400), max_tokens_per_batch=64)
        wait_for(lambda: client.get(job.id).progress is not None, up.log)
        (worker,) = up.children("worker run")

        os.kill(worker, signal.SIGKILL)

        done = client.wait(job.id, poll=0.2, timeout=600)
    assert done.state is State.SUCCEEDED, done.error
    assert done.attempt == 2
    with up.client() as client:
        types = [event["type"] for event in client._send("GET", f"/v1/initializations/{job.id}/events").json()["data"]]
    assert types == ["queued", "running", "running", "succeeded"]


def test_a_running_job_is_cancelled_within_a_batch(shared_up, tiny_model, rows):
    with shared_up.client() as client:
        job = submit(client, tiny_model, rows(2000), max_tokens_per_batch=64)
        wait_for(lambda: client.get(job.id).progress is not None, shared_up.log)

        client.cancel(job.id)

        assert client.wait(job.id, poll=0.1, timeout=120).state is State.CANCELLED


def test_a_job_that_cannot_be_done_fails_with_its_reason(shared_up, tiny_model, rows):
    with shared_up.client() as client:
        job = submit(client, tiny_model, rows(4), max_length=3)
        done = client.wait(job.id, poll=0.1, timeout=300)

    assert (done.state, done.error.code) == (State.FAILED, "rows_too_long")
    command = [sys.executable, "-m", "d2lora.cli", "wait", job.id, "--url", shared_up.url, "--api-key", shared_up.key]
    waited = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, timeout=300)
    assert waited.returncode == 1
    assert json.loads(waited.stdout)["error"]["code"] == "rows_too_long"
    assert "max_length 3" in waited.stderr


def test_stopping_takes_everything_along(up):
    children = up.children("worker run") + up.children("service")
    assert len(children) == 2

    up.process.send_signal(signal.SIGTERM)

    up.process.wait(120)
    wait_for(lambda: not any(alive(child) for child in children), up.log, timeout=30)


def test_no_child_outlives_a_supervisor_that_is_killed(up):
    children = up.children("worker run") + up.children("service")
    assert len(children) == 2

    os.kill(up.process.pid, signal.SIGKILL)

    wait_for(lambda: not any(alive(child) for child in children), up.log, timeout=30)


def test_the_key_and_the_state_are_for_their_owner_alone(shared_up):
    assert shared_up.state.stat().st_mode & 0o777 == 0o700
    assert (shared_up.state / "api_key").stat().st_mode & 0o777 == 0o600

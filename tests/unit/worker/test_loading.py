"""Spread models: accelerate's hooks run for real, on the one device that every machine has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoConfig

import worker.loading
import worker.models
from d2lora.errors import OutOfMemory
from tests.support.models import as_base, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.unit.worker.conftest import one_fold, reference_rows
from tests.unit.worker.test_statistics import assert_same_sums, gathered, targets_of
from worker.checkpointing import activation_checkpointing
from worker.factors import Factors, adapted
from worker.loading import LoadingPlan, loading_plan
from worker.models import load, verify_head, weight_norm
from worker.statistics import score

ROWS = reference_rows(5, paired=True)


def dispatched(model, tmp_path, *, disk=()):
    """The model with a hook of accelerate on every module; the weights of some wait on disk between forwards."""
    parts = [name for name, module in model.named_modules() if name.count(".") == 2 or name.count(".") == 1]
    parts = [name for name in parts if not any(other.startswith(f"{name}.") for other in parts)]
    parts += [name for name, _ in model.named_children() if not any(part.startswith(f"{name}.") for part in parts)]
    places = {name: "disk" if any(one in name for one in disk) else "cpu" for name in parts}
    return dispatch_model(model, places, offload_dir=str(tmp_path), force_hooks=True)


MODELS = {
    "llama": (tiny_llama, ("layers.1",)),
    "tied": (lambda: tiny_llama(tie=True), ("layers.1",)),
    "gpt2": (tiny_gpt2, ("h.0",)),
}


@pytest.fixture(params=list(MODELS))
def pair(request, tmp_path):
    """A plain model, and the same one under accelerate's hooks with a layer whose weights come and go."""
    make, disk = MODELS[request.param]
    spread = dispatched(make(), tmp_path, disk=disk)
    assert any(one.device.type == "meta" for one in spread.parameters())
    return make(), spread


def test_a_spread_model_scores_rows_as_the_plain_one(pair):
    (batch,) = one_fold(ROWS)
    plain, spread = (score(as_base(model), batch) for model in pair)

    assert torch.equal(plain.chosen_logps, spread.chosen_logps)
    assert torch.equal(plain.rejected_logps, spread.rejected_logps)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_spread_model_gives_the_plain_ones_statistics(pair, checkpointing):
    plain, spread = pair

    expected, _ = gathered(plain, ROWS)
    with activation_checkpointing(as_base(spread), enabled=checkpointing):
        statistics, _ = gathered(spread, ROWS)

    assert_same_sums(expected, statistics, 1e-6)


def test_a_spread_models_head_and_inputs_find_their_devices(pair):
    base = as_base(pair[1])

    verify_head(base)

    assert base.device == torch.device("cpu")


def test_an_adapter_on_a_spread_model_does_what_it_does_on_the_plain_one(pair):
    (batch,) = one_fold(ROWS)
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: Factors(torch.randn(2, sizes[1], generator=generator), torch.randn(sizes[0], 2, generator=generator))
        for name, module in targets_of(pair[0]).items()
        if (sizes := worker.models.layer_sizes(module))
    }
    scores = []
    for model in pair:
        with adapted(targets_of(model), factors, scaling=0.1):
            scores.append(score(as_base(model), batch).chosen_logps)

    assert torch.equal(*scores)
    assert not torch.equal(scores[0], score(as_base(pair[0]), batch).chosen_logps)


def test_layers_that_stay_in_memory_under_hooks_have_their_norms(tmp_path):
    plain, spread = tiny_llama(), dispatched(tiny_llama(), tmp_path)

    for name, module in targets_of(plain).items():
        assert weight_norm(spread.get_submodule(name)) == weight_norm(module)


@pytest.fixture
def checkpoint(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def plan_with(monkeypatch, checkpoint, free, **changes):
    monkeypatch.setattr(worker.loading, "free_bytes", lambda _device: free)
    how = {"dtype": torch.float32, "target": torch.device("cpu"), "quantization": None, **changes}
    return loading_plan(checkpoint, AutoConfig.from_pretrained(checkpoint), **how)


def test_a_model_that_the_first_device_holds_is_loaded_plainly(monkeypatch, checkpoint):
    assert plan_with(monkeypatch, checkpoint, [10**9, 10**9]) == LoadingPlan(None, {})


def test_a_larger_model_gets_a_share_of_every_device(monkeypatch, checkpoint):
    size = sum(4 * one.numel() for one in tiny_llama().parameters())

    plan = plan_with(monkeypatch, checkpoint, [size, size])

    assert plan.arguments == {"device_map": "auto", "max_memory": {0: int(0.7 * size), 1: int(0.7 * size)}}


def test_in_half_the_precision_the_same_model_fits_one_device(monkeypatch, checkpoint):
    size = sum(4 * one.numel() for one in tiny_llama().parameters())

    assert plan_with(monkeypatch, checkpoint, [size, size], dtype=torch.bfloat16).arguments == {}
    assert "max_memory" not in plan_with(monkeypatch, checkpoint, [size, size], quantization="4bit").arguments


def test_a_model_that_all_devices_do_not_hold_is_refused_before_it_is_loaded(monkeypatch, checkpoint):
    with pytest.raises(OutOfMemory, match="2 devices"):
        plan_with(monkeypatch, checkpoint, [1000, 1000])


def test_a_model_of_which_a_part_would_stay_on_disk_is_refused(monkeypatch, checkpoint):
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    plan = LoadingPlan(None, {"device_map": {**places, "model.layers.1": "disk"}})
    monkeypatch.setattr(worker.models, "loading_plan", lambda *_, **__: plan)

    with pytest.raises(OutOfMemory, match="does not fit on the devices"):
        load(checkpoint, revision=None, dtype="float32", device="cpu")


def test_compiled_code_from_a_hub_is_never_fetched(tmp_path):
    """A package of the name that the libraries ask for would leave a mark."""
    (tmp_path / "kernels.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\ndef get_kernel(*_, **__): raise OSError\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])}

    for code, marked in (("import worker.models, peft, bitsandbytes", False), ("import kernels", True)):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "mark").exists() == marked
        assert "kernels" not in done.stderr


def test_a_gguf_files_weights_are_unpacked_whatever_else_is_installed():
    plan = loading_plan("model.gguf", None, dtype="auto", target=torch.device("cpu"), quantization=None)

    assert plan.quantization is None
    assert plan.arguments["quantization_config"].dequantize

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from d2lora.initializations import InitializationSpec
from tests.support.models import as_base, tiny_gpt2, tiny_llama
from tests.unit.worker.conftest import as_examples, reference_rows
from tests.unit.worker.test_initialization import base_model, logits_of, run, write_rows  # noqa: F401  # a fixture
from tests.unit.worker.test_joint_initialization import pairs, plain  # noqa: F401  # fixtures
from tests.unit.worker.test_joint_initialization import run as run_jointly
from worker.batches import make_batches
from worker.factors import Factors
from worker.models import layer_sizes
from worker.output_scale import with_outputs_as_pefts
from worker.targets import lora_config, resolve_targets


def some_factors(targets, *, rank=3):
    generator = torch.Generator().manual_seed(1)
    return {
        name: Factors(
            torch.randn(rank, layer_sizes(module)[1], generator=generator),
            torch.randn(layer_sizes(module)[0], rank, generator=generator),
        )
        for name, module in targets.items()
    }


def targets_of(model):
    config = InitializationSpec(base_model="tiny", dataset_id="ds").lora
    return resolve_targets(model, lora_config(model, config, base_model="tiny", revision=None))


def inputs_of(model, names, rows):
    """Every layer's inputs, in float64, sequence by sequence without padding."""
    twin, seen = copy.deepcopy(model).double(), {name: [] for name in names}
    for name in names:
        twin.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            for completion in filter(None, (row.chosen, row.rejected)):
                twin(input_ids=torch.tensor([row.prompt + completion]))
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("paired", [True, False])
def test_outputs_are_as_large_as_a_random_lora_as_and_updates_stay(make, paired):
    model, rows = make(), reference_rows(7, paired=paired)
    targets = targets_of(model)
    factors = some_factors(targets)
    examples = as_examples(rows)
    batches = make_batches(examples, [0] * len(examples), max_tokens=64, pad_token_id=0)
    assert len(batches) > 1
    assert any(not batch.attention_mask.all() for batch in batches)

    scaled = with_outputs_as_pefts(as_base(model), targets, factors, batches)

    for name, inputs in inputs_of(model, targets, rows).items():
        ours = (inputs @ scaled[name].lora_A.double().T).square().mean()
        # The variance of an entry of PEFT's lora_A is 1 / (3 I).
        assert ours.item() == pytest.approx((inputs.square().mean() / 3).item(), rel=1e-4), name
        update = factors[name].lora_B @ factors[name].lora_A
        torch.testing.assert_close(scaled[name].lora_B @ scaled[name].lora_A, update, rtol=1e-4, atol=1e-5)


def test_pefts_own_start_has_the_outputs_that_are_meant():
    """Averaged over draws of PEFT's default lora_A, on inputs of any shape."""
    inputs, seen = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)) * torch.arange(24), []
    for seed in range(200):
        torch.manual_seed(seed)
        layer = torch.nn.Sequential(torch.nn.Linear(24, 8))
        lora_a = get_peft_model(layer, LoraConfig(r=4, target_modules=["0"])).base_model.model[0].lora_A["default"]
        seen.append((inputs @ lora_a.weight.detach().T).square().mean())

    assert torch.stack(seen).mean().item() == pytest.approx((inputs.square().mean() / 3).item(), rel=0.05)


def test_a_layer_whose_lora_a_gives_nothing_stays_as_it_is():
    model = tiny_llama()
    targets = dict(list(targets_of(model).items())[:1])
    ((name, module),) = targets.items()
    factors = {name: Factors(torch.zeros(2, layer_sizes(module)[1]), torch.ones(layer_sizes(module)[0], 2))}
    batches = make_batches(as_examples(reference_rows(3, paired=False)), [0] * 3, max_tokens=64, pad_token_id=0)

    scaled = with_outputs_as_pefts(as_base(model), targets, factors, batches)

    assert torch.equal(scaled[name].lora_B, factors[name].lora_B)


@pytest.mark.parametrize("start", ["calibrated", "zero"])
def test_the_files_hold_the_same_function_with_another_lora_a(base_model, tmp_path, start):  # noqa: F811  # as above
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    results = {
        scale: run(base_model, rows, tmp_path / scale, lora_a_scale=scale, start=start) for scale in ("rows", "outputs")
    }

    adapters = {
        scale: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), str(tmp_path / scale))
        for scale in results
    }
    torch.testing.assert_close(logits_of(adapters["outputs"]), logits_of(adapters["rows"]), rtol=1e-4, atol=1e-4)
    lengths = {
        scale: {name: one.norm().item() for name, one in adapter.state_dict().items() if "lora_A" in name}
        for scale, adapter in adapters.items()
    }
    assert all(abs(lengths["outputs"][name] / one - 1) > 1e-3 for name, one in lengths["rows"].items())
    held_out = [result.summary.held_out for result in results.values()]
    assert held_out[0] == held_out[1]
    assert results["rows"].summary.fingerprint != results["outputs"].summary.fingerprint
    cards = {scale: (tmp_path / scale / "README.md").read_text() for scale in results}
    assert "Learning rates that suit LoRA's default start suit this one" in cards["outputs"]
    assert "Begin with a smaller learning rate than suits LoRA's default start" in cards["rows"]


def test_adapters_of_several_datasets_have_it_too(base_model, plain, pairs, tmp_path):  # noqa: F811  # as above
    lengths = []
    for scale in ("rows", "outputs"):
        run_jointly(base_model, [plain, pairs], tmp_path / scale, lora_a_scale=scale)
        adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), str(tmp_path / scale))
        lengths.append([one.norm().item() for name, one in adapter.state_dict().items() if "lora_A" in name])

    assert all(abs(one / other - 1) > 1e-3 for one, other in zip(*lengths, strict=True))


def test_pefts_methods_do_not_take_it():
    with pytest.raises(ValueError, match="lora_a_scale: not used by method pissa"):
        InitializationSpec(base_model="tiny", dataset_id="ds", method="pissa", lora_a_scale="outputs")

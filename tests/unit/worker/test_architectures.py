"""Every architecture that docs/method.md lists, by the same tests: the dense oracle, PEFT's targets, stock PEFT."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    T5Config,
)

from d2lora.datasets import DatasetFile, Format
from d2lora.errors import ModelUnsupported, TargetUnsupported
from d2lora.initializations import Dpo, InitializationSpec, LoraSpec, Orpo, Sft
from d2lora.settings import WorkerSettings
from tests.support.architectures import ARCHITECTURES
from tests.support.models import as_base, tiny_llama, tiny_tokenizer
from tests.support.reference import dpo_loss, in_float64, orpo_loss, sft_loss, weight_gradients
from tests.unit.worker.conftest import one_fold, reference_rows
from worker.checkpointing import activation_checkpointing
from worker.factors import Factors, adapted
from worker.gradients import DenseGradient
from worker.initialization import initialize
from worker.left_out import left_out
from worker.matrices import Shape, TestMatrices
from worker.models import layer_sizes, load, verify_causality, verify_head
from worker.objectives import bases_of, objective_coefficients
from worker.sketching import Sketch
from worker.statistics import gather
from worker.targets import lora_config, passed_over, resolve_targets

_PEFT_SAYS_EXPERTS_ARE_NO_TARGETS = pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern keys did not match")
OBJECTIVES = [Sft(), Dpo(beta=0.3), Orpo(beta=0.7)]


@pytest.fixture(params=ARCHITECTURES, scope="module")
def model(request):
    return ARCHITECTURES[request.param]()


def targets_of(model, target_modules="all-linear", r=1):
    config = lora_config(model, LoraSpec(r=r, target_modules=target_modules), base_model="tiny", revision=None)
    return resolve_targets(model, config)


def gradients(model, rows, *, checkpointing=False, max_tokens=10_000, targets=None):
    """Every objective's gradient by every target's weight, from one pass."""
    base, bases = as_base(model), bases_of(OBJECTIVES)
    targets = targets or targets_of(model)
    matrices = TestMatrices(0, torch.device("cpu"))
    layers = {
        name: DenseGradient.empty(Shape(*layer_sizes(module), 1), len(bases), matrices)
        for name, module in targets.items()
    }
    batches = one_fold(rows, max_tokens=max_tokens)
    with activation_checkpointing(base, enabled=checkpointing):
        counts = gather(base, targets, layers, batches, bases, on_batch=lambda *_: None)
    coefficients = objective_coefficients(OBJECTIVES, bases, counts)
    return {name: torch.einsum("jk,koi->joi", coefficients, layer.gradients.double()) for name, layer in layers.items()}


def assert_near(left, right, tolerance):
    for name in left:
        for ours, theirs in zip(left[name], right[name], strict=True):
            assert (ours - theirs).norm() < tolerance * theirs.norm(), name


def test_one_pass_gives_autograds_gradients_of_all_objectives(model):
    """Rows of 2 to 18 tokens, so most are padded, and windows of 4 tokens cut; the oracle takes one row at a time."""
    rows, reference = reference_rows(5, paired=True), in_float64(model)

    ours = gradients(model, rows, max_tokens=70)

    losses = [
        lambda twin: sft_loss(twin, rows),
        lambda twin: dpo_loss(twin, reference, rows, beta=0.3),
        lambda twin: orpo_loss(twin, rows, beta=0.7),
    ]
    expected = [weight_gradients(model, ours, loss) for loss in losses]
    assert_near(ours, {name: [one[name] for one in expected] for name in ours}, 1e-5)


def test_activation_checkpointing_changes_nothing_but_rounding(model):
    rows = reference_rows(3, paired=True)

    assert_near(gradients(model, rows, checkpointing=True), gradients(model, rows), 1e-5)

    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["falcon-alibi", "bloom"])
def test_activation_checkpointing_drops_no_activations(name):
    """These layers drop activations themselves when they are in training mode, which checkpointing asks for."""
    model, rows = ARCHITECTURES[name](), reference_rows(2, paired=True)
    model.config.hidden_dropout = model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "hidden_dropout"):
            module.hidden_dropout = 0.5

    assert_near(gradients(model, rows, checkpointing=True), gradients(model, rows), 1e-5)


def test_head_and_attention_of_every_architecture_are_understood(model):
    base = as_base(model)

    verify_head(base)
    verify_causality(base)


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`")  # these models have no name
@_PEFT_SAYS_EXPERTS_ARE_NO_TARGETS
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # as PEFT finds out by itself
def test_all_linear_means_what_it_means_to_peft(model):
    """But for experts and routers that are parameters, which PEFT wraps too, and layers that it would mistake."""
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))

    modules = wrapped.base_model.model.named_modules()
    names = {name for name, module in modules if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)}
    assert names - passed_over(model, 1).keys() == set(targets_of(model))


@pytest.mark.parametrize(
    ("family", "r"),
    [
        *(
            (name, 1)
            for name in ("qwen2", "mistral-window", "gemma2", "phi", "falcon", "bloom", "mixtral", "qwen2-moe")
        ),
        ("qwen2-moe", 3),
        ("qwen3-moe-partly-dense", 3),
    ],
)
def test_stock_peft_gives_the_logits_of_our_factors_on_the_unmodified_base(family, r, tmp_path):
    """Llama and GPT-2 pass the same way in test_initialization.py."""
    model = ARCHITECTURES[family]()

    out = deliver(model, tmp_path, r=r)

    targets, stored = targets_of(model, r=r), load_file(out / "adapter_model.safetensors")
    factors = {
        name: Factors(*(stored[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")) for name in targets
    }
    with adapted(targets, factors, scaling=3.0):
        ours = logits_of(model)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = logits_of(base)
    theirs = logits_of(PeftModel.from_pretrained(base, str(out)))
    assert len(stored) == 2 * len(targets)
    assert torch.equal(before, logits_of(model))
    assert (theirs - before).norm() > 1e-3 * before.norm()
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def deliver(model, place, *, r, **lora):
    """Save the model, let an adapter be made for it, and return the adapter's directory."""
    model.save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    rows = [f'{{"prompt": "item {i}:", "chosen": " yes yes", "rejected": " no {i}"}}' for i in range(6)]
    (place / "rows.jsonl").write_text("\n".join(rows))
    (place / "out").mkdir()
    lora = LoraSpec(r=r, lora_alpha=3 * r, **lora)
    initialize(
        InitializationSpec(base_model=str(place / "model"), dataset_id="ds", lora=lora, objectives=[Sft()]),
        DatasetFile(place / "rows.jsonl", Format.JSONL),
        {},
        out=place / "out",
        settings=WorkerSettings(device="cpu"),
        on_progress=lambda *_: None,
    )
    return place / "out"


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


def test_a_forward_that_adds_the_update_in_place_gives_what_one_with_gradients_does(model):
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, module in targets_of(model).items():
        rows, columns = layer_sizes(module)
        factors[name] = Factors(torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator))
    ids = torch.arange(3, 20)[None]
    plain = logits_of(model)

    with adapted(targets_of(model), factors, scaling=0.03):
        in_place = logits_of(model)
        with torch.enable_grad():
            added = model(input_ids=ids).logits

    assert (in_place - plain).norm() > 1e-3 * plain.norm()
    torch.testing.assert_close(in_place, added, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits_of(model), plain)


@pytest.mark.parametrize("config", [T5Config(), BartConfig()], ids=["t5", "bart"])
def test_an_encoder_decoder_is_refused_with_the_reason(config, tmp_path):
    config.save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")

    with pytest.raises(ModelUnsupported, match=r"base_model: .* is an encoder-decoder"):
        load(str(tmp_path), revision=None, dtype="auto", device="cpu")


def test_targets_that_peft_would_take_for_experts_are_refused_by_name_and_skipped_by_all_linear():
    """Stock PEFT would leave the dense layer as it is, and warn that the experts' adapters are missing."""
    model = ARCHITECTURES["qwen3-moe-partly-dense"]()
    dense = ["gate_proj", "up_proj", "down_proj"]

    with pytest.raises(TargetUnsupported, match=r"base_model 'tiny' .*up_proj for experts .*; .* applies .*q_proj"):
        targets_of(model, ["q_proj", *dense])
    with pytest.raises(TargetUnsupported, match=r"base_model 'tiny': .*up_proj without also targeting gate_proj"):
        targets_of(model, ["q_proj", "up_proj"])
    attention = targets_of(model, ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert set(targets_of(model)) == set(attention)
    assert passed_over(model, 1) == {
        f"model.layers.1.mlp.{name}": f"PEFT takes the name {name} for experts that are parameters" for name in dense
    }


def test_experts_and_skipped_layers_are_in_report_warnings_and_model_card(tmp_path):
    model = ARCHITECTURES["qwen2-moe"]()

    out = deliver(model, tmp_path, r=3)

    report = json.loads((out / "report.json").read_text())
    left = {one["modules"]: one for one in report["left_out"]}
    experts = left["model.layers.*.mlp.experts"]
    weights = {name: weight.numel() for name, weight in model.named_parameters()}
    assert experts["parameters"] == sum(size for name, size in weights.items() if "experts." in name)
    assert experts["share"] == pytest.approx(experts["parameters"] / sum(weights.values()))
    gates = left["model.layers.*.mlp.shared_expert_gate"]
    assert (gates["count"], gates["parameters"], gates["reason"]) == (2, 48, "r = 3 is above its smaller side, 1")
    router = left["model.layers.*.mlp.gate"]
    assert (router["parameters"], router["reason"]) == (192, "a Qwen2MoeTopKRouter is no Linear or Conv1D layer")
    # Every weight matrix is adapted, named as left out, an embedding or the head.
    adapted_names = set(targets_of(model, r=3))
    listed = sum(one["parameters"] for one in left.values())
    matrices = {name: model.get_parameter(name) for name in weights if model.get_parameter(name).ndim > 1}
    rest = {
        name: value.numel()
        for name, value in matrices.items()
        if name.removesuffix(".weight") not in {*adapted_names, "model.embed_tokens", "lm_head"}
    }
    assert listed == sum(rest.values())
    said = f"not adapted: model.layers.*.mlp.experts (2 modules, {experts['parameters']} parameters, "
    assert any(said in warning for warning in report["summary"]["warnings"])
    assert said in (out / "README.md").read_text()


def test_a_name_of_experts_that_matches_no_module_is_told(tmp_path):
    out = deliver(ARCHITECTURES["qwen3-moe"](), tmp_path, r=2, target_modules=["q_proj", "up_proj"])

    warnings = json.loads((out / "report.json").read_text())["summary"]["warnings"]
    assert "lora.target_modules: 'up_proj' matches no module" in warnings
    assert any("mlp.experts" in warning for warning in warnings)
    assert not any("'q_proj'" in warning for warning in warnings)


def test_a_dense_model_leaves_nothing_out():
    assert left_out(ARCHITECTURES["gpt2"](), LoraSpec(r=2)) == []
    assert left_out(ARCHITECTURES["gemma3"](), LoraSpec(r=2)) == []


def test_a_layer_of_one_output_is_found_exactly():
    shape, matrices = Shape(1, 24, 1), TestMatrices(0, torch.device("cpu"))
    layer = Sketch.empty(shape, 1, matrices)
    inputs, grads = torch.randn(2, 5, 24), torch.randn(2, 5, 1)

    layer.add(inputs, grads, torch.ones(1, 2), paired=False)

    found = layer.factorize(torch.ones(1), 1)
    exact = torch.einsum("sto,sti->oi", grads, inputs)
    torch.testing.assert_close(found.left * found.values @ found.right, exact)


def test_a_model_that_looks_ahead_is_refused():
    config = BertConfig(vocab_size=97, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=30)
    base = as_base(BertLMHeadModel(config).eval().requires_grad_(False))

    with pytest.raises(ModelUnsupported, match=r"base_model: .*from later ones"):
        verify_causality(base)


def test_a_model_that_lets_no_gradient_through_is_refused():
    model = tiny_llama()
    model.model.norm.register_forward_hook(lambda _module, _inputs, output: output.detach())

    with pytest.raises(ModelUnsupported, match=r"base_model: .*no gradient"):
        verify_causality(as_base(model))


def test_a_small_soft_cap_that_the_configuration_does_not_tell_is_noticed():
    model = tiny_llama()
    model.register_forward_hook(
        lambda _module, _inputs, output: setattr(output, "logits", 100 * torch.tanh(output.logits / 100))
    )

    with pytest.raises(ModelUnsupported, match=r"base_model: .*logits"):
        verify_head(as_base(model))


def test_a_target_that_no_token_passes_is_refused():
    model = tiny_llama()
    model.model.layers[0].vision = nn.Linear(24, 24)

    with pytest.raises(TargetUnsupported, match=r"no token passes 'model\.layers\.0\.vision'"):
        gradients(model, reference_rows(2, paired=True))


def test_a_target_that_runs_twice_is_refused():
    model = tiny_llama()
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: output + module.up_proj(inputs[0])[..., :24]
    )

    with pytest.raises(TargetUnsupported, match=r"up_proj' runs more than once"):
        gradients(model, reference_rows(2, paired=True))


def test_a_target_that_sees_a_part_of_the_tokens_is_refused():
    model = tiny_llama()

    def some_tokens(_module, arguments, output):
        chosen = arguments[0].reshape(-1, 24)[::2]
        output.reshape(-1, 24)[::2] += expert(chosen)
        return output

    expert = model.model.layers[0].expert = nn.Linear(24, 24)
    model.model.layers[0].mlp.register_forward_hook(some_tokens)

    with pytest.raises(TargetUnsupported, match=r"expert' sees a part of the tokens"):
        gradients(model, reference_rows(3, paired=True))

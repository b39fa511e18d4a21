"""PEFT's methods as PEFT runs them on the whole model, beside our adapters on the unmodified base."""

import json
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from d2lora.datasets import DatasetFile, Format
from d2lora.errors import ModelUnsupported, NumericalFailure, RankTooLarge, TargetUnsupported
from d2lora.initializations import InitializationSpec, LoraSpec, Phase
from d2lora.methods import CHANGES_BASE, NAMES
from d2lora.roles import Role
from d2lora.settings import WorkerSettings
from tests.support.models import as_base, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.unit.worker.conftest import as_examples, labeled_rows
from worker.data import encode_rows
from worker.initialization import initialize
from worker.models import layer_sizes, load
from worker.peft_methods import build_peft_adapter
from worker.peft_passes import gradients, sample
from worker.quantization import dequantized_weight
from worker.targets import lora_config, resolve_targets

RANK = 4
METHODS = [
    "kaiming",
    "gaussian",
    "orthogonal",
    "pissa",
    {"type": "pissa", "niter": 2},
    "olora",
    "eva",
    "corda",
    {"type": "corda", "corda_method": "kpm"},
    "lora_ga",
    {"type": "lora_ga", "direction": "random", "scale": "weight_svd"},
]
CHANGING = ["pissa", "olora", "corda", "lora_ga"]
"""Those that change the base weights."""


def name_of(value):
    if callable(value):
        return value.__name__
    return value if isinstance(value, str) else "-".join(map(str, value.values()))


def cases(methods, *, model="base_model"):
    """Both models with each method; olora on GPT-2 is refused, which a test of its own holds."""
    pairs = [(make, method) for make in (tiny_llama, tiny_gpt2) for method in methods]
    return pytest.mark.parametrize(
        (model, "method"),
        [(make, method) for make, method in pairs if (make, method) != (tiny_gpt2, "olora")],
        ids=name_of,
        indirect=["base_model"] if model == "base_model" else [],
    )


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=name_of, scope="module")
def base_model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    # PEFT's LoRA-GA runs in training mode; without dropout its gradients are those of the loss.
    model = request.param()
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"item {number}:", "chosen": f" yes {number}", "rejected": " no"} for number in range(10, 22)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return DatasetFile(path, Format.JSONL)


def run(base_model, dataset, out, method, *, evaluation=None, on_progress=lambda *_: None, **changes):
    fields = {"base_model": base_model, "dataset_id": "ds", "lora": LoraSpec(r=RANK, lora_alpha=6), "seed": 3}
    spec = InitializationSpec(**{**fields, "method": method, **changes})
    out.mkdir()
    settings = WorkerSettings(device="cpu")
    extras = {Role.EVALUATION: evaluation} if evaluation else {}
    return initialize(spec, dataset, extras, out=out, settings=settings, on_progress=on_progress)


def encoded(count=12):
    from d2lora.rows import PromptCompletionRow

    rows = [
        PromptCompletionRow(prompt=f"item {number}:", completion=f" yes {number}") for number in range(10, 10 + count)
    ]
    return encode_rows(rows, tiny_tokenizer(), max_length=100).examples


def loss_of(model, example):
    ids = torch.tensor([example.chosen.input_ids])
    labels = ids.masked_fill(~torch.tensor([example.chosen.completion_mask]), -100)
    return model(input_ids=ids, labels=labels, use_cache=False).loss


def by_peft(base_model, method, targets, *, rslora=False):
    """Return the model as PEFT alone initializes it: all layers at once, base weights changed where it changes them."""
    model = AutoModelForCausalLM.from_pretrained(base_model)
    gpt2 = "gpt2" in model.config.model_type
    kind = method if isinstance(method, str) else method["type"]
    options = {} if isinstance(method, str) else {key: value for key, value in method.items() if key != "type"}
    init = {"kaiming": True, "pissa": f"pissa_niter_{options['niter']}" if options and kind == "pissa" else "pissa"}
    config = LoraConfig(
        r=RANK,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=targets,
        fan_in_fan_out=gpt2,
        task_type="CAUSAL_LM",
        init_lora_weights=init.get(kind, kind),
        eva_config=EvaConfig(rho=1.0) if kind == "eva" else None,
        corda_config=CordaConfig(**options) if kind == "corda" else None,
        lora_ga_config=LoraGAConfig(**options) if kind == "lora_ga" else None,
    )
    examples = sorted(encoded(), key=lambda one: one.digest)
    torch.manual_seed(3)
    if kind == "corda":
        preprocess_corda(
            model, config, lambda: [model(input_ids=torch.tensor([one.chosen.input_ids])) for one in examples]
        )
    if kind == "lora_ga":
        # All completions have as many tokens, so the mean over rows is that over tokens.
        preprocess_loraga(model, config, lambda: [loss_of(model, one).backward() for one in examples])
    adapted = get_peft_model(model, config, low_cpu_mem_usage=kind == "eva")
    if kind == "eva":
        width = max(one.length for one in examples)
        ids = torch.tensor([one.chosen.input_ids + [0] * (width - one.length) for one in examples])
        mask = torch.tensor([one.chosen.completion_mask + [False] * (width - one.length) for one in examples])
        attention = torch.tensor([[1] * one.length + [0] * (width - one.length) for one in examples])
        batch = {"input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(~mask, -100)}
        initialize_lora_eva_weights(adapted, [batch], show_progress_bar=False)
    return adapted


def with_the_signs_of(directory, theirs, base_model):
    """Return PEFT's model with our lora_A and lora_B, and a base from which they have been taken.

    LoRA-GA pairs vectors of different singular values, so the arbitrary signs of both change what is trained.
    """
    stored = load_file(directory / "adapter_model.safetensors")
    clean = AutoModelForCausalLM.from_pretrained(base_model)
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if hasattr(module, "lora_A"):
                lora_A, lora_B = stored[f"{name}.lora_A.weight"][:RANK], stored[f"{name}.lora_B.weight"][:, :RANK]
                module.lora_A["default"].weight.copy_(lora_A)
                module.lora_B["default"].weight.copy_(lora_B)
                delta = module.scaling["default"] * lora_B @ lora_A
                weight = clean.get_submodule(name.removeprefix("base_model.model.")).weight
                module.base_layer.weight.copy_(weight - (delta.T if module.fan_in_fan_out else delta))
    return theirs


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@cases(METHODS)
def test_stock_peft_on_the_unmodified_base_gives_the_logits_of_pefts_own_initialization(
    base_model, dataset, tmp_path, method
):
    run(base_model, dataset, tmp_path / "out", method)

    base = AutoModelForCausalLM.from_pretrained(base_model)
    before = logits_of(base)
    delivered = PeftModel.from_pretrained(base, str(tmp_path / "out"), is_trainable=True)
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    theirs = by_peft(base_model, method, targets)

    torch.testing.assert_close(logits_of(delivered), logits_of(theirs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(delivered), before, rtol=1e-4, atol=1e-4)
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            ours = delivered.get_submodule(name)
            lora_A, lora_B = ours.lora_A["default"].weight[:RANK], ours.lora_B["default"].weight[:, :RANK]
            expected_A, expected_B = module.lora_A["default"].weight, module.lora_B["default"].weight
            # The sign of a singular vector is arbitrary, and rounding may choose another one.
            torch.testing.assert_close(lora_A.abs(), expected_A.abs(), rtol=1e-2, atol=1e-3)
            torch.testing.assert_close(lora_B.abs(), expected_B.abs(), rtol=1e-2, atol=1e-3)
            assert ours.scaling == module.scaling
            assert any(part.weight.abs().sum() > 0 for part in (ours.lora_A["default"], ours.lora_B["default"]))


@cases(["kaiming", "gaussian", "orthogonal", "pissa", "olora"])
def test_layer_by_layer_gives_exactly_what_peft_draws_for_the_whole_model(base_model, dataset, tmp_path, method):
    run(base_model, dataset, tmp_path / "out", method)

    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, module in by_peft(base_model, method, targets).named_modules():
        if hasattr(module, "lora_A"):
            assert torch.equal(ours[f"{name}.lora_A.weight"][:RANK], module.lora_A["default"].weight)
            assert torch.equal(ours[f"{name}.lora_B.weight"][:, :RANK], module.lora_B["default"].weight)


def train(model, base_model, steps=4):
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2, weight_decay=0.0)
    for example in encoded(steps):
        optimizer.zero_grad()
        loss_of(model, example).backward()
        optimizer.step()
    return logits_of(model)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("rslora", [False, True])
@cases(CHANGING)
def test_training_as_the_model_card_says_is_training_as_peft_does(base_model, dataset, tmp_path, method, rslora):
    run(base_model, dataset, tmp_path / "out", method, lora=LoraSpec(r=RANK, lora_alpha=6, use_rslora=rslora))
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    theirs = by_peft(base_model, method, targets, rslora=rslora)
    if method == "lora_ga":
        theirs = with_the_signs_of(tmp_path / "out", theirs, base_model)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_model), str(tmp_path / "out"), is_trainable=True
    )
    start = logits_of(model)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "learning rate" not in card.lower()
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "register_hook" in code]
    exec(snippet, {"model": model})

    trained, expected = train(model, base_model), train(theirs, base_model)

    assert (expected - start).abs().max() > 0.05
    torch.testing.assert_close(trained, expected, rtol=2e-3, atol=2e-3)
    for name, value in model.named_parameters():
        if ".lora_A." in name:
            stored = load_file(tmp_path / "out" / "adapter_model.safetensors")[name.replace(".default", "")]
            assert torch.equal(value[RANK:], stored[RANK:])
            assert not torch.equal(value[:RANK], stored[:RANK])


@cases(METHODS)
def test_an_adapter_trains_a_step_in_every_rank_that_has_a_gradient(base_model, dataset, tmp_path, method):
    run(base_model, dataset, tmp_path / "out", method)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_model), str(tmp_path / "out"), is_trainable=True
    )

    before = logits_of(model)

    assert not torch.allclose(train(model, base_model, steps=1), before)


@cases(METHODS)
def test_the_same_request_gives_the_same_files(base_model, dataset, tmp_path, method):
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(reversed(dataset.path.read_text().splitlines())) + "\n")

    results = [
        run(base_model, rows, tmp_path / out, method)
        for rows, out in ((dataset, "a"), (dataset, "b"), (DatasetFile(shuffled, Format.JSONL), "c"))
    ]

    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert len({(tmp_path / out / file).read_bytes() for out in ("a", "b", "c")}) == 1
    assert results[0].summary.fingerprint == results[1].summary.fingerprint


@pytest.mark.parametrize(
    ("method", "seen"),
    [("kaiming", 0), ("pissa", 0), ({"type": "eva", "max_rows": 5}, 5), ({"type": "corda", "max_rows": 100}, 12)],
    ids=["kaiming", "pissa", "eva", "corda"],
)
def test_a_warning_counts_the_rows_that_the_method_reads(base_model, dataset, tmp_path, method, seen):
    result = run(base_model, dataset, tmp_path / "out", method, evaluation=dataset)

    said = [warning for warning in result.summary.warnings if warning.startswith("eval_dataset_id")]
    assert [f"{seen} of 12 rows" in warning for warning in said] == ([True] if seen else [])


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [None, Phase.STATISTICS, Phase.FACTORS])
@cases(METHODS, model="make")
def test_a_shared_base_is_bit_for_bit_as_it_was_also_when_stopped(make, method, stop):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = {name: value.data_ptr() for name, value in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    state = torch.get_rng_state()

    def on_progress(phase, done, _total):
        if phase is stop and done:
            raise Stop

    spec = InitializationSpec(base_model="tiny", dataset_id="ds", lora=LoraSpec(r=RANK), method=method)
    config = lora_config(model, spec.lora, base_model="tiny", revision=None)
    targets = resolve_targets(model, config)
    settings = WorkerSettings(device="cpu")
    try:
        build_peft_adapter(as_base(model), targets, config, spec, encoded(), settings=settings, on_progress=on_progress)
    except Stop:
        assert stop is not None

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == pointers
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(value.requires_grad or value.grad is not None for value in model.parameters())
    assert not any(module.training or module._forward_hooks or module._backward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["pissa", "eva"])
def test_the_report_names_the_method_its_ranks_and_what_was_measured(base_model, dataset, tmp_path, method):
    result = run(base_model, dataset, tmp_path / "out", method, evaluation=dataset)

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    changes = method == "pissa"
    assert report["spec"]["method"]["type"] == method
    assert "combination" not in report["spec"]
    assert (report["peft"]["init_lora_weights"], report["peft"]["rank"]) == (method, RANK)
    assert report["peft"]["delivered_rank"] == config["r"] == (2 * RANK if changes else RANK)
    assert report["peft"]["frozen_ranks"] == ([RANK, 2 * RANK] if changes else None)
    assert report["peft"]["rows"] == result.summary.rows_used == (0 if changes else 12)
    assert (config["init_lora_weights"], config["rank_pattern"], config["alpha_pattern"]) == (True, {}, {})
    for layer in report["peft"]["layers"].values():
        assert layer["relative_magnitude"] < 1e-6
        assert (layer["method_magnitude"] > 0.01) == changes
    assert result.summary.evaluation.keys() == {"nll", "sft", "dpo", "orpo"}
    for value in result.summary.evaluation.values():
        assert value.adapter == pytest.approx(value.base, abs=1e-4)
    assert ("rank 8" in " ".join(result.summary.warnings)) == changes
    assert report["versions"]["peft"]


def test_without_freezing_the_first_step_moves_the_function_twice_as_far(base_model, dataset, tmp_path):
    run(base_model, dataset, tmp_path / "out", "pissa")
    moves = []
    for frozen in (True, False):
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base_model), str(tmp_path / "out"), is_trainable=True
        )
        before = logits_of(model)
        loss_of(model, encoded()[0]).backward()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.grad is not None:
                    step = 1e-4 * value.grad
                    if frozen and ".lora_A." in name:
                        step[RANK:] = 0
                    if frozen and ".lora_B." in name:
                        step[:, RANK:] = 0
                    value.sub_(step)
        moves.append(logits_of(model) - before)

    torch.testing.assert_close(moves[1], 2 * moves[0], rtol=0.05, atol=1e-3 * moves[1].abs().max().item())


def test_lora_gas_gradient_is_that_of_the_mean_loss_however_rows_are_batched():
    model = tiny_llama()
    spec = InitializationSpec(base_model="tiny", dataset_id="ds", lora=LoraSpec(r=RANK))
    config = lora_config(model, spec.lora, base_model="tiny", revision=None)
    config.lora_ga_config = LoraGAConfig()
    targets = resolve_targets(model, config)

    small, large = (
        gradients(as_base(model), targets, config, encoded(), max_tokens=tokens, on_progress=lambda *_: None)
        for tokens in (40, 4096)
    )

    oracle = tiny_llama().requires_grad_(True)
    for example in encoded():
        (loss_of(oracle, example) / len(encoded())).backward()
    for name in targets:
        for of in (small, large):
            expected = oracle.get_submodule(name).weight.grad
            assert (of.attributes[name]["_peft_loraga_grad"] - expected).norm() < 1e-5 * expected.norm()


def test_no_method_learns_from_rejected_or_undesirable_completions():
    labeled = [replace(one, desirable=number % 2 == 0) for number, one in enumerate(encoded())]
    pairs = [replace(one, rejected=encoded()[0].chosen) for one in encoded()]

    from_labels, from_pairs = (sample(rows, count=100, seed=0) for rows in (labeled, pairs))

    assert {one.digest for one in from_labels} == {one.digest for one in encoded()[::2]}
    assert len(from_pairs) == len(pairs)
    assert not any(one.rejected or one.desirable is not None for one in [*from_labels, *from_pairs])


def test_lora_ga_needs_twice_the_rank(base_model, dataset, tmp_path):
    with pytest.raises(RankTooLarge, match="2 r = 40"):
        run(base_model, dataset, tmp_path / "out", "lora_ga", lora=LoraSpec(r=20, target_modules=["up_proj", "c_fc"]))


def test_olora_on_conv1d_layers_is_refused(base_model, dataset, tmp_path):
    if "gpt2" in AutoConfig.from_pretrained(base_model).model_type:
        with pytest.raises(TargetUnsupported, match="Conv1D"):
            run(base_model, dataset, tmp_path / "out", "olora")
        assert not any((tmp_path / "out").iterdir())


def test_eva_says_when_no_batch_has_enough_completion_tokens(base_model, dataset, tmp_path):
    with pytest.raises(RankTooLarge, match="completion tokens"):
        run(base_model, dataset, tmp_path / "out", "eva", lora=LoraSpec(r=10), max_tokens_per_batch=1)


def test_eva_gives_up_where_peft_would_go_on_for_ever(base_model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("worker.peft_passes.MAX_EVA_PASSES", 1)

    with pytest.raises(NumericalFailure, match=r"tau = 1\.0"):
        run(base_model, dataset, tmp_path / "out", {"type": "eva", "tau": 1.0}, max_tokens_per_batch=40)


@cases(METHODS, model="make")
def test_a_base_in_bfloat16_gets_factors_in_float32_that_add_nothing(make, method):
    base = as_base(make().to(torch.bfloat16))
    before = {name: value.clone() for name, value in base.model.state_dict().items()}

    targets, adapter = built(base, method)

    # PEFT rounds orthogonal factors to the base's type, so their product is zero to that precision only.
    tolerance = 1e-3 if method == "orthogonal" else 1e-6
    for name, layer in adapter.factors.items():
        assert {layer.lora_A.dtype, layer.lora_B.dtype} == {torch.float32}
        assert (layer.lora_B @ layer.lora_A).norm() < tolerance * targets[name].weight.float().norm()
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2], ids=name_of)
def quantized(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    request.param(hidden=64).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return load(str(directory), revision=None, dtype="float32", device="cpu", quantization="4bit")


def built(base, method):
    spec = InitializationSpec(base_model="tiny", dataset_id="ds", lora=LoraSpec(r=RANK), method=method)
    config = lora_config(base.model, spec.lora, base_model="tiny", revision=None)
    targets = resolve_targets(base.model, config)
    settings = WorkerSettings(device="cpu")
    adapter = build_peft_adapter(base, targets, config, spec, encoded(), settings=settings, on_progress=lambda *_: None)
    return targets, adapter


# bitsandbytes 0.50 still defines functions of torch.jit when it is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("method", ["kaiming", "gaussian", "eva", "olora"])
def test_what_peft_does_on_a_quantized_base_works_here_and_leaves_it_as_it_was(quantized, method):
    before = {name: value.clone() for name, value in quantized.model.state_dict().items()}

    targets, adapter = built(quantized, method)

    for name, layer in adapter.factors.items():
        assert (layer.lora_B.shape[0], layer.lora_A.shape[1]) == layer_sizes(targets[name])
        assert torch.allclose(layer.lora_B @ layer.lora_A, torch.zeros(()), atol=1e-5)
        if method == "olora":
            weight = dequantized_weight(targets[name]).float()
            # The first r columns of Q span the first r columns of the weight.
            q_OR = layer.lora_B[:, :RANK] / layer.lora_B[:, :RANK].norm(dim=0)
            torch.testing.assert_close(q_OR @ (q_OR.T @ weight[:, :RANK]), weight[:, :RANK], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in quantized.model.state_dict().items())


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("method", ["orthogonal", "pissa", "corda", "lora_ga"])
def test_what_peft_refuses_on_a_quantized_base_is_refused(quantized, method):
    with pytest.raises(ModelUnsupported, match="floating point"):
        built(quantized, method)


def test_of_labeled_rows_a_method_sees_the_desirable_ones_alone():
    examples = as_examples(labeled_rows(9))

    seen = sample(examples, count=5, seed=0)

    desirable = [example.digest for example in examples if example.desirable]
    assert sorted(example.digest for example in seen) == sorted(desirable)
    assert all(example.desirable is None for example in seen)


def test_every_method_of_peft_has_a_test():
    tested = {method if isinstance(method, str) else method["type"] for method in METHODS}

    assert tested == set(NAMES) - {"gradient", "warmup"}  # ours and TRL's
    assert {kind.model_fields["type"].default for kind in CHANGES_BASE} == set(CHANGING)

"""Ranks of their own for layers, within the parameters of one rank for all."""

import itertools
import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from d2lora.initializations import InitializationSpec, LoraSpec
from tests.support.models import tiny_llama, tiny_tokenizer
from tests.support.reference import sft_loss, weight_gradients
from tests.unit.worker.test_initialization import run, write_rows
from tests.unit.worker.test_pipeline import build, learnable_rows
from worker import pipeline
from worker.factors import Factors
from worker.low_rank import LowRank
from worker.matrices import Shape, TestMatrices
from worker.rank_patterns import with_ranks
from worker.ranks import allocate, cut_to_ranks
from worker.sketching import Sketch

BUDGET = LoraSpec(r=2, ranks="budget")


def falling(source, count):
    return sorted((source.expovariate(1.0) for _ in range(count)), reverse=True)


def best_gain(gains, costs, budget):
    """Of all ranks within the budget, tried one by one."""
    return max(
        sum(sum(own[:rank]) for own, rank in zip(gains.values(), ranks, strict=True))
        for ranks in itertools.product(*(range(1, len(own) + 1) for own in gains.values()))
        if sum(rank * cost for rank, cost in zip(ranks, costs.values(), strict=True)) <= budget
    )


@given(seed=st.integers(0, 9999), equal=st.booleans())
def test_no_ranks_within_the_budget_gain_more_than_the_stated_bound_on_top(seed, equal):
    source = random.Random(seed)
    rank = source.randint(1, 3)
    gains = {name: falling(source, 2 * rank) for name in "abc"}
    costs = {name: 7 if equal else source.randint(2, 30) for name in gains}

    spent = allocate(gains, costs, rank)

    best = best_gain(gains, costs, rank * sum(costs.values()))
    assert spent.parameters == sum(own * costs[name] for name, own in spent.ranks.items()) <= spent.budget
    assert all(1 <= own <= 2 * rank for own in spent.ranks.values())
    assert spent.uniform_gain - 1e-9 <= spent.gain <= best + 1e-9
    assert best <= spent.gain + spent.at_most_missed + 1e-9
    if equal:
        assert spent.gain == pytest.approx(best)


def test_what_is_below_the_noise_gains_nothing():
    spent = allocate({"signal": [9.0, 4.0, 3.0, 2.0], "noise": [1.0, -0.5, -0.6, -0.7]}, {"signal": 5, "noise": 5}, 2)

    assert spent.ranks == {"signal": 3, "noise": 1}
    assert spent.gain == 17.0


def test_ranks_are_chosen_by_what_is_left_of_the_squared_values_without_the_noise():
    def layer(values, noise):
        eye = torch.eye(5)[:4]
        return LowRank(eye.T, torch.tensor(values), eye, energy=99.0, missed=3.0, noise=noise)

    direction = {"exact": layer([3.0, 2.0, 1.9, 1.0], 0.0), "noisy": layer([3.0, 2.5, 2.4, 1.0], 4.0)}

    cut, spent = cut_to_ranks(direction, BUDGET)

    assert spent.ranks == {"exact": 3, "noisy": 1}
    assert {name: len(own.values) for name, own in cut.items()} == spent.ranks
    assert spent.gain == pytest.approx(9 + 4 + 1.9**2 + 9 - 4)


def test_the_ranks_are_those_of_the_dense_gradients_singular_values(tmp_path):
    model, rows = tiny_llama(), learnable_rows(8, paired=False)

    built = build(rows, tmp_path, model=model, statistics="exact", lora=BUDGET, direction="gradient")

    gradients = weight_gradients(model, built.direction, lambda twin: sft_loss(twin, rows))
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    squares = {name: (torch.linalg.svdvals(own / norm)[:4] ** 2).tolist() for name, own in gradients.items()}
    expected = allocate(squares, {name: sum(own.shape) for name, own in gradients.items()}, 2)
    assert len(set(expected.ranks.values())) > 1
    assert built.allocation.ranks == expected.ranks
    assert built.allocation.gain == pytest.approx(expected.gain, rel=1e-4)
    assert built.eta > 0
    for name, factors in built.factors.items():
        left, values, right = torch.linalg.svd(gradients[name] / norm)
        rank = expected.ranks[name]
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        update = BUDGET.scaling * factors.lora_B @ factors.lora_A
        assert (update.double() / -built.eta - best).norm() < 1e-4 * values[0], name


def test_every_fold_is_scored_at_ranks_that_the_others_chose(tmp_path, monkeypatch):
    noted = []

    def note(*arguments):
        noted.append(leave_one_out(*arguments))
        return noted[-1]

    leave_one_out = pipeline.leave_one_out_directions
    monkeypatch.setattr(pipeline, "leave_one_out_directions", note)

    built = build(learnable_rows(12, paired=False), tmp_path, lora=BUDGET)

    (own,) = noted
    ranks = [{name: len(layer.values) for name, layer in direction.items()} for direction in own]
    assert len(ranks) == built.folds
    assert any(one != built.allocation.ranks for one in ranks)
    for direction in own:
        assert sum(layer.left.numel() + layer.right.numel() for layer in direction.values()) <= built.allocation.budget


def test_the_noise_of_a_sketch_is_known_without_bias():
    """A matrix of rank 1 on a flat tail: fitted squared values are too large by the noise, in the mean."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.linalg.qr(torch.randn(*size, generator=generator))[0]
    shape = Shape(96, 64, 8)
    matrix = 0.3 * draw(96, 64) + 6 * draw(96, 1) @ draw(64, 1).T
    inputs, output_grads = torch.eye(64)[None], matrix.T[None]
    with_noise, without = [], []
    for seed in range(60):
        sketch = Sketch.empty(shape, 1, TestMatrices(seed, torch.device("cpu")))
        sketch.add(inputs, output_grads, torch.ones(1, 1), paired=False)
        found = sketch.factorize(torch.ones(1, dtype=torch.float64), 2)
        true = (found.left.T @ matrix @ found.right.T).diagonal() ** 2  # what these directions really hold
        with_noise.append((found.values**2 - true)[1].item())
        without.append((found.values**2 - found.noise - true)[1].item())
    assert abs(sum(without)) < 0.5 * abs(sum(with_noise))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["calibrated", "zero"])
def test_stock_peft_loads_every_layer_at_its_own_rank_and_one_scaling(tmp_path, start, rslora):
    model = str(tmp_path / "model")
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    lora = LoraSpec(r=2, lora_alpha=6, use_rslora=rslora, ranks="budget")

    result = run(model, write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "out", lora=lora, start=start)

    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "out"))
    ranks = set()
    for name, layer in report["layers"].items():
        module = loaded.get_submodule(f"base_model.model.{name}")
        lora_A, lora_B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(module.get_delta_weight("default"), lora.scaling * lora_B @ lora_A)
        assert module.r["default"] == len(lora_A) == len(layer["singular_values"])
        assert module.scaling["default"] == pytest.approx(lora.scaling)
        ranks.add(len(lora_A))
    assert len(ranks) > 1
    said = report["ranks"]
    assert (said["smallest"], said["largest"]) == (min(ranks), max(ranks))
    assert said["parameters"] == sum(tensor.numel() for tensor in tensors.values()) <= said["budget"]
    assert said["uniform_energy_kept"] <= said["energy_kept"] <= 1
    assert f"ranks of {min(ranks)} to {max(ranks)}" in (tmp_path / "out" / "README.md").read_text()
    assert result.summary.start == start
    assert f"up to {max(ranks)}" in result.summary.warnings[-1]


def test_a_layer_whose_name_ends_anothers_keeps_its_own_rank():
    """PEFT looks names up by their ends, and `h.1.fc` ends `twin.h.1.fc`."""
    block = lambda: nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(6, 5)}) for _ in range(12)])})
    model = nn.ModuleDict({**block(), "twin": block()})
    config = LoraConfig(r=2, target_modules=["fc"])
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    factors = {
        name: Factors(torch.zeros(rank, 6), torch.zeros(5, rank))
        for name, rank in zip(names, itertools.cycle([1, 3, 2, 4, 2]), strict=False)
    }

    loaded = get_peft_model(model, with_ranks(config, LoraSpec(r=2), factors))

    for name, own in factors.items():
        assert loaded.get_submodule(f"base_model.model.{name}").r["default"] == len(own.lora_A), name


@pytest.mark.parametrize(
    "other",
    [
        {"rounds": 2},
        {"second_pass_above": 0.5},
        {"whitening": {}},
        {"retain_dataset_id": "ds_general"},
        {"method": "lora_ga"},
        {"method": {"type": "warmup", "warmup_dataset_id": "ds_general", "from": "gradient"}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_ranks_beside_what_they_are_not_offered_with_are_refused_by_name(other):
    with pytest.raises(ValidationError, match=r"lora\.ranks: "):
        InitializationSpec(base_model="tiny", dataset_id="ds", lora=BUDGET, **other)


def test_ranks_are_part_of_the_fingerprint(tmp_path):
    model = str(tmp_path / "model")
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows = write_rows(tmp_path / "rows.jsonl", 6)

    one, other = (
        run(model, rows, tmp_path / str(ranks), lora=LoraSpec(r=2, ranks=ranks), start="zero").summary.fingerprint
        for ranks in (None, "budget")
    )

    assert one != other

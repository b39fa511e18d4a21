"""Steps of one length along all of a layer's directions (docs/method.md, eq. 4a)."""

import pytest
import torch

from d2lora.initializations import InitializationSpec, LoraSpec
from tests.support.models import tiny_gpt2, tiny_llama
from tests.support.reference import ReferenceRow, dpo_loss, orpo_loss, sft_loss, weight_gradients
from tests.unit.worker.test_pipeline import build, learnable_rows, updates
from tests.unit.worker.test_ranks import BUDGET
from worker import pipeline
from worker.low_rank import LowRank


def dense_steps(gradients, squares, rank):
    """Of norm 1 together."""
    steps = {}
    for name, gradient in gradients.items():
        left, _, right = torch.linalg.svd(gradient)
        steps[name] = squares[name] ** -0.5 * left[:, :rank] @ right[:rank]
    norm = sum(step.square().sum() for step in steps.values()).sqrt()
    return {name: step / norm for name, step in steps.items()}


def by_rows(model, layers, rows, row_loss):
    """The gradient of the sum of the rows' losses, and the sum of the squared norms of each one's own, by autograd."""
    gradients, squares = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    for row in rows:
        for name, own in weight_gradients(model, layers, lambda twin, row=row: row_loss(twin, row)).items():
            gradients[name] = gradients[name] + own
            squares[name] = squares[name] + own.square().sum()
    return gradients, squares


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_step_is_the_dense_gradients_polar_factor_over_the_rows_own_norms(tmp_path, make):
    model, rows = make(), learnable_rows(8, paired=False)

    built = build(rows, tmp_path, model=model, statistics="exact")

    tokens = sum(len(row.chosen) for row in rows)
    gradients, squares = by_rows(
        model, built.direction, rows, lambda twin, row: sft_loss(twin, [row]) * len(row.chosen) / tokens
    )
    assert built.eta > 0
    expected = dense_steps(gradients, squares, 4)
    for name, update in updates(built).items():
        assert (update.double() / -built.eta - expected[name]).norm() < 1e-3 * expected[name].norm(), name


def test_the_rows_own_norms_are_those_of_the_objectives_together(tmp_path):
    model, rows = tiny_llama(), learnable_rows(8)

    built = build(rows, tmp_path, model=model, statistics="exact")

    tokens, reference = sum(len(row.chosen) for row in rows), tiny_llama().double()
    sft, dpo, orpo = (weight / norm for weight, norm in zip(built.mixture.weights, built.mixture.norms, strict=True))

    def row_loss(twin, row):
        likelihood = sft_loss(twin, [row]) * len(row.chosen) / tokens
        preference = dpo_loss(twin, reference, [row], beta=0.1) / len(rows)
        odds = (orpo_loss(twin, [row], beta=0.1) - sft_loss(twin, [row])) / len(rows)
        return sft * likelihood + dpo * preference + orpo * (likelihood + odds)

    gradients, squares = by_rows(model, built.direction, rows, row_loss)
    assert built.eta > 0
    expected = dense_steps(gradients, squares, 4)
    for name, update in updates(built).items():
        assert (update.double() / -built.eta - expected[name]).norm() < 1e-3 * expected[name].norm(), name


def test_the_sketched_step_has_one_length_and_goes_down(tmp_path):
    model, rows = tiny_llama(), learnable_rows(24, paired=False)

    built = build(rows, tmp_path, model=model)

    gradients = weight_gradients(model, built.direction, lambda twin: sft_loss(twin, rows))
    for name, update in updates(built).items():
        values = torch.linalg.svdvals(update.double())[:4]
        assert values.max() < 1.0001 * values.min(), name
        assert (update.double() * gradients[name]).sum() < 0, name


def test_the_gradients_own_step_on_request(tmp_path):
    built = build(learnable_rows(24, paired=False), tmp_path, direction="gradient")

    assert built.eta > 0
    for name, layer in built.direction.items():
        expected = -built.eta * (layer.left * layer.values) @ layer.right
        torch.testing.assert_close(updates(built)[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("direction", ["gradient", "orthogonalized"])
def test_held_out_rows_are_scored_under_steps_of_the_same_kind(tmp_path, direction, monkeypatch):
    """So the delivered eta, in units of the step, is as large as the folds'."""
    seen = []

    def watched(asked, mixture, directions, **options):
        seen.extend(directions)
        return calibrate(asked, mixture, directions, **options)

    calibrate = pipeline.calibrate
    monkeypatch.setattr(pipeline, "calibrate", watched)

    built = build(learnable_rows(24, paired=False), tmp_path, direction=direction)

    assert len(seen) == 4
    for one in seen:
        for layer in one.values():
            assert (layer.lengths is None) == (direction == "gradient")
        lengths = [sum(layer.step_energy for layer in of.values()) ** 0.5 for of in (one, built.direction)]
        assert lengths[0] == pytest.approx(lengths[1], rel=1e-6 if direction == "orthogonalized" else 0.05)


def test_directions_that_are_rounding_get_no_step():
    left, right = torch.eye(6)[:, :3], torch.eye(5)[:3]
    layer = LowRank(left, torch.tensor([2.0, 0.5, 1e-7]), right, energy=4.25, missed=0.0)

    assert layer.orthogonalized(0.25).step.tolist() == [0.25, 0.25, 0.0]
    assert layer.orthogonalized(0.25).descent == pytest.approx(0.25 * 2.5)


def test_a_layer_without_gradient_gets_no_step():
    layer = LowRank(torch.eye(3)[:, :2], torch.zeros(2), torch.eye(4)[:2], energy=0.0, missed=0.0)

    assert layer.orthogonalized(0.25).step.tolist() == [0.0, 0.0]
    assert layer.orthogonalized(0.25).taken(0.5).energy == 0.0


def test_a_layer_whose_gradient_is_rounding_gets_no_step(tmp_path):
    """Where the first of two tokens predicts the second, attention has one key and nothing to learn from queries."""
    built = build([ReferenceRow([4 + n], [40 + n % 3], None) for n in range(24)], tmp_path)

    assert built.eta > 0
    sizes = {name: layer.step_energy**0.5 for name, layer in built.direction.items()}
    assert {name.rsplit(".", 1)[-1] for name, size in sizes.items() if size == 0} == {"q_proj", "k_proj"}
    assert max(sizes.values()) < 100 * min(size for size in sizes.values() if size)


def test_a_taken_step_keeps_its_relative_errors():
    layer = LowRank(torch.eye(3)[:, :2], torch.tensor([2.0, 1.0]), torch.eye(4)[:2], energy=10.0, missed=1.0)

    step = layer.orthogonalized(0.25).taken(0.5)

    assert step.values.tolist() == [0.125, 0.125]
    assert step.energy / step.kept == pytest.approx(10.0 / 5.0)
    assert step.missed / step.energy == pytest.approx(0.1)


def test_a_cut_keeps_what_belongs_to_its_directions():
    layer = LowRank(
        torch.eye(3),
        torch.tensor([3.0, 2.0, 1.0]),
        torch.eye(4)[:3],
        energy=14.0,
        missed=0.5,
        rows=4.0,
        along=torch.tensor([5.0, 6.0, 7.0]),
    )

    cut = layer.cut(2)

    assert cut.along.tolist() == [5.0, 6.0]
    assert (cut.energy, cut.missed, cut.rows) == (14.0, 0.5, 4.0)
    assert layer.orthogonalized(0.25).cut(2).step.tolist() == [0.25, 0.25]


def test_ranks_are_chosen_by_the_gradients_values_and_all_directions_step_alike(tmp_path):
    rows = learnable_rows(8, paired=False)
    plain, built = (
        build(rows, tmp_path / kind, statistics="exact", lora=BUDGET, direction=kind)
        for kind in ("gradient", "orthogonalized")
    )

    assert built.allocation == plain.allocation
    assert len(set(built.allocation.ranks.values())) > 1
    assert built.eta > 0
    for name, layer in built.direction.items():
        assert len(layer.step) == built.allocation.ranks[name]
        assert layer.step.max() == layer.step.min() > 0


def test_a_whitened_step_has_one_length_too(tmp_path):
    built = build(learnable_rows(24, paired=False), tmp_path, whitening={}, start="calibrated")

    assert built.eta > 0
    for name, update in updates(built).items():
        values = torch.linalg.svdvals(update.double())[:4]
        assert values.max() < 1.0001 * values.min(), name
        assert built.direction[name].descent > 0, name


def test_orthogonalized_is_the_default_but_beside_retain_rows_and_other_methods_do_not_take_it():
    request = {"base_model": "tiny", "dataset_id": "ds", "lora": LoraSpec(r=4)}
    retaining = {**request, "retain_dataset_id": "general"}

    assert InitializationSpec(**request).direction == "orthogonalized"
    assert InitializationSpec(**request, direction="gradient").direction == "gradient"
    assert InitializationSpec(**retaining).direction == "gradient"
    with pytest.raises(ValueError, match="direction: an orthogonalized step cannot be restrained"):
        InitializationSpec(**retaining, direction="orthogonalized")
    with pytest.raises(ValueError, match="direction: not used by method pissa"):
        InitializationSpec(**request, direction="gradient", method="pissa")
    warmup = {"type": "warmup", "warmup_dataset_id": "general", "from": "gradient"}
    assert InitializationSpec(**request, direction="gradient", method=warmup).direction == "gradient"

import dataclasses
import random

import pytest
import torch

from d2lora.errors import NumericalFailure
from d2lora.initializations import Fixed, InitializationSpec, LoraSpec, Sft
from d2lora.settings import WorkerSettings
from tests.support.models import as_base, tiny_llama
from tests.support.reference import ReferenceRow, sft_loss, weight_gradients
from tests.unit.worker.conftest import all_dpo_losses, as_examples, labeled_rows, reference_rows
from worker import calibration
from worker.factors import calibrated_step
from worker.gathering import deal_batches
from worker.pipeline import build_adapter
from worker.targets import lora_config, resolve_targets

SCALING = LoraSpec(r=4).scaling


def spec_for(**changes):
    return InitializationSpec(**{"base_model": "tiny", "dataset_id": "ds", "lora": LoraSpec(r=4), **changes})


def build(rows, tmp_path, *, model=None, settings=None, **changes):
    model = model or tiny_llama()
    spec = spec_for(**changes)
    targets = resolve_targets(model, lora_config(model, spec.lora, base_model="tiny", revision=None))
    tmp_path.mkdir(exist_ok=True)
    return build_adapter(
        as_base(model),
        targets,
        spec,
        as_examples(rows),
        settings=settings or WorkerSettings(),
        directory=tmp_path,
        on_progress=lambda *_: None,
    )


def updates(built, *, eta=None):
    """s B A of every layer, at the delivered step or at a fixed one."""
    factors = built.factors if eta is None else calibrated_step(built.direction, eta=eta, scaling=SCALING)
    return {name: SCALING * layer.lora_B @ layer.lora_A for name, layer in factors.items()}


def learnable_rows(count, *, paired=True, seed=0):
    """Chosen completions come from few tokens and rejected ones from others: something to learn, and to hold out."""
    source = random.Random(seed)
    rows = reference_rows(count, paired=paired, seed=seed)
    pick = lambda low: [source.randrange(low, low + 5) for _ in range(6)]
    return [dataclasses.replace(row, chosen=pick(10), rejected=pick(60) if paired else None) for row in rows]


def test_the_exact_direction_is_the_dense_svd_of_the_normalized_gradient(tmp_path):
    model, rows = tiny_llama(), learnable_rows(8, paired=False)

    built = build(rows, tmp_path, model=model, statistics="exact", start="zero")

    gradients = weight_gradients(model, built.direction, lambda twin: sft_loss(twin, rows))
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    assert built.mixture.norms.item() == pytest.approx(norm.item(), rel=1e-5)
    for name, layer in built.direction.items():
        left, values, right = torch.linalg.svd(gradients[name] / norm)
        best = (left[:, :4] * values[:4]) @ right[:4]
        ours = (layer.left * layer.values) @ layer.right
        assert (ours.double() - best).norm() < 1e-4 * values[0], name


@pytest.mark.parametrize("paired", [True, False])
def test_a_step_of_the_pilot_is_judged_on_all_rows(tmp_path, monkeypatch, paired):
    rows = learnable_rows(48, paired=paired)
    model = tiny_llama().double()  # the same rows run in other batches, and float32 would round otherwise there
    found = build(rows, tmp_path / "pilot", model=model).calibration
    monkeypatch.setattr(calibration, "PILOT_ROWS", 48)

    whole = build(rows, tmp_path / "whole", model=model).calibration

    assert whole.pilot == []
    assert len(found.trials) == 1
    assert found.accepted.eta in [one.eta for one in found.pilot]
    same = [one for one in whole.trials if one.eta == found.pilot[0].eta]
    assert same[0].combined.mean != pytest.approx(found.pilot[0].combined.mean, rel=1e-6)
    by_eta = {one.eta: one for one in whole.trials}
    if found.accepted.eta in by_eta:
        assert found.accepted.combined.mean == pytest.approx(by_eta[found.accepted.eta].combined.mean, rel=1e-9)
        assert found.accepted.combined.error == pytest.approx(by_eta[found.accepted.eta].combined.error, rel=1e-9)
    assert found.accepted.combined.mean == pytest.approx(whole.accepted.combined.mean, rel=0.05)


def test_the_step_goes_down_the_gradient(tmp_path):
    model, rows = tiny_llama(), learnable_rows(8, paired=False)

    built = build(rows, tmp_path, model=model, statistics="exact")

    gradients = weight_gradients(model, built.direction, lambda twin: sft_loss(twin, rows))
    assert built.eta > 0
    for name, update in updates(built).items():
        assert (update.double() * gradients[name]).sum() < 0, name


def test_a_learnable_task_gets_a_calibrated_start_that_lowers_every_held_out_objective(tmp_path):
    built = build(learnable_rows(24), tmp_path)

    assert built.eta > 0
    assert [objective.type for objective in built.objectives] == ["sft", "dpo", "orpo"]
    for name, measured in built.held_out.items():
        assert measured.adapter < measured.base, name


@pytest.mark.parametrize("objective", all_dpo_losses(beta=0.1), ids=lambda objective: objective.loss_type)
def test_every_dpo_loss_of_a_learnable_preference_falls_on_held_out_rows(tmp_path, objective):
    built = build(learnable_rows(24), tmp_path, objectives=[objective])

    assert built.eta > 0
    assert built.held_out["dpo"].adapter < built.held_out["dpo"].base
    assert built.noise_scales[0] is not None


def test_rows_of_pure_noise_get_the_zero_start(tmp_path):
    source = random.Random(1)
    rows = reference_rows(16, paired=True, seed=1)
    # Which of the two completions is chosen is a coin toss, so nothing about the preference holds out.
    rows = [dataclasses.replace(row, rejected=[source.randrange(3, 97) for _ in row.chosen]) for row in rows]

    built = build(rows, tmp_path, objectives=[{"type": "dpo"}])

    assert built.eta == 0.0
    assert "standard error" in built.reason
    assert all(not layer.lora_B.any() for layer in built.factors.values())
    assert all(measured.base == measured.adapter for measured in built.held_out.values())


def test_the_zero_start_leaves_the_model_as_it_is_and_points_the_right_way(tmp_path):
    built = build(learnable_rows(8), tmp_path, start="zero")

    for layer in built.factors.values():
        assert not layer.lora_B.any()
        norms = layer.lora_A.norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, 3**-0.5))


def test_the_same_request_gives_the_same_adapter_bit_for_bit(tmp_path):
    rows = learnable_rows(12)

    first, second = (build(rows, tmp_path / name).factors for name in ("a", "b"))

    for name, layer in first.items():
        assert torch.equal(layer.lora_A, second[name].lora_A)
        assert torch.equal(layer.lora_B, second[name].lora_B)


def test_another_seed_gives_another_sketch(tmp_path):
    rows = learnable_rows(12)

    first, second = (build(rows, tmp_path / str(seed), seed=seed).factors for seed in (0, 1))

    assert any(not torch.equal(layer.lora_A, second[name].lora_A) for name, layer in first.items())


def test_the_order_of_rows_changes_nothing(tmp_path):
    rows = learnable_rows(12)

    first = updates(build(rows, tmp_path / "a"), eta=0.1)
    second = updates(build(random.Random(3).sample(rows, 12), tmp_path / "b"), eta=0.1)

    assert all(torch.equal(update, second[name]) for name, update in first.items())


def test_the_cut_into_batches_changes_nothing_beyond_float_addition(tmp_path):
    rows = learnable_rows(12)

    first = updates(build(rows, tmp_path / "a", start="zero"), eta=0.1)
    second = updates(build(rows, tmp_path / "b", start="zero", max_tokens_per_batch=1), eta=0.1)

    for name, update in first.items():
        assert (update - second[name]).norm() < 1e-3 * update.norm(), name


def test_activation_checkpointing_changes_nothing_beyond_float_addition(tmp_path):
    rows = learnable_rows(12)

    first = updates(build(rows, tmp_path / "a", start="zero"), eta=0.1)
    settings = WorkerSettings(activation_checkpointing=True)
    second = updates(build(rows, tmp_path / "b", start="zero", settings=settings), eta=0.1)

    for name, update in first.items():
        assert (update - second[name]).norm() < 1e-3 * update.norm(), name


def test_sketches_agree_with_the_exact_mode_on_the_mixture(tmp_path):
    rows = learnable_rows(16)

    sketched, exact = (
        build(rows, tmp_path / kind, statistics=kind, start="zero").mixture for kind in ("sketch", "exact")
    )

    torch.testing.assert_close(sketched.norms, exact.norms, rtol=0.1, atol=0)
    torch.testing.assert_close(sketched.cosines, exact.cosines, rtol=0, atol=0.1)


def test_fixed_weights_of_one_objective_give_that_objectives_direction(tmp_path):
    rows = learnable_rows(10)
    both = {"objectives": [{"type": "sft"}, {"type": "dpo"}], "combination": Fixed(weights=[1, 0])}

    alone = updates(build(rows, tmp_path / "a", statistics="exact", start="zero", objectives=[Sft()]), eta=0.1)
    mixed = updates(build(rows, tmp_path / "b", statistics="exact", start="zero", **both), eta=0.1)

    for name, update in alone.items():
        assert (update - mixed[name]).norm() < 1e-4 * update.norm(), name


def test_a_single_row_leaves_nothing_to_hold_out(tmp_path):
    built = build(learnable_rows(1) * 3, tmp_path)

    assert built.folds == 1
    assert built.eta == 0.0
    assert "nothing to hold out" in built.reason


def test_rows_without_rejected_take_part_in_sft_alone(tmp_path):
    built = build(learnable_rows(8, paired=False), tmp_path)

    assert [objective.type for objective in built.objectives] == ["sft"]
    assert built.mixture.weights.tolist() == [1.0]


def labels_of(rows):
    """Every pair as a desirable and an undesirable row."""
    both = [(row, row.chosen, True) for row in rows] + [(row, row.rejected, False) for row in rows]
    return [ReferenceRow(row.prompt, completion, desirable=label) for row, completion, label in both]


def test_sft_alone_on_preferences_runs_no_rejected_sequence_and_gives_the_adapter_of_the_chosen_ones(tmp_path):
    model, rows = tiny_llama(), learnable_rows(12, paired=True)
    chosen = [dataclasses.replace(row, rejected=None) for row in rows]

    pairs = build(rows, tmp_path / "pairs", model=model, objectives=[Sft()], start="zero")
    alone = build(chosen, tmp_path / "alone", model=model, objectives=[Sft()], start="zero")

    dealt = deal_batches(as_base(model), spec_for(objectives=[Sft()]), as_examples(rows), settings=WorkerSettings())
    assert sum(len(batch.input_ids) for batch in dealt) == len(rows)
    assert not any(batch.paired for batch in dealt)
    for name, update in updates(pairs, eta=1.0).items():
        torch.testing.assert_close(update, updates(alone, eta=1.0)[name], rtol=1e-3, atol=1e-5)


def test_rows_that_differ_only_in_what_sft_does_not_see_share_a_fold():
    rows = [dataclasses.replace(row, prompt=[5], chosen=[6, 7]) for row in reference_rows(4, paired=True)]
    others = reference_rows(4, paired=True, seed=1)

    dealt = deal_batches(
        as_base(tiny_llama()), spec_for(objectives=[Sft()]), as_examples(rows + others), settings=WorkerSettings()
    )

    assert len({batch.fold for batch in dealt if {0, 1, 2, 3} & set(batch.rows)}) == 1


def test_labeled_rows_get_a_start_that_lowers_kto_and_the_likelihood_loss_of_desirable_rows(tmp_path):
    built = build(labels_of(learnable_rows(16)), tmp_path)

    assert [objective.type for objective in built.objectives] == ["sft", "kto"]
    assert built.eta > 0
    for name, measured in built.held_out.items():
        assert measured.adapter < measured.base, name
    assert {name: measured.rows for name, measured in built.held_out.items()} == {"nll": 16, "sft": 16, "kto": 32}
    assert built.noise_scales[1] is not None


def test_every_fold_has_rows_of_both_labels_or_there_is_one_fold(tmp_path):
    rows = labels_of(learnable_rows(24))
    rare = [row for row in rows if not row.desirable] + [row for row in rows if row.desirable][:2]
    single = [row for row in rows if not row.desirable] + [row for row in rows if row.desirable][:1]

    assert build(rare, tmp_path / "a").folds == 2
    assert build(single, tmp_path / "b").folds == 1


def test_labels_that_are_a_coin_toss_get_the_zero_start(tmp_path):
    rows = [dataclasses.replace(row, desirable=index % 2 == 0) for index, row in enumerate(labeled_rows(16, seed=1))]

    built = build(rows, tmp_path, objectives=[{"type": "kto"}])

    assert built.eta == 0.0


def test_the_noise_scale_tells_repeated_rows_from_random_ones(tmp_path):
    same = learnable_rows(2, paired=False) * 8
    different = reference_rows(16, paired=False, seed=5)

    quiet, loud = (
        build(rows, tmp_path / name, start="zero", statistics="exact").noise_scales[0]
        for name, rows in (("a", same), ("b", different))
    )

    assert quiet is not None
    assert loud is None or loud > 2 * quiet


def test_preferences_that_cancel_fail_with_the_objectives_name(tmp_path):
    row = learnable_rows(1)[0]
    swapped = dataclasses.replace(row, chosen=row.rejected, rejected=row.chosen)

    with pytest.raises(NumericalFailure, match="dpo"):
        build([row, swapped], tmp_path, objectives=[{"type": "dpo"}], statistics="exact")

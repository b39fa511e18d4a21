"""Several datasets, one adapter."""

import dataclasses
import random

import pytest
import torch

import worker.joint
from d2lora.errors import ObjectiveUnavailable
from d2lora.initializations import Fixed, InitializationSpec, LoraSpec, Phase
from d2lora.settings import WorkerSettings
from tests.support.models import as_base, tiny_gpt2, tiny_llama
from tests.support.reference import dpo_loss, kto_loss, orpo_loss, sft_loss, weight_gradients
from tests.unit.worker.conftest import as_examples, reference_rows
from tests.unit.worker.test_pipeline import build, labels_of, learnable_rows
from worker.batches import distinct_rows
from worker.directions import coefficients_of, combined_direction, statistics_of
from worker.factors import inner_products
from worker.gathering import FOLDS
from worker.joint import build_jointly, deal_folds
from worker.targets import lora_config, resolve_targets

SFT, DPO, ORPO, KTO = ({"type": kind} for kind in ("sft", "dpo", "orpo", "kto"))


def spec_of(asked, **changes):
    datasets = [{"dataset_id": f"ds_{number}", "objectives": one} for number, one in enumerate(asked)]
    return InitializationSpec.model_validate(
        {"base_model": "tiny", "datasets": datasets, "lora": LoraSpec(r=4), **changes}
    )


def together(datasets, asked, directory, *, model=None, on_progress=lambda *_: None, **changes):
    """What comes of several datasets' rows; ``asked`` are their objectives."""
    model, spec = model or tiny_llama(), spec_of(asked, **changes)
    directory.mkdir(exist_ok=True)
    return build_jointly(
        as_base(model),
        resolve_targets(model, lora_config(model, spec.lora, base_model="tiny", revision=None)),
        spec,
        [as_examples(rows) for rows in datasets],
        settings=WorkerSettings(),
        directory=directory,
        on_progress=on_progress,
    )


def jointly(*arguments, **changes):
    """The one adapter for several datasets."""
    (built,) = together(*arguments, **changes).adapters
    return built


def dense(layer):
    return (layer.left * layer.values).double() @ layer.right.double()


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def min_norm(cosines):
    """The min-norm point of a hull, by many exact line searches towards its best corner (Frank-Wolfe)."""
    weights = torch.full_like(cosines[0], 1 / len(cosines))
    for _ in range(20_000):
        corner = torch.nn.functional.one_hot((cosines @ weights).argmin(), len(cosines)).double()
        step = corner - weights
        curvature = step @ cosines @ step
        if curvature > 0:
            weights = weights + (-(weights @ cosines @ step) / curvature).clamp(0, 1) * step
    return weights


def gradients_of(model, names, tasks):
    """Autograd's gradients in float64: ``tasks`` has for every objective its loss and its rows."""
    return [weight_gradients(model, names, lambda twin, loss=loss, rows=rows: loss(twin, rows)) for loss, rows in tasks]


def tasks_on(model, plain, pairs):
    """Losses of SFT on one dataset, and of DPO and ORPO on another."""
    return [
        (sft_loss, plain),
        (lambda twin, rows: dpo_loss(twin, model.double(), rows, beta=0.1), pairs),
        (lambda twin, rows: orpo_loss(twin, rows, beta=0.1), pairs),
    ]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_gradients_weights_and_direction_are_those_of_float64_autograd_on_each_datasets_own_rows(tmp_path, make):
    plain, pairs = reference_rows(7, paired=False, seed=3), learnable_rows(10)
    built = jointly([plain, pairs], [[SFT], [DPO, ORPO]], tmp_path, model=make(), statistics="exact", start="zero")

    gradients = gradients_of(make(), built.direction, tasks_on(make(), plain, pairs))
    norms = torch.stack([flat(one).norm() for one in gradients])
    units = torch.stack([flat(one) / norm for one, norm in zip(gradients, norms, strict=True)])
    cosines = units @ units.T
    torch.testing.assert_close(built.mixture.norms, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(built.mixture.cosines, cosines, rtol=0, atol=1e-5)
    weights = min_norm(cosines)
    torch.testing.assert_close(built.mixture.weights, weights, rtol=0, atol=1e-3)
    assert built.names == ["datasets[0].sft", "datasets[1].dpo", "datasets[1].orpo"]
    for name, layer in built.direction.items():
        mixed = sum(
            weight * one[name] / norm for weight, one, norm in zip(built.mixture.weights, gradients, norms, strict=True)
        )
        left, values, right = torch.linalg.svd(mixed)
        assert (dense(layer) - (left[:, :4] * values[:4]) @ right[:4]).norm() < 1e-4 * values[0], name
        own = torch.tensor([[(one[name] * other[name]).sum() for other in gradients] for one in gradients])
        torch.testing.assert_close(built.layer_gramians[name], own, rtol=1e-4, atol=1e-4 * own.max().item())


def passes_of(monkeypatch, *arguments, **changes):
    """What the passes over the datasets leave behind, and the request."""
    seen = []
    real = worker.joint.adapter_from
    monkeypatch.setattr(worker.joint, "adapter_from", lambda *all_, **more: seen.append(all_) or real(*all_, **more))
    jointly(*arguments, **changes)
    return seen[0]


def test_without_a_fold_each_dataset_keeps_the_normalizers_of_its_own_other_rows(tmp_path, monkeypatch):
    plain, pairs = reference_rows(9, paired=False, seed=3), learnable_rows(6)
    exact = {"statistics": "exact", "start": "zero", "combination": Fixed(weights=[1, 3])}

    passes, spec = passes_of(monkeypatch, [plain, pairs], [[SFT], [DPO]], tmp_path, **exact)
    products = inner_products(statistics_of(passes), coefficients_of(passes).shape[1])
    mixture, direction = combined_direction(passes, products, spec, leave_out=2)

    others = [
        [row for row, fold in zip(rows, own, strict=True) if fold != 2]
        for rows, own in zip([plain, pairs], dealt(plain, pairs), strict=True)
    ]
    assert all(0 < len(kept) < len(rows) for kept, rows in zip(others, [plain, pairs], strict=True))
    gradients = gradients_of(tiny_llama(), direction, tasks_on(tiny_llama(), *others)[:2])
    norms = [flat(one).norm() for one in gradients]
    torch.testing.assert_close(mixture.norms, torch.stack(norms), rtol=1e-5, atol=0)
    for name, layer in direction.items():
        mixed = 0.25 * gradients[0][name] / norms[0] + 0.75 * gradients[1][name] / norms[1]
        left, values, right = torch.linalg.svd(mixed)
        assert (dense(layer) - (left[:, :4] * values[:4]) @ right[:4]).norm() < 1e-4 * values[0], name


def test_sketches_agree_with_exact_gradients_across_datasets(tmp_path):
    datasets, asked = [learnable_rows(16, paired=False), learnable_rows(16, seed=1)], [[SFT], [SFT, DPO]]

    sketched, exact = (
        jointly(datasets, asked, tmp_path / kind, statistics=kind, start="zero").mixture for kind in ("sketch", "exact")
    )

    torch.testing.assert_close(sketched.norms, exact.norms, rtol=0.1, atol=0)
    torch.testing.assert_close(sketched.cosines, exact.cosines, rtol=0, atol=0.1)


@pytest.mark.parametrize("statistics", ["sketch", "exact"])
def test_two_datasets_of_the_same_rows_and_objective_give_the_adapter_of_one(tmp_path, statistics):
    rows = learnable_rows(12)
    whole = {"statistics": statistics, "combination": {"type": "mean"}, "start": "zero"}

    twice = jointly([rows, rows], [[DPO], [DPO]], tmp_path / "twice", **whole)
    once = build(rows, tmp_path / "once", objectives=[DPO], **whole)

    assert twice.mixture.cosines.min() > 1 - 1e-9
    for name, layer in once.direction.items():
        assert (dense(twice.direction[name]) - dense(layer)).norm() < 1e-4 * dense(layer).norm(), name


def test_the_order_of_datasets_changes_nothing_but_names(tmp_path):
    plain, pairs = learnable_rows(12, paired=False), learnable_rows(12, seed=1)

    first = jointly([plain, pairs], [[SFT], [DPO]], tmp_path / "a", start="zero")
    second = jointly([pairs, plain], [[DPO], [SFT]], tmp_path / "b", start="zero")

    torch.testing.assert_close(first.mixture.weights, second.mixture.weights.flip(0), rtol=0, atol=1e-6)
    for name, layer in first.direction.items():
        assert (dense(layer) - dense(second.direction[name])).norm() < 1e-3 * dense(layer).norm(), name


def test_a_dataset_of_many_rows_does_not_drown_one_of_few(tmp_path):
    """Copies of all rows of a dataset change neither its mean loss nor the direction."""
    plain, pairs = learnable_rows(8, paired=False), learnable_rows(8, seed=1)

    few = jointly([plain, pairs], [[SFT], [DPO]], tmp_path / "a", start="zero", statistics="exact")
    many = jointly([plain * 5, pairs], [[SFT], [DPO]], tmp_path / "b", start="zero", statistics="exact")

    for name, layer in few.direction.items():
        assert (dense(layer) - dense(many.direction[name])).norm() < 1e-3 * dense(layer).norm(), name


def test_two_learnable_tasks_get_one_step_that_lowers_each_on_its_own_held_out_rows(tmp_path):
    plain, pairs = learnable_rows(16, paired=False), learnable_rows(20, seed=1)
    seen = []

    built = jointly([plain, pairs], [[SFT], [DPO]], tmp_path, on_progress=lambda *progress: seen.append(progress))

    assert built.eta > 0
    assert list(built.held_out) == ["datasets[0].nll", "datasets[0].sft", "datasets[1].nll", "datasets[1].dpo"]
    assert [one.rows for one in built.held_out.values()] == [16, 16, 20, 20]
    for name in ("datasets[0].sft", "datasets[1].dpo"):
        assert built.held_out[name].adapter < built.held_out[name].base, name
    assert built.held_out["datasets[0].sft"].base == pytest.approx(sft_loss(tiny_llama(), plain).item(), rel=1e-5)
    assert built.held_out["datasets[1].nll"].base == pytest.approx(sft_loss(tiny_llama(), pairs).item(), rel=1e-5)
    assert all(scale is not None for scale in built.noise_scales)
    for phase in (Phase.STATISTICS, Phase.CALIBRATION):
        done = [(one, total) for at, one, total in seen if at is phase]
        assert done == sorted(done)
        assert len({total for _, total in done}) == 1
    assert (Phase.STATISTICS, 36, 36) in seen


def test_an_adapter_for_each_dataset_has_the_direction_of_its_rows_alone_and_the_cosines_are_those_of_all(tmp_path):
    plain, pairs = learnable_rows(9, paired=False), learnable_rows(8, seed=1)
    both, exact = [[SFT], [DPO, ORPO]], {"statistics": "exact", "start": "zero"}

    each = together([plain, pairs], both, tmp_path / "each", adapters="per_dataset", **exact)
    one = jointly([plain, pairs], both, tmp_path / "one", **exact)

    assert each.names == one.names
    torch.testing.assert_close(each.cosines, one.mixture.cosines)
    for built, rows, asked, place in zip(
        each.adapters, [plain, pairs], both, ("datasets[0].", "datasets[1]."), strict=True
    ):
        alone = build(rows, tmp_path / place, objectives=asked, **exact)
        assert built.names == [f"{place}{objective['type']}" for objective in asked]
        torch.testing.assert_close(built.mixture.weights, alone.mixture.weights, rtol=0, atol=1e-5)
        for name, layer in alone.direction.items():
            assert (dense(built.direction[name]) - dense(layer)).norm() < 1e-4 * dense(layer).norm(), name


def test_of_adapters_for_each_dataset_every_one_takes_the_step_that_its_own_rows_support(tmp_path):
    source, noise = random.Random(1), reference_rows(12, paired=True, seed=1)
    noise = [dataclasses.replace(row, rejected=[source.randrange(3, 97) for _ in row.chosen]) for row in noise]
    seen = []

    learned, unlearned = together(
        [learnable_rows(12), noise],
        [[DPO], [DPO]],
        tmp_path,
        adapters="per_dataset",
        on_progress=lambda *progress: seen.append(progress),
    ).adapters

    assert learned.eta > 0
    assert learned.held_out["datasets[0].dpo"].adapter < learned.held_out["datasets[0].dpo"].base
    assert list(learned.held_out) == ["datasets[0].nll", "datasets[0].dpo"]
    assert unlearned.eta == 0.0
    assert all(not layer.lora_B.any() for layer in unlearned.factors.values())
    for phase in (Phase.STATISTICS, Phase.FACTORS, Phase.CALIBRATION):
        done = [(one, total) for at, one, total in seen if at is phase]
        assert done == sorted(done), phase
        assert len({total for _, total in done}) == 1


def test_a_step_that_makes_one_task_worse_is_not_taken_however_much_it_helps_another(tmp_path):
    pairs = learnable_rows(16)
    # The other task prefers what this one rejects, after prompts of its own.
    opposed = [
        dataclasses.replace(row, prompt=other.prompt, chosen=row.rejected, rejected=row.chosen)
        for row, other in zip(pairs, reference_rows(16, paired=True, seed=9), strict=True)
    ]

    built = jointly([pairs, opposed], [[DPO], [DPO]], tmp_path, combination=Fixed(weights=[1, 0]))

    assert built.eta == 0.0
    assert built.reason == "every step that lowers the combined objective raises datasets[1].dpo on held-out rows"
    assert all(one.base == one.adapter for one in built.held_out.values())


def test_the_same_request_gives_the_same_direction_bit_for_bit_in_any_order_of_rows(tmp_path):
    plain, pairs = learnable_rows(6, paired=False), learnable_rows(6, seed=1)
    mixed = [random.Random(3).sample(rows, 6) for rows in (plain, pairs)]

    first = jointly([plain, pairs], [[SFT], [DPO]], tmp_path / "a", start="zero").direction
    second = jointly(mixed, [[SFT], [DPO]], tmp_path / "b", start="zero").direction

    for name, layer in first.items():
        assert torch.equal(layer.right, second[name].right)
        assert torch.equal(layer.values, second[name].values)


def test_labels_join_too_with_ktos_mismatches(tmp_path):
    plain, labeled = learnable_rows(12, paired=False), labels_of(learnable_rows(12, seed=1))

    built = jointly([plain, labeled], [[SFT], [KTO]], tmp_path, statistics="exact")

    gradient = weight_gradients(
        tiny_llama(), built.direction, lambda twin: kto_loss(twin, tiny_llama().double(), labeled, beta=0.1)
    )
    assert built.mixture.norms[1].item() == pytest.approx(flat(gradient).norm().item(), rel=1e-5)
    assert built.eta > 0
    for name in ("datasets[0].sft", "datasets[1].kto"):
        assert built.held_out[name].adapter < built.held_out[name].base, name


def test_an_objective_that_a_datasets_rows_do_not_allow_is_refused(tmp_path):
    with pytest.raises(ObjectiveUnavailable, match="dpo needs rows with chosen and rejected"):
        jointly([learnable_rows(4), learnable_rows(4, paired=False)], [[DPO], [DPO]], tmp_path)


def test_datasets_that_leave_nothing_to_hold_out_get_the_zero_start(tmp_path):
    built = jointly([learnable_rows(8), learnable_rows(1, seed=1) * 3], [[DPO], [DPO]], tmp_path)

    assert (built.folds, built.eta) == (1, 0.0)
    assert "cannot be held out" in built.reason


def dealt(*datasets, seed=0):
    return deal_folds([as_examples(rows) for rows in datasets], seed=seed)


def test_folds_are_even_in_every_dataset():
    folds = dealt(reference_rows(30, paired=True), reference_rows(21, paired=False, seed=1))

    for own, size in zip(folds, (30, 21), strict=True):
        sizes = [own.count(fold) for fold in range(FOLDS)]
        assert sum(sizes) == size
        assert max(sizes) - min(sizes) <= 1


def test_a_row_and_its_copies_share_a_fold_across_datasets_whatever_was_rejected():
    rows, others = reference_rows(16, paired=True), reference_rows(24, paired=True, seed=1)
    copies = [dataclasses.replace(row, rejected=None) for row in rows[::3]]
    rejected = [dataclasses.replace(row, rejected=[90, 91]) for row in rows[1::3]]

    first, second, third = dealt(rows, [*others, *copies], [*rejected, *others[:8]])

    assert second[24:] == first[::3]
    assert third[: len(rejected)] == first[1::3]
    assert third[len(rejected) :] == second[:8]


def test_every_dataset_has_rows_of_each_label_in_every_fold_or_there_are_fewer_folds():
    pairs, labeled = reference_rows(16, paired=True), labels_of(learnable_rows(9))
    rare = [row for row in labeled if row.desirable][:3] + [row for row in labeled if not row.desirable]

    first, second = dealt(pairs, rare)

    assert distinct_rows(as_examples(rare)) == 3
    for own, label in ((first, None), (second[:3], True), (second[3:], False)):
        assert set(own) == {0, 1, 2}, label
    assert dealt(pairs, pairs[:1] * 4) == [[0] * 16, [0] * 4]


def test_folds_depend_on_seed_and_content_alone():
    rows, others = reference_rows(20, paired=True), reference_rows(20, paired=True, seed=1)
    order = random.Random(0).sample(range(20), 20)

    plain, shuffled = dealt(rows, others), dealt([rows[index] for index in order], others)

    assert shuffled == [[plain[0][index] for index in order], plain[1]]
    assert dealt(rows, others, seed=1) != plain

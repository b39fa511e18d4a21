import copy
import dataclasses

import pytest
import torch

from d2lora.errors import NumericalFailure
from d2lora.initializations import Whitening
from d2lora.settings import WorkerSettings
from tests.support.models import as_base, tiny_llama
from tests.support.reference import dpo_loss, sft_loss, weight_gradients
from tests.unit.worker.conftest import as_examples
from tests.unit.worker.test_pipeline import build, learnable_rows, spec_for, updates
from tests.unit.worker.test_whitening import best, dense_whitened, reconstruct
from worker.batches import assign_folds
from worker.directions import Pass, combined_direction
from worker.factors import inner_products
from worker.gathering import FOLDS, deal_batches, gather_statistics
from worker.matrices import TestMatrices
from worker.objectives import bases_of
from worker.sketch_files import load
from worker.targets import lora_config, resolve_targets

WHITENING = {"damping": 0.1, "power": 0.5}


def second_moments(model, names, rows):
    """The sum of x x^T over all tokens of all sequences, in a float64 copy, one sequence at a time."""
    twin = copy.deepcopy(model).double()
    found = {name: [] for name in names}
    for name in names:
        twin.get_submodule(name).register_forward_hook(lambda _, given, __, name=name: found[name].append(given[0][0]))
    for row in rows:
        for completion in filter(None, (row.chosen, row.rejected)):
            twin(input_ids=torch.tensor([row.prompt + completion]))
    return {name: torch.cat(own).T @ torch.cat(own) for name, own in found.items()}


def whitened_gradients(model, names, rows, loss):
    gradients, moments = weight_gradients(model, names, loss), second_moments(model, names, rows)
    return {name: dense_whitened(gradients[name], moments[name], Whitening(**WHITENING)) for name in names}


def norm_of(gradients):
    return torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()


def test_the_exact_direction_is_that_of_the_dense_whitened_gradients_each_normalized_after_whitening(tmp_path):
    model, rows = tiny_llama(), learnable_rows(8)
    objectives = [{"type": "sft"}, {"type": "dpo", "beta": 0.3}]

    built = build(
        rows,
        tmp_path,
        model=model,
        statistics="exact",
        start="zero",
        objectives=objectives,
        combination={"type": "fixed", "weights": [0.3, 0.7]},
        whitening=WHITENING,
    )

    names, reference = list(built.direction), copy.deepcopy(model).double()
    parts = [
        whitened_gradients(model, names, rows, lambda twin: sft_loss(twin, rows)),
        whitened_gradients(model, names, rows, lambda twin: dpo_loss(twin, reference, rows, beta=0.3)),
    ]
    norms = [norm_of(part) for part in parts]
    assert built.mixture.norms.tolist() == pytest.approx([norm.item() for norm in norms], rel=1e-4)
    for name, layer in built.direction.items():
        wanted = 0.3 * parts[0][name] / norms[0] + 0.7 * parts[1][name] / norms[1]
        assert (reconstruct(layer) - best(wanted, 4)).norm() < 1e-3 * wanted.norm(), name
        cosine = (parts[0][name] * parts[1][name]).sum() / parts[0][name].norm() / parts[1][name].norm()
        gramian = built.layer_gramians[name]
        assert gramian[0, 1] / gramian.diagonal().prod().sqrt() == pytest.approx(cosine.item(), abs=1e-4)


def test_a_fold_that_is_left_out_enters_neither_gradient_nor_moment(tmp_path):
    model, rows = tiny_llama(), learnable_rows(12, paired=False)
    spec = spec_for(statistics="exact", objectives=[{"type": "sft"}], whitening=WHITENING)
    base, examples = as_base(model), as_examples(rows)
    targets = resolve_targets(model, lora_config(model, spec.lora, base_model="tiny", revision=None))
    objectives, settings = list(spec.objectives), WorkerSettings()
    batches = deal_batches(base, spec, examples, settings=settings)
    gathered = gather_statistics(
        base,
        targets,
        spec,
        batches,
        bases_of(objectives),
        settings=settings,
        directory=tmp_path,
        on_progress=lambda *_: None,
    )
    matrices = TestMatrices(spec.seed, base.device)
    one_pass = Pass(objectives, bases_of(objectives), [load(path, matrices) for path in gathered.sums.values()], [])

    _, direction = combined_direction([one_pass], inner_products(one_pass.statistics, 1), spec, leave_out=2)

    folds = assign_folds(examples, folds=FOLDS, seed=spec.seed)
    others = [row for row, fold in zip(rows, folds, strict=True) if fold != 2]
    assert 0 < len(others) < len(rows)
    wanted = whitened_gradients(model, list(direction), others, lambda twin: sft_loss(twin, others))
    for name, layer in direction.items():
        assert (reconstruct(layer) - best(wanted[name] / norm_of(wanted), 4)).norm() < 1e-4, name


@pytest.mark.parametrize("changes", [{}, {"statistics": "exact"}, {"lora": {"r": 2}, "whitening": {"power": 1.0}}])
def test_a_learnable_task_gets_a_whitened_start_that_lowers_every_held_out_objective(tmp_path, changes):
    built = build(learnable_rows(24), tmp_path, **{"whitening": {}, **changes})

    assert built.eta > 0
    for name, measured in built.held_out.items():
        assert measured.adapter < measured.base, name


def test_whitening_changes_the_adapter_and_its_absence_changes_nothing(tmp_path):
    rows = learnable_rows(12)

    plain, none, whitened = (
        updates(build(rows, tmp_path / name, whitening=whitening), eta=0.1)
        for name, whitening in (("plain", None), ("none", None), ("whitened", {}))
    )

    assert all(torch.equal(update, none[name]) for name, update in plain.items())
    assert all((whitened[name] - update).norm() > 0.05 * update.norm() for name, update in plain.items())


def test_preferences_that_cancel_fail_under_whitening_too(tmp_path):
    row = learnable_rows(1)[0]
    swapped = dataclasses.replace(row, chosen=row.rejected, rejected=row.chosen)

    with pytest.raises(NumericalFailure, match="dpo is zero"):
        build([row, swapped], tmp_path, objectives=[{"type": "dpo"}], whitening={})

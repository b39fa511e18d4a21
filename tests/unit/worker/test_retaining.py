import copy
import math
import random

import pytest
import torch

from d2lora.errors import DatasetInvalid, OutOfMemory
from d2lora.initializations import InitializationSpec, LoraSpec
from d2lora.settings import WorkerSettings
from tests.support.models import as_base, tiny_gpt2, tiny_llama
from tests.support.reference import ReferenceRow, sft_loss
from tests.unit.worker.conftest import as_examples, one_fold, reference_rows
from tests.unit.worker.test_pipeline import learnable_rows, spec_for, updates
from tests.unit.worker.test_whitening import power
from worker.gradients import DenseGradient
from worker.line_search import Calibration, Change, Trial
from worker.low_rank import LowRank
from worker.matrices import Shape, TestMatrices
from worker.models import layer_sizes
from worker.moments import Moment, Spectrum, add_inputs
from worker.pipeline import build_adapter
from worker.retaining import STRENGTHS, GeneralText, Restraint, restrain, restrained, restraint_from
from worker.sketching import Sketch
from worker.statistics import score
from worker.targets import lora_config, resolve_targets

CPU = torch.device("cpu")


def dense(direction):
    return ((direction.left * direction.values) @ direction.right).double()


def random_problem(sides, *, seed=0):
    """A gradient, and a second moment with a few large eigenvalues, in float64."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(*sides, generator=generator, dtype=torch.float64)
    tokens = torch.randn(200, sides[1], generator=generator, dtype=torch.float64)
    tokens[:, :3] *= 10.0
    return gradient, tokens.T @ tokens / len(tokens)


def factorized(gradient):
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    return LowRank(left, values, right, energy=values.square().sum().item(), missed=0.0)


def spectrum_of(moment):
    values, vectors = torch.linalg.eigh(moment)
    return Spectrum(vectors, values.clamp(min=0), 0.0)


def objective(step, gradient, moment, *, eta, mu):
    return (gradient * step).sum() + step.square().sum() / (2 * eta) + mu / 2 * (step @ moment * step).sum()


@pytest.mark.parametrize("sides", [(12, 20), (20, 12)])
def test_at_full_rank_the_step_is_where_the_objectives_gradient_is_zero(sides):
    gradient, moment = random_problem(sides)
    eta, mu = 0.3, 2.0

    step = -eta * dense(restrained(factorized(gradient), spectrum_of(moment), eta * mu, min(sides)))

    step.requires_grad_()
    objective(step, gradient, moment, eta=eta, mu=mu).backward()
    assert step.grad.norm() < 1e-9 * gradient.norm()


@pytest.mark.parametrize("rank", [1, 3])
def test_at_low_rank_no_factors_reach_a_smaller_objective(rank):
    """The problem that is solved, handed to a general optimizer over the factors from many starts."""
    gradient, moment = random_problem((8, 10))
    eta, mu = 0.3, 2.0

    step = -eta * dense(restrained(factorized(gradient), spectrum_of(moment), eta * mu, rank))

    assert torch.linalg.matrix_rank(step) == rank
    ours = objective(step, gradient, moment, eta=eta, mu=mu).item()
    found = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        factors = [
            0.3 * torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((8, rank), (rank, 10))
        ]
        found.append(minimize(lambda b, a: objective(b @ a, gradient, moment, eta=eta, mu=mu), factors))
    assert min(found) == pytest.approx(ours, rel=1e-6)
    assert min(found) >= ours - 1e-9 * abs(ours)


def minimize(function, factors):
    factors = [factor.requires_grad_() for factor in factors]
    optimizer = torch.optim.LBFGS(
        factors, max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = function(*factors)
        value.backward()
        return value

    optimizer.step(closure)
    return function(*factors).item()


@pytest.mark.parametrize("sides", [(24, 40), (40, 24)])
@pytest.mark.parametrize(("kind", "tolerance"), [(DenseGradient, 1e-5), (Sketch, 1e-3)])
def test_statistics_of_a_pass_give_the_minimizer(kind, tolerance, sides):
    """Exact mode always, sketches where gradient and second moment have small rank."""
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(2, 20, 3, generator=generator) @ torch.randn(3, sides[0], generator=generator)
    inputs = torch.randn(2, 20, sides[1], generator=generator)
    text = torch.randn(50, 3, generator=generator) @ torch.randn(3, sides[1], generator=generator)
    width = sides[1] if kind is DenseGradient else 8
    moment = Moment.empty(TestMatrices(0, CPU).moment(sides[1], width))
    layer = kind.empty(Shape(*sides, width=8), 1, TestMatrices(0, CPU))
    layer.add(inputs, grads, torch.ones(1, 2), paired=False)
    moment.add(text)

    leading = layer.factorize(torch.ones(1), 3 if kind is Sketch else min(sides))
    ours = dense(restrained(leading, moment.spectrum(), 0.05, 3))

    gradient = torch.einsum("sto,sti->oi", grads.double(), inputs.double())
    half = power(torch.eye(sides[1]).double() + 0.05 * text.double().T @ text.double(), -0.5, 0.0)
    left, values, right = torch.linalg.svd(gradient @ half, full_matrices=False)
    expected = (left[:, :3] * values[:3]) @ right[:3] @ half
    assert (ours - expected).norm() < tolerance * expected.norm()


def test_without_restraint_the_direction_is_the_plain_one_bit_for_bit():
    gradient, moment = random_problem((12, 20))
    leading = factorized(gradient)

    plain, whole = leading.cut(3), restrained(leading, spectrum_of(moment), 0.0, 3)

    assert torch.equal(plain.left, whole.left)
    assert torch.equal(plain.values, whole.values)
    assert torch.equal(plain.right, whole.right)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_forward_pass_gives_the_second_moment_of_every_token_that_is_there(make):
    model, rows = make(), reference_rows(7, paired=False)
    targets = targets_of(model)
    moments = empty_moments(targets)

    batches = one_fold(rows, max_tokens=60)
    assert not all(batch.attention_mask.all() for batch in batches)
    for batch in batches:
        add_inputs(as_base(model), targets, moments, batch)

    twin, found = copy.deepcopy(model).double(), {name: [] for name in targets}
    for name in targets:
        twin.get_submodule(name).register_forward_hook(lambda _, given, __, name=name: found[name].append(given[0][0]))
    for row in rows:
        twin(input_ids=torch.tensor([row.prompt + row.chosen]))
    for name, own in found.items():
        expected = torch.cat(own).T @ torch.cat(own)
        assert (moments[name].products.double() - expected).norm() < 1e-5 * expected.norm(), name
        assert moments[name].trace.item() == pytest.approx(expected.trace().item(), rel=1e-5)


class FailsOnce(Moment):
    """Runs out of memory once, when its products have been added and its trace has not."""

    spent = False

    def add(self, tokens):
        if FailsOnce.spent:
            return super().add(tokens)
        FailsOnce.spent = True
        self.products += 1.0
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("place", ["in the forward", "while a layer's inputs are added"])
def test_a_batch_of_retain_rows_that_runs_out_of_memory_is_halved_and_counted_once(place, monkeypatch):
    model, rows = tiny_llama(), reference_rows(8, paired=False)
    targets = targets_of(model)
    (batch,) = one_fold(rows)
    expected = empty_moments(targets)
    add_inputs(as_base(model), targets, expected, batch)
    moments, sizes = empty_moments(targets), []

    def refuse_large(_module, arguments):
        sizes.append(len(arguments[0]))
        if place == "in the forward" and sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.model.layers[1].register_forward_pre_hook(refuse_large)
    if place != "in the forward":
        FailsOnce.spent, real = False, Moment.empty
        monkeypatch.setattr(Moment, "empty", lambda test: FailsOnce(**vars(real(test))))

    add_inputs(as_base(model), targets, moments, batch)
    handle.remove()

    assert sizes == ([8, 4, 2, 2, 4, 2, 2] if place == "in the forward" else [4, 4])
    for name, moment in expected.items():
        torch.testing.assert_close(moments[name].products, moment.products, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments[name].trace, moment.trace)


def test_a_retain_row_that_does_not_fit_is_an_error_with_a_remedy():
    model = tiny_llama()

    def refuse(*_arguments):
        raise MemoryError

    model.model.layers[0].register_forward_pre_hook(refuse)
    with pytest.raises(OutOfMemory, match="max_length"):
        add_inputs(
            as_base(model),
            targets_of(model),
            empty_moments(targets_of(model)),
            *one_fold(reference_rows(1, paired=False)),
        )


def empty_moments(targets):
    return {name: Moment.empty(torch.eye(layer_sizes(module)[1])) for name, module in targets.items()}


def targets_of(model):
    return resolve_targets(model, lora_config(model, LoraSpec(r=4), base_model="tiny", revision=None))


def text_rows(count, *, seed=5):
    """Rows whose first token alone is not learned, as of plain text; a plain step worsens those of this seed."""
    source = random.Random(seed)
    return [ReferenceRow([source.randrange(3, 97)], [source.randrange(3, 97) for _ in range(12)]) for _ in range(count)]


def restraint_for(model, spec, rows):
    return restraint_from(
        as_base(model),
        targets_of(model),
        spec,
        as_examples(rows),
        max_tokens=200,
        pad_token_id=0,
        on_progress=lambda *_: None,
    )


def build(rows, directory, *, retain=None, **changes):
    model = tiny_llama()
    spec = spec_for(**({"retain_dataset_id": "ds_general"} if retain else {}) | changes)
    directory.mkdir(exist_ok=True)
    return build_adapter(
        as_base(model),
        targets_of(model),
        spec,
        as_examples(rows),
        settings=WorkerSettings(),
        directory=directory,
        on_progress=lambda *_: None,
        restraint=restraint_for(model, spec, retain) if retain else None,
    )


@pytest.mark.parametrize("statistics", ["sketch", "exact"])
def test_a_tolerance_that_does_not_bind_leaves_the_plain_step_bit_for_bit(tmp_path, statistics):
    rows = learnable_rows(24, paired=False)

    plain = build(rows, tmp_path / "plain", statistics=statistics, direction="gradient")
    loose = build(rows, tmp_path / "loose", statistics=statistics, retain=text_rows(16), retain_tolerance=100.0)

    assert plain.eta == loose.eta > 0
    assert (loose.retained.mu, loose.retained.strengths) == (0.0, [0.0])
    for name, layer in plain.factors.items():
        assert torch.equal(layer.lora_A, loose.factors[name].lora_A)
        assert torch.equal(layer.lora_B, loose.factors[name].lora_B)


@pytest.mark.parametrize("statistics", ["sketch", "exact"])
def test_a_tolerance_that_binds_is_kept_and_the_task_still_gains(tmp_path, statistics):
    rows, text = learnable_rows(24, paired=False), text_rows(16)
    loose = build(rows, tmp_path / "loose", statistics=statistics, retain=text, retain_tolerance=100.0).retained
    tolerance = 0.3 * (loose.adapter - loose.base)
    assert tolerance > 0

    built = build(rows, tmp_path / "tight", statistics=statistics, retain=text, retain_tolerance=tolerance)

    retained = built.retained
    assert built.eta > 0
    assert retained.mu > 0
    assert retained.adapter <= retained.base + tolerance < retained.unrestrained == loose.adapter
    assert built.held_out["sft"].adapter < built.held_out["sft"].base


def test_the_report_has_the_loss_of_the_delivered_adapter_on_the_held_out_rows(tmp_path):
    model, text = tiny_llama(), text_rows(16)
    built = build(learnable_rows(24, paired=False), tmp_path, retain=text, retain_tolerance=0.05)

    held = restraint_for(model, spec_for(retain_dataset_id="ds_general"), text).text.held
    rows = [text[index] for batch in held for index in batch.rows]
    assert built.retained.rows == len(rows) == 4
    assert built.retained.base == pytest.approx(sft_loss(copy.deepcopy(model).double(), rows).item(), rel=1e-5)
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, update in updates(built).items():
            twin.get_submodule(name).weight += update.double()
    assert built.retained.adapter == pytest.approx(sft_loss(twin, rows).item(), rel=1e-4)


def test_a_tolerance_that_no_step_keeps_gives_the_zero_start(tmp_path, monkeypatch):
    monkeypatch.setattr("worker.retaining.STRENGTHS", STRENGTHS[:1])

    built = build(learnable_rows(24, paired=False), tmp_path, retain=text_rows(16), retain_tolerance=0.0)

    assert built.eta == 0.0
    assert "retain rows" in built.reason
    assert built.retained.adapter == built.retained.base < built.retained.unrestrained


def test_a_single_retain_row_is_refused():
    with pytest.raises(DatasetInvalid, match="retain_dataset_id"):
        restraint_for(tiny_llama(), spec_for(retain_dataset_id="ds_general"), text_rows(1) * 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"retain_tolerance": 0.1}, "nothing to retain"),
        ({"retain_dataset_id": "ds_general", "start": "zero"}, "no step"),
        ({"retain_dataset_id": "ds_general", "whitening": {}}, "whitening"),
        ({"retain_dataset_id": "ds_general", "rounds": 2}, "rounds"),
        ({"retain_dataset_id": "ds_general", "method": "pissa"}, "not used by method pissa"),
    ],
)
def test_requests_that_could_not_retain_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        InitializationSpec(base_model="m", dataset_id="ds", **fields)


@pytest.mark.parametrize("broken", [0.9, math.inf])
def test_the_search_takes_the_best_step_of_the_first_restraint_that_binds_no_more(broken):
    """Phi and the rise of the loss, written down for every strength and step."""
    table = {
        0: {1.0: (-3.0, broken), 0.5: (-1.0, 0.1)},
        1: {1.0: (-2.0, 0.3)},
        2: {2.0: (-2.5, 0.2)},
        3: {1.0: (-9.0, 0.0)},
    }
    left, right = torch.eye(2)[:, :1], torch.eye(2)[:1]
    text = GeneralText({"layer": Spectrum(torch.eye(2)[:, :1], torch.tensor([2.0]), 0.0)}, [], scores_of_nothing())
    strength_of = {}

    def trial(eta, phi):
        return Trial(eta, Change(phi, 0.1), {}, {})

    def calibrate(others, *, keeps):
        number = len(strength_of)
        strength_of[others[0]["layer"].values.item()] = number
        trials = [trial(eta, phi) for eta, (phi, _) in table[number].items()]
        ordered = sorted(trials, key=lambda one: one.combined.mean)
        return Calibration(trials, next((one for one in ordered if keeps(one.eta)), None), "found")

    def change(direction, eta):
        return table[strength_of[direction["layer"].values.item()]][eta][1]

    leading = {"layer": LowRank(left, torch.tensor([1.0]), right, 1.0, 0.0)}
    outcome = restrain(leading, [leading], calibrate, Restraint(text, change, 0.25), rank=1)

    assert outcome.calibration.accepted.combined.mean == -2.5
    assert outcome.retained.strengths == list(STRENGTHS[:3])
    assert outcome.retained.mu == pytest.approx(STRENGTHS[2] / 1.0 / 2.0)
    assert outcome.retained.adapter == pytest.approx(text.loss + 0.2)
    # JSON has no infinity, and the database refuses it.
    unrestrained = pytest.approx(text.loss + broken) if math.isfinite(broken) else None
    assert outcome.retained.unrestrained == unrestrained


def scores_of_nothing():
    model = tiny_llama()
    (batch,) = one_fold(text_rows(1))
    return score(as_base(model), batch)

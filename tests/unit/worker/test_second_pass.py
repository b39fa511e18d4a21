import pytest
import torch
from pydantic import ValidationError

from d2lora.initializations import InitializationSpec, LoraSpec, Phase
from d2lora.settings import WorkerSettings
from tests.support.models import as_base, tiny_gpt2, tiny_llama
from tests.support.reference import sft_loss, weight_gradients
from tests.unit.worker.conftest import as_examples, one_fold
from tests.unit.worker.test_pipeline import build, learnable_rows
from tests.unit.worker.test_sketching import decaying
from worker.matrices import Shape, TestMatrices
from worker.objectives import Basis
from worker.pipeline import build_adapter
from worker.second_pass import Projection, inaccurate_layers
from worker.sketching import Sketch
from worker.statistics import gather
from worker.targets import lora_config, resolve_targets

ONE = torch.ones(1, dtype=torch.float64)


def dense(layer):
    return (layer.left * layer.values) @ layer.right


def kept(layer, exact):
    """The share of the best energy of the same rank."""
    matrix, ours = dense(exact), dense(layer)
    whole = matrix.square().sum()
    return ((whole - (matrix - ours).square().sum()) / whole).item()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_second_pass_is_the_dense_gradient_in_the_range_of_the_first(tmp_path, make, monkeypatch):
    """The best rank-r part of Q Q^T G, with G by autograd in float64."""
    model, rows, options = make(), learnable_rows(12), {"start": "zero", "objectives": [{"type": "sft"}]}
    options["direction"] = "gradient"
    seen = {}
    real = Projection.factorize

    def watched(self, sketch, rank):
        result = real(self, sketch, rank)
        seen[id(result)] = self
        return result

    monkeypatch.setattr(Projection, "factorize", watched)

    built = build(rows, tmp_path, model=model, second_pass_above=0.0, lora=LoraSpec(r=2), **options)

    gradients = weight_gradients(model, built.direction, lambda twin: sft_loss(twin, rows))
    assert len(seen) == len(built.refined) > 4
    for name in built.refined:
        projection = seen[id(built.direction[name])]
        gradient = gradients[name] / built.mixture.norms
        transposed, q = projection.shape.transposed, projection.basis.double()
        left, values, right = torch.linalg.svd(q @ (q.T @ (gradient.T if transposed else gradient)))
        best = (left[:, :2] * values[:2]) @ right[:2]
        ours = dense(built.direction[name]).double()
        assert ((ours.T if transposed else ours) - best).norm() < 1e-4 * best.norm(), name


def test_a_second_pass_keeps_more_of_the_best_rank(tmp_path):
    rows, shape = learnable_rows(24), {"lora": LoraSpec(r=3), "start": "zero"}

    exact = build(rows, tmp_path / "exact", statistics="exact", **shape)
    once = build(rows, tmp_path / "once", **shape)
    twice = build(rows, tmp_path / "twice", second_pass_above=0.0, **shape)

    shares = [[kept(built.direction[name], exact.direction[name]) for name in twice.refined] for built in (once, twice)]
    assert sum(shares[1]) > sum(shares[0])
    assert min(shares[1]) > 0.9


def test_what_a_second_pass_misses_is_estimated_without_bias():
    inputs, grads, matrix = decaying(80, 40, seed=0)
    weights = torch.ones(1, 1)

    estimates, truths = [], []
    for seed in range(60):
        sketch = Sketch.empty(Shape(80, 80, width=8), 1, TestMatrices(seed, torch.device("cpu")))
        sketch.add(inputs, grads, weights, paired=False)
        projection = Projection.of(sketch, ONE)
        projection.add(inputs, grads, weights, paired=False)
        estimates.append(projection.factorize(sketch, 8).missed)
        reached = projection.basis @ projection.sums
        truths.append(((reached.T if sketch.shape.transposed else reached) - matrix).square().sum().item())

    differences = torch.tensor(estimates) - torch.tensor(truths)
    assert differences.mean().abs() < 4 * differences.std() / 60**0.5
    assert differences.std() < 0.5 * sum(truths) / 60


@pytest.mark.parametrize("sides", [(30, 50), (50, 30), (40, 40)])
def test_the_projection_is_the_range_times_the_gradient_however_rows_are_cut(sides):
    generator = torch.Generator().manual_seed(0)
    inputs, grads = (torch.randn(6, 5, side, generator=generator) for side in sides)
    weights = torch.randn(2, 6, generator=generator)
    coefficients = torch.tensor([0.3, -0.7], dtype=torch.float64)
    sketch = Sketch.empty(Shape(sides[1], sides[0], width=4), 2, TestMatrices(0, torch.device("cpu")))
    sketch.add(inputs, grads, weights, paired=True)

    whole, parts = Projection.of(sketch, coefficients), Projection.of(sketch, coefficients)
    whole.add(inputs, grads, weights, paired=True)
    for index in range(6):
        parts.add(inputs[[index]], grads[[index]], weights[:, [index]], paired=False)

    gradient = torch.einsum("k,ks,sto,sti->oi", coefficients, weights.double(), grads.double(), inputs.double())
    oriented = gradient.T if whole.shape.transposed else gradient
    expected = whole.basis.double().T @ oriented
    torch.testing.assert_close(whole.sums.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.sums, whole.sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", ["gradient", "orthogonalized"])
def test_only_layers_above_the_bound_are_refined_and_the_step_stays_as_long(tmp_path, direction):
    model, rows = tiny_llama(), learnable_rows(12)
    options = {"model": model, "lora": LoraSpec(r=2), "direction": direction}
    once = build(rows, tmp_path / "once", **options)
    errors = {name: (layer.missed / layer.energy) ** 0.5 for name, layer in once.direction.items()}
    last = [error for name, error in errors.items() if ".1." in name]
    above = sum(sorted(last)[-2:]) / 2  # between two layers, away from rounding
    expected = {name for name, error in errors.items() if error > above}
    assert 0 < len(expected) < len(errors)

    twice = build(rows, tmp_path / "twice", second_pass_above=above, **options)

    assert twice.refined == expected == set(inaccurate_layers(once.direction, above))
    assert twice.eta == once.eta > 0
    for name, layer in once.factors.items():
        same = torch.equal(layer.lora_B, twice.factors[name].lora_B)
        assert same == (name not in expected), name


def test_the_backward_ends_at_the_lowest_target():
    model = tiny_llama()
    name, lower = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"
    backward = []
    below = model.model.layers[0].register_forward_hook(
        lambda *arguments: backward.append(arguments[2][0] if isinstance(arguments[2], tuple) else arguments[2])
    )
    sums = {}
    for names in ([name, lower], [name]):
        targets = {name: model.get_submodule(name) for name in names}
        shapes = {name: Shape(module.out_features, module.in_features, 4) for name, module in targets.items()}
        matrices = TestMatrices(0, torch.device("cpu"))
        layers = {name: Sketch.empty(shape, 1, matrices) for name, shape in shapes.items()}
        gather(
            as_base(model),
            targets,
            layers,
            one_fold(learnable_rows(4)),
            [Basis.LIKELIHOOD],
            on_batch=lambda *_: None,
        )
        sums[len(names)] = layers[name]
    below.remove()

    assert [output.requires_grad for output in backward] == [True, False]
    torch.testing.assert_close(sums[2].range_sketch, sums[1].range_sketch)


def test_no_layer_above_the_bound_leaves_the_adapter_as_it_is(tmp_path):
    rows = learnable_rows(8)
    once, bounded = (
        build(rows, tmp_path / str(bound), second_pass_above=bound, lora=LoraSpec(r=8)) for bound in (None, 0.99)
    )

    assert not bounded.refined
    assert all(torch.equal(layer.lora_B, bounded.factors[name].lora_B) for name, layer in once.factors.items())


def test_a_second_pass_tells_its_progress_as_a_phase_of_its_own(tmp_path):
    told, model = [], tiny_llama()
    spec = InitializationSpec(base_model="tiny", dataset_id="ds", lora=LoraSpec(r=2), second_pass_above=0.0)
    build_adapter(
        as_base(model),
        resolve_targets(model, lora_config(model, spec.lora, base_model="tiny", revision=None)),
        spec,
        as_examples(learnable_rows(12)),
        settings=WorkerSettings(activation_checkpointing=True),
        directory=tmp_path,
        on_progress=lambda *mark: told.append(mark),
    )

    assert told[-1] == (Phase.REFINEMENT, 12, 12)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"statistics": "exact"}, "exact statistics have no sketch error"),
        ({"retain_dataset_id": "ds_2"}, "retain"),
        ({"rounds": 2}, "rounds"),
    ],
)
def test_what_a_second_pass_does_not_go_with_is_refused(other, message):
    with pytest.raises(ValidationError, match=message):
        InitializationSpec(base_model="tiny", dataset_id="ds", second_pass_above=0.1, **other)

"""A second pass for whitened gradients, against dense float64."""

import pytest
import torch

from d2lora.initializations import LoraSpec
from tests.support.models import tiny_gpt2, tiny_llama
from tests.support.reference import sft_loss, weight_gradients
from tests.unit.worker.test_pipeline import build, learnable_rows
from tests.unit.worker.test_whitening import (
    CPU,
    WHITENING,
    best,
    dense_whitened,
    reconstruct,
    second_moments,
    skewed_tokens,
)
from worker.matrices import Shape, TestMatrices
from worker.whitened_projections import WhitenedProjection
from worker.whitening import MomentSketch, whitened_factorization

COEFFICIENTS = torch.tensor([1.0, -0.5], dtype=torch.float64)


def decaying_layer(sides, *, seed, width, tokens=600):
    """A batch whose gradient and inputs have many directions, each weaker than the one before."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = sides
    decay = torch.arange(1, out_features + 1) ** -0.8
    inputs = skewed_tokens(tokens, in_features, rank=6, seed=seed) * torch.arange(1, in_features + 1) ** -0.3
    grads = torch.randn(tokens, out_features, generator=generator) * decay
    batch = (inputs.view(4, -1, in_features), grads.view(4, -1, out_features), torch.ones(2, 4))
    layer = MomentSketch.empty(Shape(*sides, width=width), 2, TestMatrices(seed, CPU))
    layer.add(*batch, paired=False)
    gradient = 0.5 * torch.einsum("sto,sti->oi", batch[1].double(), batch[0].double())
    flat = inputs.double()
    return layer, batch, gradient, flat.T @ flat


def second_pass(layer, batch):
    projection = WhitenedProjection.of(layer, COEFFICIENTS, WHITENING)
    projection.add(*batch, paired=False)
    return projection


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_is_the_dense_whitened_gradient_where_ranges_are_whole(tmp_path, make):
    """With r so large that sketches are as wide as most layers; by autograd in float64."""
    model, rows = make(), learnable_rows(12)

    built = build(
        rows,
        tmp_path,
        model=model,
        second_pass_above=0.0,
        whitening=WHITENING.model_dump(),
        lora=LoraSpec(r=4),
        start="zero",
        objectives=[{"type": "sft"}],
    )

    gradients = weight_gradients(model, built.direction, lambda twin: sft_loss(twin, rows))
    moments = second_moments(model, built.direction, rows)
    assert len(built.refined) > 4
    for name in built.refined:
        expected = best(dense_whitened(gradients[name] / built.mixture.norms, moments[name], WHITENING), 4)
        whole = 3 * min(32, *expected.shape) >= expected.shape[1]  # one layer of GPT-2 is wider than that
        assert (reconstruct(built.direction[name]) - expected).norm() < (1e-3 if whole else 5e-3) * expected.norm(), (
            name
        )


@pytest.mark.parametrize("sides", [(30, 36), (50, 30)])
def test_it_is_the_whitened_gradient_within_the_range_found(sides):
    """As `dense_whitened` of Q Q^T G, where the basis on the inputs' side is whole."""
    layer, batch, gradient, moment = decaying_layer(sides, seed=0, width=12)

    projection = second_pass(layer, batch)
    direction = projection.factorize(layer, 3)

    q = projection.left.double()
    assert projection.right.shape[1] == sides[1]
    expected = best(dense_whitened(q @ (q.T @ gradient), moment, WHITENING), 3)
    assert (reconstruct(direction) - expected).norm() < 1e-4 * expected.norm()
    assert direction.descent == pytest.approx((reconstruct(direction) * gradient).sum().item(), rel=1e-4)


@pytest.mark.parametrize("sides", [(120, 160), (160, 120)])
def test_it_keeps_more_of_the_best_direction_than_one_pass(sides):
    shares = {"one": [], "two": []}
    for seed in range(3):
        layer, batch, gradient, moment = decaying_layer(sides, seed=seed, width=16)
        whitened = dense_whitened(gradient, moment, WHITENING)
        whole = best(whitened, 2).norm()
        once = whitened_factorization(layer, COEFFICIENTS, 2, WHITENING)
        twice = second_pass(layer, batch).factorize(layer, 2)
        for name, direction in (("one", once), ("two", twice)):
            ours = reconstruct(direction)
            shares[name].append(((ours * whitened).sum() / ours.norm() / whole).item())

    assert all(two > one for one, two in zip(shares["one"], shares["two"], strict=True))
    assert min(shares["two"]) > 0.97


@pytest.mark.parametrize("sides", [(60, 90), (90, 60)])
def test_the_stated_error_is_unbiased(sides):
    ratios = []
    for seed in range(40):
        layer, batch, gradient, _ = decaying_layer(sides, seed=seed, width=6, tokens=120)
        projection = second_pass(layer, batch)
        direction = projection.factorize(layer, 2)
        truth = (projection.whiten(layer)(gradient) - reconstruct(direction)).square().sum().item()
        ratios.append(direction.missed / truth)
    ratios = torch.tensor(ratios)
    assert (ratios.mean() - 1).abs() < 4 * ratios.std() / 40**0.5
    assert ratios.std() < 0.3


def test_sums_do_not_depend_on_how_rows_are_cut_into_batches():
    layer, batch, _, _ = decaying_layer((30, 50), seed=0, width=6, tokens=80)
    inputs, grads, weights = batch
    whole, parts = second_pass(layer, batch), WhitenedProjection.of(layer, COEFFICIENTS, WHITENING)

    for index in range(4):
        parts.add(inputs[[index]], grads[[index]], weights[:, [index]], paired=False)

    torch.testing.assert_close(parts.gradient, whole.gradient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.moment, whole.moment, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("direction", ["gradient", "orthogonalized"])
def test_the_step_follows_the_slope_of_the_refined_direction(tmp_path, direction):
    """So that eta |D|^2 / <G, D> is what the line search has found."""
    rows = learnable_rows(24)
    once, twice = (
        build(
            rows, tmp_path / str(above), second_pass_above=above, whitening={}, lora=LoraSpec(r=1), direction=direction
        )
        for above in (None, 0.0)
    )

    slope, squared = (
        [sum(getattr(layer, of) for layer in built.direction.values()) for built in (once, twice)]
        for of in ("descent", "step_energy")
    )
    assert len(twice.refined) == len(twice.direction)
    assert once.eta > 0
    assert twice.eta * squared[1] / slope[1] == pytest.approx(once.eta * squared[0] / slope[0])
    for name, layer in twice.factors.items():
        step = 2.0 * layer.lora_B @ layer.lora_A  # alpha is 2 r
        expected = -twice.eta * reconstruct(twice.direction[name].taken(1.0))
        torch.testing.assert_close(step.double(), expected, rtol=1e-4, atol=1e-7)

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchjd.aggregation import MGDAWeighting

from d2lora.errors import NumericalFailure
from d2lora.initializations import Fixed, ImtlG, Mean, Mgda, UpGrad
from worker.combining import combine, objective_gramian
from worker.min_norm import min_norm_weights

NAMES = ["sft", "dpo", "orpo"]
ALL = [Mgda(), UpGrad(), ImtlG(), Mean(), Fixed(weights=[1, 1, 1])]


def gramian_of(vectors):
    return vectors @ vectors.T


def mix(gramian, combination):
    return combine(gramian, combination, names=NAMES[: len(gramian)], row_norms=torch.diagonal(gramian))


def vectors(count, seed, *, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return drawn * torch.logspace(0, scale, count, dtype=torch.float64)[:, None]


@settings(max_examples=30)
@given(seed=st.integers(0, 9999), combination=st.sampled_from(ALL[:4]))
def test_the_scale_of_an_objective_decides_nothing(seed, combination):
    drawn = vectors(3, seed)
    scaled = drawn * torch.tensor([[1e-6], [1.0], [1e4]], dtype=torch.float64)

    one, other = mix(gramian_of(drawn), combination), mix(gramian_of(scaled), combination)

    torch.testing.assert_close(one.weights, other.weights, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.norms, scaled.norm(dim=1), rtol=1e-9, atol=0)


def hull(seed, *, count=None):
    """Unit vectors of few or many dimensions, on one side or all around, some of them twice."""
    source = random.Random(seed)
    count, size = count or source.randint(1, 7), source.randint(1, 7)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, size, generator=generator, dtype=torch.float64)
    drawn += source.choice([0.0, 1.5]) * torch.randn(1, size, generator=generator, dtype=torch.float64)
    if source.random() < 0.2:
        drawn[-1] = drawn[0]
    return drawn / drawn.norm(dim=1, keepdim=True)


@settings(max_examples=100)
@given(seed=st.integers(0, 9999))
def test_the_min_norm_point_satisfies_its_optimality_conditions(seed):
    units = hull(seed)

    weights = min_norm_weights(gramian_of(units))

    point = weights @ units
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-9)
    # At the point of least norm in a convex hull no vertex lies behind the plane through it.
    assert (units @ point >= point @ point - 1e-9).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_min_norm_point_is_no_further_than_the_one_that_torchjd_draws_near_to(seed):
    units = hull(seed, count=3)
    near = MGDAWeighting(epsilon=1e-3, max_iters=2000)(gramian_of(units)) @ units

    point = mix(gramian_of(units), Mgda()).weights @ units

    assert point.norm() <= near.norm() + 1e-12
    torch.testing.assert_close(point, near, rtol=0, atol=2e-2)


@settings(max_examples=30)
@given(seed=st.integers(0, 9999))
def test_upgrads_direction_conflicts_with_no_objective(seed):
    drawn = vectors(3, seed)
    units = drawn / drawn.norm(dim=1, keepdim=True)

    direction = mix(gramian_of(drawn), UpGrad()).weights @ units

    assert (units @ direction >= -2e-3 * direction.norm()).all()


@pytest.mark.parametrize("combination", ALL[:4])
def test_two_objectives_are_bisected(combination):
    mixture = mix(gramian_of(vectors(2, 4, scale=3.0)), combination)

    torch.testing.assert_close(mixture.weights, torch.tensor([0.5, 0.5], dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_an_objective_that_repeats_another_is_not_counted_twice():
    cosines = torch.tensor([[1, -0.04, 0.9999], [-0.04, 1, -0.04], [0.9999, -0.04, 1]], dtype=torch.float64)

    weights = mix(cosines, Mgda()).weights

    torch.testing.assert_close(weights, torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64), rtol=0, atol=1e-4)


def test_the_direction_is_the_weighted_sum_of_normalized_gradients():
    drawn = vectors(3, 6)
    mixture = mix(gramian_of(drawn), Fixed(weights=[2, 1, 1]))

    direction = mixture.basis_coefficients(torch.eye(3, dtype=torch.float64)) @ drawn

    expected = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64) @ (drawn / drawn.norm(dim=1, keepdim=True))
    torch.testing.assert_close(direction, expected)


def test_a_vanishing_gradient_is_named():
    gramian = torch.diag(torch.tensor([1.0, 1e-12, 1.0], dtype=torch.float64))

    with pytest.raises(NumericalFailure, match="dpo"):
        combine(gramian, Mean(), names=NAMES, row_norms=torch.ones(3, dtype=torch.float64))


def test_opposite_gradients_have_no_common_direction():
    gramian = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)

    with pytest.raises(NumericalFailure, match="imtl_g"):
        mix(gramian, ImtlG())


def test_the_gramian_of_a_union_of_folds_is_that_of_their_summed_gradients():
    generator = torch.Generator().manual_seed(0)
    bases = torch.randn(4, 3, 7, generator=generator, dtype=torch.float64)  # folds, bases, coordinates
    coefficients = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    products = torch.einsum("fkc,glc->fkgl", bases, bases)

    gramian = objective_gramian(products, coefficients, [0, 2, 3])

    gradients = coefficients @ bases[[0, 2, 3]].sum(0)
    torch.testing.assert_close(gramian, gradients @ gradients.T)

import pytest
import torch

from bench import dense
from bench.statistics import BASES, Ratio, lost_aims, statistics_over_dense_bytes
from bench.subjects import Subject, pairs, target_layers
from tests.support.models import as_base, tiny_llama
from worker.gradients import DenseGradient
from worker.matrices import Shape, TestMatrices
from worker.models import layer_sizes
from worker.statistics import gather

AIMS = {
    "time_over_limit": {"aim": 1.15, "reached": 1.10},
    "time_over_limit_wide": {"aim": 1.05, "reached": 1.09},
    "speedup_over_dense": {"aim": 3.5, "reached": 3.6},
}


def tiny_subject():
    base = as_base(tiny_llama())
    return Subject("tiny", "", base, target_layers(base.model, 2), pairs(base, 48, length=8))


def test_the_dense_side_computes_the_gradients_that_ours_are_compared_with():
    subject = tiny_subject()
    matrices = TestMatrices(0, torch.device("cpu"))
    ours = {
        name: DenseGradient.empty(Shape(*layer_sizes(module), 2), len(BASES), matrices)
        for name, module in subject.targets.items()
    }

    theirs = dense.three_objectives(subject)
    gather(subject.base, subject.targets, ours, [subject.batch], BASES, on_batch=lambda *_: None)

    for name, layer in ours.items():
        for basis, gradients in zip(layer.gradients, theirs.values(), strict=True):
            torch.testing.assert_close(basis, gradients[name], rtol=1e-4, atol=1e-4 * basis.abs().max().item())
    assert not any(parameter.requires_grad for parameter in subject.base.model.parameters())


def test_lora_ga_leaves_the_model_as_it_was():
    subject = tiny_subject()

    dense.lora_ga(subject)

    assert not subject.base.model.training
    assert not any(parameter.requires_grad for parameter in subject.base.model.parameters())
    assert all(parameter.grad is None for parameter in subject.base.model.parameters())


@pytest.mark.parametrize(
    ("name", "value", "spread", "is_lost"),
    [
        ("time_over_limit", 1.16, 0.02, False),  # within the spread
        ("time_over_limit", 1.18, 0.02, True),
        ("time_over_limit_wide", 1.30, 0.01, False),  # was never reached
        ("speedup_over_dense", 3.30, 0.10, True),
        ("speedup_over_dense", 3.45, 0.10, False),
    ],
)
def test_an_aim_is_lost_when_it_was_reached_and_is_missed_by_more_than_the_spread(name, value, spread, is_lost):
    assert bool(lost_aims({name: Ratio(value, spread)}, AIMS)) == is_lost


def test_a_ratio_is_taken_within_turns_so_that_a_slow_turn_weighs_nothing():
    turns = [{"a": 2.0, "b": 1.0}, {"a": 20.0, "b": 10.0}, {"a": 2.2, "b": 1.0}]

    ratio = Ratio.of(turns, "a", "b")

    assert (ratio.value, ratio.spread) == pytest.approx((2.0, 0.1))


def test_sketches_of_a_7b_shape_take_a_twentieth_of_the_dense_gradients_or_less():
    assert statistics_over_dense_bytes(8) < 0.05

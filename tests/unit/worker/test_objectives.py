import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2lora.errors import ObjectiveUnavailable
from d2lora.initializations import Dpo, Kto, Orpo, Sft
from d2lora.supervision import Supervision
from tests.unit.worker.conftest import all_dpo_losses
from worker.objectives import (
    Basis,
    Counts,
    Scores,
    bases_of,
    count,
    log_odds_ratio,
    objective_coefficients,
    resolve_objectives,
    row_losses,
    rows_measured,
    sequence_weights,
)

ALL = [Sft(), Dpo(beta=0.3), Orpo(beta=0.7)]
DPO_LOSSES = all_dpo_losses(beta=0.3)


def random_scores(rows: int, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, 30, (rows,), generator=generator) for _ in range(3)]
    logps = [-(0.05 + 3 * torch.rand(rows, generator=generator, dtype=torch.float64)) * t for t in tokens]
    return Scores(logps[0], tokens[0], logps[1], tokens[1], logps[2], tokens[2])


def autograd_sequence_gradient(objective, scores: Scores) -> torch.Tensor:
    """d mean loss / d (chosen and rejected log-probabilities), by autograd."""
    chosen = scores.chosen_logps.clone().requires_grad_()
    rejected = scores.rejected_logps.clone().requires_grad_()
    moved = dataclasses.replace(scores, chosen_logps=chosen, rejected_logps=rejected)
    row_losses(objective, moved, scores).mean().backward()
    return torch.cat([chosen.grad, torch.zeros_like(rejected) if rejected.grad is None else rejected.grad])


@settings(max_examples=40)
@given(rows=st.integers(1, 9), seed=st.integers(0, 10_000), beta=st.floats(0.01, 5.0))
def test_the_scalars_are_the_derivatives_of_the_losses(rows, seed, beta):
    scores = random_scores(rows, seed)
    objectives = [*ALL, *all_dpo_losses(beta=beta)]
    bases = bases_of(objectives)

    weights = objective_coefficients(objectives, bases, count(scores)) @ sequence_weights(bases, scores)

    for row, objective in zip(weights, objectives, strict=True):
        torch.testing.assert_close(row, autograd_sequence_gradient(objective, scores), rtol=1e-9, atol=1e-12)


def test_sft_averages_over_tokens_and_not_over_rows():
    scores = Scores(
        torch.tensor([-1.0, -30.0], dtype=torch.float64),
        torch.tensor([1, 10]),
        torch.zeros(2).double(),
        torch.tensor([1, 1]),
    )

    losses = row_losses(Sft(), scores, scores)

    assert losses.mean().item() == pytest.approx(31 / 11)


def test_dpo_starts_at_log_two_whatever_the_margin():
    scores = random_scores(5, 0)

    losses = row_losses(Dpo(beta=0.5), scores, scores)

    torch.testing.assert_close(losses, torch.full((5,), 2.0, dtype=torch.float64).log())


@pytest.mark.parametrize("objective", DPO_LOSSES, ids=lambda objective: objective.loss_type)
def test_every_dpo_loss_starts_alike_on_all_rows_and_falls_when_the_margin_grows(objective):
    scores = random_scores(5, 0)
    better = dataclasses.replace(
        scores, chosen_logps=scores.chosen_logps + 0.1, rejected_logps=scores.rejected_logps - 0.1
    )

    start = row_losses(objective, scores, scores)

    torch.testing.assert_close(start, start[:1].expand(5))
    assert (row_losses(objective, better, scores) < start).all()


@pytest.mark.parametrize("objective", DPO_LOSSES, ids=lambda objective: objective.loss_type)
def test_only_losses_of_mean_tokens_weigh_rows_by_their_lengths(objective):
    scores = random_scores(6, 1)
    bases = bases_of([objective])

    weights = objective_coefficients([objective], bases, count(scores)) @ sequence_weights(bases, scores)
    chosen, rejected = weights[0].split(6)

    if objective.loss_type in {"sigmoid_norm", "ipo"}:
        chosen, rejected = chosen * scores.chosen_tokens, rejected * scores.rejected_tokens
    assert bool((chosen == 0).all()) == (objective.loss_type == "apo_down")
    torch.testing.assert_close(chosen, chosen[:1].expand(6))
    torch.testing.assert_close(rejected, rejected[:1].expand(6))
    assert (rejected > 0).all()


def test_dpo_losses_of_summed_tokens_point_where_the_sigmoid_loss_does():
    summed = [one for one in DPO_LOSSES if one.loss_type not in {"sigmoid_norm", "ipo", "apo_down"}]

    assert bases_of(summed) == (Basis.MARGIN,)


def test_losses_far_from_the_start_stay_finite():
    scores = random_scores(3, 0)
    far = dataclasses.replace(scores, chosen_logps=scores.chosen_logps - 1e4, rejected_logps=scores.rejected_logps)

    for objective in DPO_LOSSES:
        assert torch.isfinite(row_losses(objective, far, scores)).all()
        assert torch.isfinite(row_losses(objective, scores, far)).all()


def labeled(scores: Scores) -> Scores:
    labels = torch.arange(len(scores.chosen_logps)) % 3 == 0
    return Scores(scores.chosen_logps, scores.chosen_tokens, desirable=labels)


@settings(max_examples=40)
@given(rows=st.integers(2, 9), seed=st.integers(0, 10_000), beta=st.floats(0.01, 5.0), weight=st.floats(0.1, 9.0))
def test_the_scalars_of_labeled_rows_are_the_derivatives_of_the_losses(rows, seed, beta, weight):
    scores = labeled(random_scores(rows, seed))
    objectives = [Sft(), Kto(beta=beta, desirable_weight=weight, undesirable_weight=1 / weight)]
    bases = bases_of(objectives)

    weights = objective_coefficients(objectives, bases, count(scores)) @ sequence_weights(bases, scores)

    assert bases == (Basis.LIKELIHOOD, Basis.UNDESIRABLE)
    for row, objective in zip(weights, objectives, strict=True):
        chosen = scores.chosen_logps.clone().requires_grad_()
        row_losses(objective, dataclasses.replace(scores, chosen_logps=chosen), scores).mean().backward()
        torch.testing.assert_close(row, chosen.grad, rtol=1e-9, atol=1e-12)


def test_undesirable_completions_are_not_imitated():
    scores = labeled(random_scores(5, 0))
    desirable = Scores(scores.chosen_logps[[0, 3]], scores.chosen_tokens[[0, 3]])

    losses = row_losses(Sft(), scores, scores)

    assert losses.mean().item() == pytest.approx(row_losses(Sft(), desirable, desirable).mean().item())
    assert losses[[1, 2, 4]].tolist() == [0, 0, 0]
    assert (rows_measured(Sft(), scores), rows_measured(Kto(), scores)) == (2, 5)


def test_rows_of_which_none_is_desirable_have_no_likelihood_and_no_division_by_zero():
    scores = random_scores(3, 0)
    scores = Scores(scores.chosen_logps, scores.chosen_tokens, desirable=torch.zeros(3, dtype=torch.bool))

    assert row_losses(Sft(), scores, scores).tolist() == [0, 0, 0]


def test_kto_starts_at_half_the_weights_and_falls_as_the_labels_ask():
    scores = labeled(random_scores(6, 0))
    objective = Kto(beta=0.5, desirable_weight=3.0)
    better = dataclasses.replace(scores, chosen_logps=scores.chosen_logps + torch.where(scores.desirable, 0.1, -0.1))

    start = row_losses(objective, scores, scores)

    assert start.tolist() == [1.5, 0.5, 0.5, 1.5, 0.5, 0.5]
    assert (row_losses(objective, better, scores) < start).all()


def test_a_gain_that_every_completion_has_is_no_gain():
    scores = dataclasses.replace(labeled(random_scores(6, 0)), mismatched_logps=torch.zeros(6, dtype=torch.float64))
    all_up, all_down = (
        dataclasses.replace(
            scores, chosen_logps=scores.chosen_logps + shift, mismatched_logps=scores.mismatched_logps + shift
        )
        for shift in (2.0, -2.0)
    )
    start = row_losses(Kto(), scores, scores)

    torch.testing.assert_close(row_losses(Kto(), all_up, scores), start)
    # The reference point stands for a divergence, which is not negative.
    assert (row_losses(Kto(), all_down, scores) > start)[scores.desirable].all()


@pytest.mark.parametrize("mean_logp", [-1e-9, -1e-5, -0.5, -0.7, -50.0, -800.0])
def test_the_log_odds_ratio_is_finite_and_antisymmetric_at_the_extremes(mean_logp):
    one = torch.ones(1, dtype=torch.int64)
    extreme, middle = torch.tensor([mean_logp], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)

    forth = log_odds_ratio(Scores(extreme, one, middle, one))
    back = log_odds_ratio(Scores(middle, one, extreme, one))

    assert torch.isfinite(forth).all()
    torch.testing.assert_close(forth, -back)


def test_the_log_odds_ratio_keeps_its_digits_near_certainty():
    one = torch.ones(1, dtype=torch.int64)
    certain, even = torch.tensor([-1e-6], dtype=torch.float64), torch.tensor([-(2.0**0.5)], dtype=torch.float64)

    ratio = log_odds_ratio(Scores(certain, one, even, one))

    import mpmath

    mpmath.mp.dps = 40
    odds = [mpmath.exp(x) / (1 - mpmath.exp(x)) for x in (mpmath.mpf(certain.item()), mpmath.mpf(even.item()))]
    assert ratio.item() == pytest.approx(float(mpmath.log(odds[0] / odds[1])), rel=1e-12)


def test_full_sequence_likelihood_counts_the_prompt_too():
    scores = random_scores(4, 3)

    losses = row_losses(Orpo(beta=1e-12, nll="full_sequence"), scores, scores)

    total = -(scores.chosen_logps + scores.prompt_logps).sum() / (scores.chosen_tokens + scores.prompt_tokens).sum()
    assert losses.mean().item() == pytest.approx(total.item(), rel=1e-9)


def test_objectives_default_to_all_that_the_rows_allow():
    resolved = {kind: [one.type for one in resolve_objectives(None, kind)] for kind in Supervision}

    assert resolved == {"completion": ["sft"], "preference": ["sft", "dpo", "orpo"], "label": ["sft", "kto"]}


@pytest.mark.parametrize(
    ("objective", "supervision", "needed"),
    [
        (Dpo(), Supervision.COMPLETION, "dpo needs rows with chosen"),
        (Orpo(), Supervision.LABEL, "orpo needs rows with chosen"),
        (Kto(), Supervision.PREFERENCE, "kto needs rows with a label"),
    ],
)
def test_an_objective_that_the_rows_do_not_allow_is_refused_by_name(objective, supervision, needed):
    with pytest.raises(ObjectiveUnavailable, match=needed):
        resolve_objectives([Sft(), objective], supervision)


def test_bases_are_shared_between_objectives():
    assert bases_of(ALL) == (Basis.LIKELIHOOD, Basis.MARGIN, Basis.ODDS)
    assert bases_of([Sft(), Dpo(loss_type="apo_down")]) == (Basis.LIKELIHOOD, Basis.MARGIN)
    assert bases_of([Orpo(nll="full_sequence")]) == (Basis.SEQUENCE, Basis.ODDS)


def test_counts_add():
    assert Counts(1, 2, 3) + Counts(10, 20, 30) == Counts(11, 22, 33)

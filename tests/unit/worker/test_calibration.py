import math
from dataclasses import replace

import pytest
import torch

from d2lora.initializations import Dpo, Kto, Sft
from tests.unit.worker.conftest import as_examples, reference_rows
from worker.batches import groups_in, make_batches
from worker.calibration import Examined, calibrate, failed_trial, together, trial
from worker.combining import Mixture
from worker.line_search import Change, Trial, first_step, line_search
from worker.low_rank import LowRank
from worker.objectives import Scores


def valley(bottom, *, depth=1.0, error=0.01, others=None):
    """A combined objective that falls to -depth at eta = bottom, on a logarithmic scale."""

    def evaluate(eta):
        evaluate.asked.append(eta)
        mean = depth * (math.log2(eta / bottom) ** 2 / 4 - 1)
        objectives = {"sft": Change(mean, error), **({} if others is None else {"dpo": others(eta)})}
        return Trial(eta, Change(mean, error), objectives, {})

    evaluate.asked = []
    return evaluate


@pytest.mark.parametrize("first", [0.25, 0.5, 1.0, 1.7, 4.0])
def test_the_search_finds_the_bottom_of_a_valley(first):
    evaluate = valley(1.0)

    found = line_search(evaluate, first, evaluations=5)

    assert found.accepted is not None
    assert abs(math.log2(found.accepted.eta)) < 0.35
    assert len(evaluate.asked) <= 5


@pytest.mark.parametrize(("first", "second"), [(0.3, 0.6), (1.0, 2.0), (5.0, 2.5)])
def test_a_first_step_that_falls_is_followed_by_a_longer_one_and_one_that_rises_by_a_shorter_one(first, second):
    evaluate = valley(1.0)

    line_search(evaluate, first, evaluations=5)

    assert evaluate.asked[:2] == [first, second]


def test_a_change_within_its_standard_error_is_not_accepted():
    found = line_search(valley(1.0, depth=0.01, error=0.02), 1.0, evaluations=5)

    assert found.accepted is None
    assert "standard error" in found.reason


def test_a_step_that_raises_another_objective_is_not_accepted():
    found = line_search(valley(1.0, others=lambda _: Change(0.5, 0.1)), 1.0, evaluations=5)

    assert found.accepted is None
    assert "raises dpo" in found.reason


def test_a_shorter_step_is_taken_when_the_best_one_raises_another_objective():
    found = line_search(valley(1.0, others=lambda eta: Change(0.5 if eta > 0.6 else -0.5, 0.1)), 1.0, evaluations=5)

    assert found.accepted is not None
    assert found.accepted.eta < 0.6


def test_steps_that_overflow_are_walked_away_from():
    def evaluate(eta):
        return failed_trial(eta, [Sft()]) if eta > 0.3 else valley(0.25)(eta)

    found = line_search(evaluate, 1.0, evaluations=5)

    assert found.accepted is not None
    assert found.accepted.eta <= 0.3


def confirming(evaluate):
    """The same on all rows, told apart by an error of its own."""

    def confirm(found):
        confirm.asked.append(found.eta)
        return evaluate(found.eta)

    confirm.asked = []
    return confirm


def test_a_step_that_pilot_rows_find_is_confirmed_once_on_all():
    pilot, whole = valley(1.0, error=5.0), valley(1.1)
    confirm = confirming(whole)

    found = line_search(pilot, 1.0, evaluations=5, confirm=confirm)

    assert confirm.asked == [1.0]
    assert found.trials == [found.accepted]
    assert found.accepted.combined == whole(1.0).combined
    assert [one.eta for one in found.pilot] == pilot.asked


def test_a_step_that_all_rows_do_not_support_gives_way_to_the_next_best_of_the_pilot():
    confirm = confirming(valley(1.0, others=lambda eta: Change(0.5 if eta > 0.6 else -0.5, 0.1)))

    found = line_search(valley(1.0), 1.0, evaluations=5, confirm=confirm)

    assert found.accepted.eta == 0.5
    assert confirm.asked[0] == 1.0
    assert [one.eta for one in found.trials] == confirm.asked


def test_what_no_rows_support_is_not_accepted_and_says_why():
    raised = line_search(
        valley(1.0), 1.0, evaluations=5, confirm=confirming(valley(1.0, others=lambda _: Change(0.5, 0.1)))
    )
    rising = lambda eta: Trial(eta, Change(eta, 0.01), {}, {})
    nothing = line_search(rising, 1.0, evaluations=5, confirm=confirming(valley(1.0)))

    assert raised.accepted is nothing.accepted is None
    assert "raises dpo" in raised.reason
    assert nothing.trials == []  # no pilot step falls, so there is none to confirm
    assert len(nothing.pilot) == 5


def test_steps_that_must_not_be_taken_are_passed_over():
    confirm = confirming(valley(1.0))

    plain = line_search(valley(1.0), 1.0, evaluations=5, keeps=lambda eta: eta < 0.9)
    confirmed = line_search(valley(1.0), 1.0, evaluations=5, confirm=confirm, keeps=lambda eta: eta < 0.9)

    assert plain.accepted.eta == confirmed.accepted.eta == 0.5
    assert confirm.asked == [0.5]


def held(sizes, *, paired=True):
    """Folds of batches of these sizes, each with scores that tell the rows."""
    folds, number = [], 0
    for fold, own in enumerate(sizes):
        batches = make_batches(
            as_examples(reference_rows(sum(own), paired=paired, seed=fold)),
            [fold] * sum(own),
            max_tokens=10_000,
            pad_token_id=0,
        )
        (whole,) = batches
        begin, parts = 0, []
        for size in own:
            rows = [*range(begin, begin + size)]
            values = torch.arange(number, number + size).double()
            tokens = torch.ones(size, dtype=torch.int64)
            parts.append((whole.part(rows), Scores(values, tokens, values, tokens)))
            begin, number = begin + size, number + size
        folds.append(parts)
    return folds


def numbers(examined):
    return [[int(value) for _, scores in fold for value in scores.chosen_logps] for fold in examined.held]


def test_pilot_rows_are_spread_over_every_fold_and_the_rest_is_all_others():
    whole = Examined([Sft(), Dpo()], held([[12, 8], [20], [1, 1, 18], [2]]), evaluator=lambda _: None)

    pilot, rest = whole.parted()

    assert [len(own) for own in numbers(pilot)] == [8, 8, 8, 2]
    assert numbers(pilot)[1] == [21, 23, 26, 28, 31, 33, 36, 38]
    for all_rows, first, second in zip(numbers(whole), numbers(pilot), numbers(rest), strict=True):
        assert sorted(first + second) == all_rows
    for part in (pilot, rest):
        for fold in part.held:
            for batch, scores in fold:
                assert batch.input_ids.shape[0] == 2 * len(batch.rows) == 2 * len(scores.chosen_logps)
    originals = {
        int(value): batch.input_ids[row]
        for fold in whole.held
        for batch, scores in fold
        for row, value in enumerate(scores.chosen_logps)
    }
    for fold in rest.held:
        for batch, scores in fold:
            for row, value in enumerate(scores.chosen_logps):
                assert torch.equal(batch.input_ids[row], originals[int(value)])


def test_pilot_rows_are_the_same_however_rows_are_batched():
    one, other = (Examined([Sft()], held(sizes), evaluator=lambda _: None) for sizes in ([[39, 1]], [[12, 2, 26]]))

    assert numbers(one.parted()[0]) == numbers(other.parted()[0])


@pytest.mark.parametrize("objectives", [[Sft()], [Kto()]])
def test_few_rows_and_those_of_kto_have_no_rest(objectives):
    folds = held([[8], [8], [8], [8]] if objectives == [Sft()] else [[40], [40]])

    pilot, rest = Examined(objectives, folds, evaluator=lambda _: None).parted()

    assert numbers(pilot) == numbers(Examined(objectives, folds, evaluator=lambda _: None))
    assert rest.batches == 0


def scores(chosen, rejected):
    tokens = torch.full((len(chosen),), 10)
    return Scores(torch.tensor(chosen).double(), tokens, torch.tensor(rejected).double(), tokens)


def test_a_trial_weighs_the_changes_and_gives_their_standard_errors():
    base, stepped = scores([-20.0, -30.0], [-25.0, -25.0]), scores([-18.0, -29.0], [-26.0, -27.0])

    result = trial(0.5, [Sft(), Dpo(beta=0.1)], torch.tensor([2.0, 3.0]).double(), base, stepped, groups=["a", "b"])

    sft = torch.tensor([-0.2, -0.1]).double()
    dpo = -torch.nn.functional.logsigmoid(torch.tensor([0.3, 0.3]).double()) - math.log(2)
    assert result.objectives["sft"].mean == pytest.approx(sft.mean().item())
    assert result.objectives["dpo"].mean == pytest.approx(dpo.mean().item())
    combined = 2 * sft + 3 * dpo
    assert result.combined.mean == pytest.approx(combined.mean().item())
    assert result.combined.error == pytest.approx(combined.std().item() / 2**0.5)
    assert result.nll["nll"].mean == pytest.approx(sft.mean().item())


def test_one_row_has_no_standard_error_and_supports_nothing():
    result = trial(0.5, [Sft()], torch.ones(1).double(), scores([-20.0], [-1.0]), scores([-2.0], [-1.0]), groups="a")

    assert result.combined.error == float("inf")
    assert not result.is_supported


def test_rows_of_a_group_count_as_one_sample():
    base = scores([-20.0, -30.0, -25.0], [-25.0] * 3)
    stepped = scores([-18.0, -29.0, -20.0], [-25.0] * 3)
    change = [-0.2, -0.1, -0.5]  # nats per token

    def error(groups, of=(0, 1, 2)):
        one, other = base.part(of), stepped.part(of)
        return trial(0.5, [Sft()], torch.ones(1).double(), one, other, groups=groups).combined.error

    mean = sum(change) / 3
    first, second = change[0] + change[2] - 2 * mean, change[1] - mean
    assert error(["b", "a", "b"]) == pytest.approx((2 / 1 * (first**2 + second**2)) ** 0.5 / 3)
    assert error(["c", "a", "b"]) == pytest.approx(torch.tensor(change).std().item() / 3**0.5)
    # Rows that are all there ten times tell no more than once, but for G / (G-1).
    assert error(["c", "a", "b"] * 10, [0, 1, 2] * 10) == pytest.approx(error(["c", "a", "b"]))
    assert error(["a"] * 3) == float("inf")


def test_calibration_judges_a_step_by_the_groups_of_its_rows():
    def found(copies):
        examples = as_examples([row for row in reference_rows(40, paired=False) for _ in range(copies)])
        (batch,) = make_batches(examples, [0] * len(examples), max_tokens=10**6, pad_token_id=0)
        tokens = torch.ones(len(examples), dtype=torch.int64)
        fold = [(batch, Scores(torch.full((len(examples),), -9.0).double(), tokens))]

        def evaluator(_):
            def scorer(held, _):
                rows = torch.tensor(
                    [examples[row].chosen.input_ids[0] for own in held for b, _ in own for row in b.rows]
                )
                return lambda eta: Scores(-9.0 + eta + rows.double() / 7, torch.ones_like(rows))

            return scorer

        mixture = Mixture(torch.ones(1).double(), torch.ones(1).double(), torch.ones(1, 1).double())
        direction = {"layer": LowRank(torch.ones(1, 1), torch.ones(1), torch.ones(1, 1), energy=1.0, missed=0.0)}
        one = Examined([Sft()], [fold], evaluator)
        return calibrate([one], mixture, [direction], on_progress=lambda *_: None).accepted.combined

    once, often = found(1), found(5)

    assert often.mean == pytest.approx(once.mean)
    assert often.error == pytest.approx(once.error)


def test_groups_in_batches_are_those_of_the_rows_whatever_their_order():
    rows = reference_rows(4, paired=True)
    rows[1] = replace(rows[1], prompt=rows[0].prompt)
    examples = as_examples([*rows, rows[2], replace(rows[0], rejected=rows[1].chosen)])
    (batch,) = make_batches(examples, [0] * 6, max_tokens=10_000, pad_token_id=0)
    parts = [batch.part([4, 1]), batch.part([0, 5, 3, 2])]

    known = dict(zip([row for part in parts for row in part.rows], groups_in(parts), strict=True))

    assert known[0] == known[1] == known[5]
    assert known[2] == known[4]
    assert len({known[0], known[2], known[3]}) == 3


def test_the_first_step_is_where_the_slope_alone_would_halve_the_loss():
    eta = first_step([2.0, 1.0], torch.tensor([0.5, 0.5]).double(), slope=0.25)

    assert 0.25 * eta == pytest.approx(0.5 * (0.5 * 2.0 + 0.5 * 1.0))


def test_trials_on_independent_rows_add_their_means_and_their_squared_errors():
    first = Trial(0.5, Change(-4.0, 3.0), {"a.sft": Change(-1.0, 0.5)}, {"a.nll": Change(-1.0, 0.5)})
    second = Trial(0.5, Change(-0.5, 4.0), {"b.dpo": Change(0.2, 0.1)}, {"b.nll": Change(0.0, 0.0)})

    both = together([first, second])

    assert (both.combined, both.falls) == (Change(-4.5, 5.0), False)
    assert (list(both.objectives), list(both.nll), both.risen) == (["a.sft", "b.dpo"], ["a.nll", "b.nll"], ["b.dpo"])
    assert together([first]) == first
    assert together([first, failed_trial(0.5, [Sft()], "b.")]).combined.mean == float("inf")

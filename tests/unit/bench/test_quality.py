"""The arithmetic of the comparison, and that nobody gets more than the others."""

import json
import math
import shutil

import pytest
from scipy import stats

from bench.quality import grid
from bench.quality.aims import aims
from bench.quality.choosing import choose
from bench.quality.curves import first_reach, mean_height, median, paired_interval, value_at
from bench.quality.datasets import general_rows, in_batches, splits
from bench.quality.generation import answer_of
from bench.quality.grid import Cell, Protocol, Task
from bench.quality.store import Store
from bench.quality.summary import check_same_batches, shown_command, summarize

PROTOCOL = Protocol(steps=4, batch=2)
TASK = Task(name="t", kind="text", trainer="sft")


def cell(initializer="vanilla", rate=0.1, seed=0, phase="tune", **changes):
    return Cell(
        **{
            "phase": phase,
            "model": "m",
            "model_identity": "a",
            "task": TASK,
            "rows_identity": "b",
            "general_identity": None,
            "questions_identity": None,
            "rows": 8,
            "initializer": initializer,
            "learning_rate": rate,
            "seed": seed,
            "chosen_step": None,
            "protocol": PROTOCOL,
            "code": "c",
            "versions": {"torch": "1"},
        }
        | changes
    )


def record(losses, *, of=None, batches="same", base=4.0):
    of = of or cell()
    curve = [{"step": step, "seconds": 2.0 * step, "cpu_seconds": step, "loss": loss} for step, loss in losses.items()]
    return {
        "cell": of.model_dump(),
        "base": {"loss": base},
        "initialization": {"seconds": 3.0, "cpu_seconds": 1.0},
        "curve": curve,
        "batches": batches,
        "details": {str(step): {"row_losses": [loss, loss]} for step, loss in losses.items()},
        "hardware": {"processor": "p"},
        "commit": "0",
        "failed": None,
    }


def test_a_target_between_two_measured_steps_is_reached_between_them():
    curve = [(0, 4.0), (2, 3.0), (4, 1.0), (8, 2.0)]

    assert first_reach(curve, 2.0) == 3.0
    assert first_reach(curve, 5.0) == 0
    assert first_reach(curve, 1.0) == 4


def test_a_target_that_is_never_reached_is_infinitely_far_and_counts_in_the_median():
    assert first_reach([(0, 4.0), (2, 3.0)], 2.9) == math.inf
    assert median([3.0, math.inf, math.inf]) == math.inf
    assert median([3.0, 5.0, math.inf]) == 5.0


def test_a_run_that_comes_back_from_infinity_reaches_the_target_where_it_was_measured():
    assert first_reach([(0, math.inf), (4, 1.0)], 2.0) == 4


def test_the_mean_height_of_a_straight_line_is_its_middle():
    assert mean_height([(0, 4.0), (1, 3.5), (8, 0.0)]) == pytest.approx(2.0)
    assert value_at([(0, 4.0), (8, 0.0)], 6) == 1.0


def test_a_paired_interval_is_scipys():
    ours, theirs = [1.0, 2.5, 2.0, 4.0], [1.5, 2.0, 3.0, 4.5]

    interval = paired_interval(ours, theirs)

    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_a_pair_whose_seeds_differ_alike_has_a_narrow_interval():
    interval = paired_interval([1.0, 11.0, 21.0], [2.0, 12.0, 22.0])

    assert (interval.mean, interval.low, interval.high) == (-1.0, -1.0, -1.0)


def test_a_single_pair_supports_no_interval():
    assert paired_interval([1.0], [2.0]).low == -math.inf


def test_rate_and_step_of_the_lowest_mean_validation_loss_are_chosen():
    tune = [
        record({0: 4.0, 2: 1.0, 4: 3.0}, of=cell(rate=0.1, seed=0)),
        record({0: 4.0, 2: 3.0, 4: 3.0}, of=cell(rate=0.1, seed=1)),
        record({0: 4.0, 2: 2.5, 4: 1.8}, of=cell(rate=0.2, seed=0)),
        record({0: 4.0, 2: 2.5, 4: 1.8}, of=cell(rate=0.2, seed=1)),
    ]

    choice = choose(tune)["m", "t", 8, "vanilla"]

    assert (choice.learning_rate, choice.step, choice.validation_loss) == (0.2, 4, 1.8)
    assert choice.at_edge == "highest"
    assert [(test.phase, test.chosen_step, test.seed) for test in choice.test_cells([1, 2])] == [
        ("test", 4, 1),
        ("test", 4, 2),
    ]


def test_a_rate_that_diverges_for_one_seed_is_not_chosen():
    tune = [
        record({0: 4.0, 4: 0.1}, of=cell(rate=0.2, seed=0)),
        record({0: 4.0, 4: None}, of=cell(rate=0.2, seed=1)),
        record({0: 4.0, 4: 3.0}, of=cell(rate=0.1, seed=0)),
        record({0: 4.0, 4: 3.0}, of=cell(rate=0.1, seed=1)),
    ]

    assert choose(tune)["m", "t", 8, "vanilla"].learning_rate == 0.1


def test_the_test_split_takes_no_part_in_choosing():
    with pytest.raises(ValueError, match="test split"):
        choose([record({0: 1.0}, of=cell(phase="test", chosen_step=0))])


def test_no_rate_gets_more_seeds_than_another():
    tune = [record({0: 1.0}, of=cell(rate=0.1, seed=seed)) for seed in (0, 1)]

    with pytest.raises(ValueError, match="same seeds"):
        choose([*tune, record({0: 0.5}, of=cell(rate=0.2, seed=0))])


def write(folder, *names, rows=40):
    for name in names:
        lines = [json.dumps({"text": f"{name} {number}"}) for number in range(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def cut(folder, **changes):
    arguments = {"rows": 8, "seed": 0, "validation_rows": 6, "test_rows": 5, "with_test": False}
    return splits(folder, "text", "sft", **arguments | changes)


def test_while_tuning_the_test_file_is_not_even_opened(tmp_path):
    write(tmp_path, "train")

    assert cut(tmp_path).test is None
    with pytest.raises(FileNotFoundError):
        cut(tmp_path, with_test=True)


def test_held_out_validation_rows_are_the_same_for_all_and_never_trained_on(tmp_path):
    write(tmp_path, "train")

    parts = [cut(tmp_path, seed=seed, rows=rows) for seed, rows in ((0, 8), (1, 16), (2, 34))]

    assert parts[0].validation == parts[1].validation == parts[2].validation
    assert not any(row in part.validation for part in parts for row in part.train)
    assert parts[0].train != parts[1].train[:8]


def test_more_rows_begin_with_the_fewer(tmp_path):
    write(tmp_path, "train")

    assert cut(tmp_path, rows=16).train[:8] == cut(tmp_path, rows=8).train


def test_too_few_rows_are_refused_by_number(tmp_path):
    write(tmp_path, "train")

    with pytest.raises(ValueError, match="35 rows wanted, and 34 are left"):
        cut(tmp_path, rows=35)


def test_text_that_starts_learn_from_is_never_measured(tmp_path):
    write(tmp_path, "general")

    general = general_rows(tmp_path / "general.jsonl", 8, 16)

    assert (len(general.measured), len(general.learned)) == (8, 16)
    assert not [row for row in general.learned if row in general.measured]
    assert general.measured == general_rows(tmp_path / "general.jsonl", 8, 0).measured


def test_rows_that_do_not_fit_are_in_no_split(tmp_path):
    write(tmp_path, "train", "test")

    parts = cut(tmp_path, rows=14, with_test=True, fits=lambda row: int(row["text"].split()[1]) % 2 == 0)

    numbers = [int(row["text"].split()[1]) for row in parts.train + parts.validation + parts.test]
    assert len(numbers) == 14 + 6 + 5
    assert all(number % 2 == 0 for number in numbers)


def test_every_pass_sees_every_row_once_in_another_order():
    rows = [{"text": str(number)} for number in range(6)]

    ordered = in_batches(rows, seed=0, steps=6, batch=2)

    by_text = lambda part: sorted(row["text"] for row in part)
    assert by_text(ordered[:6]) == by_text(ordered[6:]) == by_text(rows)
    assert ordered[:6] != ordered[6:]
    assert ordered == in_batches(rows, seed=0, steps=6, batch=2)


def test_another_number_of_anything_is_another_cell():
    changes = [{"rows": 9}, {"seed": 1}, {"rate": 0.2}, {"initializer": "pissa"}, {"code": "d"}, {"rows_identity": "x"}]

    fingerprints = {cell(**change).fingerprint for change in [{}, *changes]}

    assert len(fingerprints) == 7
    assert cell().fingerprint == cell().fingerprint


@pytest.mark.parametrize("name", ["d2lora/initialization_spec.py", "d2lora/objectives.py", "d2lora/methods.py"])
def test_other_defaults_of_requests_are_other_code_for_ours_alone(monkeypatch, tmp_path, name):
    def identities(copy):
        for folder in ("bench/quality", "d2lora", "worker"):
            shutil.copytree(grid.ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        with (copy / name).open("a") as file:
            file.write(f"# {copy.name}\n")
        with monkeypatch.context() as patched:
            patched.setattr(grid, "ROOT", copy)
            return [grid.code_identity(initializer) for initializer in ("ours", "pissa")]

    first, second = identities(tmp_path / "a"), identities(tmp_path / "b")

    assert first[0] != second[0]
    assert first[1] == second[1]


def test_a_write_that_breaks_off_leaves_no_record(tmp_path):
    store = Store(tmp_path / "cells")

    with pytest.raises(ValueError, match="JSON"):
        store.write(cell(), {"loss": math.nan})

    assert not store.has(cell())
    store.write(cell(), {"loss": 1.0})
    assert store.read([cell(seed=1), cell()]) == [{"loss": 1.0}]


def both(ours, **changes):
    tune = [record(losses, of=cell(name)) for name, losses in (("vanilla", {0: 4.0, 2: 2.0, 4: 3.0}), ("ours", ours))]
    choices = choose(tune)
    test = [
        record(losses, of=cell(name, phase="test", chosen_step=2), **(changes if name == "ours" else {}))
        for name, losses in (("vanilla", {0: 4.0, 2: 2.0, 4: 2.5}), ("ours", ours))
    ]
    return summarize(test, choices, [], command="c")["groups"][0]["entries"]


def test_a_summary_counts_steps_coverage_and_seconds_to_vanillas_best():
    vanilla, ours = both({0: 3.0, 2: 1.0, 4: 1.5})

    assert (vanilla["steps_to_target"], ours["steps_to_target"]) == (2.0, 1.0)
    assert (vanilla["step_0_covers"], ours["step_0_covers"]) == (0.0, 0.5)
    assert ours["seconds_to_target"] == 3.0 + 2.0
    assert (ours["best_loss"], ours["best_loss_difference"]["mean"]) == (1.0, -1.0)


def test_a_loss_that_vanilla_reaches_and_others_do_not_is_said():
    _, ours = both({0: 3.9, 2: 3.0, 4: 3.5})

    assert ours["steps_to_target"] is None
    assert (ours["reached"], ours["seeds"]) == (0, 1)


def test_the_page_says_which_aims_are_reached():
    figures = {"forgetting_at_target": 0.01, "rouge_l_last": 0.3, "steps_to_accuracy": 4.0}
    vanilla, ours = both({0: 3.0, 2: 1.0, 4: 1.5})
    worse = ours | {"initializer": "ours_worse", "step_0_covers": 0.49, "best_loss": 2.1, "steps_to_target": None}
    worse |= {"forgetting_at_target": 0.02, "rouge_l_last": 0.31, "steps_to_accuracy": 2.1}
    better = ours | {"forgetting_at_target": 0.01, "rouge_l_last": 0.33, "steps_to_accuracy": 2.0}
    eva = vanilla | {"initializer": "eva", "best_loss": 2.05, "steps_to_target": 1.5}
    slow = eva | {"initializer": "lora_ga", "steps_to_target": None}

    verdicts = dict(aims([vanilla | figures, better, worse, slow, eva]))

    assert verdicts == {
        "half of the way to vanilla's best loss at step 0": ["50%, reached", "49%, missed"],
        "vanilla's best loss in half of its steps, 1": ["1.0, reached", "missed, not reached"],
        "as soon as the best of PEFT's, 1.5": ["1.0, reached", "missed, not reached"],
        "a best loss below all others', 2.000 (vanilla)": ["1.000, reached", "2.100, missed"],
        "ROUGE-L 0.02 above vanilla's at the last step, 0.320": ["0.330, reached", "0.310, missed"],
        "vanilla's preference accuracy in half of its steps, 2": ["2.0, reached", "2.1, missed"],
        "at vanilla's best loss, general text no worse than with it, +0.010": ["+0.010, reached", "+0.020, missed"],
    }


@pytest.mark.parametrize(
    ("theirs", "title", "verdict"),
    [
        (0.0, "as soon as the best of PEFT's, 0.0", "1.0, missed"),
        (None, "as soon as the best of PEFT's, none of which reaches it", "1.0, reached"),
    ],
)
def test_peft_is_beaten_where_it_is_slower_or_never_there(theirs, title, verdict):
    vanilla, ours = both({0: 3.0, 2: 1.0, 4: 1.5})
    lora_ga = vanilla | {"initializer": "lora_ga", "steps_to_target": theirs}

    assert dict(aims([vanilla, ours, lora_ga]))[title] == [verdict]


def test_steps_to_an_accuracy_end_where_it_first_rises_to_vanillas():
    def by_preference(name, accuracies):
        run = record({0: 4.0, 2: 2.0, 4: 2.5}, of=cell(name, phase="test", chosen_step=2))
        for point, accuracy in zip(run["curve"], accuracies, strict=True):
            point["accuracy"] = accuracy
        return run

    choices = choose([record({0: 4.0, 2: 2.0, 4: 2.5}, of=cell(name)) for name in ("vanilla", "ours")])
    runs = [by_preference("vanilla", [0.5, 0.7, 0.6]), by_preference("ours", [0.6, 0.8, 0.9])]

    vanilla, ours = summarize(runs, choices, [], command="c")["groups"][0]["entries"]

    assert vanilla["steps_to_accuracy"] == 2.0
    assert ours["steps_to_accuracy"] == pytest.approx(1.0)


def test_other_batches_than_vanillas_are_no_comparison():
    with pytest.raises(ValueError, match="other batches"):
        both({0: 3.0, 2: 1.0, 4: 1.5}, batches="other")
    with pytest.raises(ValueError, match="other batches or seeds"):
        check_same_batches({"vanilla": [record({0: 1.0})], "ours": []})


def test_the_shown_command_has_no_directories_of_this_machine():
    shown = shown_command(
        ["run", "--model", "tiny=/a/b/tiny", "--task", "t:text:sft=/a/rows", "--general", "/x/g.jsonl"]
    )

    assert shown == "python -m bench.quality run --model tiny=tiny --task t:text:sft=rows --general g.jsonl"


@pytest.mark.parametrize(
    ("text", "number"),
    [("so\n#### 1,200", "1200"), ("#### -3", "-3"), ("#### $5.50 is it", "5.5"), ("12", None), ("#### 7.0", "7")],
)
def test_the_answer_is_the_number_after_the_marks(text, number):
    assert answer_of(text) == number

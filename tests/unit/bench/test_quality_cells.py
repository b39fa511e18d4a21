"""Cells that really run: same tokens and batches for all, the same numbers again, and nothing that runs twice."""

import pytest
import torch

from bench.quality import ours, peft_starts, running
from bench.quality.cell import load, run
from bench.quality.choices import Question, questions, right_answers
from bench.quality.datasets import read, splits
from bench.quality.encoding import encode, fits
from bench.quality.grid import Plan
from bench.quality.initializers import INITIALIZERS
from bench.quality.measuring import Held, mean_loss, score_all
from bench.quality.running import run_plans
from bench.quality.smoke import smoke_plans, write_smoke_places
from bench.quality.starts import Start
from bench.quality.store import Store

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and its dependencies' own


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_smoke_places(tmp_path_factory.mktemp("smoke"), None)


@pytest.fixture(scope="module")
def plan():
    (plan,) = smoke_plans()
    protocol = plan.protocol.model_copy(update={"steps": 3, "generation_rows": 2, "new_tokens": 4})
    tasks = tuple(task.model_copy(update={"initializers": None}) for task in plan.tasks)
    return Plan(
        tasks=tasks,
        rows=(8,),
        initializers=("vanilla", "pissa", "lora_ga", "ours_calibrated"),
        learning_rates=(1e-2,),
        seeds=(0,),
        protocol=protocol,
    )


@pytest.fixture(scope="module")
def cells(plan, places):
    return {(cell.task.name, cell.initializer): cell for cell in plan.tune_cells(places)}


@pytest.mark.parametrize("task", ["sums", "triage-dpo", "triage-orpo"])
def test_every_initializer_is_trained_on_the_same_batches_and_starts_from_the_same_base(cells, places, task):
    records = [run(cell, places) for (name, _), cell in cells.items() if name == task]

    assert len(records) == 4
    assert len({record["batches"] for record in records}) == 1
    assert len({record["base"]["loss"] for record in records}) == 1
    assert len({record["curve"][-1]["loss"] for record in records}) == 4
    assert records[0]["curve"][0]["loss"] == records[0]["base"]["loss"]  # LoRA's start is the base itself


def test_running_a_choice_again_measures_the_same_training(cells, places):
    tune = cells["titles", "vanilla"]

    once = run(tune, places)
    test = run(tune.model_copy(update={"phase": "test", "chosen_step": 3}), places)

    losses = lambda record, what: [point[what] for point in record["curve"]]
    assert losses(once, "general_loss") == losses(test, "general_loss")
    assert losses(once, "loss") != losses(test, "loss")  # other rows
    assert once["details"] == {}
    assert len(test["details"]["3"]["rouge_l"]) == 2
    assert len(test["details"]["3"]["untrained"]) == len(test["base"]["untrained"]) == 8


def test_a_loss_is_trls_on_the_same_rows(places, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(places.models["smoke"])
    rows = read(places.folders["sums"] / "train.jsonl", "gsm8k", "sft")[:4]
    config = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False)
    trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        theirs = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss.item()

    held = Held(rows, tokenizer, max_length=96)

    assert [encode(row, "completion", tokenizer, max_length=96).ids for row in rows] == [
        row["input_ids"] for row in trainer.train_dataset
    ]
    scores = score_all(model, held)
    assert mean_loss("sft", scores, scores, beta=0.1).item() == pytest.approx(theirs, rel=1e-5)


def test_a_completion_that_would_be_cut_does_not_fit_and_a_text_does(places):
    _, tokenizer = load(places.models["smoke"])
    row = {"prompt": "Abstract: one\nTitle:", "completion": " two three"}
    length = len(encode(row, "completion", tokenizer, max_length=99).ids)

    assert fits(row, tokenizer, max_length=length)
    assert not fits(row, tokenizer, max_length=length - 1)
    assert not fits({"prompt": "p", "chosen": " a", "rejected": " a" * 99}, tokenizer, max_length=length)
    assert fits({"text": "one two " * 99}, tokenizer, max_length=length)


def test_rows_of_a_task_are_split_into_parts_that_share_nothing(places):
    folder = places.folders["triage-dpo"]
    parts = splits(folder, "preference", "dpo", rows=16, seed=3, validation_rows=16, test_rows=16, with_test=True)

    texts = [{row["prompt"] + row["chosen"] for row in part} for part in (parts.train, parts.validation, parts.test)]
    assert not (texts[0] & texts[1])
    assert not (texts[0] & texts[2])
    assert not (texts[1] & texts[2])


@pytest.mark.parametrize(
    ("initializer", "module", "maker"), [("ours_calibrated", ours, "initialize"), ("eva", peft_starts, "eva")]
)
def test_learning_rates_share_a_start_and_what_it_cost(
    cells, places, tmp_path, monkeypatch, initializer, module, maker
):
    cell = cells["titles", "ours_calibrated"].model_copy(update={"initializer": initializer})
    places = places.model_copy(update={"starts": tmp_path / "starts"})
    alone = run(cell, places.model_copy(update={"starts": None}))

    once = run(cell, places)
    monkeypatch.setattr(module, maker, None)
    shared = run(cell.model_copy(update={"learning_rate": 1e-3}), places)

    assert alone["curve"][0]["loss"] == once["curve"][0]["loss"] == shared["curve"][0]["loss"]
    assert once["curve"][-1]["loss"] != shared["curve"][-1]["loss"]
    assert once["initialization"] == shared["initialization"]
    assert once["initialization"]["cpu_seconds"] > 0
    with pytest.raises(TypeError):  # other rows are another start
        run(cell.model_copy(update={"seed": 1}), places)


def test_a_kept_start_of_eva_trains_as_pefts_own(cells, places, monkeypatch):
    cell = cells["titles", "vanilla"].model_copy(update={"initializer": "eva"})
    kept = run(cell, places)
    monkeypatch.setitem(INITIALIZERS, "eva", lambda work: Start(peft_starts.eva(work), {}))

    own = run(cell, places)

    losses = lambda record: [point["loss"] for point in record["curve"]]
    assert losses(kept) == losses(own)


def test_what_is_there_is_not_run_again(plan, places, tmp_path, monkeypatch, capsys):
    one = Plan(**plan.model_dump() | {"tasks": plan.tasks[:1], "initializers": ("vanilla",)})
    store = Store(tmp_path)
    (cell,) = one.tune_cells(places)
    store.write(cell, run(cell, places))
    ran = []

    def instead(phase, missing, *_, **__):
        ran.extend((phase, cell) for cell in missing if not store.has(cell))

    monkeypatch.setattr(running, "_run_cells", instead)

    run_plans([one], places, store, processes=1, threads=1)

    assert [phase for phase, _ in ran] == ["test"]
    assert ran[0][1].initializer == "vanilla"


def test_bfloat16_changes_a_loss_by_its_rounding_alone(places):
    model, tokenizer = load(places.models["smoke"])
    rows = read(places.folders["sums"] / "train.jsonl", "gsm8k", "sft")[:8]
    exact, rounded = (
        score_all(model, Held(rows, tokenizer, max_length=96, autocast=autocast)).chosen for autocast in (False, True)
    )

    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=2**-8, atol=0)


def test_a_row_may_hold_any_line_separator(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n{"text": "four"}\n', encoding="utf-8")

    assert [row["text"] for row in read(path, "text", "sft")] == ["one\u2028two\x85three", "four"]


def test_the_likeliest_completion_of_a_question_is_the_answer(places):
    model, tokenizer = load(places.models["smoke"])
    asked = [
        *questions(places.questions, 4),
        Question("Three or more?", ("the correct answer is a", "the correct answer is b", "none"), 2),
    ]

    right = right_answers(model, asked, tokenizer, max_length=96, autocast=False)

    one_by_one = []
    for question in sorted(asked, key=lambda question: len(question.completions)):
        logps = [
            score_all(model, Held([{"prompt": question.prompt, "completion": text}], tokenizer, max_length=96)).chosen
            for text in question.completions
        ]
        one_by_one.append(float(torch.cat(logps).argmax() == question.right))
    assert right == one_by_one


def test_a_question_without_its_answer_format_is_refused(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"instruction": "Which?", "answer": "answer1"}\n')

    with pytest.raises(ValueError, match=r"questions\.jsonl: answer 'answer1' is not in the answer format"):
        questions(path, 1)

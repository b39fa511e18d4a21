"""A small grid that runs every part of the bench in minutes, on rows made in code and the project's own example."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.quality.grid import ROOT, Places, Plan, Protocol, Task
from bench.quality.initializers import INITIALIZERS
from cluster.tiny_model import tiny_llama

_THINGS = ("apples", "pears", "nails", "cups", "books")

_FEW = ("vanilla", "lora_ga", "ours_calibrated")


def smoke_plans() -> list[Plan]:
    """Return the grids; their figures mean nothing, they only show that everything runs."""
    protocol = Protocol(
        r=4,
        lora_alpha=8,
        steps=8,
        batch=4,
        max_length=96,
        validation_rows=16,
        test_rows=16,
        general_rows=8,
        retain_rows=8,
        questions=8,
        generation_rows=8,
        new_tokens=16,
    )
    tasks = (
        Task(name="sums", kind="gsm8k", trainer="sft"),
        Task(name="titles", kind="titles", trainer="sft", initializers=_FEW),
        Task(name="triage-dpo", kind="preference", trainer="dpo", initializers=_FEW),
        Task(name="triage-orpo", kind="preference", trainer="orpo", initializers=_FEW),
    )
    return [
        Plan(
            tasks=tasks,
            rows=(16,),
            initializers=tuple(INITIALIZERS),
            learning_rates=(1e-3, 1e-2),
            seeds=(0,),
            protocol=protocol,
        )
    ]


def write_smoke_places(directory: Path, model: str | None) -> Places:
    """Write rows, and a tiny model unless one is given, into a directory."""
    folders = {name: directory / name for name in ("sums", "titles", "triage-dpo", "triage-orpo")}
    for folder in folders.values():
        folder.mkdir()
    for split, begin, end in (("train", 0, 64), ("validation", 64, 96), ("test", 96, 128)):
        _write(folders["sums"] / f"{split}.jsonl", [_sum(number) for number in range(begin, end)])
        _write(folders["titles"] / f"{split}.jsonl", [_title(number) for number in range(begin, end)])
    for name in ("triage-dpo", "triage-orpo"):
        shutil.copy(ROOT / "examples" / "support_triage.jsonl", folders[name] / "train.jsonl")
        shutil.copy(ROOT / "examples" / "support_triage_eval.jsonl", folders[name] / "test.jsonl")
    general = directory / "general.jsonl"
    _write(general, [{"text": f"There were {number} {_THINGS[number % 5]} on the table."} for number in range(32)])
    questions = directory / "questions.jsonl"
    _write(questions, [_question(number) for number in range(8)])
    if model is None:
        model = str(directory / "model")
        tiny_llama().save_pretrained(model)
        _tokenizer().save_pretrained(model)
    return Places(models={"smoke": model}, folders=folders, general=general, questions=questions)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the characters that the rows have; 0 pads, 1 begins, 2 ends."""
    characters = ["\n", *map(chr, range(32, 125))]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: 3 + i for i, c in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))  # noqa: S106  # a token of text
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("pad_token", "bos_token", "eos_token"), vocabulary, strict=False)),
    )


def _sum(number: int) -> dict[str, str]:
    first, second, thing = number % 13 + 2, number % 7 + 1, _THINGS[number % 5]
    total = first + second
    answer = f"{first}+{second}=<<{first}+{second}={total}>>{total}\n#### {total}"
    return {"question": f"Ann has {first} {thing} and gets {second}. How many?", "answer": answer}


def _title(number: int) -> dict[str, str]:
    thing, other = _THINGS[number % 5], _THINGS[(number + 2) % 5]
    return {"abstract": f"We count {thing} and {other} in {number} rooms.", "title": f"Counting {thing} and {other}"}


def _question(number: int) -> dict[str, str]:
    thing, other = _THINGS[number % 5], _THINGS[(number + 2) % 5]
    instruction = f"Which are {thing}?\n\nAnswer1: {other}. Answer2: {thing}.\n\nAnswer format: answer1/answer2"
    return {"instruction": instruction, "answer": "answer2"}


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

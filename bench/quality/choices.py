"""Accuracy on multiple-choice questions that nothing was trained on: what a start may make a model forget."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from bench.quality.datasets import HELD_OUT, shuffled
from bench.quality.measuring import Held, score_all

_OPTIONS = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)\s*$")


@dataclass(frozen=True)
class Question:
    """A prompt, completions of which one is right, and the right one's number."""

    prompt: str
    completions: tuple[str, ...]
    right: int


def questions(path: Path, count: int) -> list[Question]:
    """Return the first questions of a fixed shuffle of a file's rows (instruction, answer).

    Raises:
        ValueError: an instruction does not end with its answer format, or the answer is not among those.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = shuffled([json.loads(line) for line in lines if line.strip()], HELD_OUT)
    return [_question(path.name, row) for row in rows[:count]]


def right_answers(
    model: nn.Module, asked: Sequence[Question], tokenizer: PreTrainedTokenizerBase, *, max_length: int, autocast: bool
) -> list[float]:
    """Return 1 for every question whose right completion is the most probable one, and 0 for the others."""
    right: list[float] = []
    for options in sorted({len(question.completions) for question in asked}):
        group = [question for question in asked if len(question.completions) == options]
        rows = [
            {"prompt": question.prompt, "completion": completion}
            for question in group
            for completion in question.completions
        ]
        held = Held(rows, tokenizer, max_length=max_length, autocast=autocast)
        answers = score_all(model, held).chosen.view(-1, options).argmax(1).tolist()
        right += [float(answer == question.right) for answer, question in zip(answers, group, strict=True)]
    return right


def _question(name: str, row: dict[str, str]) -> Question:
    instruction, answer = row["instruction"], row["answer"]
    options = found[1].split("/") if (found := _OPTIONS.search(instruction)) else []
    if answer not in options:
        raise ValueError(f"{name}: answer {answer!r} is not in the answer format that ends the instruction")
    completions = tuple(f"the correct answer is {option}" for option in options)
    return Question(f"{instruction}\n\n", completions, options.index(answer))

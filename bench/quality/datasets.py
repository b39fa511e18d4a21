"""Rows of the folders that the bench is given, in TRL's formats, and the splits.

A folder has ``train.jsonl``, ``test.jsonl`` and perhaps ``validation.jsonl``. Without the last, validation rows are
held out of ``train``, the same ones for every seed and size.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["gsm8k", "titles", "preference", "text"]
Row = dict[str, str]
HELD_OUT = 20240229
"""Seed of the shuffles that do not depend on a cell's seed."""


@dataclass(frozen=True)
class Splits:
    """What a cell may see; ``test`` is None while learning rates are chosen."""

    train: list[Row]
    """The cell's rows, in the seed's order."""
    validation: list[Row]
    test: list[Row] | None


@dataclass(frozen=True)
class General:
    """Rows of general text, the same for all seeds."""

    measured: list[Row]
    """Forgetting is measured on these alone."""
    learned: list[Row]
    """Some starts learn from these; none of them is measured."""


def splits(
    folder: Path,
    kind: Kind,
    trainer: str,
    *,
    rows: int,
    seed: int,
    validation_rows: int,
    test_rows: int,
    with_test: bool,
    fits: Callable[[Row], bool] = lambda _: True,
) -> Splits:
    """Return the splits; ``train`` is the first ``rows`` of the seed's shuffle.

    Rows that do not fit are passed over everywhere: cut off, they would have nothing to learn.

    Raises:
        ValueError: fewer rows than asked for, or a row without a field that the kind needs.
    """

    def fitting(name: str) -> list[Row]:
        return [row for row in read(folder / name, kind, trainer) if fits(row)]

    pool = fitting("train.jsonl")
    if (folder / "validation.jsonl").exists():
        validation = shuffled(fitting("validation.jsonl"), HELD_OUT)[:validation_rows]
    else:
        mixed = shuffled(pool, HELD_OUT)
        validation, pool = mixed[:validation_rows], mixed[validation_rows:]
    train = shuffled(pool, seed)[:rows]
    if len(train) < rows:
        raise ValueError(f"{folder.name}: {rows} rows wanted, and {len(train)} are left beside the validation rows")
    test = None
    if with_test:
        test = shuffled(fitting("test.jsonl"), HELD_OUT)[:test_rows]
    return Splits(train, validation, test)


def in_batches(rows: list[Row], *, seed: int, steps: int, batch: int) -> list[Row]:
    """Return the rows of every step in order: whole passes over the rows, each shuffled by seed and pass."""
    ordered: list[Row] = []
    turn = 0
    while len(ordered) < steps * batch:
        ordered += shuffled(rows, 1000 * (seed + 1) + turn)
        turn += 1
    return ordered[: steps * batch]


def general_rows(path: Path, measured: int, learned: int) -> General:
    """Return the first rows of a fixed shuffle of a file of ``text`` rows, as measured ones and, after them, others."""
    rows = shuffled(read(path, "text", "sft"), HELD_OUT)
    return General(rows[:measured], rows[measured : measured + learned])


def read(path: Path, kind: Kind, trainer: str) -> list[Row]:
    """Return a file's rows as the trainer takes them."""
    lines = path.read_text(encoding="utf-8").split("\n")  # a row may hold other separators
    rows = [_row(json.loads(line), kind, trainer) for line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path.name}: no rows")
    return rows


def _row(record: dict[str, Any], kind: Kind, trainer: str) -> Row:
    match kind:
        case "gsm8k":
            row = {"prompt": f"Question: {record['question']}\nAnswer:", "completion": f" {record['answer']}"}
        case "titles":
            row = {"prompt": f"Abstract: {record['abstract']}\nTitle:", "completion": f" {record['title']}"}
        case "text":
            row = {"text": record["text"]}
        case "preference":
            # The completion must begin with a break of its own; rows that bring one keep theirs.
            chosen, rejected = (_apart(record["prompt"], record[name]) for name in ("chosen", "rejected"))
            if trainer == "sft":
                return {"prompt": record["prompt"], "completion": chosen}
            return {"prompt": record["prompt"], "chosen": chosen, "rejected": rejected}
    if trainer != "sft":
        raise ValueError(f"rows of kind {kind} have no rejected completion, which {trainer} needs")
    return row


def _apart(prompt: str, completion: str) -> str:
    return completion if completion[:1].isspace() or prompt[-1:].isspace() else f"\n\n{completion}"


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    """Return the rows in the order that the seed decides."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[index] for index in order.tolist()]

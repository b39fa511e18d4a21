"""What is measured: the cells of the grid, and what makes one the same as another.

A cell says nothing of this machine's paths: models and rows are known by their labels and digests.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from bench.quality.datasets import Kind
from d2lora.initializations import Frozen
from d2lora.models import LocalModel, locate

ROOT = Path(__file__).resolve().parents[2]
Trainer = Literal["sft", "dpo", "orpo"]

_DECIDING = ("datasets", "encoding", "starts", "peft_starts", "training", "measuring", "generation", "choices", "cell")
"""Modules of this package that decide every cell's numbers."""


class Protocol(Frozen):
    """How every cell of a plan trains and is measured."""

    r: int = 8
    lora_alpha: int = 16
    steps: int = 64
    batch: int = 8
    max_length: int = 512
    validation_rows: int = 64
    test_rows: int = 128
    general_rows: int = 32
    retain_rows: int = 64
    """Further rows of general text, none of those that are measured, for the starts that learn from such text."""
    questions: int = 64
    generation_rows: int = 64
    new_tokens: int = 96
    beta: float = 0.1
    """Of DPO and ORPO."""
    autocast: bool = False
    """Whether training and measuring multiply matrices in bfloat16. Jobs of ours do too then; PEFT's starts do not."""

    def measured_at(self) -> list[int]:
        """Return the steps at which losses are measured: dense at the start, where initializations differ."""
        dense = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
        return [step for step in dense if step < self.steps] + [self.steps]


class Task(Frozen):
    """Rows of a kind, and the trainer that learns from them."""

    name: str
    kind: Kind
    trainer: Trainer
    initializers: tuple[str, ...] | None = None
    """Instead of the plan's."""


class Cell(Frozen):
    """One training run; equal cells give equal numbers."""

    phase: Literal["tune", "test"]
    """``tune`` never opens the test split; ``test`` runs again what the validation split chose."""
    model: str
    model_identity: str
    task: Task
    rows_identity: str
    general_identity: str | None
    questions_identity: str | None
    rows: int
    initializer: str
    learning_rate: float
    seed: int
    chosen_step: int | None
    """Where the validation loss was best; known to ``test`` alone."""
    protocol: Protocol
    code: str
    versions: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Return what names the cell's file."""
        text = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def group(self) -> tuple[str, str, int]:
        """Return what is compared with each other: everything but initializer, learning rate and seed."""
        return self.model, self.task.name, self.rows

    def __str__(self) -> str:
        return (
            f"{self.phase} {self.model} {self.task.name} {self.rows} rows {self.initializer} "
            f"lr {self.learning_rate:g} seed {self.seed}"
        )


class Places(Frozen):
    """Where this machine has what the cells name."""

    models: dict[str, str]
    """Label -> directory, GGUF file or hub ID."""
    folders: dict[str, Path]
    """Task's name -> folder with train.jsonl, test.jsonl and perhaps validation.jsonl."""
    general: Path | None = None
    """A file of ``text`` rows, for forgetting and for the starts that learn from general text."""
    questions: Path | None = None
    """A file of multiple-choice rows (instruction, answer) of no task that is trained, for forgetting too."""
    starts: Path | None = None
    """Where starts that cost much are kept, for the learning rates to share; None keeps none."""


class Plan(Frozen):
    """A grid; every initializer gets all of it."""

    tasks: tuple[Task, ...]
    rows: tuple[int, ...]
    initializers: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    """Of the test split."""
    protocol: Protocol
    tune_seeds: tuple[int, ...] | None = None
    """Among which learning rates are chosen, for every initializer alike; all ``seeds`` when None."""

    def tune_cells(self, places: Places) -> Iterator[Cell]:
        """Yield the cells among which learning rates are chosen; seeds come last, so that a broken run has pairs."""
        versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
        general, questions = (None if path is None else digest([path]) for path in (places.general, places.questions))
        for seed in self.tune_seeds or self.seeds:
            for label, path in places.models.items():
                for task in self.tasks:
                    folder = places.folders[task.name]
                    rows_identity = digest(sorted(folder.glob("*.jsonl")))
                    for rows in self.rows:
                        for initializer in task.initializers or self.initializers:
                            for learning_rate in self.learning_rates:
                                yield Cell(
                                    phase="tune",
                                    model=label,
                                    model_identity=model_identity(path),
                                    task=task.model_copy(update={"initializers": None}),
                                    rows_identity=rows_identity,
                                    general_identity=general,
                                    questions_identity=questions,
                                    rows=rows,
                                    initializer=initializer,
                                    learning_rate=learning_rate,
                                    seed=seed,
                                    chosen_step=None,
                                    protocol=self.protocol,
                                    code=code_identity(initializer),
                                    versions=versions,
                                )


def code_identity(initializer: str) -> str:
    """Return a digest of the sources that decide a cell's numbers; for ours the worker's and requests' defaults too."""
    paths = [ROOT / "bench" / "quality" / f"{name}.py" for name in _DECIDING]
    if initializer.startswith(("ours", "random", "warmup")):
        paths += [ROOT / "bench" / "quality" / "ours.py", *sorted((ROOT / "worker").glob("*.py"))]
        paths += [ROOT / "d2lora" / f"{name}.py" for name in ("initialization_spec", "objectives", "methods")]
    return digest(paths)


def model_identity(path: str) -> str:
    """Return a digest of a local model's weights, or a hub model's ID."""
    place = locate(path)
    return digest(place.weight_files) if isinstance(place, LocalModel) else place.id


def digest(paths: Iterable[Path]) -> str:
    """Return a digest over names and contents."""
    return _digest(tuple(paths))


@cache
def _digest(paths: tuple[Path, ...]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(path.name.encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:20]

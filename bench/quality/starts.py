"""What an initializer is given, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.quality.datasets import Row
from bench.quality.grid import Protocol, Trainer


@dataclass(frozen=True)
class Work:
    """What an initializer is given."""

    base: PreTrainedModel
    """A copy of its own: it may be changed."""
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    """The rows that training will see."""
    trainer: Trainer
    protocol: Protocol
    seed: int
    model: str
    """Where the base model is."""
    directory: Path
    """Empty, for files."""
    general: list[Row]
    """Rows of general text that nothing is measured on; none where the grid has no such text."""
    kept: Path | None = None
    """Where starts of files are kept for cells that differ in the learning rate alone."""


@dataclass(frozen=True)
class Start:
    """A model that is ready to be trained."""

    model: PeftModel
    about: dict[str, Any]
    """What the initializer says of itself; goes into the record."""


Initializer = Callable[[Work], Start]

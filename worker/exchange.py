"""What the runner and the mathematics of a job that is cut into shards hand each other: files and what they are.

Without torch, so that the runner may know these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from d2lora.shards import EvaluationTask, StatisticsTask

ROWS = "rows.safetensors"
"""Name of a statistics task's input file."""


@dataclass(frozen=True)
class Split:
    """A job that was cut instead of built."""

    plan: Path
    """What the build needs to know beside the shards' files."""
    shards: list[tuple[StatisticsTask, Path]]
    """Each shard's task and rows, in the order in which their sums are added up."""


@dataclass(frozen=True)
class ShardOutput:
    """What a task leaves behind."""

    files: list[Path]
    """Of a statistics task, in the task's directory."""
    scores: dict[str, Any] | None
    """Of an evaluation task, as JSON; floats keep all their digits."""


@dataclass(frozen=True)
class ShardFiles:
    """A finished shard: its rows, and the files that its task left behind."""

    rows: Path
    statistics: list[Path]


class Share(Protocol):
    """Lets any worker take part in the tasks."""

    def __call__(self, files: Mapping[str, Path], tasks: Sequence[EvaluationTask]) -> list[dict[str, Any]]:
        """Return the tasks' scores in the order of the tasks.

        The files are made available under these names first; a name that was there at an earlier call is still the
        same file.
        """

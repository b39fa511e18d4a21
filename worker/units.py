"""The seam between the runner, which knows store and storage, and the mathematics, which knows files in directories.

Torch-free, so that the runner is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from d2lora.datasets import DatasetFile
from d2lora.initializations import Frozen, InitializationSpec, Phase, Result
from d2lora.roles import Role
from d2lora.shards import EvaluationTask, ShardTask, StatisticsTask

ROWS = "rows.safetensors"
"""Name under which a statistics task expects its rows."""

KEPT = "statistics"
"""Directory inside a unit's own: statistics that the job is to keep."""
BASE = "based-on"
"""Directory inside a unit's own: statistics of the job that the request is based on; absent if there are none."""
KEPT_INDEX = "index.json"
"""In both of them, what the other files are."""


class KeptHead(Frozen):
    """What can be said of kept statistics without reading them."""

    format: int
    files: list[str]
    """All of them, by name."""
    r: int
    """The LoRA rank that the sketches were made for."""
    rows: int


OnProgress = Callable[[Phase, int, int], None]
"""Told (phase, done, total) at least once per batch; may raise, which stops the unit."""


@dataclass(frozen=True)
class Split:
    """A job that is to be cut: the plan for its builder, and the rows of every shard."""

    plan: Path
    shards: list[tuple[StatisticsTask, Path]]


@dataclass(frozen=True)
class ShardOutput:
    """What a shard leaves behind: files of sums, or scores that JSON can carry."""

    files: list[Path]
    scores: dict[str, Any] | None = None


@dataclass(frozen=True)
class ShardFiles:
    """A finished shard's input and the files that came out of it, as its builder sees them."""

    rows: Path
    sums: list[Path]


@runtime_checkable
class Share(Protocol):
    """Lets any worker take part in a calibration."""

    def __call__(self, files: Mapping[str, Path], tasks: Sequence[EvaluationTask]) -> list[dict[str, Any]]:
        """Return the scores of the tasks, in their order; ``files`` are what they need, by the names they use.

        The same names come again for the next step size and are not stored twice.
        """


@runtime_checkable
class Work(Protocol):
    """What a worker can do with files; `worker.initialization` does it."""

    def initialize(
        self,
        spec: InitializationSpec,
        dataset: DatasetFile,
        extras: Mapping[Role, DatasetFile],
        out: Path,
        on_progress: OnProgress,
    ) -> Result | Split:
        """Write the adapter's files into a directory, or the shards' if the job is large.

        ``extras`` are the further datasets that the request names.
        """

    def initialize_jointly(
        self,
        spec: InitializationSpec,
        datasets: Sequence[DatasetFile],
        evaluations: Mapping[int, DatasetFile],
        out: Path,
        on_progress: OnProgress,
    ) -> Result:
        """Write the files of the one adapter for several datasets, or of one for each, into a directory.

        ``evaluations`` measure on the objectives of the dataset in that place.
        """

    def run_shard(
        self, spec: InitializationSpec, task: ShardTask, directory: Path, on_progress: OnProgress
    ) -> ShardOutput:
        """Do one shard, whose input files are in the directory."""

    def finish(
        self,
        spec: InitializationSpec,
        plan: Path,
        shards: Iterable[ShardFiles],
        extras: Mapping[Role, DatasetFile],
        out: Path,
        share: Share,
        on_progress: OnProgress,
    ) -> Result:
        """Write the adapter's files into a directory, from the shards' sums.

        ``shards`` are in order; the files of one are there until the next is asked for.
        """

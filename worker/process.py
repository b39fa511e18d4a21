"""What a worker process keeps between units, however it is woken: connections, settings, and loaded models."""

import logging
import os
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from d2lora.datasets import DatasetFile
from d2lora.initializations import InitializationSpec, Phase, Result
from d2lora.roles import Role
from d2lora.scratch import remove_leftovers
from d2lora.settings import DatabaseSettings, StorageSettings, WorkerSettings
from d2lora.shards import ShardTask
from d2lora.storage import open_storage
from d2lora.store import Store
from worker.runner import Runner
from worker.units import OnProgress, ShardFiles, ShardOutput, Share, Split

log = logging.getLogger(__name__)


@dataclass
class RealWork:
    """`worker.units.Work` by `worker.initialization`, which imports torch when the first unit needs it."""

    settings: WorkerSettings
    may_split: bool

    def initialize(
        self,
        spec: InitializationSpec,
        dataset: DatasetFile,
        extras: Mapping[Role, DatasetFile],
        out: Path,
        on_progress: OnProgress,
    ) -> Result | Split:
        """See `worker.units.Work`."""
        on_progress(Phase.LOADING, 0, 1)
        from worker.initialization import initialize  # noqa: PLC0415  # seconds of imports

        return initialize(
            spec,
            dataset,
            extras,
            out=out,
            settings=self.settings,
            on_progress=on_progress,
            load=self._load,
            may_split=self.may_split,
        )

    def initialize_jointly(
        self,
        spec: InitializationSpec,
        datasets: Sequence[DatasetFile],
        evaluations: Mapping[int, DatasetFile],
        out: Path,
        on_progress: OnProgress,
    ) -> Result:
        """See `worker.units.Work`."""
        on_progress(Phase.LOADING, 0, 1)
        from worker.joint_initialization import initialize_jointly  # noqa: PLC0415  # seconds of imports

        return initialize_jointly(
            spec, datasets, evaluations, out=out, settings=self.settings, on_progress=on_progress, load=self._load
        )

    def run_shard(
        self, spec: InitializationSpec, task: ShardTask, directory: Path, on_progress: OnProgress
    ) -> ShardOutput:
        """See `worker.units.Work`."""
        on_progress(Phase.LOADING, 0, 1)
        from worker.initialization import run_shard  # noqa: PLC0415  # seconds of imports

        return run_shard(spec, task, directory, settings=self.settings, on_progress=on_progress, load=self._load)

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
        """See `worker.units.Work`."""
        on_progress(Phase.LOADING, 0, 1)
        from worker.initialization import finish  # noqa: PLC0415  # seconds of imports

        return finish(
            spec,
            plan,
            shards,
            extras,
            out=out,
            settings=self.settings,
            on_progress=on_progress,
            share=share,
            load=self._load,
        )

    @cached_property
    def _load(self) -> Any:
        """The `worker.model_cache.Loader` that all units of this process share."""
        from worker.model_cache import ModelCache  # noqa: PLC0415  # seconds of imports

        return ModelCache(int(self.settings.model_cache_gib * 2**30)).load

    def warm_up(self) -> None:
        """Do what takes seconds before the first unit needs it."""
        import worker.initialization  # noqa: F401, PLC0415  # seconds of imports


@contextmanager
def open_runner(*, stop: threading.Event) -> Iterator[Runner]:
    """Give a runner as the environment describes it."""
    settings = WorkerSettings()
    remove_leftovers("job")
    with Store(DatabaseSettings()) as store:
        yield Runner(
            store.leases,
            open_storage(StorageSettings()),
            RealWork(settings, may_split=True),
            settings,
            worker=f"{socket.gethostname()}:{os.getpid()}",
            stop=stop,
        )

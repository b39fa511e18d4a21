"""The builder's side of a shared calibration: offer the parts, take part, and wait for those that others hold."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2lora.claims import Claim, ShardClaim, StoredFile
from d2lora.leases import Leases
from d2lora.settings import WorkerSettings
from d2lora.shards import EvaluationTask
from worker.files import Files

_POLL_SECONDS = 0.1


@dataclass
class Sharing:
    """Implements `worker.units.Share` over the queue of record."""

    claim: Claim
    leases: Leases
    files: Files
    settings: WorkerSettings
    worker: str
    check: Callable[[], None]
    """Raises when the build must stop."""
    help_out: Callable[[ShardClaim, Path], None]
    _stored: dict[str, StoredFile] = field(default_factory=dict)

    def __call__(self, files: Mapping[str, Path], tasks: Sequence[EvaluationTask]) -> list[dict[str, Any]]:
        """Return the scores of the tasks; see `worker.units.Share`."""
        directory = self.files.directory / "shared"
        directory.mkdir(exist_ok=True)
        for name, path in files.items():
            if name not in self._stored:
                self.check()
                self._stored[name] = self.files.put_shared(self.claim, name, path)
                (directory / name).hardlink_to(path)
        numbers = self.leases.share(self.claim, [(task, [self._stored[name] for name in task.files]) for task in tasks])
        while numbers is not None:
            self.check()
            shard = self.leases.claim_shard(
                self.worker,
                lease=self.settings.lease,
                max_attempts=self.settings.max_attempts,
                initialization_id=self.claim.id,
            )
            if shard is not None:
                self.help_out(shard, directory)
                continue
            outcomes = self.leases.outcomes(self.claim, numbers)
            scores = [outcome.scores for outcome in outcomes if outcome is not None and outcome.scores is not None]
            if len(scores) == len(numbers):
                return scores
            time.sleep(_POLL_SECONDS)
        while True:  # the claim is lost; the next check says so
            self.check()
            time.sleep(_POLL_SECONDS)

"""``python -m tests.chaos.worker_entry run``: the real worker, which obeys orders at the moments that it reaches.

The wrapping is done on import, since a child that is spawned imports its parent's main module anew.
"""

import sys

import worker.process
from d2lora.leases import Leases
from d2lora.storage import open_storage
from d2lora.store import Store
from tests.chaos.orders import lift_limits, reach
from worker.process import RealWork


class ObedientWork(RealWork):
    """The real work; every progress is a moment named like its phase."""

    def initialize(self, spec, dataset, extras, out, on_progress):
        try:
            return super().initialize(spec, dataset, extras, out, _obediently(on_progress))
        finally:
            lift_limits()

    def run_shard(self, spec, task, directory, on_progress):
        reach("shard")
        try:
            return super().run_shard(spec, task, directory, _obediently(on_progress))
        finally:
            lift_limits()

    def finish(self, spec, plan, shards, extras, out, share, on_progress):
        reach("gathered")
        try:
            return super().finish(spec, plan, shards, extras, out, share, _obediently(on_progress))
        finally:
            lift_limits()


class ObedientLeases(Leases):
    """The real queue of record, with moments around its steps."""

    def claim(self, *arguments, **options):
        reach("claim")
        claim = super().claim(*arguments, **options)
        if claim is not None:
            reach("claimed")
        return claim

    def split(self, *arguments):
        reach("split")
        return super().split(*arguments)

    def finish_shard(self, *arguments):
        reach("shard_finish")
        return super().finish_shard(*arguments)

    def succeed(self, *arguments):
        reach("published")
        done = super().succeed(*arguments)
        reach("succeeded")
        return done


class ObedientStore(Store):
    """A store whose leases are obedient."""

    def __init__(self, settings):
        super().__init__(settings)
        self.leases = ObedientLeases(self._engine)


def open_obedient_storage(settings):
    """Return the real storage, with moments before its transfers."""
    storage = open_storage(settings)
    put_file, get_file = storage.put_file, storage.get_file

    def put(key, path, sha256, *, only_if_absent=False):
        reach(_upload(key, only_if_absent))
        return put_file(key, path, sha256, only_if_absent=only_if_absent)

    def get(key, path, sha256):
        reach("fetch")
        return get_file(key, path, sha256)

    storage.put_file, storage.get_file = put, get
    return storage


def _upload(key, only_if_absent):
    """Return the moment before an upload: of a split's rows, a build's directions, a shard's sums, or the result."""
    _, shards, name = key.partition("/shards/")
    if not shards:
        return "manifest" if only_if_absent else "upload"
    return f"{name.partition('-')[0]}_upload" if name.startswith(("split-", "build-")) else "shard_upload"


def _obediently(on_progress):
    def progress(phase, done, total):
        on_progress(phase, done, total)
        reach(str(phase))

    return progress


worker.process.RealWork = ObedientWork
worker.process.Store = ObedientStore
worker.process.open_storage = open_obedient_storage

if __name__ == "__main__":
    from worker.__main__ import main

    sys.exit(main())

"""A job in shards on one machine: every task is worked on here, one after another, in directories as workers have."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from worker.initialization import ROWS, finish, initialize, run_shard
from worker.units import ShardFiles


@dataclass
class Alone:
    """A `worker.units.Share` that nobody else takes part in; remembers what it was asked."""

    spec: object
    directory: Path
    settings: object
    load: object
    asked: list = field(default_factory=list)
    known: dict = field(default_factory=dict)

    def __call__(self, files, tasks):
        for name, path in files.items():
            content = path.read_bytes()
            assert self.known.setdefault(name, content) == content, "a name stands for one file"
        answers = []
        for task in tasks:
            place = self.directory / f"task-{len(self.asked)}"
            place.mkdir(parents=True)
            for name in task.files:
                (place / name).write_bytes(self.known[name])
            self.asked.append(task)
            output = run_shard(
                self.spec, task, place, settings=self.settings, on_progress=lambda *_: None, load=self.load
            )
            assert output.files == []
            answers.append(output.scores)
            shutil.rmtree(place)
        return answers


def gather(spec, split, directory, *, settings, load, order=lambda numbers: numbers):
    """Work on all shards, in some order, and return their files in the order of the shards."""
    done = {}
    for number in order(range(len(split.shards))):
        task, rows = split.shards[number]
        place = directory / f"shard-{number}"
        place.mkdir(parents=True)
        shutil.copy(rows, place / ROWS)
        output = run_shard(spec, task, place, settings=settings, on_progress=lambda *_: None, load=load)
        assert output.scores is None
        done[number] = ShardFiles(place / ROWS, output.files)
    return [done[number] for number in sorted(done)]


def cut(spec, dataset, extras, directory, *, settings, load):
    """Return the job in shards; their files lie in the directory."""
    directory.mkdir(parents=True)
    return initialize(
        spec,
        dataset,
        extras,
        out=directory,
        settings=settings,
        on_progress=lambda *_: None,
        load=load,
        may_split=True,
    )


def build(spec, split, shards, extras, directory, *, settings, load):
    """Build the adapter into ``directory / "out"``."""
    out = directory / "out"
    out.mkdir(parents=True)
    share = Alone(spec, directory / "tasks", settings, load)
    return finish(
        spec,
        split.plan,
        shards,
        extras,
        out=out,
        settings=settings,
        on_progress=lambda *_: None,
        share=share,
        load=load,
    )

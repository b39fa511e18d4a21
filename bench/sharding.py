"""What cutting a job into shards costs, and how even the shards are.

    python -m bench.sharding [--shards 8] [--rows 240] [--r 8]

On a small random Llama, with one thread: processor time of the statistics of all rows at once, of every shard, and of
adding the shards up. The speed of two workers that each take the next free shard follows from these times by counting;
transfers and the queue are not in it. The last line is one JSON object.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.subjects import small_llama
from d2lora.initializations import InitializationSpec, LoraSpec
from d2lora.settings import WorkerSettings
from d2lora.supervision import Supervision
from worker.data import Example, TokenSequence
from worker.evidence import Intake
from worker.gathering import deal_batches, gather_statistics
from worker.objectives import bases_of, resolve_objectives
from worker.shard_files import read_batches, sha256
from worker.sharding import count_tokens, gather_shard, merge, read_plan, split
from worker.units import ShardFiles


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--r", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    subject = small_llama(96, arguments.r)
    base, targets, examples = subject.base, subject.targets, pairs(arguments.rows)
    spec = InitializationSpec(base_model="random", dataset_id="any", lora=LoraSpec(r=arguments.r))
    limit = -(-count_tokens(examples) // arguments.shards)
    settings = WorkerSettings(device="cpu", max_tokens_per_batch=1024, shard_tokens=limit)
    bases = bases_of(resolve_objectives(None, Supervision.PREFERENCE))
    common: dict[str, Any] = {"settings": settings, "on_progress": lambda *_: None}

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        batches = deal_batches(base, spec, examples, settings=settings)
        gather_statistics(base, targets, spec, batches[:2], bases, directory=directory, **common)  # warm
        whole = seconds(lambda: gather_statistics(base, targets, spec, batches, bases, directory=directory, **common))
        used = len(examples)
        nothing: dict[str, Any] = {"truncated": 0, "dropped": {}, "mean_tokens": {}, "warnings": [], "columns": {}}
        rows = Intake(sha256="", extras={}, read=used, used=used, supervision=Supervision.PREFERENCE, **nothing)
        cut = split(base, spec, examples, rows, directory=directory, seconds=dict, **common)
        shards, files = [], []
        for number, (_, path) in enumerate(cut.shards):
            place = directory / str(number)
            place.mkdir()

            def work(path: Path = path, place: Path = place) -> None:
                own, made_from = read_batches(path)[1], sha256(path)
                sums = gather_shard(base, targets, spec, own, made_from=made_from, directory=place, **common)
                files.append(ShardFiles(path, sums))

            shards.append(seconds(work))
        plan = read_plan(cut.plan)
        adding = seconds(
            lambda: merge(base, targets, spec, plan, files, directory=directory, on_progress=common["on_progress"])
        )
        stored = sum(path.stat().st_size for one in files for path in one.sums)

    result = {
        "shards": len(shards),
        "tokens": [task.tokens for task, _ in cut.shards],
        "whole_seconds": round(whole, 2),
        "shard_seconds": [round(value, 2) for value in shards],
        "adding_seconds": round(adding, 2),
        "stored_mib": round(stored / 2**20, 1),
        "cost_of_cutting": round((sum(shards) + adding) / whole, 3),
        "two_workers_times_as_fast": round(sum(shards) / makespan(shards, 2), 3),
    }
    print(f"{subject.name}, r = {arguments.r}: shards and their sum cost {result['cost_of_cutting']} times the pass")
    print(f"over all rows at once; two workers gather {result['two_workers_times_as_fast']} times as fast as one")
    print(json.dumps(result))


def pairs(count: int) -> list[Example]:
    """Return preference rows of random tokens and of lengths from 24 to 160."""
    source = random.Random(0)  # noqa: S311  # no secret

    def sequence() -> TokenSequence:
        length = source.randint(24, 160)
        ids = [source.randrange(5, 4096) for _ in range(length)]
        return TokenSequence(ids, [index > length // 2 for index in range(length)])

    return [Example(str(number), sequence(), sequence()) for number in range(count)]


def makespan(costs: list[float], workers: int) -> float:
    """Return when the last of the workers is done, each taking the next free shard."""
    free = [0.0] * workers
    for cost in costs:
        free[free.index(min(free))] += cost
    return max(free)


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()

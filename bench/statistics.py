"""Time of the statistics pass against its limit and its peers; ``make bench`` runs this.

    python -m bench.statistics [--subjects smollm2 small wide 7b] [--turns 5] [--r 8] [--update] [--clock wall]

Sides, warm and in one process, taking turns on the same batch of preference pairs:

    a   ours, all three objectives                       a1  ours, SFT alone, on the chosen sequences
    b   the limit: a plain forward and activations-only backward over the batch
    c   PEFT's LoRA-GA, ``preprocess_loraga``, SFT alone, on the chosen sequences, without dropout
    d   dense weight gradients of SFT, DPO (with its reference forward) and ORPO in turn

On a CPU every side has one thread, and what counts is the processor time of this process: other load changes it little.
With ``--clock wall``, and with CUDA, it is the time that passes, with all threads.

A ratio is the median over turns of the ratio within a turn; its spread is half the distance from the smallest to the
largest. The last line is one JSON object. The exit status is 1 if an aim that ``results/aims.json`` says was reached
is lost by more than the spread.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from bench import dense
from bench.subjects import Subject, shape_of_7b, small_llama, smollm2, target_layers, whole_7b, wide_layer
from worker.gathering import sketch_shape
from worker.matrices import TestMatrices
from worker.objectives import Basis
from worker.sketch_files import SketchFile
from worker.sketching import Sketch
from worker.statistics import gather, plain_pass

ROOT = Path(__file__).resolve().parent.parent
AIMS = ROOT / "bench" / "results" / "aims.json"
BASES = (Basis.LIKELIHOOD, Basis.MARGIN, Basis.ODDS)
SUBJECTS: dict[str, tuple[Callable[[int, int], Subject], int]] = {
    "smollm2": (smollm2, 768),
    "small": (small_llama, 1536),
    "wide": (wide_layer, 768),
    "7b": (whole_7b, 6144),
}
"""How each is made, and the tokens of its batch."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of two sides, turn by turn."""

    value: float
    spread: float

    @staticmethod
    def of(turns: list[dict[str, float]], over: str, under: str) -> "Ratio":
        """Return the median over turns, and half the range."""
        ratios = [turn[over] / turn[under] for turn in turns]
        return Ratio(median(ratios), (max(ratios) - min(ratios)) / 2)

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.spread:.3f}"


def measure(subject: Subject, *, r: int, turns: int, clock: Callable[[], float]) -> list[dict[str, float]]:
    """Return seconds of every side, turn by turn; each side has run once before."""
    matrices = TestMatrices(0, subject.base.device)
    shapes = {name: sketch_shape(module, rank=r) for name, module in subject.targets.items()}

    def ours(name: str, bases: tuple[Basis, ...]) -> Callable[[], object]:
        batch = subject.batch if len(bases) > 1 else subject.chosen

        def work() -> None:
            # A fold of its own every time: opening the file and making it final belong to the pass.
            with SketchFile(Path(directory) / name, "sketch", shapes, bases=len(bases), matrices=matrices) as file:
                sums = file.accumulators()
                file.finish(gather(subject.base, subject.targets, sums, [batch], bases, on_batch=lambda *_: None))

        return work

    with tempfile.TemporaryDirectory() as directory:
        sides: dict[str, Callable[[], object]] = {
            "b": lambda: plain_pass(subject.base, subject.targets, subject.batch),
            "a": ours("three", BASES),
            "c": lambda: dense.lora_ga(subject),
            "a1": ours("one", BASES[:1]),
            "d": lambda: dense.three_objectives(subject),
        }
        for work in sides.values():
            work()
        return [{name: _seconds(work, clock) for name, work in sides.items()} for _ in range(turns)]


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    began = clock()
    work()
    if cuda:
        torch.cuda.synchronize()
    return clock() - began


def memory_over_limit(r: int) -> float:
    """Return the peak memory above the weights over the limit's, as ``bench.memory`` measures it."""
    command = [sys.executable, "-m", "bench.memory", "--tokens", "2048", "--r", str(r)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["memory_over_limit"])


def statistics_over_dense_bytes(r: int) -> float:
    """Return the bytes of a fold's sketches over those of its dense gradients, on Llama-2-7B's shape; by arithmetic."""
    sketched = whole = 0
    for module in target_layers(shape_of_7b(), r).values():
        shape = sketch_shape(module, rank=r)
        for dtype, size in Sketch.layout(shape, len(BASES)).values():
            sketched += math.prod(size) * {"F32": 4, "F64": 8}[dtype]
        whole += len(BASES) * shape.in_features * shape.out_features * 4
    return sketched / whole


def lost_aims(measured: Mapping[str, Ratio], aims: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a line for every aim that was reached and is now missed by more than the spread."""
    lines = []
    for name, ratio in measured.items():
        aim, reached = aims[name]["aim"], aims[name]["reached"]
        higher_is_better = name.startswith("speedup")
        was_reached = reached >= aim if higher_is_better else reached <= aim
        missed_by = aim - ratio.value if higher_is_better else ratio.value - aim
        if was_reached and missed_by > ratio.spread:
            lines.append(f"{name}: {ratio}, and the aim {aim} was reached with {reached}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=None)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="wall" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--update", action="store_true", help="write the measured values to results/aims.json")
    arguments = parser.parse_args()
    clock = time.perf_counter
    if arguments.clock == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    if arguments.subjects is None:
        subjects = [name for name in SUBJECTS if name != "7b" or torch.cuda.is_available()]
    else:
        subjects = arguments.subjects

    measured: dict[str, Ratio] = {}
    threads = torch.get_num_threads()
    print(f"r = {arguments.r}, {arguments.turns} turns, {arguments.clock} time, {threads} threads; seconds are medians")
    for key in subjects:
        make, tokens = SUBJECTS[key]
        subject = make(tokens, arguments.r)
        turns = measure(subject, r=arguments.r, turns=arguments.turns, clock=clock)
        measured |= _report(key, subject, turns)
        del subject
    if arguments.subjects is None:
        measured["memory_over_limit"] = Ratio(memory_over_limit(arguments.r), 0.01)
    measured["statistics_over_dense_bytes"] = Ratio(statistics_over_dense_bytes(arguments.r), 0.0)

    aims = json.loads(AIMS.read_text(encoding="utf-8"))
    lost = lost_aims(measured, aims)
    for line in lost:
        print(f"lost: {line}")
    if arguments.update:
        for name, ratio in measured.items():
            aims[name] |= {"reached": round(ratio.value, 3), "spread": round(ratio.spread, 3)}
        AIMS.write_text(json.dumps(aims, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: round(measured[name].value, 3) for name in aims if name in measured}))
    return 1 if lost else 0


def _report(key: str, subject: Subject, turns: list[dict[str, float]]) -> dict[str, Ratio]:
    """Print a subject's table, and return what it contributes to the last line."""
    ratios = {pair: Ratio.of(turns, *pair.split("/")) for pair in ("a/b", "a1/b", "c/b", "d/b", "d/a", "a1/c", "a/c")}
    print(f"\n{subject.name}: {subject.about}")
    for side in turns[0]:
        taken = [turn[side] for turn in turns]
        print(f"  {side:3} {median(taken):8.3f} s   ({min(taken):.3f} to {max(taken):.3f})")
    for pair, ratio in ratios.items():
        print(f"  {pair:5} {ratio}")
    sys.stdout.flush()
    match key:
        case "smollm2":
            return {
                "time_over_limit": ratios["a/b"],
                "speedup_over_dense": ratios["d/a"],
                "sft_time_over_lora_ga": ratios["a1/c"],
                "time_over_lora_ga": ratios["a/c"],
            }
        case "wide":
            return {"time_over_limit_wide": ratios["a/b"], "speedup_over_dense_wide": ratios["d/a"]}
        case _:
            return {}


if __name__ == "__main__":
    sys.exit(main())

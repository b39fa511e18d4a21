"""Every initializer that the grid compares, as functions with one signature in one table.

A further one is a function of `Work` and a line in the table.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel

from bench.quality import ours, peft_starts
from bench.quality.grid import code_identity, model_identity
from bench.quality.kept import kept
from bench.quality.starts import Initializer, Start, Work


def _by_peft(make: Callable[[Work], PeftModel]) -> Initializer:
    return lambda work: Start(make(work), {})


def _eva(work: Work) -> Start:
    """As PEFT makes it, once for all learning rates: its forwards take longer than the training."""
    request = [model_identity(work.model), repr(work.protocol), str(work.seed), repr(work.rows), code_identity("eva")]

    def make(out: Path) -> dict[str, Any]:
        peft_starts.eva(work).save_pretrained(out)
        return {}

    return kept(work, request, make)


INITIALIZERS: dict[str, Initializer] = {
    "vanilla": _by_peft(peft_starts.random_start),
    "pissa": _by_peft(peft_starts.pissa),
    "olora": _by_peft(peft_starts.olora),
    "eva": _eva,
    "lora_ga": _by_peft(peft_starts.lora_ga),
    "random_matched": ours.random_matched,
    "ours_zero": ours.ours_zero,
    "ours_calibrated": ours.ours_calibrated,
    "ours_alone": ours.ours_alone,
    "ours_gradient": ours.ours_gradient,
    "ours_rows": ours.ours_rows,
    "ours_whitened": ours.ours_whitened,
    "ours_rounds": ours.ours_rounds,
    "ours_ranks": ours.ours_ranks,
    "ours_retain": ours.ours_retain,
    "warmup": ours.warmup,
}

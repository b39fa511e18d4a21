"""Every initializer that the grid compares, as functions with one signature in one table.

A further one, such as a warm-up on general text or a variant of ours, is a function of `Work` and a line in the table.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.quality import peft_starts
from bench.quality.datasets import Row
from bench.quality.grid import Protocol, Trainer
from bench.quality.peft_starts import layers, random_start, scaled
from d2lora.datasets import DatasetFile, Format
from d2lora.initializations import InitializationSpec, LoraSpec
from d2lora.settings import WorkerSettings
from worker.initialization import initialize


@dataclass(frozen=True)
class Work:
    """What an initializer is given."""

    base: PreTrainedModel
    """A copy of its own: it may be changed."""
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    """The rows that training will see."""
    trainer: Trainer
    protocol: Protocol
    seed: int
    model: str
    """Where the base model is."""
    directory: Path
    """Empty, for files."""


@dataclass(frozen=True)
class Start:
    """A model that is ready to be trained."""

    model: PeftModel
    about: dict[str, Any]
    """What the initializer says of itself; goes into the record."""


Initializer = Callable[[Work], Start]


def ours_calibrated(work: Work) -> Start:
    """Delivered files with the step that held-out rows support."""
    return _ours(work, "calibrated")


def ours_zero(work: Work) -> Start:
    """Delivered files with the direction in ``lora_A`` alone."""
    return _ours(work, "zero")


def random_matched(work: Work) -> Start:
    """Random factors whose product is, layer by layer, as large as that of our calibrated step (arXiv:2507.06558)."""
    wanted = {name: scaled(layer).norm().item() for name, layer in layers(_ours(work, "calibrated").model).items()}
    start = random_start(work)
    generator = torch.Generator().manual_seed(work.seed)
    with torch.no_grad():
        for name, layer in layers(start).items():
            factor = layer.lora_B["default"].weight
            factor.copy_(torch.randn(factor.shape, generator=generator))
            factor.mul_(wanted[name] / scaled(layer).norm())
    return Start(start, {"magnitude": _magnitude(wanted)})


def _by_peft(make: Callable[[Work], PeftModel]) -> Initializer:
    return lambda work: Start(make(work), {})


INITIALIZERS: dict[str, Initializer] = {
    "vanilla": _by_peft(random_start),
    "pissa": _by_peft(peft_starts.pissa),
    "olora": _by_peft(peft_starts.olora),
    "eva": _by_peft(peft_starts.eva),
    "lora_ga": _by_peft(peft_starts.lora_ga),
    "random_matched": random_matched,
    "ours_zero": ours_zero,
    "ours_calibrated": ours_calibrated,
}


def _ours(work: Work, start: Literal["calibrated", "zero"]) -> Start:
    """Run the worker from files to files, and load its files on the unmodified base as a user would."""
    rows = work.directory / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in work.rows), encoding="utf-8")
    out = work.directory / "adapter"
    out.mkdir()
    spec = InitializationSpec(
        base_model=work.model,
        dataset_id="bench",
        lora=LoraSpec(r=work.protocol.r, lora_alpha=work.protocol.lora_alpha),
        start=start,
        max_length=work.protocol.max_length,
        seed=work.seed,
    )
    result = initialize(
        spec, DatasetFile(rows, Format.JSONL), None, out=out, settings=WorkerSettings(), on_progress=lambda *_: None
    )
    model = PeftModel.from_pretrained(work.base, str(out), is_trainable=True)
    wanted = {name: scaled(layer).norm().item() for name, layer in layers(model).items()}
    summary = result.summary
    return Start(model, {"start": summary.start, "weights": summary.weights, "magnitude": _magnitude(wanted)})


def _magnitude(norms: dict[str, float]) -> float:
    """Return the norm of all layers' ``s B A`` together."""
    return round(sum(norm**2 for norm in norms.values()) ** 0.5, 6)

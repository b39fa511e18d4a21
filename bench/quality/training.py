"""Training by TRL's own trainers, on rows whose order is fixed before."""

import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from bench.quality.datasets import Row
from bench.quality.grid import Protocol, Trainer

OnStep = Callable[[int, float, float], None]
"""Called with the step, and seconds and processor seconds spent training so far."""


@dataclass
class _Watch(TrainerCallback):
    """Calls `on_step` after chosen steps, and leaves what that takes out of the clocks."""

    steps: frozenset[int]
    on_step: OnStep
    began: tuple[float, float] = (0.0, 0.0)
    outside: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = _now()

    def on_step_end(self, _arguments: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step not in self.steps:
            return
        before = _now()
        self.on_step(
            state.global_step,
            *(now - start - out for now, start, out in zip(before, self.began, self.outside, strict=True)),
        )
        for index, (now, start) in enumerate(zip(_now(), before, strict=True)):
            self.outside[index] += now - start


def train(
    model: PeftModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    *,
    trainer: Trainer,
    learning_rate: float,
    protocol: Protocol,
    directory: Path,
    on_step: OnStep,
) -> str:
    """Train on the rows in their order, and return a digest of the batches that the trainer really saw.

    AdamW without weight decay, a constant learning rate, gradients clipped at norm 1: the same for every initializer.
    ``reference`` is DPO's; it is the unmodified base model for all.
    """
    settings = {
        "output_dir": str(directory / "trainer"),
        "per_device_train_batch_size": protocol.batch,
        "max_steps": protocol.steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "max_length": protocol.max_length,
        "seed": 0,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": protocol.autocast or next(model.parameters()).dtype == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
    }
    watch = _Watch(frozenset(protocol.measured_at()), on_step)
    common = {
        "train_dataset": Dataset.from_list(rows),
        "processing_class": tokenizer,
        "callbacks": [watch],
    }
    with _quiet():
        match trainer:
            case "sft":
                runner = trl.SFTTrainer(model, args=trl.SFTConfig(**settings), **common)
            case "dpo":
                args = trl.DPOConfig(**settings, beta=protocol.beta)
                runner = trl.DPOTrainer(model, ref_model=reference, args=args, **common)
            case "orpo":
                runner = ORPOTrainer(model, args=ORPOConfig(**settings, beta=protocol.beta), **common)
        runner.remove_callback(PrinterCallback)
        seen = hashlib.sha256()
        collate = runner.data_collator

        def watched(features: Any) -> Any:
            batch = collate(features)
            for name in sorted(batch):
                if name.endswith("input_ids"):
                    seen.update(name.encode() + batch[name].numpy().tobytes())
            return batch

        runner.data_collator = watched
        runner.train()
    return seen.hexdigest()[:20]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' advice for users out of hundreds of cells' output."""
    verbosity = transformers_logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_progress_bars()
        transformers_logging.set_verbosity_error()
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            transformers_logging.set_verbosity(verbosity)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()

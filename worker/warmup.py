"""A LoRA warm-up on general rows by TRL's own trainers: the published D2LoRA (arXiv:2503.18089).

TRL and PEFT replace layers of the model that they train, patch its forward and set its switches. The base model is
shared between jobs, so all of that happens to a copy of its modules that shares the weights, and the copy is dropped.

Rows are encoded as everywhere here (`worker.data`); TRL's preparation sees one row of its own instead of them.
"""

import copy
import hashlib
import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from d2lora.errors import ModelUnsupported, NumericalFailure, OutOfMemory
from d2lora.initializations import Phase
from d2lora.methods import Warmup
from worker.data import Example, TokenSequence
from worker.factors import Factors
from worker.halving import is_out_of_memory
from worker.models import BaseModel
from worker.units import OnProgress


@dataclass(frozen=True)
class Warmed:
    """What a warm-up leaves behind."""

    start: dict[str, Factors]
    factors: dict[str, Factors]
    losses: list[float]
    """Of every step's batch before the step, as TRL computes them."""


def warm_up_rows(examples: Sequence[Example], method: Warmup, seed: int) -> list[Example]:
    """Return the rows that the steps will see, in that order: drawn by hash(seed, content), as many as they need.

    The SFT trainer learns the chosen side of preferences, and of labeled rows the desirable ones.
    """
    if method.trainer == "sft":
        examples = [replace(one, rejected=None, desirable=None) for one in examples if one.desirable is not False]
    ranked = sorted(examples, key=lambda one: hashlib.sha256(f"{seed}:{one.digest}".encode()).digest())
    return ranked[: method.steps * method.batch_size]


def check_warm_up(base: BaseModel) -> None:
    """Return if TRL can train an adapter on this model without touching it.

    Raises:
        ModelUnsupported: it cannot.
    """
    if getattr(base.model, "is_loaded_in_8bit", False):
        raise ModelUnsupported(
            "quantization: the layers of an 8-bit base change while they run, so they cannot be trained beside other "
            "jobs; use 4bit or none"
        )
    devices = {parameter.device for parameter in base.model.parameters()}
    if len(devices) > 1 or (base.device.index or 0) > 0:
        raise ModelUnsupported("base_model: a warm-up needs all of it on one device, the first that the worker sees")


def warm_up(
    base: BaseModel,
    config: LoraConfig,
    method: Warmup,
    rows: Sequence[Example],
    *,
    start: Mapping[str, Factors] | None,
    seed: int,
    directory: Path,
    on_progress: OnProgress,
) -> Warmed:
    """Train an adapter for some steps and return its factors; ``start`` None is PEFT's default.

    AdamW without weight decay, a constant learning rate, gradients clipped at norm 1, the rows in their order, again
    from the first when they are used up. DPO's reference is the base model, whatever the start.

    Raises:
        OutOfMemory: a batch does not fit.
        NumericalFailure: a loss or a factor is not finite.
    """
    with _left_alone(base, seed), _quiet():
        own = copy.copy(config)
        own.inference_mode = False
        own.init_lora_weights = True
        model = get_peft_model(_copy_sharing_weights(base.model), own)
        if start is not None:
            _set_factors(model, start)
        begun = _factors(model)
        try:
            losses = _train(base, model, method, rows, seed=seed, directory=directory, on_progress=on_progress)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise OutOfMemory(
                    "memory is used up; lower method.batch_size, max_length or r, or use a larger machine"
                ) from error
            raise
        factors = _factors(model)
    if not all(torch.isfinite(one).all() for layer in factors.values() for one in (layer.lora_A, layer.lora_B)):
        raise NumericalFailure(
            f"method.learning_rate: at {method.learning_rate:g} the adapter is not finite after {method.steps} steps; "
            "lower it"
        )
    return Warmed(begun, factors, losses)


def _train(
    base: BaseModel,
    model: PeftModel,
    method: Warmup,
    rows: Sequence[Example],
    *,
    seed: int,
    directory: Path,
    on_progress: OnProgress,
) -> list[float]:
    """Run TRL's trainer on the model, and return the losses of its steps."""
    # TRL's ORPO is experimental, which it says at every import.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import trl  # noqa: PLC0415  # seconds of imports that only this method needs
    from datasets import Dataset  # noqa: PLC0415  # see above
    from transformers import PrinterCallback, TrainerCallback  # noqa: PLC0415  # see above
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: PLC0415  # see above

    class Progress(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
        """Reports before and after every step, which also stops a job that was cancelled."""

        def on_step_begin(self, _arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            on_progress(Phase.WARMUP, state.global_step, method.steps)

        def on_step_end(self, _arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            on_progress(Phase.WARMUP, state.global_step, method.steps)

    dtype = base.model.dtype
    settings = {
        "output_dir": str(directory),
        "per_device_train_batch_size": method.batch_size,
        "max_steps": method.steps,
        "learning_rate": method.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "max_length": None,  # the rows are cut already
        "seed": seed,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": bool(base.model.supports_gradient_checkpointing),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16 and base.device.type == "cuda",
        "use_cpu": base.device.type == "cpu",
        "dataloader_pin_memory": base.device.type == "cuda",
    }
    tokenizer = copy.deepcopy(base.tokenizer)
    if tokenizer.pad_token_id != base.pad_token_id:
        tokenizer.pad_token_id = base.pad_token_id
    common = {"processing_class": tokenizer, "callbacks": [Progress()]}
    match method.trainer:
        case "sft":
            args = _on_one_device(trl.SFTConfig(**settings))
            trainer = trl.SFTTrainer(model, args=args, train_dataset=Dataset.from_list([{"text": "a"}]), **common)
        case "dpo":
            args = _on_one_device(trl.DPOConfig(**settings, beta=method.coefficient))
            reference = _copy_sharing_weights(base.model)
            trainer = trl.DPOTrainer(
                model, ref_model=reference, args=args, train_dataset=Dataset.from_list([_PAIR]), **common
            )
        case "orpo":
            settings["max_length"] = max(one.length for one in rows)
            args = _on_one_device(ORPOConfig(**settings, beta=method.coefficient))
            trainer = ORPOTrainer(model, args=args, train_dataset=Dataset.from_list([_PAIR]), **common)
        case _:
            assert_never(method.trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.train_dataset = Dataset.from_list([_columns(one, method) for one in rows])
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    if not all(np.isfinite(losses)):
        raise NumericalFailure(
            f"method.learning_rate: at {method.learning_rate:g} the warm-up's loss is not finite; lower it"
        )
    return losses


_PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def _columns(example: Example, method: Warmup) -> dict[str, list[int]]:
    """Return a row as the trainer's own preparation leaves it."""
    chosen, rejected = example.chosen, example.rejected
    match method.trainer:
        case "sft":
            return {"input_ids": chosen.input_ids, "labels": _labels(chosen)}
        case "dpo":
            assert rejected is not None
            start = chosen.completion_mask.index(True)
            return {
                "prompt_ids": chosen.input_ids[:start],
                "chosen_ids": chosen.input_ids[start:],
                "rejected_ids": rejected.input_ids[start:],
            }
        case "orpo":
            assert rejected is not None
            start = chosen.completion_mask.index(True)
            columns = {"prompt_input_ids": chosen.input_ids[:start], "prompt_attention_mask": [1] * start}
            for name, sequence in {"chosen": chosen, "rejected": rejected}.items():
                columns[f"{name}_input_ids"] = sequence.input_ids
                columns[f"{name}_attention_mask"] = [1] * len(sequence.input_ids)
                columns[f"{name}_labels"] = _labels(sequence)
            return columns
        case _:
            assert_never(method.trainer)


def _labels(sequence: TokenSequence) -> list[int]:
    pairs = zip(sequence.input_ids, sequence.completion_mask, strict=True)
    return [token if learned else -100 for token, learned in pairs]


def _on_one_device(args: Any) -> Any:
    """Return the arguments so that no trainer spreads the batch over all GPUs that the process sees."""
    if args.n_gpu > 1:
        args._n_gpu = 1  # noqa: SLF001  # transformers has no public way
    return args


def _copy_sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of modules of its own over the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _layers(model: PeftModel) -> dict[str, Any]:
    """Return the layers with an adapter, by the names that they have in the base model."""
    found = {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def _factors(model: PeftModel) -> dict[str, Factors]:
    """Return a copy of the adapter's factors."""
    return {
        name: Factors(
            layer.lora_A["default"].weight.detach().float().clone(),
            layer.lora_B["default"].weight.detach().float().clone(),
        )
        for name, layer in _layers(model).items()
    }


def _set_factors(model: PeftModel, factors: Mapping[str, Factors]) -> None:
    layers = _layers(model)
    assert layers.keys() == factors.keys()
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A["default"].weight.copy_(factors[name].lora_A)
            layer.lora_B["default"].weight.copy_(factors[name].lora_B)


@contextmanager
def _left_alone(base: BaseModel, seed: int) -> Iterator[None]:
    """Seed the process's generators and leave them, its environment and the base's parameters as they were."""
    state, numpy_state, environment = random.getstate(), np.random.get_state(), dict(os.environ)  # noqa: NPY002  # TRL's
    devices = [base.device] if base.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002  # see above
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        for parameter in base.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' advice for people, and their progress bars, out of a worker's log."""
    from datasets import disable_progress_bars, enable_progress_bars  # noqa: PLC0415  # only this method needs it
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415  # see above

    verbosity, disabled = transformers_logging.get_verbosity(), logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_progress_bars()
        transformers_logging.set_verbosity_error()
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
            transformers_logging.set_verbosity(verbosity)
            enable_progress_bars()

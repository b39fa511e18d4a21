"""LoRA's start and those of PEFT that others published, run by PEFT itself on a copy of the base model.

PiSSA, OLoRA and LoRA-GA change the base's weights; they are trained and measured on the changed copy, as PEFT gives
them.
"""

import warnings
from typing import TYPE_CHECKING

import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora import LoraLayer, preprocess_loraga
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bench.quality.encoding import padded
from bench.quality.measuring import Held, mean_loss, score

if TYPE_CHECKING:
    from bench.quality.starts import Work

_EVA_FORWARDS = 400
"""PEFT has no limit of its own and would go on for ever where components do not converge."""


class MethodFailed(Exception):
    """A method cannot start here; that is a result, and is kept."""


def layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Return the adapter's layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def scaled(layer: LoraLayer) -> Tensor:
    """Return what an adapter adds to a layer's weight, ``s B A``."""
    product: Tensor = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return layer.scaling["default"] * product.detach()


def random_start(work: "Work") -> PeftModel:
    """LoRA as published: PEFT's default."""
    return _started(work, _config(work))


def pissa(work: "Work") -> PeftModel:
    """Principal singular vectors of the weights (arXiv:2404.02948)."""
    return _started(work, _config(work, init_lora_weights="pissa"))


def olora(work: "Work") -> PeftModel:
    """Orthonormal factors of the weights (arXiv:2406.01775)."""
    return _started(work, _config(work, init_lora_weights="olora"))


def eva(work: "Work") -> PeftModel:
    """Principal directions of the layers' inputs, ranks by explained variance (arXiv:2410.07170)."""
    model = _started(work, _config(work, init_lora_weights="eva", eva_config=EvaConfig()))
    held = Held(work.rows, work.tokenizer, max_length=work.protocol.max_length)
    device = next(model.parameters()).device
    batches = []
    for part in held.batches():
        ids, attention, learned = padded(part.chosen, part.pad, device)
        labels = ids.masked_fill(~learned, -100)
        batches.append({"input_ids": ids, "attention_mask": attention, "labels": labels})
    forwards = 0

    def forward(inner: nn.Module, inputs: dict[str, Tensor]) -> None:
        nonlocal forwards
        forwards += 1
        if forwards > _EVA_FORWARDS:
            raise MethodFailed(f"EVA's components have not converged in {_EVA_FORWARDS} forwards")
        with torch.no_grad():
            inner(**inputs)

    initialize_lora_eva_weights(model, batches, forward_fn=forward, show_progress_bar=False)
    return model


def lora_ga(work: "Work") -> PeftModel:
    """Singular vectors of the gradient of the trainer's own loss over all rows (arXiv:2407.05000)."""
    config = _config(work, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    # PEFT's preprocessing knows no "all-linear".
    head = work.base.get_output_embeddings()
    config.target_modules = {
        name
        for name, module in work.base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    held = Held(work.rows, work.tokenizer, max_length=work.protocol.max_length)

    def train_step() -> None:
        for part in held.batches():
            scores = score(work.base, part)
            # At the start the model is its own reference.
            mean_loss(work.trainer, scores, scores.detached(), beta=work.protocol.beta).backward()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # PEFT's counter; no input needs one
        preprocess_loraga(work.base, config, train_step)
    return _started(work, config)


def _config(work: "Work", **changes: object) -> LoraConfig:
    return LoraConfig(
        r=work.protocol.r,
        lora_alpha=work.protocol.lora_alpha,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        **changes,
    )


def _started(work: "Work", config: LoraConfig) -> PeftModel:
    torch.manual_seed(work.seed)
    return get_peft_model(work.base, config)

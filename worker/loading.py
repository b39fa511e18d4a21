"""How a base model's weights are to be loaded: in which precision, and onto which devices."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from d2lora.errors import ModelUnsupported
from d2lora.initializations import Quantization
from d2lora.models import parameters_of
from worker.devices import free_bytes, spread, weight_bytes
from worker.quantization import check_request, loading_arguments, stored_quantization


@dataclass(frozen=True)
class LoadingPlan:
    """How the weights are to be loaded."""

    quantization: Quantization | None
    """Of the model once it is loaded."""
    arguments: dict[str, Any]
    """For ``from_pretrained``."""


def loading_plan(
    base_model: str, config: Any, *, dtype: Any, target: torch.device, quantization: Quantization | None
) -> LoadingPlan:
    """Return how to load a model of this configuration, which is None for a GGUF file; ``dtype`` may be "auto".

    Raises:
        ModelUnsupported: an encoder-decoder, or weights in a format that cannot be loaded as requested.
        OutOfMemory: all devices together do not hold the weights.
    """
    if config is None:
        if quantization is not None:
            raise ModelUnsupported(
                f"quantization: {base_model!r} is a GGUF file, which is dequantized when it is loaded; "
                "leave quantization out, or name the model in safetensors"
            )
        full = dtype if isinstance(dtype, torch.dtype) else torch.float32
        free = free_bytes(target)
        rooms = spread(int(parameters_of(base_model) or 0) * full.itemsize, free) if len(free) > 1 else None
        arguments: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)}
        return LoadingPlan(None, arguments | ({} if rooms is None else {"device_map": "auto", "max_memory": rooms}))
    _refuse_encoder_decoder(config)
    stored = stored_quantization(config, base_model)
    check_request(quantization, stored, base_model)
    full = dtype if isinstance(dtype, torch.dtype) else config.get_text_config().dtype or torch.float32
    arguments = {}
    if stored is not None:
        arguments = {"device_map": {"": target}}
    elif quantization is not None:
        arguments = loading_arguments(quantization, dtype=full, device=target)
    free = free_bytes(target)
    if len(free) > 1:
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        rooms = spread(weight_bytes(outline, dtype=full, quantization=quantization or stored), free)
        if rooms is not None:
            arguments |= {"device_map": "auto", "max_memory": rooms}
    return LoadingPlan(quantization or stored, arguments)


def _refuse_encoder_decoder(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelUnsupported(
            f"base_model: {config.model_type!r} is an encoder-decoder; "
            "the objectives are defined for decoder-only models"
        )

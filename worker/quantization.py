"""Base models in 4 or 8 bits, by bitsandbytes.

Only activations carry gradients, so statistics work on them as they are. The libraries are imported where they are
needed: most jobs do without.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from d2lora.errors import ModelUnsupported
from d2lora.initializations import Quantization

_MAX_ERROR = 0.15
"""Relative error of 4-bit weights above which something else than their rounding is at work."""


def stored_quantization(config: Any, base_model: str) -> Quantization | None:
    """Return how a checkpoint's weights are quantized, from its configuration.

    Raises:
        ModelUnsupported: in another format than bitsandbytes'.
    """
    stored = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if stored is None:
        return None
    about: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    if about.get("quant_method", "bitsandbytes") == "bitsandbytes":
        if about.get("load_in_4bit"):
            return "4bit"
        if about.get("load_in_8bit"):
            return "8bit"
    raise ModelUnsupported(
        f"base_model: {base_model!r} is quantized in the format {about.get('quant_method')!r}; only bitsandbytes' "
        "4 and 8 bits and GGUF can be used. Name the model that it was made from, and ask for quantization"
    )


def check_request(requested: Quantization | None, stored: Quantization | None, base_model: str) -> None:
    """Return if a checkpoint with weights stored so can be loaded as requested.

    Raises:
        ModelUnsupported: it is quantized already, and otherwise.
    """
    if requested is not None and stored is not None and requested != stored:
        raise ModelUnsupported(
            f"quantization: {base_model!r} is quantized to {stored} already; leave quantization out to use it so"
        )


def loading_arguments(quantization: Quantization, *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what ``from_pretrained`` takes to quantize the linear layers while it loads them.

    The 4-bit type is NF4 (arXiv:2305.14314, section 3), without quantized scales: they save 0.4 bits a weight and add
    an error of their own.
    """
    from transformers import BitsAndBytesConfig  # noqa: PLC0415  # it checks the library's presence

    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}


def prepare(model: nn.Module) -> None:
    """Make a quantized model ready for passes with a gradient.

    Raises:
        ModelUnsupported: bitsandbytes does not give back the weights of a layer of this size.
    """
    from bitsandbytes.nn import Linear4bit  # noqa: PLC0415  # only quantized models need it

    checked: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            if (
                module.in_features not in checked
                and _error_of_rows(module.in_features, module.weight.device) > _MAX_ERROR
            ):
                raise ModelUnsupported(
                    f"quantization: bitsandbytes does not give back 4-bit rows of {module.in_features} weights, as "
                    f"{name!r} has, on this {module.weight.device.type}; use 8bit, or another device"
                )
            checked.add(module.in_features)
            # On CPUs with bfloat16 units the first forward without a gradient repacks the weights for a product that
            # autograd does not see: every later backward would stop there, without an error.
            module.support_avx512bf16_for_cpu = False
    # It warns at every layer of every 8-bit forward that activations are rounded, which is what 8 bits are.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _error_of_rows(in_features: int, device: torch.device) -> float:
    """Return the relative error of random rows after quantization to 4 bits and back; 0.09 is NF4's own.

    bitsandbytes 0.50 on CPUs with AVX-512 takes the scales of wrong blocks if 16 divides the length and 64 does not.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: PLC0415  # as above

    rows = torch.randn(64, in_features, generator=torch.Generator().manual_seed(0)).to(device)
    error: Tensor = dequantize_4bit(*quantize_4bit(rows, quant_type="nf4")) - rows
    return (error.norm() / rows.norm()).item()


def dequantized_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight in floating point; itself if it is not quantized."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if weight.is_floating_point():
        return weight.detach()
    from transformers.integrations.bitsandbytes import (  # noqa: PLC0415  # only quantized models need it
        dequantize_bnb_weight,
    )

    values: Tensor = dequantize_bnb_weight(weight, state=getattr(module, "state", None))
    return values.detach()

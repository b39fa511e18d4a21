"""Which devices a model goes to, and which of their errors mean that the process has to end."""

import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed import DistBackendError
from transformers.pytorch_utils import Conv1D

from d2lora.errors import OutOfMemory

_SHARES = (0.7, 0.9)
"""Of a device's free memory, what weights may take: with room for activations, and with as little as can work."""

_BITS = {"4bit": 4.5, "8bit": 8.0}
"""Of a quantized weight; in 4 bits every block of 64 has a scale in float32."""

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)

_DEVICE_FAILURE = re.compile(
    r"CUDA (driver )?error|HIP error|CUBLAS_STATUS_|CUSOLVER_STATUS_|CUDNN_STATUS_|cuDNN error|NCCL error"
    r"|Triton Error|illegal memory access|device-side assert",
    re.IGNORECASE,
)


def pick_device(device: str) -> str:
    """Return the device's name; ``auto`` takes CUDA, then the CPU. Sums are in float64, which Apple's MPS has not."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_bytes(device: torch.device) -> list[int]:
    """Return the free memory of every device that a model on this one may be spread over; CUDA alone has several."""
    if device.type != "cuda" or device.index is not None:
        return []
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def weight_bytes(model: nn.Module, *, dtype: torch.dtype, quantization: str | None) -> int:
    """Return the memory that a model's parameters take in this precision; the model may lie on the meta device.

    Quantization covers the linear layers, except the output head.
    """
    full = 8.0 * dtype.itemsize
    head = getattr(model, "get_output_embeddings", lambda: None)()
    bits: dict[int, float] = {}
    for module in model.modules():
        packed = quantization is not None and isinstance(module, nn.Linear | Conv1D) and module is not head
        for name, parameter in module.named_parameters(recurse=False):
            each = _BITS[quantization or ""] if packed and name == "weight" else full
            bits[id(parameter)] = parameter.numel() * each
    return round(sum(bits.values()) / 8)


def spread(weights: int, free: Sequence[int]) -> dict[int, int] | None:
    """Return how many bytes of weights every device may hold; None if the first one holds them all.

    A single device is not second-guessed: there is no other place.

    Raises:
        OutOfMemory: all devices together do not hold the weights.
    """
    if len(free) < 2 or weights <= _SHARES[0] * free[0]:
        return None
    for share in _SHARES:
        if weights <= share * sum(free):
            return {index: int(share * size) for index, size in enumerate(free)}
    raise OutOfMemory(
        f"the base model's weights take {weights / 2**30:.1f} GiB, and {len(free)} devices have "
        f"{sum(free) / 2**30:.1f} GiB free; use quantization 4bit, or a larger machine"
    )


def says_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error without a class of its own tells of memory that is used up."""
    return bool(_OUT_OF_MEMORY.search(str(error)))


def is_device_failure(error: BaseException) -> bool:
    """Whether an accelerator failed in a way that leaves its process of no use; memory that is used up does not."""
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError) or says_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError | DistBackendError) or bool(_DEVICE_FAILURE.search(str(error)))

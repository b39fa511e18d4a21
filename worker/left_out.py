"""What an adapter leaves as it is though a user may think otherwise: experts, routers, layers that all-linear skips."""

import re
from collections.abc import Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from d2lora.initializations import Frozen, LoraSpec
from worker.models import layer_sizes
from worker.targets import asks_for_all_linear, passed_over


class LeftOut(Frozen):
    """Modules of one kind whose weights the adapter does not change."""

    modules: str
    """Their names, with ``*`` for the numbers in which they differ."""
    count: int
    parameters: int
    """In their weight matrices, all of them together."""
    share: float
    """Of the base model's parameters."""
    reason: str


def left_out(model: PreTrainedModel, lora: LoraSpec) -> list[LeftOut]:
    """Return what is left out whatever ``target_modules`` says, and what ``all-linear`` skips.

    Embeddings, convolutions and the head are not listed: nobody takes them for linear layers.
    """
    found: dict[tuple[str, str], list[int]] = {}
    skipped = passed_over(model, lora.r) if asks_for_all_linear(lora) else {}
    for name, module in model.named_modules():
        reason = _why(name, module, skipped)
        if reason is not None:
            found.setdefault((_pattern(name), reason), []).append(_matrix_entries(module))
    total = model.num_parameters()
    return [
        LeftOut(modules=pattern, count=len(sizes), parameters=sum(sizes), share=sum(sizes) / total, reason=reason)
        for (pattern, reason), sizes in found.items()
    ]


def in_words(left: LeftOut) -> str:
    """Return a sentence for warnings and the model card."""
    modules = "module" if left.count == 1 else "modules"
    return (
        f"not adapted: {left.modules} ({left.count} {modules}, {left.parameters} parameters, {left.share:.1%} of the "
        f"base model's); {left.reason}"
    )


def _why(name: str, module: nn.Module, skipped: Mapping[str, str]) -> str | None:
    if name in skipped:
        return skipped[name]
    if isinstance(module, nn.Linear | Conv1D | nn.Embedding | _ConvNd) or not _matrix_entries(module):
        return None
    if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)):
        return "experts held as parameters, which LoRA layers cannot wrap"
    return f"a {type(module).__name__} is no Linear or Conv1D layer"


def _matrix_entries(module: nn.Module) -> int:
    if isinstance(module, nn.Linear | Conv1D):  # whose weight may be packed
        out_features, in_features = layer_sizes(module)
        return out_features * in_features
    return sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.ndim > 1)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)

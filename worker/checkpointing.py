"""Activation checkpointing of a frozen model in evaluation mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from worker.models import BaseModel


@contextmanager
def activation_checkpointing(base: BaseModel, *, enabled: bool) -> Iterator[None]:
    """Recompute each decoder layer in the backward while the block runs; nothing if the model does not support it."""
    layers = [module for module in base.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not enabled or not base.model.supports_gradient_checkpointing:
        layers = []
    for layer in layers:
        # transformers checkpoints only in training mode, in which some layers (Falcon, Bloom) also drop activations.
        layer._gradient_checkpointing_func = partial(_recomputed, layer)  # noqa: SLF001  # its class asks for it
        layer.gradient_checkpointing = True
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False
            layer.training = False
            del layer._gradient_checkpointing_func  # noqa: SLF001  # as above


def _recomputed(layer: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a layer's forward in evaluation mode, now and again in the backward."""

    def evaluated(*arguments: Any) -> Any:
        layer.training = False
        try:
            return function(*arguments)
        finally:
            layer.training = True

    return checkpoint(evaluated, *arguments, use_reentrant=False, preserve_rng_state=False)

"""Base models kept between jobs, the least recently used dropped first.

A pass leaves a model as it found it, also when it fails (`test_a_pass_that_fails_leaves_the_model_as_it_was`), so one
copy in memory serves job after job.
"""

import gc
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from d2lora.initializations import Quantization
from d2lora.models import HubModel, LocalModel, locate
from worker.devices import pick_device
from worker.models import BaseModel, commit_of, load


@runtime_checkable
class Loader(Protocol):
    """What `worker.models.load` is, and `ModelCache.load` in its place."""

    def __call__(
        self,
        base_model: str,
        *,
        revision: str | None,
        dtype: str,
        device: str,
        quantization: Quantization | None = None,
    ) -> BaseModel:
        """Return the model, ready for passes over it."""


class ModelCache:
    """Keeps the model in use, and others as long as their parameters together take no more than ``limit_bytes``.

    Whatever has to go goes before the next model is loaded, so that both are never in memory at once. For one thread.
    """

    def __init__(self, limit_bytes: int, *, loader: Loader = load) -> None:
        self._limit = limit_bytes
        self._loader = loader
        self._models: OrderedDict[Hashable, BaseModel] = OrderedDict()
        """Least recently used first."""

    def load(
        self,
        base_model: str,
        *,
        revision: str | None,
        dtype: str,
        device: str,
        quantization: Quantization | None = None,
    ) -> BaseModel:
        """Return the model, from memory if it is there and its files have not changed.

        Raises:
            D2LoraError: as `worker.models.load` does.
        """
        key = (_identity(base_model, revision), dtype, pick_device(device), quantization)
        self._make_room(besides=key)
        if key not in self._models:
            self._models[key] = self._loader(
                base_model, revision=revision, dtype=dtype, device=device, quantization=quantization
            )
        self._models.move_to_end(key)
        # The same model may be spelt in several ways, and the adapter says what this request wrote.
        return replace(self._models[key], name=base_model)

    def clear(self) -> None:
        """Drop all models."""
        if self._models:
            self._models.clear()
            _release()

    def _make_room(self, *, besides: Hashable) -> None:
        """Drop the least recently used models until the others than ``besides`` keep to the limit."""
        sizes = {key: base.parameter_bytes for key, base in self._models.items() if key != besides}
        taken = sum(sizes.values())
        dropped = False
        for key, size in sizes.items():
            if taken <= self._limit:
                break
            del self._models[key]
            taken -= size
            dropped = True
        if dropped:
            _release()


def _release() -> None:
    """Give the memory of dropped models back: modules refer to each other in circles, and CUDA keeps freed blocks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _identity(base_model: str, revision: str | None) -> Hashable:
    """Return what tells one model's weights from another's, or from those that the files held before."""
    match locate(base_model):
        case HubModel(id=name):
            return name, commit_of(name, revision)
        case LocalModel(directory=directory, gguf_file=gguf_file):
            return str(directory.resolve()), gguf_file, _stamps(directory)


def _stamps(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Return name, size and time of change of every file; weights, configuration and tokenizer are among them."""
    files = ((path.name, path.stat()) for path in sorted(directory.iterdir()) if path.is_file())
    return tuple((name, about.st_size, about.st_mtime_ns) for name, about in files)

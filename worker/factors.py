"""From the combined direction to LoRA factors (docs/method.md, section 4).

Shape legend
    O  out_features    I  in_features    N  LoRA rank r    F  folds    K  bases
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from d2lora.initializations import Whitening
from worker.low_rank import LowRank
from worker.sketching import LayerStatistics
from worker.statistics import Statistics
from worker.whitening import MomentGradient, MomentSketch, whitened_factorization, whitened_gramian

ROW_NORM = 3**-0.5
"""Norm of a row of PEFT's default lora_A: uniform on +-1/sqrt(I), so a variance of 1/(3 I) per entry."""


@dataclass(frozen=True)
class Factors:
    """``lora_A`` and ``lora_B`` of one layer, as PEFT stores them."""

    lora_A: Float[Tensor, "N I"]
    lora_B: Float[Tensor, "O N"]


Direction = Mapping[str, LowRank]
"""The combined gradient of every layer, cut to rank r."""


def factorize(
    folds: Sequence[Statistics],
    coefficients: Float[Tensor, " K"],
    *,
    rank: int,
    keep: int | None = None,
    leave_out: int | None = None,
    whitening: Whitening | None = None,
) -> dict[str, LowRank]:
    """Return the rank-r direction from all folds, or from all but one; on request that of the whitened gradient.

    Of plain gradients ``keep`` directions are returned instead of r, 2 r at most.
    """
    direction = {}
    for name, layer in _summed_layers(folds, leave_out):
        if whitening is None:
            direction[name] = layer.factorize(coefficients, rank, keep=keep)
        else:
            direction[name] = whitened_factorization(_with_moment(layer), coefficients, rank, whitening)
    return direction


def whitened_gramians(
    folds: Sequence[Statistics], whitening: Whitening, *, leave_out: int | None = None
) -> dict[str, Float[Tensor, "K K"]]:
    """Return the inner products of every layer's whitened bases; each union of folds has a second moment of its own."""
    return {
        name: whitened_gramian(_with_moment(layer), whitening).cpu() for name, layer in _summed_layers(folds, leave_out)
    }


def calibrated_step(direction: Direction, *, eta: float, scaling: float) -> dict[str, Factors]:
    """Return factors of a step of size eta: eq. 4 of docs/method.md, and eq. 5 for ``eta = 0``."""
    return {
        name: Factors(
            lora_A=(ROW_NORM * layer.right).contiguous(),
            lora_B=(-(eta / (scaling * ROW_NORM)) * layer.left * layer.step).contiguous(),
        )
        for name, layer in direction.items()
    }


@contextmanager
def adapted(modules: Mapping[str, nn.Module], factors: Mapping[str, Factors], *, scaling: float) -> Iterator[None]:
    """Add ``s B A x`` to the outputs of the layers while the block runs; the weights stay as they are."""
    handles = [
        modules[name].register_forward_hook(partial(_with_update, layer, scaling)) for name, layer in factors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_update(
    layer: Factors, scaling: float, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    inputs = arguments[0]
    down = inputs @ layer.lora_A.to(inputs).mT
    up = (scaling * layer.lora_B).to(inputs).mT
    if torch.is_grad_enabled():
        return output + down @ up
    # Nothing else has seen the layer's new output: the product is added where it is, without copies of its size.
    output.view(-1, output.shape[-1]).addmm_(down.flatten(0, -2), up)
    return output


@dataclass(frozen=True)
class Products:
    """Inner products of gradients; every Gramian and norm that is asked for follows."""

    folds: Float[Tensor, "F K F K"]
    """Between the summed bases of two folds, over all layers; bilinear, so a union of folds is a sum of blocks."""
    rows: Float[Tensor, "K K"]
    """Between a row's own gradients, summed over all rows."""
    layers: Mapping[str, Float[Tensor, "K K"]]
    """Between the bases summed over all folds, of one layer each."""


def inner_products(folds: Sequence[Statistics], bases: int) -> Products:
    """Return the inner products of all folds' bases."""
    table = torch.zeros(len(folds), bases, len(folds), bases, dtype=torch.float64)
    rows = torch.zeros(bases, bases, dtype=torch.float64)
    layers = {}
    for name in folds[0].layers:
        parts = [fold.layers[name] for fold in folds]
        own = torch.zeros_like(table)
        for i, left in enumerate(parts):
            rows += left.row_gramian.cpu()
            for j, right in enumerate(parts[: i + 1]):
                block = left.inner_products(right).cpu()  # type: ignore[arg-type]  # all folds of a job are of one kind
                own[i, :, j, :] = block
                own[j, :, i, :] = block.T
        table += own
        layers[name] = own.sum((0, 2))
    return Products(table, rows, layers)


def _summed_layers(folds: Sequence[Statistics], leave_out: int | None) -> Iterator[tuple[str, LayerStatistics]]:
    """Yield every layer's name and its statistics over all folds, or over all but one."""
    used = [fold for index, fold in enumerate(folds) if index != leave_out]
    for name in used[0].layers:
        yield name, summed([fold.layers[name] for fold in used])


def _with_moment(layer: LayerStatistics) -> MomentSketch | MomentGradient:
    assert isinstance(layer, MomentSketch | MomentGradient), "the pass has not gathered second moments"
    return layer


def summed(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """Return the statistics of all parts' rows together."""
    first = parts[0]
    tensors = [part.tensors() for part in parts]
    summed = {name: torch.stack([one[name] for one in tensors]).sum(0) for name in tensors[0]}
    return type(first).from_tensors(first.shape, first.matrices, summed)

"""The second moment of a layer's inputs, ``C = sum of x x^T`` over tokens, and functions of it.

A `Moment` keeps products of C with a fixed random test matrix, and its trace; both add over batches, folds and shards.
The `Spectrum` that follows is low rank plus a multiple of the identity, so that C^p costs thin products only. No I x I
matrix is made, unless the test matrix is as wide as that.

Shape legend
    T  tokens    I  in_features    N  width of the sketch of C    E  eigenvalues kept, at most N    B  any rows

References:
    [1] Tropp, Yurtsever, Udell, Cevher. Fixed-rank approximation of a positive-semidefinite matrix from streaming data.
        2017. arXiv:1706.05736
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from worker.batches import Batch
from worker.halving import in_halves
from worker.models import BaseModel

_NEGLIGIBLE = 1e-6
"""Eigenvalues of the sketch below this share of the largest are rounding errors of float32 sums."""


@dataclass(frozen=True)
class Spectrum:
    """``C = vectors diag(values) vectors^T + rest (1 - vectors vectors^T)``."""

    vectors: Float[Tensor, "I E"]
    """Orthonormal."""
    values: Float[Tensor, " E"]
    rest: float
    """The mean of the eigenvalues that are not among ``values``."""

    @property
    def mean(self) -> float:
        """The mean eigenvalue, tr(C) / I."""
        size, kept = self.vectors.shape
        return (self.values.sum().item() + self.rest * (size - kept)) / size

    def map(self, rows: Float[Tensor, "*B I"], function: Callable[[Tensor], Tensor]) -> Float[Tensor, "*B I"]:
        """Return ``rows @ f(C)``, where f acts on the eigenvalues."""
        rest = function(self.values.new_tensor(self.rest)).item()
        vectors, changes = self.vectors.to(rows), (function(self.values) - rest).to(rows)
        return rest * rows + ((rows @ vectors) * changes) @ vectors.mT


@dataclass
class Moment:
    """Sums over tokens of one layer's inputs."""

    test: Float[Tensor, "I N"]
    """The test matrix omega; a full orthogonal basis makes everything exact."""
    products: Float[Tensor, "N I"]
    """``omega^T sum_t x_t x_t^T``."""
    trace: Float[Tensor, "1"]
    """``sum_t |x_t|^2``; float64."""

    @staticmethod
    def empty(test: Float[Tensor, "I N"]) -> "Moment":
        """Return the moment of no tokens."""
        return Moment(test, torch.zeros_like(test.mT), torch.zeros(1, dtype=torch.float64, device=test.device))

    @staticmethod
    def layout(in_features: int, width: int) -> dict[str, tuple[str, list[int]]]:
        """Return type and size of every tensor that `tensors` returns, by name."""
        return {"trace": ("F64", [1]), "moment": ("F32", [width, in_features])}

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums, by name; what `from_tensors` takes."""
        return {"trace": self.trace, "moment": self.products}

    @staticmethod
    def from_tensors(test: Float[Tensor, "I N"], tensors: dict[str, Tensor]) -> "Moment":
        """Return the moment that gave these tensors."""
        return Moment(test, tensors["moment"], tensors["trace"])

    def add(self, tokens: Float[Tensor, "T I"], products: Float[Tensor, "N I"] | None = None) -> None:
        """Add tokens; ``products`` are theirs alone, where they are known."""
        tokens = tokens.float()
        if products is None:
            self.products.addmm_((tokens @ self.test).mT, tokens)
        else:
            self.products += products
        self.trace += tokens.square().sum().double()

    def spectrum(self) -> Spectrum:
        """Return the spectrum of C by the Nystroem approximation ([1], eq. 2.4); its trace is C's own.

        Every eigenvalue is at most C's own, and what is missing from the trace is spread over the other directions.
        """
        size, trace = len(self.test), self.trace.item()
        if trace == 0.0:
            return Spectrum(self.test[:, :0].double(), self.test.new_zeros(0).double(), 0.0)
        products, test = self.products.double(), self.test.double()
        core = products @ test
        weights, basis = torch.linalg.eigh((core + core.mT) / 2)
        kept = weights > _NEGLIGIBLE * weights[-1]
        root = products.mT @ (basis[:, kept] * weights[kept].rsqrt())  # C ~ root root^T
        values, rotation = torch.linalg.eigh(root.mT @ root)
        values = values.clamp(min=torch.finfo(values.dtype).tiny)
        vectors = root @ (rotation * values.rsqrt())
        left_over = size - len(values)
        rest = max(0.0, trace - values.sum().item()) / left_over if left_over else 0.0
        return Spectrum(vectors, values, rest)


def add_inputs(base: BaseModel, targets: Mapping[str, nn.Module], moments: Mapping[str, Moment], batch: Batch) -> None:
    """Add every layer's inputs at the batch's tokens to its moment, by a forward pass.

    Raises:
        OutOfMemory: a single row does not fit; more than one are taken in halves.
    """

    def run(part: Batch, done: set[str]) -> None:
        with torch.no_grad(), _inputs_added(targets, moments, part.attention_mask.bool(), done):
            base.hidden_states(part.input_ids, part.attention_mask)

    for _ in in_halves(base, batch, run):
        pass


@contextmanager
def _inputs_added(
    targets: Mapping[str, nn.Module], moments: Mapping[str, Moment], present: Bool[Tensor, "S T"], done: set[str]
) -> Iterator[None]:
    """Add the inputs of the targets at ``present`` tokens to their moments while the block runs, but of those done."""
    skip = frozenset(done)

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if name in skip:
                return
            (inputs,) = arguments[:1]
            part = Moment.empty(moments[name].test)
            tokens = inputs.reshape(present.numel(), -1)  # mixtures of experts flatten them on their way
            part.add(tokens[present.flatten().to(inputs.device)])
            # All of it or, if memory has run out by now, nothing.
            moments[name].products += part.products
            moments[name].trace += part.trace
            done.add(name)

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in targets.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

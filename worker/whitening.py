"""Whitened gradients: ``H = G (C + c tr(C)/I)^(-p)``, where C is the second moment of a layer's inputs.

C sums over all tokens of all sequences, prompts and completions alike; whoever adds a batch sees to it that inputs are
zero at padding. (Divided by the number of tokens, C would change H by one factor, the same in all layers.) The kinds of
statistics here keep C's sums beside G's, so that both come from one pass and add alike.

Whitening acts on the sketch afterwards. ``Psi G`` becomes ``Psi H`` exactly (``Omega^T G`` becomes ``Omega^T H`` where
G^T is sketched), which gives unbiased inner products of whitened gradients; the rank-r direction is the whitened rank-r
part of G (see `MomentSketch.leading`), or that of all of G in exact mode.

Shape legend
    S  sequences    T  tokens of a padded sequence    I  in_features    O  out_features    K  bases
    N  rows of the test matrix on the output's side    M  any
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from d2lora.initializations import Whitening
from worker.gradients import DenseGradient
from worker.low_rank import LowRank, signed
from worker.matrices import Shape, TestMatrices
from worker.moments import Moment
from worker.sketching import Sketch

OVERSAMPLING = 8
"""Range-sketch width in units of r: whitening raises what a sketch of 4 r keeps least of (docs/log.md)."""
MOMENT_OVERSAMPLING = 16
"""Width of the sketch of C in units of r."""


@dataclass
class _BesideGradients:
    """The part that both kinds share: a moment beside the gradients of the class that comes next."""

    moment: Moment

    @staticmethod
    def moment_test(shape: Shape, matrices: TestMatrices) -> Float[Tensor, "I M"]:
        """Return the test matrix of C."""
        raise NotImplementedError

    @staticmethod
    def moment_width(shape: Shape) -> int:
        """Return how many columns it has."""
        raise NotImplementedError

    @classmethod
    def empty(cls, shape: Shape, bases: int, matrices: TestMatrices) -> Any:
        """Return the sums of nothing."""
        gradients = super().empty(shape, bases, matrices)  # type: ignore[misc]  # of the class that comes next
        return cls(**vars(gradients), moment=Moment.empty(cls.moment_test(shape, matrices)))

    def add(
        self,
        inputs: Float[Tensor, "S T I"],
        output_grads: Float[Tensor, "S T O"],
        weights: Float[Tensor, "K S"],
        *,
        paired: bool,
    ) -> None:
        """Add a batch to the gradients and to the moment."""
        super().add(inputs, output_grads, weights, paired=paired)  # type: ignore[misc]  # of the class that comes next
        self.add_to_moment(inputs.flatten(0, -2))

    def add_to_moment(self, tokens: Float[Tensor, "T I"]) -> None:
        """Add tokens to the moment."""
        self.moment.add(tokens)

    @classmethod
    def layout(cls, shape: Shape, bases: int) -> dict[str, tuple[str, list[int]]]:
        """Return type and size of every tensor that `tensors` returns, by name."""
        gradients = super().layout(shape, bases)  # type: ignore[misc]  # of the class that comes next
        both = gradients | Moment.layout(shape.in_features, cls.moment_width(shape))
        # Numbers of eight bytes first, where a file's are aligned.
        return dict(sorted(both.items(), key=lambda entry: entry[1][0] != "F64"))

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums, by name; what `from_tensors` takes."""
        return super().tensors() | self.moment.tensors()  # type: ignore[misc]  # of the class that comes next

    @classmethod
    def from_tensors(cls, shape: Shape, matrices: TestMatrices, tensors: dict[str, Tensor]) -> Any:
        """Return the sums that gave these tensors."""
        gradients = super().from_tensors(shape, matrices, tensors)  # type: ignore[misc]  # of the class that comes next
        return cls(**vars(gradients), moment=Moment.from_tensors(cls.moment_test(shape, matrices), tensors))


@dataclass
class MomentSketch(_BesideGradients, Sketch):
    """Sketches of K gradients of one layer, and of the second moment of its inputs."""

    @staticmethod
    def moment_test(shape: Shape, matrices: TestMatrices) -> Float[Tensor, "I M"]:
        """Return a seeded matrix of random columns."""
        return matrices.moment(shape.in_features, MomentSketch.moment_width(shape))

    @staticmethod
    def moment_width(shape: Shape) -> int:
        """Return the width of the sketch of C."""
        return min(shape.width * MOMENT_OVERSAMPLING // OVERSAMPLING, shape.in_features)

    def add_to_moment(self, tokens: Float[Tensor, "T I"]) -> None:
        """Add tokens, whose products are made once if several layers in turn have them."""
        self.moment.add(tokens, self.matrices.moment_of(self.moment_width(self.shape), tokens))

    def probes(self) -> Float[Tensor, "K N I"]:
        """Return ``T G_k`` for the test matrix T on the output's side, scaled so that E |T g|^2 = |g|^2."""
        probes = self.range_sketch if self.shape.transposed else self.corange_sketch
        return probes / probes.shape[1] ** 0.5

    def probed(self, columns: Float[Tensor, "O M"]) -> Float[Tensor, "N M"]:
        """Return ``T columns`` for the test matrix T of `probes`."""
        if self.shape.transposed:
            return (columns.mT @ self.matrices.omega(self.shape)).mT / self.shape.width**0.5
        return self.matrices.psi(self.shape).of(columns.mT).mT / self.shape.corange_width**0.5

    def leading(self, coefficients: Float[Tensor, " K"], rank: int) -> LowRank:
        """Return what is whitened of ``sum_k coefficients[k] G_k``: its rank-r part.

        More directions of G would bring in more of the fit's noise than of H (measured in docs/log.md).
        """
        return self.factorize(coefficients, rank)

    def missed(self, approximation: LowRank, probes: Float[Tensor, "N I"]) -> float:
        """Estimate the squared norm of ``H - approximation`` from the probes of H.

        They took part in the approximation, so its r directions count as fitted (`worker.sketching`, theorem 4.3
        of [1] there). On real gradients the estimate is 1.0 to 1.1 times the truth (docs/log.md).
        """
        count, fitted = len(probes), len(approximation.values)
        left_over = probes - (self.probed(approximation.left) * approximation.values) @ approximation.right
        squared = left_over.double().square().sum().item()
        if count == self.shape.out_features:
            return squared  # a full basis estimates nothing
        freedom = max(2, count - fitted)
        return squared * count / freedom * (1 + fitted / (freedom - 1))


@dataclass
class MomentGradient(_BesideGradients, DenseGradient):
    """K dense gradients of one layer, and the dense second moment of its inputs: the exact mode."""

    @staticmethod
    def moment_test(shape: Shape, matrices: TestMatrices) -> Float[Tensor, "I M"]:
        """Return the identity, so that C itself is summed."""
        return torch.eye(shape.in_features, device=matrices.device)

    @staticmethod
    def moment_width(shape: Shape) -> int:
        """Return I."""
        return shape.in_features

    def probes(self) -> Float[Tensor, "K O I"]:
        """Return the gradients themselves."""
        return self.gradients

    def leading(self, coefficients: Float[Tensor, " K"], rank: int) -> LowRank:
        """Return all of ``sum_k coefficients[k] G_k``, whatever the rank asked for."""
        return self.factorize(coefficients, max(rank, self.shape.shorter))

    def missed(self, _approximation: LowRank, _probes: Float[Tensor, "O I"]) -> float:
        """Return 0: nothing is estimated."""
        return 0.0


WithMoment = MomentSketch | MomentGradient
_Whitener = Callable[[Tensor], Tensor]


def whitened_gramian(layer: WithMoment, whitening: Whitening) -> Float[Tensor, "K K"]:
    """Return ``<H_j, H_k>``; float64. From a sketch, unbiased for the layer's estimate of C."""
    probes = whitener(layer.moment, whitening)(layer.probes()).flatten(1).double()
    return probes @ probes.mT


def whitened_factorization(
    layer: WithMoment, coefficients: Float[Tensor, " K"], rank: int, whitening: Whitening
) -> LowRank:
    """Return the rank-r direction of ``sum_k coefficients[k] H_k``; `LowRank.along` is of G.

    ``energy`` and ``missed`` are those of H, for the layer's estimate of C.
    """
    whiten = whitener(layer.moment, whitening)
    leading = layer.leading(coefficients, rank)
    probes = layer.probes()
    probes = whiten(torch.einsum("k,kni->ni", coefficients.to(probes), probes))
    whitened = right_multiplied(leading, whiten)
    missed = layer.missed(whitened, probes)
    energy = probes.double().square().sum().item()
    return descending(replace(whitened, energy=energy, missed=missed).cut(rank), leading)


def right_multiplied(matrix: LowRank, multiply: _Whitener) -> LowRank:
    """Return the factorization of ``matrix @ W``, where ``multiply`` returns rows times W."""
    rotation, values, right = torch.linalg.svd(matrix.values[:, None] * multiply(matrix.right), full_matrices=False)
    return LowRank(*signed(matrix.left @ rotation, values, right), matrix.energy, matrix.missed, rows=matrix.rows)


def descending(direction: LowRank, gradient: LowRank) -> LowRank:
    """Return the direction with what the gradient has along each of its own, so that its slope is known."""
    overlap = (gradient.left.mT @ direction.left) * (gradient.right @ direction.right.mT)
    return replace(direction, along=gradient.values @ overlap)


def whitener(moment: Moment, whitening: Whitening) -> _Whitener:
    """Return what multiplies rows by ``(C + c tr(C)/I)^(-p)``, for this estimate of C."""
    spectrum = moment.spectrum()
    mean = spectrum.mean
    if mean == 0.0:  # a layer that has seen nothing
        return lambda rows: rows
    return lambda rows: spectrum.map(rows, lambda values: (values + whitening.damping * mean) ** -whitening.power)

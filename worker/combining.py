"""One direction from several objectives: weights from the cosines between their gradients.

Every gradient is divided by its global norm first, so an objective's scale (DPO's beta, a sum against a mean) decides
nothing, and the weightings see a Gramian with ones on its diagonal (docs/method.md, section 3).

Shape legend
    J  objectives    K  bases    F  folds
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor
from torchjd.aggregation import IMTLGWeighting, UPGradWeighting

from d2lora.errors import NumericalFailure
from d2lora.initializations import Combination, Fixed, ImtlG, Mean, Mgda, UpGrad
from worker.min_norm import min_norm_weights


@dataclass(frozen=True)
class Mixture:
    """How objectives are combined: ``sum_j weights[j] G_j / norms[j]``."""

    weights: Float[Tensor, " J"]
    """Of the normalized gradients; they sum to 1."""
    norms: Float[Tensor, " J"]
    """Frobenius norms of the objectives' gradients over all target layers."""
    cosines: Float[Tensor, "J J"]

    @property
    def scales(self) -> Float[Tensor, " J"]:
        """Factor of each un-normalized gradient."""
        return self.weights / self.norms

    def basis_coefficients(self, objective_coefficients: Float[Tensor, "J K"]) -> Float[Tensor, " K"]:
        """Return the combined direction in terms of the summed bases."""
        return self.scales @ objective_coefficients


_ROUNDING = 1e-10
"""Squared relative error of sums in float32; a gradient that is smaller than that share of its rows' is none."""


def combine(
    gramian: Float[Tensor, "J J"],
    combination: Combination,
    *,
    names: Sequence[str],
    row_norms: Float[Tensor, " J"],
) -> Mixture:
    """Return the weights for the given inner products of the objectives' gradients.

    ``row_norms`` are sums over rows of the squared norms of what each adds to the gradient: rows that cancel each
    other leave rounding errors, which point nowhere.

    Raises:
        NumericalFailure: an objective's gradient is zero or not finite, or the weighting finds no direction.
    """
    squared = torch.diagonal(gramian)
    if not torch.isfinite(gramian).all() or not bool((squared > _ROUNDING * row_norms).all()):
        vanished = (squared <= _ROUNDING * row_norms).tolist()
        bad = [name for name, gone in zip(names, vanished, strict=True) if gone]
        raise NumericalFailure(
            f"the gradient of objective {', '.join(bad) or 'any'} is zero or not finite on these rows"
        )
    norms = squared.sqrt()
    # Estimated inner products can leave the unit ball by their error, which no weighting is made for.
    cosines = (gramian / torch.outer(norms, norms)).clamp(-1.0, 1.0)
    weights = _weights(cosines, combination)
    if not torch.isfinite(weights).all() or not weights.sum() > 0:
        raise NumericalFailure(
            f"combination {combination.type!r} finds no common direction for {', '.join(names)}: "
            "their gradients cancel; ask for fewer objectives or for fixed weights"
        )
    return Mixture(weights / weights.sum(), norms, cosines)


def _weights(cosines: Float[Tensor, "J J"], combination: Combination) -> Float[Tensor, " J"]:
    match combination:
        case Mgda():
            return min_norm_weights(cosines)
        case UpGrad():
            return UPGradWeighting()(cosines)
        case ImtlG():
            return IMTLGWeighting()(cosines)
        case Mean():
            return torch.full_like(cosines[0], 1.0 / len(cosines))
        case Fixed():
            return torch.tensor(combination.weights, dtype=cosines.dtype)
        case _:
            assert_never(combination)


def objective_gramian(
    products: Float[Tensor, "F K F K"], coefficients: Float[Tensor, "J K"], folds: Sequence[int]
) -> Float[Tensor, "J J"]:
    """Return inner products of the objectives' gradients over the given folds, from those of the folds' bases."""
    chosen = list(folds)
    summed_KK = products[chosen][:, :, chosen].sum((0, 2))
    return coefficients @ summed_KK @ coefficients.T

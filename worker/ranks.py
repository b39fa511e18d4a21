"""A rank of its own for every layer, within the parameters that one rank for all would take (docs/method.md, ranks).

A direction of a layer costs ``I + O`` parameters and gains its squared singular value. In every layer the gains fall,
so taking directions of all layers by gain per parameter, until the budget is spent, is optimal but for the last ones.

Shape legend
    O  out_features    I  in_features    N  rank
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from d2lora.initializations import LoraSpec
from worker.factors import Direction

MOST = 2
"""The largest rank of a layer, in units of r: as many directions as a sketch is fitted with."""


@dataclass(frozen=True)
class Allocation:
    """How a budget was spent."""

    ranks: dict[str, int]
    parameters: int
    """Of lora_A and lora_B in all layers."""
    budget: int
    """Those that uniform rank r takes."""
    gain: float
    """Squared singular values of all directions that were taken, less what is noise in them."""
    uniform_gain: float
    """That of the r leading directions of every layer."""
    at_most_missed: float
    """No other ranks within the budget gain more than this on top."""


def allocate(gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], rank: int) -> Allocation:
    """Return ranks of at least 1 whose parameters are at most those of the given rank in all layers.

    ``gains`` are those of a layer's directions, falling; there are at most as many ranks. ``costs`` are the parameters
    of one rank.
    """
    uniform = {name: min(rank, len(own)) for name, own in gains.items()}
    budget = sum(rank * costs[name] for name in gains)
    ranks = dict.fromkeys(gains, 1)
    left = budget - sum(costs.values())
    # Below the noise all gain nothing; the larger value is still the better guess. Ties go to the earlier layer.
    candidates = sorted(
        (-max(gain, 0.0) / costs[name], -gain / costs[name], order, position, name)
        for order, (name, own) in enumerate(gains.items())
        for position, gain in enumerate(own[1:], start=2)
    )
    bound = None
    full = set()
    for density, _, _, position, name in candidates:
        if name in full:
            continue
        if costs[name] <= left:
            ranks[name], left = position, left - costs[name]
            continue
        full.add(name)
        if bound is None:  # even a part of the first that does not fit would gain no more
            bound = _gain(gains, ranks) - density * left
    gain, of_uniform = _gain(gains, ranks), _gain(gains, uniform)
    if of_uniform > gain:
        ranks, gain = uniform, of_uniform
    return Allocation(
        ranks=ranks,
        parameters=sum(own * costs[name] for name, own in ranks.items()),
        budget=budget,
        gain=gain,
        uniform_gain=of_uniform,
        at_most_missed=max(0.0, bound - gain) if bound is not None else 0.0,
    )


def cut_to_ranks(direction: Direction, lora: LoraSpec) -> tuple[Direction, Allocation | None]:
    """Return the direction at rank r, or at the ranks that the budget gives its layers, and how that was spent."""
    if lora.ranks is None:
        return {name: layer.cut(lora.r) for name, layer in direction.items()}, None
    spent = allocate(
        # The squared singular values, less what is noise in them.
        {name: [value**2 - layer.noise for value in layer.values.tolist()] for name, layer in direction.items()},
        {name: layer.left.shape[0] + layer.right.shape[1] for name, layer in direction.items()},
        lora.r,
    )
    return {name: layer.cut(spent.ranks[name]) for name, layer in direction.items()}, spent


def _gain(gains: Mapping[str, Sequence[float]], ranks: Mapping[str, int]) -> float:
    return sum(max(gain, 0.0) for name, rank in ranks.items() for gain in gains[name][:rank])

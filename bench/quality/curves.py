"""Arithmetic on curves and on paired differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from scipy.stats import t as student

Curve = Sequence[tuple[float, float]]
"""Points (x, loss) with rising x: steps, or seconds. A loss may be infinite."""


@dataclass(frozen=True)
class Interval:
    """A mean of paired differences with its 95 % confidence interval; infinite for a single pair."""

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{self.mean:+.3f} (one pair)"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_interval(ours: Sequence[float], theirs: Sequence[float], *, level: float = 0.95) -> Interval:
    """Return the mean of ``ours - theirs`` and Student's interval over pairs.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    count = len(differences)
    if count == 0:
        raise ValueError("no pairs")
    mean = sum(differences) / count
    if count == 1 or not math.isfinite(mean):
        return Interval(mean, -math.inf, math.inf, count)
    variance = sum((value - mean) ** 2 for value in differences) / (count - 1)
    half = float(student.ppf(0.5 + level / 2, count - 1)) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half, count)


def first_reach(curve: Curve, target: float) -> float:
    """Return where the curve first comes down to the target, linearly between its points; infinity if it never does."""
    before: tuple[float, float] | None = None
    for x, loss in curve:
        if loss <= target:
            if before is None or math.isinf(before[1]) or loss == before[1]:
                return x
            return before[0] + (x - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (x, loss)
    return math.inf


def mean_height(curve: Curve) -> float:
    """Return the area under the curve over its width: the loss averaged along training."""
    points = list(curve)
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
    return area / (points[-1][0] - points[0][0])


def value_at(curve: Curve, x: float) -> float:
    """Return the curve's height at x, linearly between its points.

    Raises:
        ValueError: x lies outside.
    """
    points = list(curve)
    for left, right in pairwise(points):
        if left[0] <= x <= right[0]:
            return left[1] + (right[1] - left[1]) * (x - left[0]) / (right[0] - left[0])
    raise ValueError(f"{x} is not on the curve")


def median(values: Sequence[float]) -> float:
    """Return the middle value; infinite where most are, so that what was never reached is not left out."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2

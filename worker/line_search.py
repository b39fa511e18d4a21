"""Step sizes, what they do to held-out rows, and the search for the best one (docs/method.md, section 4).

Shape legend
    J  objectives
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

EVALUATIONS = 5
"""Step sizes that a search tries at most."""


@dataclass(frozen=True)
class Change:
    """A mean over rows with its standard error."""

    mean: float
    error: float


@dataclass(frozen=True)
class Trial:
    """One step size and what it does to the held-out rows."""

    eta: float
    combined: Change
    """Phi: weighted change of the objectives, each in units of its gradient's norm."""
    objectives: dict[str, Change]
    nll: dict[str, Change]
    """Of a dataset's chosen completions, per token, whether SFT takes part or not."""
    since_base: dict[str, Change] = field(default_factory=dict)
    """Of the objectives from the base model on, where the step does not begin there."""

    @property
    def falls(self) -> bool:
        """Whether Phi falls by more than its standard error."""
        return self.combined.mean < -self.combined.error

    @property
    def risen(self) -> list[str]:
        """The objectives that rise by more than their own standard error, in this step or since the base model."""
        both = [*self.objectives.items(), *self.since_base.items()]
        return list(dict.fromkeys(name for name, change in both if change.mean > change.error))

    @property
    def is_supported(self) -> bool:
        """Whether Phi falls by more than its standard error and no objective rises by more than its own."""
        return self.falls and not self.risen


@dataclass(frozen=True)
class Calibration:
    """The trials in the order they were made, and the accepted one."""

    trials: list[Trial]
    """On all rows."""
    accepted: Trial | None
    reason: str
    pilot: list[Trial] = field(default_factory=list)
    """On the pilot rows alone, where there are others."""


def first_step(base_losses: Sequence[float], scales: Float[Tensor, " J"], slope: float) -> float:
    """Return the step at which the gradient alone predicts that half of the combined loss is gone.

    ``slope`` is that of Phi at 0 along the direction; its squared norm, where it is a part of the gradient itself.
    """
    total = sum(scale * loss for scale, loss in zip(scales.tolist(), base_losses, strict=True))
    return 0.5 * total / slope


def line_search(
    evaluate: Callable[[float], Trial],
    first: float,
    *,
    evaluations: int,
    confirm: Callable[[Trial], Trial] | None = None,
    keeps: Callable[[float], bool] | None = None,
) -> Calibration:
    """Return the best supported step: from ``first`` by factors of 2 until bracketed, then one parabola in log eta.

    With ``confirm``, ``evaluate`` looks at a part of the rows: it orders the steps, the best first, and the first one
    that ``confirm`` finds supported on all rows is taken. Steps that are not ``keeps`` are passed over.
    """
    tried = [evaluate(first)]
    while len(tried) < evaluations:
        following = _next_step(tried)
        if following is None:
            break
        tried.append(evaluate(following))
    # A few rows cannot support a step; they tell which one to try.
    hopeful = [one for one in tried if (one.combined.mean < 0 if confirm else one.is_supported)]
    trials: list[Trial] = []
    accepted = None
    for one in sorted(hopeful, key=lambda one: one.combined.mean):
        if keeps and not keeps(one.eta):
            continue
        trials.append(confirm(one) if confirm else one)
        if trials[-1].is_supported:
            accepted = trials[-1]
            break
    trials, pilot = (trials, tried) if confirm else (tried, [])
    if accepted:
        why = "the step lowers the held-out objective by more than its standard error"
        return Calibration(trials, accepted, why, pilot)
    best = min(trials or tried, key=lambda one: one.combined.mean)
    if best.falls and best.risen:
        why = f"every step that lowers the combined objective raises {', '.join(best.risen)} on held-out rows"
    else:
        why = "no step lowers the held-out objective by more than its standard error"
    return Calibration(trials, None, why, pilot)


def _next_step(trials: Sequence[Trial]) -> float | None:
    """Return the next eta to try, or None when the minimum is located."""
    ordered = sorted(trials, key=lambda one: one.eta)
    best = min(range(len(ordered)), key=lambda index: ordered[index].combined.mean)
    # Where the first step falls at all, a longer one is better as a rule (docs/log.md).
    if best == 0 and not (len(ordered) == 1 and ordered[0].combined.mean < 0):
        return ordered[0].eta / 2
    if best == len(ordered) - 1:
        return ordered[-1].eta * 2
    left, middle, right = ordered[best - 1 : best + 2]
    if right.eta / left.eta < 4:
        return None  # the parabola's own point is in: closer steps differ by less than the rows can tell
    if right.combined.mean == float("inf"):
        return (middle.eta * right.eta) ** 0.5
    # Vertex of the parabola through three points equally spaced in log eta (factor 2), as a power of two.
    curvature = left.combined.mean - 2 * middle.combined.mean + right.combined.mean
    if not curvature > 0:
        return None  # flat: no step changes anything
    shift = 0.5 * (left.combined.mean - right.combined.mean) / curvature
    return middle.eta * 2.0**shift if abs(shift) > 0.1 else None

"""A step that leaves general text as it is, as far as a tolerance asks for it (docs/method.md, retain).

With C the mean second moment of a layer's inputs over general text, the rank-r minimizer of
``<G, D> + |D|^2 / (2 eta) + (mu/2) |D C^(1/2)|^2`` is ``-eta`` times `restrained`, where ``nu = eta mu``. The smallest
nu of a ladder is taken whose best step keeps the loss of held-out general text within the tolerance.

Shape legend
    S  sequences    T  tokens of a padded sequence    I  in_features    N  LoRA rank r
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from d2lora.errors import DatasetInvalid, NumericalFailure
from d2lora.initializations import InitializationSpec, Phase, Retained, Sft
from worker.batches import Batch, assign_folds, distinct_rows, make_batches
from worker.calibration import calibration_batches, score_step
from worker.data import Example, needed
from worker.factors import Direction
from worker.line_search import Calibration
from worker.low_rank import LowRank
from worker.matrices import TestMatrices
from worker.models import BaseModel, layer_sizes
from worker.moments import Moment, Spectrum, add_inputs
from worker.objectives import Scores, row_losses, rows_measured
from worker.progress import PhaseCounter
from worker.statistics import score
from worker.units import OnProgress
from worker.whitening import MOMENT_OVERSAMPLING, descending, right_multiplied

TOLERANCE = 0.01
"""Nats per token, where the request names none."""
STRENGTHS = (0.0, 1.0, 10.0, 100.0, 1000.0)
"""Values of nu that are tried, over the mean eigenvalue of C in all layers."""
FOLDS = 4
"""One of them measures the loss, the others make C."""


@dataclass(frozen=True)
class GeneralText:
    """What the retain rows say: where general inputs lie, and how well the base model predicts the held-out rows."""

    spectra: Mapping[str, Spectrum]
    """Of the mean of x x^T over all tokens, by layer."""
    held: list[Batch]
    scores: Scores
    """Of the held-out rows under the base model."""

    @property
    def scale(self) -> float:
        """The mean eigenvalue over all layers."""
        return sum(spectrum.mean for spectrum in self.spectra.values()) / len(self.spectra)

    @property
    def loss(self) -> float:
        """The base model's, per token, on the held-out rows."""
        return _loss(self.scores)


@dataclass(frozen=True)
class Restraint:
    """What a step has to keep to."""

    text: GeneralText
    change: Callable[[Direction, float], float]
    """Returns how much a step of size eta along a direction raises the loss of the held-out rows."""
    tolerance: float
    """Nats per token by which it may rise."""


@runtime_checkable
class Search(Protocol):
    """What `worker.calibration.calibrate` is once it knows its rows and objectives."""

    def __call__(self, directions: Sequence[Direction], /, *, keeps: Callable[[float], bool]) -> Calibration:
        """Return the best supported step among those that are ``keeps``."""
        ...


@dataclass(frozen=True)
class Restrained:
    """The outcome of the search."""

    direction: Direction
    calibration: Calibration
    """That of the direction; accepts nothing where no step keeps the tolerance."""
    retained: Retained


def general_text(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    pad_token_id: int,
    on_progress: OnProgress,
) -> GeneralText:
    """Run forward passes over general text.

    Raises:
        DatasetInvalid: there are no two distinct rows.
        NumericalFailure: a log-probability is not finite.
        OutOfMemory: a single row does not fit.
    """
    examples = needed(examples, [Sft()])
    folds = min(FOLDS, distinct_rows(examples))
    if folds < 2:
        raise DatasetInvalid("retain_dataset_id: at least two different rows are needed, one to measure the loss")
    batches = make_batches(
        examples,
        assign_folds(examples, folds=folds, seed=spec.seed),
        max_tokens=max_tokens,
        pad_token_id=pad_token_id,
    )
    measuring = [batch for batch in batches if batch.fold == 0]
    chosen = calibration_batches([[len(batch.rows) for batch in measuring]], spec.seed)[0]
    held = [measuring[index] for index in chosen]
    learned = [batch for batch in batches if batch.fold != 0]
    count = PhaseCounter(Phase.STATISTICS, len(held) + len(learned), on_progress)
    matrices = TestMatrices(spec.seed, base.device)  # one for all layers, which share what it has made
    moments = {name: _empty(module, spec, matrices) for name, module in targets.items()}
    for batch in learned:
        add_inputs(base, targets, moments, batch)
        count()
    tokens = sum(int(batch.attention_mask.sum()) for batch in learned)
    scores = []
    for batch in held:
        scores.append(score(base, batch))
        count()
    return GeneralText(
        {name: _mean(moments.pop(name).spectrum(), tokens) for name in targets},
        held,
        Scores.concatenate(scores),
    )


def restrained(leading: LowRank, spectrum: Spectrum, nu: float, rank: int) -> LowRank:
    """Return ``[G M^(-1/2)]_r M^(-1/2)`` with ``M = 1 + nu C``, for ``leading`` in place of G.

    At nu = 0 that is the rank-r part of ``leading``, bit for bit. ``energy`` and ``missed`` stay those of G.
    """
    if nu == 0.0:
        return leading.cut(rank)

    def damp(rows: Tensor) -> Tensor:
        return spectrum.map(rows, lambda values: (1 + nu * values) ** -0.5)

    inner = right_multiplied(leading, damp).cut(rank)
    return descending(right_multiplied(inner, damp), leading)


def restrain(
    leading: Direction,
    others: Sequence[Direction],
    calibrate: Search,
    restraint: Restraint,
    *,
    rank: int,
) -> Restrained:
    """Return the step that lowers the task's loss most among those that keep general text's within the tolerance.

    ``leading`` is what the rank-r direction is made of, from all rows; ``others[f]`` the same without fold f, which
    ``calibrate`` scores. Stronger restraint is tried only while the best step breaks the tolerance: a step that
    keeps it from the first is the plain one.
    """
    text, tolerance = restraint.text, restraint.tolerance
    tried: list[_Tried] = []
    for strength in STRENGTHS:
        tried.append(_search(leading, others, calibrate, restraint, strength / text.scale, rank))
        if not tried[-1].bound:
            break
    unrestrained = next(iter(tried[0].rises.values()), 0.0)
    kept = [(accepted, one) for one in tried if (accepted := one.calibration.accepted)]
    if kept:
        accepted, chosen = min(kept, key=lambda pair: pair[0].combined.mean)
        rise, mu = chosen.rises[accepted.eta], chosen.nu / accepted.eta
        why = "the step lowers the held-out objective and keeps the loss of retain rows within its tolerance"
    else:
        chosen, rise, mu = tried[0], 0.0, 0.0
        why = f"every step that lowers the objective raises the loss of retain rows by more than {tolerance:g}"
    direction, calibration = chosen.direction, chosen.calibration
    if tried[0].bound:
        calibration = replace(calibration, reason=why)
    return Restrained(
        direction,
        calibration,
        Retained(
            base=text.loss,
            unrestrained=text.loss + unrestrained if math.isfinite(unrestrained) else None,
            adapter=text.loss + rise,
            rows=rows_measured(Sft(), text.scores),
            tolerance=tolerance,
            mu=mu,
            strengths=list(STRENGTHS[: len(tried)]),
        ),
    )


@dataclass(frozen=True)
class _Tried:
    """The search with one strength."""

    nu: float
    direction: Direction
    calibration: Calibration
    rises: dict[float, float]
    """Of the loss of general text, by eta, the best step first, down to one that is accepted."""
    bound: bool
    """Whether the tolerance has ruled a step out."""


def _search(
    leading: Direction,
    others: Sequence[Direction],
    calibrate: Search,
    restraint: Restraint,
    nu: float,
    rank: int,
) -> _Tried:
    direction = _all_restrained(leading, restraint.text, nu, rank)
    rises: dict[float, float] = {}

    def keeps(eta: float) -> bool:
        rises[eta] = restraint.change(direction, eta)
        return rises[eta] <= restraint.tolerance

    calibration = calibrate([_all_restrained(other, restraint.text, nu, rank) for other in others], keeps=keeps)
    return _Tried(nu, direction, calibration, rises, any(rise > restraint.tolerance for rise in rises.values()))


def restraint_from(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    examples: Sequence[Example] | None,
    *,
    max_tokens: int,
    pad_token_id: int,
    on_progress: OnProgress,
) -> Restraint | None:
    """Return the restraint by these rows, measured in this process; raises what `general_text` does."""
    if examples is None:
        return None
    text = general_text(
        base,
        targets,
        spec,
        examples,
        max_tokens=max_tokens,
        pad_token_id=pad_token_id,
        on_progress=on_progress,
    )

    def change(direction: Direction, eta: float) -> float:
        count = PhaseCounter(Phase.CALIBRATION, len(text.held), on_progress)
        try:
            stepped = score_step(base, targets, direction, eta, text.held, [Sft()], on_batch=count)
        except NumericalFailure:
            return float("inf")
        return _loss(stepped) - text.loss

    return Restraint(text, change, TOLERANCE if spec.retain_tolerance is None else spec.retain_tolerance)


def _all_restrained(leading: Direction, text: GeneralText, nu: float, rank: int) -> dict[str, LowRank]:
    return {name: restrained(layer, text.spectra[name], nu, rank) for name, layer in leading.items()}


def _loss(scores: Scores) -> float:
    return row_losses(Sft(), scores, scores).mean().item()


def _empty(module: nn.Module, spec: InitializationSpec, matrices: TestMatrices) -> Moment:
    _, in_features = layer_sizes(module)
    weight = next(module.parameters(), None)
    place = matrices.device if weight is None else weight.device
    if spec.statistics == "exact":
        return Moment.empty(torch.eye(in_features, device=place))
    width = min(MOMENT_OVERSAMPLING * spec.lora.r, in_features)
    return Moment.empty(matrices.on(place).moment(in_features, width))


def _mean(spectrum: Spectrum, tokens: int) -> Spectrum:
    """Return the spectrum of the mean over tokens, on the host, where all layers' wait until factors are made."""
    return Spectrum(spectrum.vectors.float().cpu(), spectrum.values.cpu() / tokens, spectrum.rest / tokens)

"""One adapter from several datasets, each with its own objectives (docs/method.md, several datasets).

Every dataset is gathered on its own, with its own bases and normalizers, and dealt into the same number of folds. From
then on their bases lie side by side (`worker/side_by_side.py`), and what combines the objectives of one dataset
combines those of all.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from d2lora.initializations import InitializationSpec, Phase
from d2lora.settings import WorkerSettings
from worker.batches import distinct_rows, groups_of, make_batches
from worker.calibration import alone, scorings
from worker.combining import objective_gramian
from worker.data import Example, needed
from worker.directions import Pass, coefficients_of, names_of, statistics_of
from worker.factors import inner_products
from worker.gathering import FOLDS, gather_statistics, tokens_per_batch
from worker.models import BaseModel
from worker.objectives import bases_of, resolve_objectives
from worker.pipeline import BuiltAdapter, adapter_from, examined, pass_of
from worker.progress import shares
from worker.units import OnProgress


@dataclass(frozen=True)
class Joint:
    """What comes of several datasets."""

    adapters: list[BuiltAdapter]
    """One for all datasets, or one for each in their order."""
    names: list[str]
    """Of all datasets' objectives."""
    cosines: Float[Tensor, "J J"]
    """Between the gradients of all of these."""


def build_jointly(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    datasets: Sequence[Sequence[Example]],
    *,
    settings: WorkerSettings,
    directory: Path,
    on_progress: OnProgress,
) -> Joint:
    """Return the adapter for the rows of all datasets, which come in the order of the request, or that of each.

    Raises:
        ObjectiveUnavailable: an objective needs what its dataset's rows do not have.
        NumericalFailure: a number is not finite, or the objectives cancel.
        OutOfMemory: a single row does not fit.
    """
    passes = _passes(base, targets, spec, datasets, settings=settings, directory=directory, on_progress=on_progress)
    groups = [passes] if spec.adapters is None else [[one] for one in passes]
    evaluators = [[alone(base, targets, one.objectives) for one in group] for group in groups]
    totals = {
        Phase.FACTORS: [len(group[0].statistics) for group in groups],
        Phase.CALIBRATION: [scorings(examined(group, own)) for group, own in zip(groups, evaluators, strict=True)],
    }
    adapters = [
        adapter_from(group, spec, evaluators=own, on_progress=report)
        for group, own, report in zip(groups, evaluators, shares(totals, on_progress), strict=True)
    ]
    if spec.adapters is None:
        return Joint(adapters, adapters[0].names, adapters[0].mixture.cosines)
    coefficients = coefficients_of(passes)
    products = inner_products(statistics_of(passes), coefficients.shape[1])
    gramian = objective_gramian(products.folds, coefficients, range(len(passes[0].statistics)))
    norms = gramian.diagonal().sqrt()
    return Joint(adapters, names_of(passes), (gramian / torch.outer(norms, norms)).clamp(-1.0, 1.0))


def _passes(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    datasets: Sequence[Sequence[Example]],
    *,
    settings: WorkerSettings,
    directory: Path,
    on_progress: OnProgress,
) -> list[Pass]:
    """Gather each dataset on its own."""
    objectives = [
        resolve_objectives(asked.objectives, rows[0].supervision)
        for asked, rows in zip(spec.training.values(), datasets, strict=True)
    ]
    examples = [needed(rows, own) for rows, own in zip(datasets, objectives, strict=True)]
    reports = shares({Phase.STATISTICS: [len(rows) for rows in examples]}, on_progress)
    folds = deal_folds(examples, seed=spec.seed)
    passes: list[Pass] = []
    for place, asked, rows, dealt, report in zip(spec.training, objectives, examples, folds, reports, strict=True):
        batches = make_batches(
            rows, dealt, max_tokens=tokens_per_batch(base, spec, settings), pad_token_id=base.pad_token_id
        )
        below = directory / f"dataset-{len(passes)}"
        below.mkdir()
        gathered = gather_statistics(
            base, targets, spec, batches, bases_of(asked), settings=settings, directory=below, on_progress=report
        )
        passes.append(pass_of(base, spec, asked, batches, gathered, place=place))
    return passes


def deal_folds(datasets: Sequence[Sequence[Example]], *, seed: int) -> list[list[int]]:
    """Return every example's fold, dataset by dataset: as many folds as leave each dataset rows of every label in each.

    Rows that share a sequence share a fold, across datasets too, so that none is held out from its own copy; the others
    are dealt evenly, in an order that depends on seed and content.
    """
    groups = iter(groups_of([example for examples in datasets for example in examples], by_label=False))
    rows = [[(_shuffled(next(groups), seed), example.desirable) for example in examples] for examples in datasets]
    most = min(FOLDS, *(distinct_rows(examples) for examples in datasets))
    for folds in range(most, 1, -1):
        dealt = _dealt(rows, folds)
        if all(_everywhere(own, places, folds) for own, places in zip(rows, dealt, strict=True)):
            return dealt
    return [[0] * len(own) for own in rows]


_Row = tuple[str, bool | None]
"""What tells a row from others, and its label."""


def _dealt(datasets: Sequence[Sequence[_Row]], folds: int) -> list[list[int]]:
    fold_of: dict[str, int] = {}
    for rows in datasets:
        for label in (None, True, False):
            own = {content for content, of in rows if of is label}
            taken = Counter(fold_of[content] for content in own if content in fold_of)
            load = [taken[fold] for fold in range(folds)]
            for content in sorted(own - fold_of.keys()):
                fold_of[content] = load.index(min(load))
                load[fold_of[content]] += 1
    return [[fold_of[content] for content, _ in rows] for rows in datasets]


def _everywhere(rows: Sequence[_Row], dealt: Sequence[int], folds: int) -> bool:
    found = {(label, fold) for (_, label), fold in zip(rows, dealt, strict=True)}
    return len(found) == len({label for _, label in rows}) * folds


def _shuffled(group: str, seed: int) -> str:
    """Return another name of a group, whose place in the order depends on the seed."""
    return hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()

"""The delivered adapter on rows that took no part in it."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from d2lora.datasets import DatasetFile, read_rows
from d2lora.errors import D2LoraError
from d2lora.initializations import HeldOut, InitializationSpec, Objective, Phase, Sft
from d2lora.roles import FIELDS, Role
from d2lora.settings import WorkerSettings
from worker.batches import make_batches
from worker.clock import Clock
from worker.data import Example, encode_rows, needed
from worker.factors import Factors, adapted
from worker.mismatches import score_for
from worker.models import BaseModel
from worker.objectives import Scores, resolve_objectives, row_losses, rows_measured
from worker.subject import Subject, length_limit
from worker.units import OnProgress


def read_evaluation(
    base: BaseModel, spec: InitializationSpec, extras: Mapping[Role, DatasetFile]
) -> list[Example] | None:
    """Return the evaluation's rows if there are any; raise what `read_extra` and `resolve_objectives` do."""
    examples = read_extra(base, spec, extras, Role.EVALUATION)
    if examples is not None:
        resolve_objectives(spec.objectives, examples[0].supervision)
    return examples


def read_extra(
    base: BaseModel, spec: InitializationSpec, extras: Mapping[Role, DatasetFile], role: Role
) -> list[Example] | None:
    """Return the rows of a role if there are any.

    Raises:
        D2LoraError: what reading and encoding raise, with the request's field before it.
    """
    return read_further(base, spec, extras[role], FIELDS[role]) if role in extras else None


def read_further(base: BaseModel, spec: InitializationSpec, file: DatasetFile, field: str) -> list[Example]:
    """Return the rows of a dataset that a field of the request names; raise what `read_extra` does."""
    try:
        return encode_rows(read_rows(file), base.tokenizer, max_length=length_limit(base, spec)[0]).examples
    except D2LoraError as error:
        raise error.within(field) from error


def seen_before(evaluation: Sequence[Example], trained: Iterable[Example], field: str) -> list[str]:
    """Return a warning if rows that are to measure are among those that the adapter is made from."""
    measuring = [_learned(example) for example in evaluation]
    found = set(measuring).intersection(map(_learned, trained))
    seen = sum(one in found for one in measuring)
    if not seen:
        return []
    said = f"{field}: {seen} of {len(measuring)} rows are among those that the adapter was made from"
    return [f"{said}; figures on these flatter it"]


def _learned(example: Example) -> tuple[int, ...]:
    """Return the prompt with what is imitated or preferred, as tokens."""
    return tuple(example.chosen.input_ids)


def measure(
    subject: Subject,
    spec: InitializationSpec,
    factors: Mapping[str, Factors],
    objectives: Sequence[Objective],
    evaluation: Sequence[Example] | None,
    *,
    settings: WorkerSettings,
    clock: Clock,
) -> dict[str, HeldOut] | None:
    """Return what base and adapter score on the evaluation rows, if there are any."""
    if evaluation is None:
        return None
    return evaluate(
        subject.base,
        subject.targets,
        spec,
        factors,
        objectives,
        evaluation,
        settings=settings,
        on_progress=clock,
    )


def evaluate(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    spec: InitializationSpec,
    factors: Mapping[str, Factors],
    objectives: Sequence[Objective],
    examples: Sequence[Example],
    *,
    settings: WorkerSettings,
    on_progress: OnProgress,
) -> dict[str, HeldOut]:
    """Return the objectives, and ``nll``, of base and delivered adapter on rows that took no part in it."""
    allowed = examples[0].supervision.objectives
    objectives = [one for one in objectives if one.type in allowed]
    batches = make_batches(
        needed(examples, objectives),
        [0] * len(examples),
        max_tokens=spec.max_tokens_per_batch or settings.tokens_per_batch(base.device.type),
        pad_token_id=base.pad_token_id,
    )
    on_progress(Phase.EVALUATION, 0, 2 * len(batches))
    before, after = [], []
    for done, batch in enumerate(batches, start=1):
        before.append(score_for(objectives, base, batch))
        with adapted(targets, factors, scaling=spec.lora.scaling):
            after.append(score_for(objectives, base, batch))
        on_progress(Phase.EVALUATION, 2 * done, 2 * len(batches))
    reference, adapter = Scores.concatenate(before), Scores.concatenate(after)
    measured: dict[str, Objective] = {"nll": Sft()} | {one.type: one for one in objectives}
    return {
        name: HeldOut(
            base=row_losses(objective, reference, reference).mean().item(),
            adapter=row_losses(objective, adapter, reference).mean().item(),
            rows=rows_measured(objective, reference),
        )
        for name, objective in measured.items()
    }

"""From records of the test split to what the page says, one entry per group and initializer."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.quality.cell import Record
from bench.quality.choosing import Choice, Key
from bench.quality.curves import Interval, first_reach, mean_height, median, paired_interval, value_at
from bench.quality.grid import Cell

Entry = dict[str, Any]
BASELINE = "vanilla"


def summarize(
    records: Sequence[Record], choices: Mapping[Key, Choice], failed: Sequence[Record], *, command: str
) -> Entry:
    """Return hardware, versions, commit and command, and the entries of every group.

    Raises:
        ValueError: a group lacks vanilla LoRA, or two initializers saw other batches or seeds.
    """
    groups: dict[tuple[str, str, int], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        cell = Cell.model_validate(record["cell"])
        groups[cell.group][cell.initializer].append(record)
    results = []
    for (model, task, rows), by_initializer in groups.items():
        if BASELINE not in by_initializer:
            raise ValueError(f"{model} {task} {rows} rows: there is no vanilla LoRA to compare with")
        for runs in by_initializer.values():
            runs.sort(key=lambda record: record["cell"]["seed"])
        check_same_batches(by_initializer)
        baseline = by_initializer[BASELINE]
        chosen = {name: choices[model, task, rows, name] for name in by_initializer}
        entries = [
            _entry(name, runs, chosen[name], baseline, chosen[BASELINE]) for name, runs in by_initializer.items()
        ]
        could_not = {
            record["cell"]["initializer"]: record["failed"]
            for record in failed
            if Cell.model_validate(record["cell"]).group == (model, task, rows)
        }
        base = sum(record["base"]["loss"] for record in baseline) / len(baseline)
        trainer, protocol = baseline[0]["cell"]["task"]["trainer"], baseline[0]["cell"]["protocol"]
        results.append(
            {"model": model, "task": task, "rows": rows, "trainer": trainer, "protocol": protocol, "base_loss": base}
            | {"entries": entries, "could_not_start": could_not}
        )
    hardware = [dict(pairs) for pairs in sorted({tuple(sorted(record["hardware"].items())) for record in records})]
    commits = sorted({record["commit"] for record in records})
    versions = records[0]["cell"]["versions"]
    return {"command": command, "commits": commits, "versions": versions, "hardware": hardware, "groups": results}


def check_same_batches(by_initializer: Mapping[str, Sequence[Record]]) -> None:
    """Raise ValueError unless every initializer saw the same batches in the same order, seed by seed."""
    seen = {name: {run["cell"]["seed"]: run["batches"] for run in runs} for name, runs in by_initializer.items()}
    if any(batches != seen[BASELINE] for batches in seen.values()):
        raise ValueError("initializers were trained on other batches or seeds than vanilla LoRA")


def curve(record: Record, what: str = "loss", against: str = "step") -> list[tuple[float, float]]:
    """Return a run's curve; against ``seconds`` it begins when the initialization does."""
    before = 0.0 if against == "step" else record["initialization"][against]
    points = ((before + point[against], point[what]) for point in record["curve"])
    return [(x, math.inf if y is None else y) for x, y in points]


def at_step(record: Record, step: int, what: str = "loss") -> float:
    """Return what a run measured at a step."""
    return dict(curve(record, what))[float(step)]


def shown_command(arguments: Sequence[str]) -> str:
    """Return the command without this machine's directories."""
    shown = []
    for argument in arguments:
        name, equals, value = argument.rpartition("=")
        shown.append(f"{name}{equals}{Path(value).name if '/' in value else value}")
    return "python -m bench.quality " + " ".join(shown)


def _entry(name: str, runs: Sequence[Record], choice: Choice, vanilla: Sequence[Record], theirs: Choice) -> Entry:
    """Return one initializer's line; differences are to vanilla LoRA, seed by seed."""
    best = [at_step(run, choice.step) for run in runs]
    targets = [at_step(run, theirs.step) for run in vanilla]
    start = [at_step(run, 0) for run in runs]
    base = [run["base"]["loss"] for run in runs]
    reached = [first_reach(curve(run), target) for run, target in zip(runs, targets, strict=True)]
    entry: Entry = {
        "initializer": name,
        "learning_rate": choice.learning_rate,
        "at_edge": choice.at_edge,
        "step": choice.step,
        "validation_loss": choice.validation_loss,
        "step_0_loss": _mean(start),
        "step_0_covers": _mean(
            [(b - s) / (b - t) if b != t else math.nan for b, s, t in zip(base, start, targets, strict=True)]
        ),
        "best_loss": _mean(best),
        "best_loss_difference": _difference(best, targets),
        "best_loss_difference_over_rows": _over_rows(runs, choice.step, vanilla, theirs.step),
        "mean_loss": _mean([mean_height(curve(run)) for run in runs]),
        "mean_loss_difference": _difference(
            [mean_height(curve(run)) for run in runs], [mean_height(curve(run)) for run in vanilla]
        ),
        "steps_to_target": _or_none(median(reached)),
        "reached": sum(math.isfinite(step) for step in reached),
        "seeds": len(runs),
        "initialization_seconds": _mean([run["initialization"]["seconds"] for run in runs]),
    }
    for clock in ("seconds", "cpu_seconds"):
        times = [first_reach(curve(run, against=clock), target) for run, target in zip(runs, targets, strict=True)]
        entry[f"{clock}_to_target"] = _or_none(median(times))
    for what in ("accuracy", "margin", "length_accuracy"):
        if what in runs[0]["curve"][0]:
            own, other = ([at_step(r, c.step, what) for r in rs] for rs, c in ((runs, choice), (vanilla, theirs)))
            entry[what] = _mean(own)
            entry[f"{what}_difference"] = _difference(own, other)
    if "accuracy" in entry:
        goals = [at_step(run, theirs.step, "accuracy") for run in vanilla]
        risen = [
            first_reach([(x, -y) for x, y in curve(run, "accuracy")], -goal)
            for run, goal in zip(runs, goals, strict=True)
        ]
        entry["steps_to_accuracy"] = _or_none(median(risen))
    if "general_loss" in runs[0]["curve"][0]:
        entry |= _forgetting(runs, choice, vanilla, theirs, reached)
    return entry | _written(runs, choice, vanilla, theirs)


def _forgetting(
    runs: Sequence[Record], choice: Choice, vanilla: Sequence[Record], theirs: Choice, reached: Sequence[float]
) -> Entry:
    """Return the change of loss on general text at the chosen step, and where vanilla's best loss is reached."""
    own = [at_step(run, choice.step, "general_loss") - run["base"]["general_loss"] for run in runs]
    other = [at_step(run, theirs.step, "general_loss") - run["base"]["general_loss"] for run in vanilla]
    equal = None
    if all(math.isfinite(step) for step in reached):
        pairs = zip(runs, reached, strict=True)
        equal = _mean([value_at(curve(run, "general_loss"), at) - run["base"]["general_loss"] for run, at in pairs])
    return {
        "forgetting": _mean(own),
        "forgetting_difference": _difference(own, other),
        "forgetting_at_target": equal,
    }


def _written(runs: Sequence[Record], choice: Choice, vanilla: Sequence[Record], theirs: Choice) -> Entry:
    """Return scores per row at each one's chosen step and, for equal steps, at the last one."""
    entry: Entry = {}
    if "untrained" in runs[0]["base"]:
        entry["untrained_base"] = _mean(runs[0]["base"]["untrained"])
    last = str(runs[0]["cell"]["protocol"]["steps"])
    for what in ("exact_match", "rouge_l", "untrained"):
        if what not in runs[0]["details"][last]:
            continue
        for label, mine, other in (("chosen", str(choice.step), str(theirs.step)), ("last", last, last)):
            own_means = [_mean(run["details"][mine][what]) for run in runs]
            other_means = [_mean(run["details"][other][what]) for run in vanilla]
            entry[f"{what}_{label}"] = _mean(own_means)
            entry[f"{what}_{label}_difference"] = _difference(own_means, other_means)
    return entry


def _over_rows(runs: Sequence[Record], step: int, vanilla: Sequence[Record], other_step: int) -> Entry | None:
    """Return the interval over test rows of the loss difference, each row's averaged over seeds."""

    def by_row(records: Sequence[Record], at: int) -> list[float]:
        columns = zip(*(record["details"][str(at)]["row_losses"] for record in records), strict=True)
        return [_mean([math.inf if value is None else value for value in column]) for column in columns]

    return _difference(by_row(runs, step), by_row(vanilla, other_step))


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> Entry | None:
    if not all(map(math.isfinite, (*ours, *theirs))):
        return None
    interval: Interval = paired_interval(ours, theirs)
    return {
        "mean": interval.mean,
        "low": _or_none(interval.low),
        "high": _or_none(interval.high),
        "pairs": interval.pairs,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None

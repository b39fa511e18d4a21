"""The results as files: ``results.json``, ``page.md`` and its plots."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.quality.aims import aims, ours_in
from bench.quality.cell import Record
from bench.quality.grid import Cell
from bench.quality.plots import draw_curves, draw_forgetting, draw_sizes, draw_steps
from bench.quality.summary import Entry

_HOW = """Every initializer got the same grid of learning rates, the same rows in the same batches and order, and the
same seeds; a seed draws the rows, their order and what is random in a start. Learning rate and step were chosen by the
mean validation loss over seeds; the chosen setting ran once more for the test split, which nothing was chosen by.
Differences are to vanilla LoRA, seed by seed, with 95 % Student intervals over seeds, and over test rows where it says
so (a row's difference averaged over seeds; it leaves out what other training rows would change). PiSSA, OLoRA and
LoRA-GA train on a changed copy of the base, as PEFT gives them. A preference's reference is the unmodified base model
for every initializer. Seconds are those of a machine with other work, and only say roughly what a start costs; an
initialization's seconds include whatever it loads. With ``--autocast`` training, measuring and jobs of ours multiply in
bfloat16, and PEFT's starts in float32. Aims are judged by the means in the tables; whether a difference is more than
chance is in the intervals."""


def write_page(summary: Entry, records: Sequence[Record], directory: Path) -> None:
    """Write all files into the directory; an earlier page there is replaced."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(_rounded(summary), indent=1) + "\n", encoding="utf-8")
    lines = ["# Initializers compared", "", _HOW, "", f"    {summary['command']}", ""]
    lines += [
        f"Commit {', '.join(summary['commits'])}; "
        + ", ".join(f"{k} {v}" for k, v in summary["versions"].items())
        + "."
    ]
    lines += ["; ".join(f"{k}: {v}" for k, v in machine.items()) + "." for machine in summary["hardware"]]
    for group in summary["groups"]:
        lines += ["", *_section(group, records, directory)]
    by_task: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for group in summary["groups"]:
        by_task[group["model"], group["task"]].append(group)
    for (model, task), groups in by_task.items():
        if len(groups) > 1:
            name = f"{model}-{task}-rows.png"
            draw_sizes(groups, directory / name)
            lines += ["", f"![best loss against rows]({name})"]
    (directory / "page.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _section(group: Entry, records: Sequence[Record], directory: Path) -> Iterator[str]:
    where = group["model"], group["task"], group["rows"]
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        cell = Cell.model_validate(record["cell"])
        if cell.group == where:
            runs[cell.initializer].append(record)
    stem = f"{group['model']}-{group['task']}-{group['rows']}"
    protocol, entries = group["protocol"], group["entries"]
    yield f"## {group['model']}, {group['task']} by {group['trainer'].upper()}, {group['rows']} rows"
    yield ""
    yield (
        f"r = {protocol['r']}, alpha = {protocol['lora_alpha']}, "
        f"{protocol['steps']} steps of {protocol['batch']} rows, "
        f"{entries[0]['seeds']} seeds. Base model's test loss: {group['base_loss']:.3f}."
    )
    yield ""
    yield from _table(
        (
            "initializer",
            "learning rate",
            "step 0",
            "covered at step 0",
            "best loss (step)",
            "difference over seeds",
            "over rows",
            "mean loss along training",
            "steps to vanilla's best",
            "seconds to it",
            "start's seconds",
        ),
        [
            (
                entry["initializer"],
                f"{entry['learning_rate']:g}" + (f" ({entry['at_edge']} tried)" if entry["at_edge"] else ""),
                f"{entry['step_0_loss']:.3f}",
                f"{entry['step_0_covers']:.0%}",
                f"{entry['best_loss']:.3f} ({entry['step']})",
                _interval(entry["best_loss_difference"]),
                _interval(entry["best_loss_difference_over_rows"]),
                f"{entry['mean_loss']:.3f}",
                _steps(entry),
                _number(entry["seconds_to_target"], 1),
                f"{entry['initialization_seconds']:.2f}",
            )
            for entry in entries
        ],
    )
    extra = _measures(entries)
    if extra:
        yield ""
        yield from _table(
            ("initializer", *extra), [(e["initializer"], *(f(e) for f in extra.values())) for e in entries]
        )
    if "length_accuracy" in entries[0]:
        yield ""
        yield f"Calling the longer completion the chosen one would score {entries[0]['length_accuracy']:.3f}."
    if ours := ours_in(entries):
        yield ""
        yield from _table(
            ("aim", *(entry["initializer"] for entry in ours)),
            [(aim, *verdicts) for aim, verdicts in aims(entries)],
        )
    for name, reason in group["could_not_start"].items():
        yield ""
        yield f"{name} could not start: {reason}."
    draw_curves(group, runs, directory / f"{stem}-curves.png")
    draw_steps(group, directory / f"{stem}-steps.png")
    yield ""
    yield f"![loss curves]({stem}-curves.png)"
    yield f"![steps to vanilla's best]({stem}-steps.png)"
    if "forgetting" in entries[0]:
        draw_forgetting(group, runs, directory / f"{stem}-forgetting.png")
        yield f"![forgetting against gain]({stem}-forgetting.png)"


def _measures(entries: Sequence[Entry]) -> dict:
    """Return the columns of the second table: those that the group has."""
    names = {
        "forgetting": "rise of loss on general text",
        "forgetting_at_target": "the same at vanilla's best loss",
        "accuracy": "preference accuracy",
        "steps_to_accuracy": "steps to vanilla's accuracy",
        "margin": "margin to the base",
        "exact_match_chosen": "exact match",
        "exact_match_last": "exact match, last step",
        "rouge_l_chosen": "ROUGE-L",
        "rouge_l_last": "ROUGE-L, last step",
        "untrained_base": "base's accuracy on an untrained task",
        "untrained_chosen": "accuracy there",
        "untrained_last": "accuracy there, last step",
    }

    def column(key: str):  # noqa: ANN202  # a formatter
        def shown(entry: Entry) -> str:
            interval = entry.get(f"{key}_difference")
            digits = 1 if key.startswith("steps") else 3
            return _number(entry[key], digits) + (f"; {_interval(interval)}" if interval else "")

        return shown

    return {title: column(key) for key, title in names.items() if key in entries[0]}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(row)} |"


def _steps(entry: Entry) -> str:
    reached = f"{entry['reached']} of {entry['seeds']} seeds"
    return f"{_number(entry['steps_to_target'], 1)} ({reached})"


def _number(value: float | None, digits: int) -> str:
    return "not reached" if value is None else f"{value:.{digits}f}"


def _interval(interval: Entry | None) -> str:
    if interval is None:
        return "diverged"
    if interval["low"] is None:
        return f"{interval['mean']:+.3f} (one pair)"
    return f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


def _rounded(value: object) -> object:
    """Return the same with floats of six digits."""
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {key: _rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [_rounded(item) for item in value]
    return value

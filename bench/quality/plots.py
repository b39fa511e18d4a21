"""The page's plots, drawn by matplotlib into PNG files."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

from bench.quality.cell import Record
from bench.quality.summary import Entry, at_step, curve

_COLORS = {
    "vanilla": "#000000",
    "pissa": "#e69f00",
    "olora": "#b08000",
    "eva": "#56b4e9",
    "lora_ga": "#009e73",
    "random_matched": "#999999",
    "ours_zero": "#cc79a7",
    "ours_calibrated": "#d55e00",
    "ours_whitened": "#8c2d04",
    "ours_rounds": "#7a0177",
}


def draw_curves(group: Entry, runs: dict[str, list[Record]], path: Path) -> None:
    """Draw test loss against steps and against seconds; bands are the range over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(13.5, 4.5), sharey=True)
    top = group["base_loss"]
    for name, records in runs.items():
        losses = np.array([[y for _, y in curve(record)] for record in records])
        losses[~np.isfinite(losses)] = np.nan
        color = _color(name)
        for axis, against in zip(axes, ("step", "seconds"), strict=True):
            x = np.mean([[at for at, _ in curve(record, against=against)] for record in records], axis=0)
            axis.plot(x, losses.mean(0), color=color, label=name, lw=1.6, marker=".", ms=4)
            axis.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.15, lw=0)
        top = max(top, float(np.nanmax(losses[:, 0])))
    target = next(entry for entry in group["entries"] if entry["initializer"] == "vanilla")["best_loss"]
    lowest = min(entry["best_loss"] for entry in group["entries"])
    for axis, label in zip(axes, ("step", "seconds, initialization included"), strict=True):
        axis.axhline(target, color="black", lw=0.8, ls=":")
        axis.axhline(group["base_loss"], color="grey", lw=0.8, ls="--")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    margin = 0.08 * (top - lowest)
    axes[0].set_ylim(lowest - margin, top + margin)
    axes[0].set_ylabel("test loss")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[1].legend(handles, labels, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.suptitle(f"{_title(group)}: dotted, vanilla's best; dashed, the base", fontsize=10)
    _save(figure, path)


def draw_steps(group: Entry, path: Path) -> None:
    """Draw bars of the steps to vanilla's best loss; hatched where most seeds never got there."""
    figure, axis = plt.subplots(figsize=(7, 3.6))
    most = group["protocol"]["steps"]
    for place, entry in enumerate(group["entries"]):
        steps, name = entry["steps_to_target"], entry["initializer"]
        missed = steps is None
        axis.barh(
            place,
            most if missed else steps,
            color="white" if missed else _color(name),
            edgecolor=_color(name),
            hatch="//" if missed else None,
        )
        note = "not reached" if missed else f"{steps:.1f}"
        axis.text(
            most * 1.02 if missed else steps + most * 0.02,
            place,
            f"{note} ({entry['reached']}/{entry['seeds']})",
            va="center",
            fontsize=8,
        )
    axis.set_yticks(range(len(group["entries"])), [entry["initializer"] for entry in group["entries"]])
    axis.invert_yaxis()
    axis.set_xlim(0, most * 1.3)
    axis.set_xlabel("steps to vanilla's best test loss (seeds that got there)")
    axis.set_title(_title(group), fontsize=10)
    _save(figure, path)


def draw_forgetting(group: Entry, runs: dict[str, list[Record]], path: Path) -> None:
    """Draw the change of loss on general text against the task's gain along training; a dot is the chosen step."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    chosen_most, lowest, highest = 0.0, 0.0, 0.0
    for entry in group["entries"]:
        records = runs[entry["initializer"]]
        gain = _mean_over([[r["base"]["loss"] - y for _, y in curve(r)] for r in records])
        lost = _mean_over([[y - r["base"]["general_loss"] for _, y in curve(r, "general_loss")] for r in records])
        color = _color(entry["initializer"])
        axis.plot(gain, lost, color=color, label=entry["initializer"], lw=1.3, alpha=0.8)
        chosen = [
            (
                r["base"]["loss"] - at_step(r, entry["step"]),
                at_step(r, entry["step"], "general_loss") - r["base"]["general_loss"],
            )
            for r in records
        ]
        x, y = np.mean(chosen, axis=0)
        axis.plot(x, y, "o", color=color, ms=6)
        chosen_most = max(chosen_most, float(y))
        lowest, highest = min(lowest, float(np.nanmin(lost))), max(highest, float(np.nanmax(lost)))
    # What a run forgets long after its chosen step must not flatten the rest.
    highest = min(highest, 2 * chosen_most) if chosen_most > 0 else highest
    margin = 0.06 * (highest - lowest) + 0.01
    axis.set_ylim(lowest - margin, highest + margin)
    axis.set_xlabel("gain: base's test loss minus the adapter's")
    axis.set_ylabel("forgetting: rise of the loss on general text")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    axis.set_title(_title(group), fontsize=10)
    _save(figure, path)


def draw_sizes(groups: Sequence[Entry], path: Path) -> None:
    """Draw the best test loss against the number of rows, for groups of one model and task."""
    figure, axis = plt.subplots(figsize=(8, 4.2))
    for name in dict.fromkeys(entry["initializer"] for group in groups for entry in group["entries"]):
        points = sorted(
            (group["rows"], entry["best_loss"], entry["step_0_loss"])
            for group in groups
            for entry in group["entries"]
            if entry["initializer"] == name
        )
        rows, best, _ = zip(*points, strict=True)
        axis.plot(rows, best, color=_color(name), marker="o", ms=4, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({group["rows"] for group in groups}), sorted({group["rows"] for group in groups}))
    axis.set_xlabel("training rows")
    axis.set_ylabel("test loss at the chosen step")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    axis.set_title(f"{groups[0]['model']}, {groups[0]['task']}", fontsize=10)
    _save(figure, path)


def _mean_over(rows: list[list[float]]) -> np.ndarray:
    values = np.array(rows)
    values[~np.isfinite(values)] = np.nan
    return values.mean(0)


def _color(name: str) -> str:
    return _COLORS.get(name, f"C{sum(map(ord, name)) % 10}")


def _title(group: Entry) -> str:
    return f"{group['model']}, {group['task']} by {group['trainer'].upper()}, {group['rows']} rows"


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)

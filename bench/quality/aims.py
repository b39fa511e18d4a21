"""What a start of ours should reach in a comparison, and whether it has."""

from collections.abc import Callable, Iterator, Sequence

from bench.quality.summary import BASELINE, Entry

PEFTS = ("pissa", "olora", "eva", "lora_ga")


def ours_in(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries of our starts."""
    return [entry for entry in entries if entry["initializer"].startswith("ours")]


def aims(entries: Sequence[Entry]) -> Iterator[tuple[str, list[str]]]:
    """Yield every aim that the group has figures for, and what each of our starts makes of it."""
    by_name = {entry["initializer"]: entry for entry in entries}
    vanilla, ours = by_name[BASELINE], ours_in(entries)

    def judged(key: str, shown: str, reaches: Callable[[float], bool]) -> list[str]:
        return [_judged(entry[key], shown, reaches) for entry in ours]

    yield "half of the way to vanilla's best loss at step 0", judged("step_0_covers", "{:.0%}", lambda x: x >= 0.5)
    half = vanilla["steps_to_target"] / 2
    yield (
        f"vanilla's best loss in half of its steps, {half:g}",
        judged("steps_to_target", "{:.1f}", lambda x: x <= half),
    )
    steps = [by_name[name]["steps_to_target"] for name in PEFTS if name in by_name]
    if steps:
        soonest = min((x for x in steps if x is not None), default=None)
        title = "as soon as the best of PEFT's, " + (
            "none of which reaches it" if soonest is None else f"{soonest:.1f}"
        )
        yield title, judged("steps_to_target", "{:.1f}", lambda x: soonest is None or x <= soonest)
    other = min((entry for entry in entries if entry not in ours), key=lambda entry: entry["best_loss"])
    title = f"a best loss below all others', {other['best_loss']:.3f} ({other['initializer']})"
    yield title, judged("best_loss", "{:.3f}", lambda x: x < other["best_loss"])
    if "rouge_l_last" in vanilla:
        goal = vanilla["rouge_l_last"] + 0.02
        title = f"ROUGE-L 0.02 above vanilla's at the last step, {goal:.3f}"
        yield title, judged("rouge_l_last", "{:.3f}", lambda x: x >= goal)
    if vanilla.get("steps_to_accuracy") is not None:
        soon = vanilla["steps_to_accuracy"] / 2
        title = f"vanilla's preference accuracy in half of its steps, {soon:g}"
        yield title, judged("steps_to_accuracy", "{:.1f}", lambda x: x <= soon)
    if vanilla.get("forgetting_at_target") is not None:
        lost = vanilla["forgetting_at_target"]
        title = f"at vanilla's best loss, general text no worse than with it, {lost:+.3f}"
        yield title, judged("forgetting_at_target", "{:+.3f}", lambda x: x <= lost)


def _judged(value: float | None, shown: str, reaches: Callable[[float], bool]) -> str:
    if value is None:
        return "missed, not reached"
    return f"{shown.format(value)}, {'reached' if reaches(value) else 'missed'}"

"""What rows say of their completions, and which objectives that allows."""

from enum import StrEnum


class Supervision(StrEnum):
    """What rows say of their completions."""

    COMPLETION = "completion"
    """To be imitated."""
    PREFERENCE = "preference"
    """One of two is better."""
    LABEL = "label"
    """Each is desirable or not."""

    @property
    def objectives(self) -> list[str]:
        """Types of the objectives that such rows allow."""
        return _OBJECTIVES[self]


_OBJECTIVES = {
    Supervision.COMPLETION: ["sft"],
    Supervision.PREFERENCE: ["sft", "dpo", "orpo"],
    Supervision.LABEL: ["sft", "kto"],
}


def rows_needed(objective: str) -> str:
    """Return which rows an objective type needs, after the word "needs"."""
    return "rows with a label" if objective == "kto" else "rows with chosen and rejected completions"


def supervision_of(*, paired: bool, labeled: bool) -> Supervision:
    """Return what rows with rejected completions, or with labels, say."""
    if paired:
        return Supervision.PREFERENCE
    return Supervision.LABEL if labeled else Supervision.COMPLETION

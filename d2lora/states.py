"""Where an initialization stands: its state, and how far a running one is."""

from enum import StrEnum

from pydantic import Field

from d2lora.objectives import Frozen


class State(StrEnum):
    """Where an initialization stands.

    From queued to running, and from there to succeeded or failed; by way of cancelling, while a worker notices, to
    cancelled; back to queued when a worker hands its work back. A succeeded one is expired once its files are removed.
    """

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    """Succeeded once; its files have been removed since."""

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended; a succeeded one may still expire."""
        return self in {State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED}

    def can_become(self, other: "State") -> bool:
        """Whether the store may move from this state to ``other``."""
        return other in _MOVES[self]


_MOVES: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED, State.FAILED}),
    # Back to queued when a worker hands its work back, or to running under a new attempt once the lease is over.
    State.RUNNING: frozenset({State.RUNNING, State.QUEUED, State.CANCELLING, State.SUCCEEDED, State.FAILED}),
    # A worker that finished before it saw the wish to cancel has lost the race: the result is dropped.
    State.CANCELLING: frozenset({State.CANCELLED}),
    State.SUCCEEDED: frozenset({State.EXPIRED}),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
    State.EXPIRED: frozenset(),
}


class Phase(StrEnum):
    """What a running initialization is doing, in about this order."""

    LOADING = "loading"
    READING = "reading"
    STATISTICS = "statistics"
    FACTORS = "factors"
    CALIBRATION = "calibration"
    REFINEMENT = "refinement"
    """The second pass, over some or all layers."""
    ROUNDS = "rounds"
    """All rounds after the first; their passes and line searches count as one phase, which never goes back."""
    WARMUP = "warmup"
    EVALUATION = "evaluation"
    PUBLISHING = "publishing"


class Progress(Frozen):
    """How far a running initialization is."""

    phase: Phase
    """What it is doing."""
    done: int = Field(ge=0, description="of the phase: rows where it passes over rows, else layers, files or one step")
    total: int = Field(ge=0, description="of the same")
    seconds_left: float | None = Field(default=None, ge=0, description="of this phase, from its own rate so far")

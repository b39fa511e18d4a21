"""What comes out of an initialization: its files, and the report in short."""

from typing import Literal

from pydantic import Field

from d2lora.objectives import Frozen


class ResultFile(Frozen):
    """One file of a finished initialization."""

    name: str
    """Where it belongs in the adapter's directory; with ``adapters: per_dataset`` below a folder."""
    size: int = Field(ge=0, description="bytes")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of its bytes")


class HeldOut(Frozen):
    """One measured quantity on rows that the measured adapter has not seen, before and after."""

    base: float
    """Of the base model alone."""
    adapter: float
    """Of the base model with the adapter."""
    rows: int
    """On how many rows."""


class Retained(Frozen):
    """The loss per token of held-out retain rows, before and after."""

    base: float = Field(description="of the base model alone")
    unrestrained: float | None = Field(
        description="of the adapter that would be delivered without retain rows; null if it is not finite"
    )
    adapter: float = Field(description="of the delivered adapter")
    rows: int = Field(description="held out, of the retain rows")
    tolerance: float = Field(description="as asked for, in nats per token")
    mu: float = Field(description="weight of the retain rows; 0 where the plain step keeps the tolerance")
    strengths: list[float] = Field(description="eta mu as tried, over the mean eigenvalue of the second moment")


class ResultSummary(Frozen):
    """The report in short: enough to decide whether to fetch the adapter."""

    start: Literal["calibrated", "zero", "warmup"] = Field(description="the start that was delivered")
    start_reason: str = Field(description="why that start was delivered, in a sentence")
    objectives: list[str] = Field(description="those that took part; with several datasets such as 'datasets[1].dpo'")
    objectives_reason: str = Field(description="why these objectives took part")
    weights: dict[str, float] = Field(description="of the normalized gradients, per objective")
    cosines: dict[str, float] = Field(description="between gradients of two objectives, such as 'sft,dpo'")
    held_out: dict[str, HeldOut] = Field(
        description="cross-validated objective values, per objective, and the loss per completion token (nll)"
    )
    evaluation: dict[str, HeldOut] | None = Field(default=None, description="the delivered adapter on eval_dataset_id")
    retained: Retained | None = Field(default=None, description="what was forgotten of retain_dataset_id")
    rows_used: int = Field(description="that the adapter was made from")
    rows_truncated: int = Field(description="of these, cut off at max_length")
    rows_dropped: int = Field(description="not used; report.json says why")
    fingerprint: str = Field(description="sha256 over all that decides the adapter")
    warnings: list[str] = Field(default=[], description="what a user should know before training from it")


class Result(Frozen):
    """What a succeeded initialization leaves behind."""

    files: list[ResultFile]
    """The adapter's, ``manifest.json`` last; where to fetch them is told by ``/adapter``."""
    summary: ResultSummary
    """The report in short."""

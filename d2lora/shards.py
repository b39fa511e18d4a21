"""What a worker is asked to do for a job that was cut into shards: statistics of its rows, or scores at a step size.

Only the requests are here, without the store, so that the mathematics may know them.
"""

from typing import Annotated, Literal

from pydantic import Field

from d2lora.initializations import Frozen


class StatisticsTask(Frozen):
    """Sum the gradients of one shard's batches; its only input is the file ``rows.safetensors``."""

    type: Literal["statistics"] = "statistics"
    rows: int = Field(ge=1)
    tokens: int = Field(ge=1, description="of chosen and rejected sequences together, without padding")


class EvaluationTask(Frozen):
    """Score held-out batches under a step of size ``eta`` that their fold took no part in."""

    type: Literal["evaluation"] = "evaluation"
    eta: float = Field(ge=0, allow_inf_nan=False)
    fold: int = Field(ge=0)
    files: list[str] = Field(min_length=1, description="names of the input files: the fold's direction and its batches")
    batches: list[int] = Field(min_length=1, description="which batches of the file, in this order")


ShardTask = Annotated[StatisticsTask | EvaluationTask, Field(discriminator="type")]

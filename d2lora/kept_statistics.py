"""What clients see of statistics that a job keeps for later ones."""

from pydantic import Field

from d2lora.objectives import Frozen


class KeptStatistics(Frozen):
    """Statistics that a succeeded initialization keeps; they go with its dataset and with its adapter."""

    r: int = Field(description="the rank that its sketches were made for; they serve ranks up to twice that")
    rows: int = Field(description="that they are of")
    size: int = Field(description="bytes")

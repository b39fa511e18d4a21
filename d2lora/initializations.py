"""An initialization: what is asked for, what state it is in, and what came out."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from d2lora.errors import Problem
from d2lora.initialization_spec import InitializationSpec, LoraSpec, Quantization, Whitening
from d2lora.kept_statistics import KeptStatistics
from d2lora.objectives import (
    Combination,
    Dpo,
    DpoLoss,
    Fixed,
    Frozen,
    ImtlG,
    Kto,
    Mean,
    Mgda,
    Objective,
    Orpo,
    Sft,
    UpGrad,
)
from d2lora.results import HeldOut, Result, ResultFile, ResultSummary, Retained
from d2lora.states import Phase, Progress, State
from d2lora.training import TrainingDataset

__all__ = [
    "Adapter",
    "AdapterFile",
    "Combination",
    "Dpo",
    "DpoLoss",
    "Fixed",
    "Frozen",
    "HeldOut",
    "ImtlG",
    "Initialization",
    "InitializationSpec",
    "Kto",
    "LoraSpec",
    "Mean",
    "Mgda",
    "Objective",
    "Orpo",
    "Phase",
    "Progress",
    "Quantization",
    "Result",
    "ResultFile",
    "ResultSummary",
    "Retained",
    "Sft",
    "State",
    "TrainingDataset",
    "UpGrad",
    "Whitening",
]


class Initialization(Frozen):
    """The resource that ``/v1/initializations`` serves."""

    id: str
    """What its addresses hold."""
    object: Literal["initialization"] = "initialization"
    state: State
    """Where it stands."""
    spec: InitializationSpec
    """The request, with defaults filled in."""
    attempt: int = Field(ge=0, description="how often a worker has claimed it")
    progress: Progress | None = Field(default=None, description="while it runs")
    created_at: datetime = Field(description="when it was queued")
    started_at: datetime | None = Field(default=None, description="when a worker first claimed it")
    cancelling_at: datetime | None = Field(default=None, description="when a running one was asked to stop")
    succeeded_at: datetime | None = Field(default=None, description="when its result was complete")
    failed_at: datetime | None = Field(default=None, description="when it ended with an error")
    cancelled_at: datetime | None = Field(default=None, description="when it ended without a result, as was asked")
    expired_at: datetime | None = Field(default=None, description="when its files were removed")
    error: Problem | None = Field(default=None, description="why it failed")
    result: Result | None = Field(default=None, description="once it has succeeded")
    statistics: KeptStatistics | None = Field(default=None, description="what it keeps with keep_statistics")


class AdapterFile(ResultFile):
    """A file of the adapter with an address to fetch it from."""

    url: str = Field(description="GET it: with the API key if it is this service's, without if it is an object store's")
    url_expires_at: datetime | None = Field(default=None, description="null if the address stays; else ask for it anew")


class Adapter(Frozen):
    """Answer of ``/v1/initializations/{id}/adapter``."""

    initialization_id: str
    """Whose files they are."""
    files: list[AdapterFile]
    """All files of the adapter, ``manifest.json`` last."""

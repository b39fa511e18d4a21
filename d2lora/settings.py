"""Settings from the environment: one frozen class per concern, read here and nowhere else.

Every variable starts with ``D2LORA_`` and its concern, for instance ``D2LORA_WORKER_DEVICE=cuda``.
``docs/operating.md`` lists them all; a test compares the two.
"""

from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

Queue = Literal["cpu", "gpu-small", "gpu-large"]
"""Classes of jobs, by what the base model needs."""

QUEUES: tuple[Queue, ...] = get_args(Queue)


def _prefix(concern: str) -> SettingsConfigDict:
    # Errors leave out what was given: it may be a key or a password, and they end in logs.
    return SettingsConfigDict(env_prefix=f"D2LORA_{concern}", frozen=True, extra="ignore", hide_input_in_errors=True)


class DatabaseSettings(BaseSettings):
    """Where the queue of record lives."""

    model_config = _prefix("DATABASE_")

    url: str = Field(default="sqlite:///.d2lora/d2lora.db", description="SQLAlchemy URL; SQLite or PostgreSQL")


class StorageSettings(BaseSettings):
    """Where datasets and adapters live."""

    model_config = _prefix("STORAGE_")

    root: Path = Field(default=Path(".d2lora/objects"), description="directory of the local object store")
    bucket: str | None = Field(default=None, description="S3 bucket; the local store is used when unset")
    endpoint_url: str | None = Field(
        default=None, description="of an S3-compatible store, as service and workers see it"
    )
    public_endpoint_url: str | None = Field(default=None, description="the same store, as clients see it")
    region: str = Field(default="us-east-1", description="of the bucket; keys come from where AWS's tools find them")


class BrokerSettings(BaseSettings):
    """Where wake-ups for the workers go. Without a broker, workers look for work in the database themselves."""

    model_config = _prefix("BROKER_")

    url: SecretStr | None = Field(default=None, description="redis:// or rediss:// URL")


class DispatchSettings(BaseSettings):
    """How the API's leading replica passes jobs on and tidies up."""

    model_config = _prefix("DISPATCH_")

    publish_seconds: float = Field(default=0.2, gt=0, description="pause between two looks into the outbox")
    reconcile_seconds: float = Field(
        default=5.0, gt=0, description="pause between two looks for jobs that nobody works on although they are free"
    )
    leader_seconds: float = Field(default=15.0, gt=0, description="a leader that is silent for so long is replaced")
    tidy_seconds: float = Field(
        default=300.0, gt=0, description="after a job's end, until what it left behind besides its result is removed"
    )
    retention_days: float | None = Field(
        default=None, gt=0, description="finished adapters are removed after so many days; never when unset"
    )


class ModelSettings(BaseSettings):
    """Which base models a request may name."""

    model_config = _prefix("MODELS_")

    allowed: list[str] = Field(
        default=[], description="hub IDs; shell patterns such as 'HuggingFaceTB/*' are understood"
    )
    roots: list[Path] = Field(default=[], description="a local model must lie below one of these directories")
    cpu_parameters: float = Field(
        default=0.5e9, gt=0, description="models of at most so many parameters go to the queue cpu"
    )
    gpu_small_parameters: float = Field(
        default=9e9, gt=0, description="larger ones of at most so many go to gpu-small, all others to gpu-large"
    )


class WorkerSettings(BaseSettings):
    """How a worker claims and computes."""

    model_config = _prefix("WORKER_")

    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_tokens_per_batch: int | None = Field(
        default=None, ge=1, description="padded tokens of one forward; 2048 on a CPU and 8192 elsewhere when unset"
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute each layer in the backward: less memory, one more forward"
    )
    queues: list[Queue] = Field(default=[], description="classes of jobs it takes; all when empty")
    shard_tokens: int = Field(
        default=500_000, ge=1, description="a job of more tokens is cut into shards of about so many"
    )
    model_cache_gib: float = Field(
        default=0.0, ge=0, description="base models kept in memory between jobs, beside the one in use; their GiB"
    )
    heartbeat_file: Path | None = Field(
        default=None, description="touched while the worker is alive; what `python -m worker alive` looks at"
    )
    grace_seconds: float = Field(
        default=30.0, gt=0, description="a child that has not handed its work back so long after a stop is killed"
    )
    job_hours: float = Field(default=6.0, gt=0, description="a single claim that takes longer is killed")
    lease_seconds: float = Field(default=60.0, gt=0, description="a claim not renewed for so long is free again")
    heartbeat_seconds: float = Field(
        default=5.0, gt=0, description="how often a claim is renewed, progress stored, and a wish to cancel seen"
    )
    poll_seconds: float = Field(default=0.5, gt=0, description="pause between two looks for work when idle")
    max_attempts: int = Field(default=3, ge=1, description="workers that may die on a job before it is worker_lost")
    max_outage_attempts: int = Field(
        default=12, ge=1, description="claims of a job before an outage fails it, at pauses up to five minutes"
    )

    @property
    def lease(self) -> timedelta:
        """The lease as the store takes it."""
        return timedelta(seconds=self.lease_seconds)

    def tokens_per_batch(self, device: str) -> int:
        """Return the padded tokens of one forward on a device of this type."""
        return self.max_tokens_per_batch or (2048 if device == "cpu" else 8192)


class ServiceSettings(BaseSettings):
    """The HTTP front."""

    model_config = _prefix("SERVICE_")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_keys: dict[str, SecretStr] = Field(
        default={}, description="tenant -> API key; the service will not start without"
    )
    max_dataset_bytes: int = Field(default=256 * 2**20, ge=1)
    max_dataset_rows: int = Field(default=1_000_000, ge=1)
    max_row_bytes: int = Field(default=2**20, ge=1)
    max_request_bytes: int = Field(default=2**20, ge=1, description="bodies other than datasets")
    metrics_port: int | None = Field(
        default=None, ge=0, le=65535, description="port of Prometheus' /metrics; not served when unset"
    )

"""The base model of an initialization, with the layers that its adapter is for."""

from collections.abc import Mapping
from dataclasses import dataclass

from peft import LoraConfig
from torch import nn

from d2lora.errors import ChecksumMismatch
from d2lora.initializations import InitializationSpec, Phase
from d2lora.settings import WorkerSettings
from worker.left_out import LeftOut, in_words, left_out
from worker.model_cache import Loader
from worker.models import BaseModel
from worker.shard_files import BasePin
from worker.targets import lora_config, resolve_targets, unmatched
from worker.units import OnProgress


@dataclass(frozen=True)
class Subject:
    """The base model and where its adapter goes."""

    base: BaseModel
    config: LoraConfig
    targets: Mapping[str, nn.Module]
    left_out: list[LeftOut]
    """What the adapter leaves as it is."""
    unmatched: list[str]
    """Names that the request asks for and no module has."""

    @property
    def warnings(self) -> list[str]:
        """What a user should know of the targets."""
        unknown = [f"lora.target_modules: {name!r} matches no module" for name in self.unmatched]
        return unknown + [in_words(one) for one in self.left_out]


def load_subject(
    spec: InitializationSpec,
    settings: WorkerSettings,
    load: Loader,
    on_progress: OnProgress,
    pinned: BasePin | None = None,
) -> Subject:
    """Return the base model, if pinned with the weights and in the type that the job's first worker had."""
    on_progress(Phase.LOADING, 0, 1)

    def loaded(revision: str | None, dtype: str) -> BaseModel:
        return load(
            spec.base_model,
            revision=revision,
            dtype=dtype,
            device=settings.device,
            quantization=spec.quantization,
        )

    base = loaded(spec.revision, spec.dtype)
    if pinned is not None and not pinned.fits(base):
        # A branch has moved on since, or this machine would choose another type.
        del base
        base = loaded(pinned.revision or spec.revision, pinned.dtype)
        if not pinned.fits(base):
            raise ChecksumMismatch(
                "base_model: its weights, configuration or tokenizer are not those that the job was begun with"
            )
    config = lora_config(base.model, spec.lora, base_model=spec.base_model, revision=spec.revision)
    targets = resolve_targets(base.model, config)
    on_progress(Phase.LOADING, 1, 1)
    return Subject(base, config, targets, left_out(base.model, spec.lora), unmatched(base.model, spec.lora))


def length_limit(base: BaseModel, spec: InitializationSpec) -> tuple[int, list[str]]:
    """Return the longest sequence that both the request and the model allow, and what to say about it."""
    limit = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit >= spec.max_length:
        return spec.max_length, []
    return limit, [f"max_length {spec.max_length} is above the model's context; {limit} was used"]

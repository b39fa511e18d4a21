"""The request for an initialization, and which of its fields go together.

Names inside ``lora`` are PEFT's, names of objectives and rows are TRL's.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from d2lora.methods import NEEDS_FLOAT, Method, Orthogonal, Warmup
from d2lora.objectives import Combination, Fixed, Frozen, Mgda, Objective
from d2lora.training import TrainingDataset, check_training

Quantization = Literal["4bit", "8bit"]
"""How the linear layers of a base model are stored: NF4, or LLM.int8; by bitsandbytes."""


class Whitening(Frozen):
    """Gradients are multiplied by ``(C + damping tr(C)/I)^(-power)``, C the second moment of the layer's I inputs."""

    damping: float = Field(
        default=0.1, gt=0, allow_inf_nan=False, description="in units of the mean eigenvalue of the second moment"
    )
    power: float = Field(default=0.5, gt=0, le=1, description="0.5 whitens the gradient, 1 its natural-gradient step")


class LoraSpec(Frozen):
    """The adapter's shape, under PEFT's names."""

    r: int = Field(default=16, ge=1, le=4096, description="rank; at most the smaller side of each layer that is named")
    lora_alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="2 * r when omitted")
    target_modules: str | list[Annotated[str, Field(min_length=1, max_length=512)]] = Field(
        default="all-linear", description="'all-linear', a regular expression, or a list of module names, as in PEFT"
    )
    use_rslora: bool = False
    """Scale by ``lora_alpha / sqrt(r)``, and not by ``lora_alpha / r``."""
    ranks: Literal["budget"] | None = Field(
        default=None,
        description="budget: every layer has a rank of its own, up to 2 r, with no more parameters in all than r has; "
        "r everywhere when omitted",
    )

    @property
    def alpha(self) -> float:
        """``lora_alpha`` with its default filled in."""
        return 2.0 * self.r if self.lora_alpha is None else self.lora_alpha

    @property
    def scaling(self) -> float:
        """The factor ``s`` that PEFT applies to ``B A``: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)

    def alpha_of(self, rank: int) -> float:
        """Return the ``lora_alpha`` with which a layer of another rank has the same scaling."""
        if rank == self.r:
            return self.alpha
        return self.alpha * ((rank / self.r) ** 0.5 if self.use_rslora else rank / self.r)


def default_direction(fields: Mapping[str, Any]) -> Literal["orthogonalized", "gradient"]:
    """Return what ``direction`` is in a request that leaves it out."""
    return "gradient" if fields.get("retain_dataset_id") is not None else "orthogonalized"


class InitializationSpec(Frozen):
    """Everything that decides the adapter, except the base model's weights and the rows themselves."""

    base_model: str = Field(min_length=1, max_length=1024, description="hub ID, or a local directory or .gguf file")
    revision: str | None = Field(default=None, max_length=256, description="commit, tag or branch of a hub model")
    dataset_id: str | None = Field(default=None, min_length=1, max_length=64, description="this or datasets is needed")
    datasets: list[TrainingDataset] | None = Field(
        default=None,
        min_length=2,
        max_length=8,
        description="in place of dataset_id: several datasets, each with its objectives, for one adapter",
    )
    adapters: Literal["per_dataset"] | None = Field(
        default=None, description="with datasets: an adapter for each, from the same pass, in place of one for all"
    )
    eval_dataset_id: str | None = Field(
        default=None,
        max_length=64,
        description="rows that only measure the delivered adapter; of several datasets each has one of its own",
    )
    retain_dataset_id: str | None = Field(
        default=None, max_length=64, description="general text that the calibrated step may not worsen"
    )
    method: Method = Field(
        default="gradient", description="ours, or an initializer of PEFT's; a name alone means its defaults"
    )
    objectives: list[Objective] | None = Field(
        default=None, min_length=1, description="all that the rows allow when omitted"
    )
    combination: Combination = Field(
        default=Mgda(), description="how the gradients of several objectives become one direction"
    )
    whitening: Whitening | None = Field(
        default=None, description="damp what most inputs share; {} for the defaults (docs/method.md, whitening)"
    )
    retain_tolerance: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="nats per token by which the loss of retain_dataset_id may rise; 0.01 when omitted",
    )
    lora: LoraSpec = Field(default=LoraSpec(), description="the adapter's shape")
    direction: Literal["orthogonalized", "gradient"] = Field(
        default="orthogonalized",
        description="of the step in a layer; orthogonalized: as far along each of the gradient's r leading singular "
        "directions, and the less far the larger the rows' own gradients are; gradient: as far as the gradient has it, "
        "which is the default beside retain_dataset_id",
    )
    lora_a_scale: Literal["outputs", "rows"] = Field(
        default="outputs",
        description="what of lora_A is as large as with PEFT's default start; outputs: its outputs on the dataset, in "
        "each layer, so that learning rates which suit LoRA suit this; rows: its rows; the update is the same",
    )
    start: Literal["calibrated", "zero"] = Field(
        default="calibrated",
        description="calibrated: a step as large as held-out rows support, and the zero start where they support none; "
        "zero: lora_B is 0, so that the adapter changes nothing before training",
    )
    statistics: Literal["sketch", "exact"] = Field(
        default="sketch", description="of gradients: sketched, or dense, which take the memory of the target layers"
    )
    second_pass_above: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="gather layers whose estimated relative sketch error is above this a second time, in the range "
        "that the first pass has found; 0 for all layers, no second pass when omitted",
    )
    rounds: int = Field(
        default=1,
        ge=1,
        le=16,
        description="steps at most; each further one has statistics of its own, gathered at the adapter so far and, "
        "for every fold of rows that judges it, without these, and is kept only if they support it",
    )
    max_length: int = Field(default=1024, ge=2, description="tokens of prompt and completion together")
    max_tokens_per_batch: int | None = Field(default=None, ge=1, description="the worker's setting when omitted")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the base model in the job; auto: float32 on a CPU, the weights' own elsewhere"
    )
    quantization: Quantization | None = Field(
        default=None, description="load the base model's linear layers in so many bits; the adapter fits any precision"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="of all that is drawn; equal requests give equal adapters")
    keep_statistics: bool = Field(
        default=False, description="keep the gradient statistics beside the result, for later requests to be based on"
    )
    based_on: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="an initialization that kept its statistics: rows that it has passed are not passed again",
    )
    metadata: dict[str, str] = Field(default={}, max_length=16, description="kept and returned, never interpreted")

    @property
    def training(self) -> dict[str, TrainingDataset]:
        """What the adapter is made from, by what the names of its fields begin with: nothing, or ``datasets[1].``."""
        if self.datasets is not None:
            return {f"datasets[{index}].": dataset for index, dataset in enumerate(self.datasets)}
        assert self.dataset_id is not None
        return {"": TrainingDataset(dataset_id=self.dataset_id, objectives=self.objectives)}

    @model_validator(mode="before")
    @classmethod
    def _the_direction_that_is_left_out(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "direction" not in fields and fields.get("method", "gradient") == "gradient":
            return {**fields, "direction": default_direction(fields)} if fields.get("retain_dataset_id") else fields
        return fields

    @model_validator(mode="after")
    def _it_is_made_from_one_dataset_or_several(self) -> "InitializationSpec":
        if (self.dataset_id is None) == (self.datasets is None):
            raise ValueError("dataset_id: name one dataset here, or several in datasets")
        check_training(self.training, self.combination)
        if self.datasets is not None:
            together = {name for name in _FOR_ONE_DATASET if getattr(self, name) is not None}
            if together or self.rounds > 1:
                if "eval_dataset_id" in together:
                    raise ValueError("eval_dataset_id: of several datasets each has one of its own, in datasets")
                names = ", ".join(sorted(together | ({"rounds"} if self.rounds > 1 else set())))
                raise ValueError(f"{names}: not offered together with datasets")
        if self.adapters is not None and self.datasets is None:
            raise ValueError("adapters: a single dataset has one; it goes with datasets")
        if self.adapters is not None and isinstance(self.combination, Fixed):
            raise ValueError("combination: fixed weights are those of one adapter; leave out adapters")
        return self

    @model_validator(mode="after")
    def _a_second_pass_has_a_sketch_to_refine(self) -> "InitializationSpec":
        if self.second_pass_above is None:
            return self
        if self.statistics == "exact":
            raise ValueError("second_pass_above: exact statistics have no sketch error to lower")
        if self.retain_dataset_id is not None:
            raise ValueError("second_pass_above: not offered together with retain_dataset_id")
        if self.rounds > 1:
            raise ValueError("second_pass_above: not offered together with rounds")
        return self

    @model_validator(mode="after")
    def _rounds_take_steps(self) -> "InitializationSpec":
        if self.rounds > 1 and self.start == "zero":
            raise ValueError("rounds: a zero start takes no step from which another round could begin")
        return self

    @model_validator(mode="after")
    def _statistics_are_those_of_one_pass(self) -> "InitializationSpec":
        ours = [name for name in ("keep_statistics", "based_on") if getattr(self, name)]
        if ours and self.rounds > 1:
            raise ValueError(f"{ours[-1]}: not offered together with rounds, each of which has statistics of its own")
        if ours and self.datasets is not None:
            raise ValueError(f"{ours[-1]}: not offered together with datasets")
        if self.based_on is not None and self.second_pass_above is not None:
            raise ValueError("based_on: not offered together with second_pass_above, which passes all rows again")
        return self

    @model_validator(mode="after")
    def _retain_restrains_a_step(self) -> "InitializationSpec":
        if self.retain_dataset_id is None:
            if self.retain_tolerance is not None:
                raise ValueError("retain_tolerance: without retain_dataset_id there is nothing to retain")
            return self
        if self.start == "zero":
            raise ValueError("retain_dataset_id: with start zero there is no step that it could restrain")
        if self.rounds > 1:
            raise ValueError("retain_dataset_id: it restrains a single step; leave out rounds")
        if self.method == "gradient" and self.direction == "orthogonalized":
            raise ValueError(
                "direction: an orthogonalized step cannot be restrained; leave out retain_dataset_id or it"
            )
        if self.whitening is not None:
            raise ValueError("retain_dataset_id: it cannot be combined with whitening; leave out one of them")
        return self

    @model_validator(mode="after")
    def _ranks_are_those_of_one_plain_pass(self) -> "InitializationSpec":
        if self.lora.ranks is None:
            return self
        if self.whitening is not None:
            raise ValueError("lora.ranks: not offered together with whitening")
        if self.retain_dataset_id is not None:
            raise ValueError("lora.ranks: not offered together with retain_dataset_id")
        if self.rounds > 1:
            raise ValueError("lora.ranks: not offered together with rounds")
        if self.second_pass_above is not None:
            raise ValueError("lora.ranks: not offered together with second_pass_above")
        return self

    @model_validator(mode="after")
    def _the_method_uses_every_field(self) -> "InitializationSpec":
        if isinstance(self.method, str):
            return self
        name = self.method.type
        unused = sorted(_unread(self.method) & self.model_fields_set)
        if unused:
            raise ValueError(f"{', '.join(unused)}: not used by method {name}; leave out what it would ignore")
        if self.lora.ranks is not None:
            raise ValueError(f"lora.ranks: method {name} has the rank r in all layers; leave it out")
        if self.quantization is not None and isinstance(self.method, NEEDS_FLOAT):
            raise ValueError(f"quantization: PEFT's {name} needs base weights in floating point; leave it out")
        if self.quantization == "8bit" and isinstance(self.method, Warmup):
            raise ValueError("quantization: a warm-up trains on a base in floating point or in 4bit")
        if isinstance(self.method, Orthogonal) and self.lora.r % 2:
            raise ValueError("lora.r: PEFT's orthogonal needs an even rank")
        return self

    # An annotation of the result would take the place of the fields in the schema.
    @model_serializer(mode="wrap")
    def _only_fields_that_the_method_uses(self, handler: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]  # noqa: ANN202  # see above
        fields: dict[str, Any] = handler(self)
        if isinstance(self.method, str):
            return fields
        return {name: value for name, value in fields.items() if name not in _unread(self.method)}


_FOR_ONE_DATASET = {"objectives", "eval_dataset_id", "retain_dataset_id", "whitening", "second_pass_above"}
"""Fields of a request that go with ``dataset_id`` alone; several datasets have ``objectives`` and evaluations each."""


_GRADIENT_ONLY = {
    "datasets",
    "adapters",
    "objectives",
    "combination",
    "whitening",
    "retain_dataset_id",
    "retain_tolerance",
    "direction",
    "lora_a_scale",
    "start",
    "statistics",
    "second_pass_above",
    "rounds",
    "keep_statistics",
    "based_on",
}
"""Fields of a request that only our own method reads."""


_BEFORE_A_WARMUP = {"objectives", "combination", "whitening", "direction", "lora_a_scale", "start", "statistics"}
"""Those of them that a warm-up from our own start reads."""


def _unread(method: Method) -> set[str]:
    """Return the fields of a request that a method does not read."""
    if isinstance(method, str):
        return set()
    if isinstance(method, Warmup) and method.start == "gradient":
        return _GRADIENT_ONLY - _BEFORE_A_WARMUP
    return _GRADIENT_ONLY

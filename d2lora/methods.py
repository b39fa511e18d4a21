"""Which method makes the starting point: ours, one of PEFT's initializers under PEFT's names, or a warm-up by TRL.

PEFT's take no options but their own; what they do to the base weights, and in which form their adapters are delivered,
is in docs/method.md, section 6.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)


class _Method(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Kaiming(_Method):
    """PEFT's default, ``init_lora_weights=True``: a uniform ``lora_A``, and ``lora_B = 0``."""

    type: Literal["kaiming"] = "kaiming"


class Gaussian(_Method):
    """A normal ``lora_A`` with standard deviation 1 / r, and ``lora_B = 0``."""

    type: Literal["gaussian"] = "gaussian"


class Orthogonal(_Method):
    """Random factors with ``B A = 0``, neither of them zero; r must be even."""

    type: Literal["orthogonal"] = "orthogonal"


class Pissa(_Method):
    """The r largest singular triples of the weight (arXiv:2404.02948)."""

    type: Literal["pissa"] = "pissa"
    niter: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="iterations of a randomized SVD, pissa_niter_[n]; the full one if omitted",
    )


class Olora(_Method):
    """The first r columns and rows of the weight's QR decomposition (arXiv:2406.01775)."""

    type: Literal["olora"] = "olora"


_MaxRows = Annotated[int, Field(ge=1, le=4096, description="rows that are read, drawn by the seed and their content")]


class Eva(_Method):
    """The leading right singular vectors of the layers' inputs at completion tokens (arXiv:2410.07170), r in each."""

    type: Literal["eva"] = "eva"
    tau: float = Field(default=0.99, gt=0, le=1, description="cosine similarity at which a component has converged")
    max_rows: _MaxRows = 256


class Corda(_Method):
    """Singular triples of the weight times its inputs' covariance (arXiv:2406.05223)."""

    type: Literal["corda"] = "corda"
    corda_method: Literal["ipm", "kpm"] = Field(
        default="ipm", description="the largest (instruction-previewed) or the smallest (knowledge-preserved)"
    )
    max_rows: _MaxRows = 256


class LoraGa(_Method):
    """Singular vectors of the SFT gradient, as PEFT's LoRA-GA takes them (arXiv:2407.05000)."""

    type: Literal["lora_ga"] = "lora_ga"
    direction: Literal["ArB2r", "ArBr", "A2rBr", "random"] = Field(
        default="ArB2r", description="which singular vectors make lora_A and lora_B, as in PEFT's LoraGAConfig"
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = Field(
        default="stable", description="how large they are made, as in PEFT's LoraGAConfig"
    )
    stable_gamma: int = Field(default=16, ge=1, description="of scale stable, as in PEFT's LoraGAConfig")
    max_rows: _MaxRows = 256


class Warmup(_Method):
    """The published D2LoRA (arXiv:2503.18089): some steps of one of TRL's trainers on general rows.

    AdamW without weight decay, a constant learning rate, gradients clipped at norm 1.
    """

    # "from" is no name in Python.
    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["warmup"] = "warmup"
    warmup_dataset_id: str = Field(min_length=1, max_length=64, description="the general rows")
    start: Literal["default", "gradient"] = Field(
        default="default",
        alias="from",
        description="PEFT's default start, or the adapter that method gradient makes from dataset_id",
    )
    trainer: Literal["sft", "dpo", "orpo"] = Field(
        default="sft", description="dpo and orpo need rows with chosen and rejected completions"
    )
    steps: int = Field(default=16, ge=1, le=1000, description="of the optimizer")
    learning_rate: float = Field(default=5e-4, gt=0, allow_inf_nan=False, description="the same in all steps")
    batch_size: int = Field(default=8, ge=1, le=256, description="rows of a step")
    beta: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="of dpo and orpo, as in TRL; 0.1 when omitted"
    )

    @field_validator("beta")
    @classmethod
    def _beta_fits_the_trainer(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("trainer") == "sft":
            raise ValueError("trainer sft has none; dpo and orpo do")
        return value

    @property
    def coefficient(self) -> float:
        """``beta`` with its default filled in."""
        return 0.1 if self.beta is None else self.beta


PeftMethod = Kaiming | Gaussian | Orthogonal | Pissa | Olora | Eva | Corda | LoraGa
"""What PEFT's own code initializes."""

CHANGES_BASE = (Pissa, Olora, Corda, LoraGa)
"""Those that take ``s B0 A0`` out of the base weights; their adapters are delivered at rank 2r."""

NEEDS_FLOAT = (Orthogonal, Pissa, Corda, LoraGa)
"""Those that PEFT refuses on a quantized base."""

_ALONE = ("gradient", *(get_args(kind.model_fields["type"].annotation)[0] for kind in get_args(PeftMethod)))

NAMES = (*_ALONE, "warmup")


def _named(value: Any) -> Any:
    """Return the method with its defaults if only its name is given."""
    return {"type": value} if value in _ALONE[1:] else value


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return value if value == "gradient" else None
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


Method = Annotated[
    Annotated[Literal["gradient"], Tag("gradient"), WithJsonSchema({"type": "string", "enum": list(_ALONE)})]
    | Annotated[Kaiming, Tag("kaiming")]
    | Annotated[Gaussian, Tag("gaussian")]
    | Annotated[Orthogonal, Tag("orthogonal")]
    | Annotated[Pissa, Tag("pissa")]
    | Annotated[Olora, Tag("olora")]
    | Annotated[Eva, Tag("eva")]
    | Annotated[Corda, Tag("corda")]
    | Annotated[LoraGa, Tag("lora_ga")]
    | Annotated[Warmup, Tag("warmup")],
    Discriminator(
        _kind,
        custom_error_type="method_unknown",
        custom_error_message=f"a name or an object whose type is one of {', '.join(NAMES)}",
    ),
    BeforeValidator(_named),
]
"""A name alone means that method with its defaults; ``warmup`` needs an object, since it needs rows."""

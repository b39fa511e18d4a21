"""Which method makes the starting point: ours, or one of PEFT's initializers under PEFT's names.

PEFT's take no options but their own; what they do to the base weights, and in which form their adapters are delivered,
is in docs/method.md, section 6.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema


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
    direction: Literal["ArB2r", "ArBr", "A2rBr", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = Field(default=16, ge=1)
    max_rows: _MaxRows = 256


PeftMethod = Kaiming | Gaussian | Orthogonal | Pissa | Olora | Eva | Corda | LoraGa
"""What PEFT's own code initializes."""

CHANGES_BASE = (Pissa, Olora, Corda, LoraGa)
"""Those that take ``s B0 A0`` out of the base weights; their adapters are delivered at rank 2r."""

NEEDS_FLOAT = (Orthogonal, Pissa, Corda, LoraGa)
"""Those that PEFT refuses on a quantized base."""

NAMES = ("gradient", *(get_args(kind.model_fields["type"].annotation)[0] for kind in get_args(PeftMethod)))


def _named(value: Any) -> Any:
    """Return the method with its defaults if only its name is given."""
    return {"type": value} if value in NAMES[1:] else value


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return value if value == "gradient" else None
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


Method = Annotated[
    Annotated[Literal["gradient"], Tag("gradient"), WithJsonSchema({"type": "string", "enum": list(NAMES)})]
    | Annotated[Kaiming, Tag("kaiming")]
    | Annotated[Gaussian, Tag("gaussian")]
    | Annotated[Orthogonal, Tag("orthogonal")]
    | Annotated[Pissa, Tag("pissa")]
    | Annotated[Olora, Tag("olora")]
    | Annotated[Eva, Tag("eva")]
    | Annotated[Corda, Tag("corda")]
    | Annotated[LoraGa, Tag("lora_ga")],
    Discriminator(
        _kind,
        custom_error_type="method_unknown",
        custom_error_message=f"a name or an object whose type is one of {', '.join(NAMES)}",
    ),
    BeforeValidator(_named),
]
"""A name alone means that method with its defaults."""

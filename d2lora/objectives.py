"""What an adapter is to serve: the objectives under TRL's names, and how their gradients are combined."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


class Frozen(BaseModel):
    """Base of everything that crosses a process: immutable, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Sft(Frozen):
    """Mean negative log-probability over completion tokens, as TRL's SFTTrainer."""

    type: Literal["sft"] = "sft"


DpoLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
]
"""TRL's ``loss_type`` of these names; docs/method.md, section 1, says why the others are not among them."""

_SMOOTHED = frozenset({"robust", "exo_pair"})


class Dpo(Frozen):
    """A DPO loss with the base model as its reference, by default sigmoid (arXiv:2305.18290, eq. 7)."""

    type: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False, description="as in TRL")
    loss_type: DpoLoss = Field(
        default="sigmoid", description="named as in TRL; sigmoid_norm and ipo take the mean over tokens"
    )
    label_smoothing: float | None = Field(
        default=None,
        gt=0,
        lt=0.5,
        description="for robust, the probability that a label is flipped; for exo_pair, its epsilon; else omitted",
        validate_default=True,
    )

    @field_validator("label_smoothing")
    @classmethod
    def _label_smoothing_fits_the_loss(cls, value: float | None, info: ValidationInfo) -> float | None:
        loss = info.data.get("loss_type")
        if loss in _SMOOTHED and value is None:
            raise ValueError(f"loss_type {loss} needs it")
        if loss is not None and loss not in _SMOOTHED and value is not None:
            raise ValueError(f"loss_type {loss} has none; {' and '.join(sorted(_SMOOTHED))} do")
        return value


class Orpo(Frozen):
    """Negative log-likelihood plus ``beta`` times the odds-ratio loss (arXiv:2403.07691, eq. 6)."""

    type: Literal["orpo"] = "orpo"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False, description="lambda of the paper, named as in TRL")
    nll: Literal["completion", "full_sequence"] = Field(
        default="completion",
        description="which tokens of the chosen sequence the likelihood term covers; TRL's is full_sequence",
    )


class Kto(Frozen):
    """KTO with the base model as its reference (arXiv:2402.01306, eq. 7), on rows with a label."""

    type: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False, description="as in TRL")
    desirable_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="of rows whose label is true")
    undesirable_weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="of rows whose label is false"
    )


Objective = Annotated[Sft | Dpo | Orpo | Kto, Field(discriminator="type")]


class Mgda(Frozen):
    """The min-norm point of the normalized gradients' convex hull."""

    type: Literal["mgda"] = "mgda"


class UpGrad(Frozen):
    """Each gradient projected onto the dual cone of all, then averaged (arXiv:2406.16232)."""

    type: Literal["upgrad"] = "upgrad"


class ImtlG(Frozen):
    """Equal projections onto every normalized gradient."""

    type: Literal["imtl_g"] = "imtl_g"


class Mean(Frozen):
    """Equal weights on the normalized gradients."""

    type: Literal["mean"] = "mean"


class Fixed(Frozen):
    """Weights of the normalized gradients, one per objective, in the order of ``objectives``."""

    type: Literal["fixed"] = "fixed"
    weights: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        min_length=1, description="not negative, and one of them positive; with several datasets dataset after dataset"
    )

    @model_validator(mode="after")
    def _some_weight_is_positive(self) -> "Fixed":
        if not sum(self.weights) > 0:
            raise ValueError("at least one weight must be positive")
        return self


Combination = Annotated[Mgda | UpGrad | ImtlG | Mean | Fixed, Field(discriminator="type")]

"""``report.json``: the evidence that an adapter carries."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from d2lora import __version__
from d2lora.initializations import Frozen, HeldOut, InitializationSpec, ResultSummary
from d2lora.roles import Role
from worker.left_out import LeftOut
from worker.low_rank import LowRank

_LIBRARIES = ("torch", "transformers", "peft", "torchjd", "safetensors", "bitsandbytes", "trl")
"""Those whose version may change the numbers."""


class ObjectiveReport(Frozen):
    """One objective that took part."""

    type: str
    dataset_id: str | None = None
    """Whose rows it is of, where there are several datasets."""
    gradient_norm: float
    """Frobenius norm over all target layers, of the mean loss over all rows."""
    weight: float
    """Of the gradient divided by its norm; the weights sum to 1."""
    noise_scale: float | None
    """Rows at which the gradient's noise equals its size (arXiv:1812.06162); null when these rows cannot tell."""


class DatasetReport(Frozen):
    """One of several datasets that the adapter is made from; their order is that of the names ``datasets[0]``, ..."""

    dataset_id: str
    sha256: str
    """Of its file."""
    evaluation_sha256: str | None = None
    """Of the file that measures on its objectives, if there is one."""
    rows: dict[str, int]
    """Read, used, truncated, and dropped by reason."""
    mean_tokens: dict[str, float]


class LayerReport(Frozen):
    """One target layer."""

    singular_values: list[float]
    """Of the combined direction, as many as the layer's rank; after further rounds, here and in the next two, of the
    whole update."""
    energy_kept: float
    """Share of the combined direction's squared norm that rank r keeps."""
    sketch_error: float
    """Estimated relative error of the sketched direction before the cut to rank r; 0 in exact mode."""
    passes: int = 1
    """2 where a second pass has refined the direction."""
    relative_magnitude: float
    """|s B A| / |W|, Frobenius norms."""
    gradient_norms: dict[str, float]
    """Of every objective in this layer."""
    cosines: dict[str, float | None]
    """Between two objectives' gradients in this layer, such as "sft,dpo"; null where one of them is zero."""


class TrialReport(Frozen):
    """One step size of the line search, on held-out rows."""

    eta: float
    combined_change: float | None
    combined_standard_error: float
    changes: dict[str, float | None]
    standard_errors: dict[str, float]


class CalibrationReport(Frozen):
    """The line search that decided the start."""

    folds: int
    rows: int
    """Rows that every trial was scored on; a seeded part of them where the dataset is large."""
    trials: list[TrialReport]
    accepted_eta: float | None
    reason: str
    pilot: list[TrialReport] = Field(default_factory=list)
    """The same on some of the rows alone: these tell which step to try on all; empty where there are no others."""


class RoundReport(Frozen):
    """A round after the first, from the gradients at the adapter that the rounds before had led to."""

    gradient_norms: dict[str, float]
    """Of every objective there."""
    weights: dict[str, float]
    calibration: CalibrationReport
    held_out: dict[str, HeldOut]
    """Cross-validated: the base model, and the adapter as this round left it."""


class RoundsReport(Frozen):
    """The rounds after the first; ``objectives`` and ``calibration`` of the report are the first one's."""

    rounds: list[RoundReport]
    stopped: str
    """Why there is no further one."""


class RanksReport(Frozen):
    """How the parameters that rank r would take are spent on layers with ranks of their own."""

    smallest: int
    largest: int
    parameters: int
    """Of lora_A and lora_B in all layers."""
    budget: int
    """Those that rank r takes."""
    energy_kept: float
    """Share of the combined direction's squared norm, over all layers, without what is sketch noise."""
    uniform_energy_kept: float
    """The same with rank r in every layer."""


class PeftLayerReport(Frozen):
    """One target layer of an adapter that PEFT has initialized."""

    relative_magnitude: float
    """|s B A| / |W| of the delivered factors, Frobenius norms; 0 up to rounding."""
    method_magnitude: float
    """|s B0 A0| / |W| of the method's own factors: what it moves from the base into the adapter."""


class PeftReport(Frozen):
    """How one of PEFT's methods was run, and the form in which its adapter is delivered."""

    init_lora_weights: str
    """As in PEFT's configuration; "true" is its default."""
    rank: int
    """Of the method: the first so many rows of lora_A and columns of lora_B are what it trains."""
    delivered_rank: int
    frozen_ranks: tuple[int, int] | None
    """From and up to: ranks that hold the offset for the unmodified base, and that the method leaves as they are."""
    rows: int
    """Rows that the method has read."""
    layers: dict[str, PeftLayerReport]


class WarmupReport(Frozen):
    """The training that a warm-up consists of."""

    trainer: str
    """TRL's class."""
    start: Literal["default", "gradient"]
    """PEFT's default start, or our own; of ours the report has objectives, calibration and layers, as it was begun."""
    steps: int
    learning_rate: float
    batch_size: int
    beta: float | None
    dataset_sha256: str
    rows: dict[str, int]
    """Of the general rows: read, used by a step, truncated, and dropped by reason."""
    loss: dict[str, float]
    """The trainer's objective on the used rows: of the base, at the start of the training, at its end."""
    step_losses: list[float]
    """Of every step's batch before the step, as TRL logs them."""
    relative_magnitudes: dict[str, float]
    """Layer -> |s B A| / |W| as delivered, Frobenius norms."""


class Reuse(Frozen):
    """What an adapter takes from the statistics of an earlier job."""

    based_on: str
    sketch_r: int
    """The rank that the sketches were made for."""
    rows_reused: int
    rows_passed: int


class Report(Frozen):
    """Everything that was measured on the way to the adapter."""

    version: Literal[1] = 1
    summary: ResultSummary
    base_model: str
    base_identity: str
    """Commit of a hub model, or sha256 over the weight files."""
    base_configuration_sha256: str | None = None
    """Over configuration, tokenizer and chat template of a local model."""
    base_license: str
    dataset_sha256: str
    """Of the dataset's file; with several datasets, of their digests in hexadecimal, one a line."""
    datasets: list[DatasetReport] | None = None
    """Where the adapter is made from several; ``rows`` and ``mean_tokens`` of the report are then those of all."""
    folders: dict[str, str] | None = None
    """Where there is an adapter for each of several datasets: folder -> ID of its dataset. A folder has a report of its
    own, and this one has what concerns all."""
    extra_dataset_sha256: dict[Role, str]
    """Of all other datasets of the request, by what they are for."""
    spec: InitializationSpec
    rows: dict[str, int]
    """Read, used, truncated, and dropped by reason."""
    mean_tokens: dict[str, float]
    """Completion tokens of chosen and rejected, or of desirable and undesirable; summed log-probabilities favor the
    longer."""
    shards: int = 1
    """Pieces in which the statistics were gathered; 1 when one worker did it all."""
    objectives: list[ObjectiveReport] = Field(default=[])
    calibration: CalibrationReport | None = None
    rounds: RoundsReport | None = None
    """Where more than one was asked for and the first took a step."""
    layers: dict[str, LayerReport] = Field(default={})
    ranks: RanksReport | None = None
    """Where layers have ranks of their own."""
    left_out: list[LeftOut] = Field(default=[])
    """What the adapter leaves as it is though it holds weight matrices, but for embeddings and the head."""
    reuse: Reuse | None = None
    """Where the statistics of an earlier job were used."""
    peft: PeftReport | None = None
    """Instead of objectives, calibration and layers, where the method is one of PEFT's."""
    warmup: WarmupReport | None = None
    """Where the method is a warm-up."""
    seconds: dict[str, float]
    """By phase. Kept out of everything that decides the adapter."""
    versions: dict[str, str]
    hardware: str


def layer_report(
    direction: LowRank,
    gramian: Float[Tensor, "J J"],
    names: Sequence[str],
    *,
    eta: float,
    weight_norm: float,
    passes: int,
) -> LayerReport:
    """Return the report of one layer whose direction was cut to rank r; ``gramian`` is that of its objectives."""
    energy = direction.energy
    return LayerReport(
        singular_values=[round_to(value) for value in direction.values.tolist()],
        energy_kept=round_to(min(1.0, direction.kept / energy)) if energy > 0 else 1.0,
        sketch_error=round_to((direction.missed / energy) ** 0.5) if energy > 0 else 0.0,
        passes=passes,
        relative_magnitude=round_to(eta * direction.step_energy**0.5 / weight_norm) if weight_norm > 0 else 0.0,
        gradient_norms={
            name: round_to(value**0.5) for name, value in zip(names, gramian.diagonal().tolist(), strict=True)
        },
        cosines=pairwise_cosines(gramian, names),
    )


def pairwise_cosines(gramian: Float[Tensor, "J J"], names: Sequence[str]) -> dict[str, float | None]:
    """Return the cosine between every two objectives' gradients; None where one of them is zero."""
    norms = gramian.diagonal().sqrt().tolist()
    return {
        f"{names[i]},{names[j]}": round_to(gramian[i, j].item() / (norms[i] * norms[j]))
        if norms[i] * norms[j]
        else None
        for i in range(len(names))
        for j in range(i + 1, len(names))
    }


def noise_scale(
    row_gramian: Float[Tensor, "K K"], gramian: Float[Tensor, "K K"], coefficients: Float[Tensor, " K"], rows: int
) -> float | None:
    """Return tr(covariance of a row's gradient) / |mean gradient|^2, unbiased in both (arXiv:1812.06162, appendix A).

    ``row_gramian`` sums the rows' own inner products, ``gramian`` is that of the summed bases, and ``coefficients``
    turn the bases into the mean loss. None when there is one row, or when noise leaves no estimate of the gradient.
    """
    if rows < 2:
        return None
    squared_mean = (coefficients @ gramian @ coefficients).item()
    squared_rows = rows**2 * (coefficients @ row_gramian @ coefficients).item()
    trace = (squared_rows - rows * squared_mean) / (rows - 1)
    squared_gradient = squared_mean - trace / rows
    return trace / squared_gradient if squared_gradient > 0 else None


def round_to(value: float, digits: int = 6) -> float:
    """Return the value at a readable number of significant digits."""
    return float(f"{value:.{digits}g}")


def versions() -> dict[str, str]:
    """Return the versions of everything that takes part in the numbers."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"d2lora": __version__, "python": platform.python_version(), **libraries}


def hardware(device: torch.device) -> str:
    """Return the device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"

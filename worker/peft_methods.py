"""PEFT's own initializers, run beside the base model and never on it.

PEFT makes an adapter by replacing layers of the model, and some of its methods change their weights. The model here is
shared between jobs, so each layer is copied, PEFT initializes an adapter on the copy, and the copy is dropped: one
layer of extra memory. The factors are those of ``get_peft_model`` on the whole model with the same seed.

In what form they are delivered is decided in docs/decisions/0003-peft-methods.md.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from d2lora.errors import ModelUnsupported, NumericalFailure, RankTooLarge, TargetUnsupported
from d2lora.initializations import InitializationSpec, Phase
from d2lora.methods import (
    CHANGES_BASE,
    NEEDS_FLOAT,
    Corda,
    Eva,
    Gaussian,
    Kaiming,
    LoraGa,
    Olora,
    Orthogonal,
    PeftMethod,
    Pissa,
)
from d2lora.settings import WorkerSettings
from worker.data import Example
from worker.factors import Factors
from worker.models import BaseModel, layer_sizes
from worker.peft_passes import Gathered, covariances, gradients, input_directions, peft_failures, sample
from worker.progress import PhaseCounter
from worker.quantization import dequantized_weight
from worker.units import OnProgress


@dataclass(frozen=True)
class PeftAdapter:
    """What is delivered."""

    config: LoraConfig
    factors: dict[str, Factors]
    """Of the delivered rank: with the offset in the second half where PEFT takes the first one out of the base."""
    rank: int
    """That of the method; the first so many rows of ``lora_A`` are what PEFT trains."""
    offset: bool
    """Whether the other half of the delivered ranks is the offset that takes the first one back."""
    rows: int
    """Rows that the method has read."""
    init_lora_weights: str
    """As PEFT was told; "true" is its default."""


def build_peft_adapter(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    config: LoraConfig,
    spec: InitializationSpec,
    examples: Sequence[Example],
    *,
    settings: WorkerSettings,
    on_progress: OnProgress,
) -> PeftAdapter:
    """Return the adapter that PEFT's method starts from, in a form that fits the unmodified base.

    Raises:
        ModelUnsupported: the base is quantized, and PEFT refuses the method on it.
        TargetUnsupported: PEFT's method is wrong for this kind of layer.
        RankTooLarge: the method finds fewer directions than ``r``.
        NumericalFailure: PEFT's computation has not converged or is not finite.
    """
    method = spec.method
    assert isinstance(method, PeftMethod)
    check_peft_method(method, targets, spec)
    own = _peft_config(config, method)
    chosen = rows_read(method, examples, seed=spec.seed)
    with _seeded(spec.seed, base.device):
        gathered = _gather(base, targets, own, spec, chosen, settings=settings, on_progress=on_progress)
        count = PhaseCounter(Phase.FACTORS, len(targets), on_progress)
        factors = {}
        for name, module in targets.items():
            factors[name] = gathered.factors.get(name) or _initialize(name, module, own, gathered.attributes[name])
            if not all(torch.isfinite(one).all() for one in (factors[name].lora_A, factors[name].lora_B)):
                raise NumericalFailure(f"PEFT's {method.type} gives numbers that are not finite in {name!r}")
            gathered.attributes[name].clear()
            count()
    offset = isinstance(method, CHANGES_BASE)
    delivered = copy.copy(config)
    if offset:
        factors = {name: _with_offset(layer) for name, layer in factors.items()}
        delivered.r = 2 * spec.lora.r
        # So that the scaling s stays what it was, as PEFT's own conversion does it.
        delivered.lora_alpha = spec.lora.alpha * (2**0.5 if spec.lora.use_rslora else 2)
    return PeftAdapter(
        delivered,
        factors,
        spec.lora.r,
        offset,
        rows=len(chosen),
        init_lora_weights=str(own.init_lora_weights).lower(),
    )


def rows_read(method: PeftMethod, examples: Sequence[Example], *, seed: int) -> list[Example]:
    """Return the rows that the method learns from, if it learns from any."""
    return sample(examples, count=getattr(method, "max_rows", 0), seed=seed)


def check_peft_method(method: PeftMethod, targets: Mapping[str, nn.Module], spec: InitializationSpec) -> None:
    """Return if PEFT can initialize these layers so; raise otherwise, as `build_peft_adapter` does."""
    for name, module in targets.items():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if not weight.is_floating_point() and isinstance(method, NEEDS_FLOAT):
            raise ModelUnsupported(
                f"base_model: PEFT's {method.type} needs weights in floating point, and {name!r} is quantized; "
                "name the model that it was made from"
            )
        if isinstance(method, Olora) and isinstance(module, Conv1D):
            raise TargetUnsupported(
                f"lora.target_modules: {name!r} is a Conv1D, whose weight PEFT's olora decomposes untransposed"
            )
        if isinstance(method, LoraGa) and 2 * spec.lora.r > min(layer_sizes(module)):
            raise RankTooLarge(
                f"lora.r: lora_ga takes 2 r = {2 * spec.lora.r} directions, above the smaller side of {name!r}; "
                f"use at most {min(layer_sizes(module)) // 2} or leave that module out"
            )


def _peft_config(config: LoraConfig, method: PeftMethod) -> LoraConfig:
    """Return the configuration with which PEFT runs the method."""
    own = copy.copy(config)
    own.inference_mode = False
    match method:
        case Kaiming():
            own.init_lora_weights = True
        case Pissa(niter=niter) if niter is not None:
            own.init_lora_weights = f"pissa_niter_{niter}"
        case Gaussian() | Orthogonal() | Pissa() | Olora():
            own.init_lora_weights = method.type
        case Eva(tau=tau):
            own.init_lora_weights = "eva"
            # rho = 1 leaves nothing to move between layers: every one keeps rank r.
            own.eva_config = EvaConfig(rho=1.0, tau=tau)
        case Corda(corda_method=corda_method):
            own.init_lora_weights = "corda"
            own.corda_config = CordaConfig(corda_method=corda_method)
        case LoraGa():
            own.init_lora_weights = "lora_ga"
            own.lora_ga_config = LoraGAConfig(
                direction=method.direction, scale=method.scale, stable_gamma=method.stable_gamma
            )
    return own


def _gather(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    config: LoraConfig,
    spec: InitializationSpec,
    examples: Sequence[Example],
    *,
    settings: WorkerSettings,
    on_progress: OnProgress,
) -> Gathered:
    """Return what the method learns from the rows."""
    max_tokens = spec.max_tokens_per_batch or settings.tokens_per_batch(base.device.type)
    match spec.method:
        case Eva():
            return input_directions(base, targets, config, examples, max_tokens=max_tokens, on_progress=on_progress)
        case Corda():
            return covariances(base, targets, config, examples, on_progress=on_progress)
        case LoraGa():
            return gradients(base, targets, config, examples, max_tokens=max_tokens, on_progress=on_progress)
        case _:
            return Gathered({}, {name: {} for name in targets})


def _initialize(name: str, module: nn.Module, config: LoraConfig, attributes: dict[str, object]) -> Factors:
    """Return PEFT's factors for one layer, from a copy of it that has the attributes PEFT looks for."""
    own = copy.copy(config)
    own.target_modules = ["layer"]
    holder = nn.ModuleDict({"layer": _copy_of(module)})
    own.fan_in_fan_out = isinstance(holder["layer"], Conv1D)
    vars(holder["layer"]).update(attributes)
    with peft_failures(f"{own.init_lora_weights} in {name!r}"):
        inject_adapter_in_model(own, holder)
    layer: Any = holder["layer"]
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return Factors(lora_A.detach().float(), lora_B.detach().float())


def _copy_of(module: nn.Module) -> nn.Module:
    """Return a layer of the same kind with a copy of the weight, in floating point; no random number is drawn."""
    out_features, in_features = layer_sizes(module)
    with torch.device("meta"):
        layer = (
            Conv1D(out_features, in_features)
            if isinstance(module, Conv1D)
            else nn.Linear(in_features, out_features, bias=False)
        )
    layer.weight = nn.Parameter(dequantized_weight(module).clone(), requires_grad=False)
    return layer


def _with_offset(layer: Factors) -> Factors:
    """Return ``[A0; A0]`` and ``[B0, -B0]``, which add nothing until the first half is trained."""
    return Factors(torch.cat([layer.lora_A, layer.lora_A]), torch.cat([layer.lora_B, -layer.lora_B], dim=1))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators, which are all that PEFT draws from, and leave them as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield

"""What the report says of an adapter that PEFT has initialized."""

from d2lora.initializations import HeldOut, InitializationSpec
from d2lora.methods import Eva, Gaussian, Kaiming, LoraGa, Orthogonal, PeftMethod
from worker.evidence import Intake, make_report
from worker.factors import Factors
from worker.models import weight_norm
from worker.peft_methods import PeftAdapter
from worker.report import PeftLayerReport, PeftReport, Report, round_to
from worker.subject import Subject


def make_peft_report(
    subject: Subject,
    spec: InitializationSpec,
    rows: Intake,
    adapter: PeftAdapter,
    evaluation: dict[str, HeldOut] | None,
    *,
    seconds: dict[str, float],
) -> Report:
    """Return the report of an adapter that PEFT has initialized."""
    method = spec.method
    assert isinstance(method, PeftMethod)
    learned = ["sft"] if isinstance(method, LoraGa) else []
    learned_by = "the gradient that lora_ga decomposes"
    return make_report(
        subject,
        spec,
        rows,
        used=adapter.rows,
        seconds=seconds,
        summary={
            "start": "zero",
            "start_reason": _why_zero(method, adapter),
            "objectives": learned,
            "objectives_reason": learned_by if learned else f"{method.type} takes no objective",
            "weights": dict.fromkeys(learned, 1.0),
            "evaluation": evaluation,
        },
        warnings=_about_ranks(method, adapter),
        peft=PeftReport(
            init_lora_weights=adapter.init_lora_weights,
            rank=adapter.rank,
            delivered_rank=adapter.config.r,
            frozen_ranks=(adapter.rank, adapter.config.r) if adapter.offset else None,
            rows=adapter.rows,
            layers={
                name: _layer_report(layer, adapter.rank, spec.lora.scaling, weight_norm(subject.targets[name]))
                for name, layer in adapter.factors.items()
            },
        ),
    )


def _layer_report(layer: Factors, rank: int, scaling: float, norm: float) -> PeftLayerReport:
    if norm == 0:
        return PeftLayerReport(relative_magnitude=0.0, method_magnitude=0.0)
    own = (layer.lora_B[:, :rank] @ layer.lora_A[:rank]).norm().item()
    delivered = (layer.lora_B @ layer.lora_A).norm().item()
    return PeftLayerReport(
        relative_magnitude=round_to(scaling * delivered / norm), method_magnitude=round_to(scaling * own / norm)
    )


def _why_zero(method: PeftMethod, adapter: PeftAdapter) -> str:
    if adapter.offset:
        return f"{method.type} keeps the base's function: what it takes out of the weights is in the adapter, both ways"
    match method:
        case Kaiming() | Gaussian() | Eva():
            return f"{method.type} sets lora_B = 0"
        case Orthogonal():
            return "orthogonal's lora_B lora_A is zero up to rounding, and neither factor is"
        case _:  # pragma: no cover  # all others have an offset
            raise AssertionError(method)


def _about_ranks(method: PeftMethod, adapter: PeftAdapter) -> list[str]:
    if not adapter.offset:
        return []
    note = (
        f"the files have rank {adapter.config.r}: PEFT's {method.type} trains the first {adapter.rank} and changes the "
        "base, for which the others stand in; README.md says how to keep those as they are in training"
    )
    return [note]

"""What the report says of an adapter that PEFT has initialized."""

from collections.abc import Mapping

from torch import nn

from d2lora.initializations import HeldOut, InitializationSpec, ResultSummary
from d2lora.methods import Eva, Gaussian, Kaiming, LoraGa, Orthogonal, PeftMethod
from worker.evidence import Intake, fingerprint
from worker.factors import Factors
from worker.models import BaseModel, weight_norm
from worker.peft_methods import PeftAdapter
from worker.report import PeftLayerReport, PeftReport, Report, hardware, round_to, versions


def make_peft_report(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
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
    learns = isinstance(method, LoraGa)
    summary = ResultSummary(
        start="zero",
        start_reason=_why_zero(method, adapter),
        objectives=["sft"] if learns else [],
        objectives_reason="the gradient that lora_ga decomposes" if learns else f"{method.type} takes no objective",
        weights={"sft": 1.0} if learns else {},
        cosines={},
        held_out={},
        evaluation=evaluation,
        rows_used=adapter.rows,
        rows_truncated=rows.truncated,
        rows_dropped=sum(rows.dropped.values()),
        fingerprint=fingerprint(spec, rows, base_identity=base.identity, dtype=str(base.model.dtype)),
        warnings=rows.warnings + _about_ranks(method, adapter),
    )
    return Report(
        summary=summary,
        base_model=base.name,
        base_identity=base.identity,
        base_license=base.license,
        dataset_sha256=rows.sha256,
        extra_dataset_sha256=rows.extras,
        spec=spec,
        rows={"read": rows.read, "used": adapter.rows, "truncated": rows.truncated, **rows.dropped},
        mean_tokens=rows.mean_tokens,
        shards=1,
        objectives=[],
        calibration=None,
        layers={},
        peft=PeftReport(
            init_lora_weights=adapter.init_lora_weights,
            rank=adapter.rank,
            delivered_rank=adapter.config.r,
            frozen_ranks=(adapter.rank, adapter.config.r) if adapter.offset else None,
            rows=adapter.rows,
            layers={
                name: _layer_report(layer, adapter.rank, spec.lora.scaling, weight_norm(targets[name]))
                for name, layer in adapter.factors.items()
            },
        ),
        seconds=seconds,
        versions=versions(),
        hardware=hardware(base.device),
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

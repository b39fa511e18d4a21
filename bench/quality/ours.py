"""Our initializer in its variants, run from files to files as the worker runs it, and a control of its magnitude."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from bench.quality.datasets import Row
from bench.quality.grid import code_identity, digest, model_identity
from bench.quality.kept import kept
from bench.quality.peft_starts import MethodFailed, layers, random_start, scaled
from bench.quality.starts import Start, Work
from d2lora.datasets import DatasetFile, Format
from d2lora.initializations import InitializationSpec, LoraSpec, Whitening
from d2lora.methods import Warmup
from d2lora.roles import Role
from d2lora.settings import WorkerSettings
from worker.initialization import initialize


def ours_calibrated(work: Work) -> Start:
    """Delivered files with the step that held-out rows support."""
    return _ours(work)


def ours_alone(work: Work) -> Start:
    """The same for the objective alone that training is for, where rows with chosen and rejected allow three."""
    trained: dict[str, Any] = {"type": work.trainer}
    if work.trainer != "sft":
        trained["beta"] = work.protocol.beta
    return _ours(work, objectives=[trained])


def ours_gradient(work: Work) -> Start:
    """The same along the gradient itself, whose singular values differ."""
    return _ours(work, direction="gradient")


def ours_rows(work: Work) -> Start:
    """The same update with rows of lora_A, and not its outputs, as large as those of PEFT's default start."""
    return _ours(work, lora_a_scale="rows")


def ours_whitened(work: Work) -> Start:
    """The same from gradients that are whitened by their inputs' second moment."""
    return _ours(work, whitening=Whitening())


def ours_rounds(work: Work) -> Start:
    """Up to four steps, each from the gradients at the one before."""
    return _ours(work, rounds=4)


def ours_retain(work: Work) -> Start:
    """The calibrated step that keeps the loss of general text, within the tolerance that is the default."""
    return _ours(work, {Role.RETAIN: _general(work)}, retain_dataset_id="general")


def warmup(work: Work) -> Start:
    """The published D2LoRA (arXiv:2503.18089): PEFT's default start, trained for a few steps on general text."""
    return _ours(work, {Role.WARMUP: _general(work)}, method=Warmup(warmup_dataset_id="general"))


def ours_ranks(work: Work) -> Start:
    """The calibrated step with a rank of its own for every layer, and as many parameters in all."""
    return _ours(work, ranks="budget")


def ours_zero(work: Work) -> Start:
    """Delivered files with the direction in ``lora_A`` alone."""
    return _ours(work, start="zero")


def random_matched(work: Work) -> Start:
    """Random factors whose product is, layer by layer, as large as that of our calibrated step (arXiv:2507.06558)."""
    ours = _ours(work)
    wanted = {name: scaled(layer).norm().item() for name, layer in layers(ours.model).items()}
    start = random_start(work)
    generator = torch.Generator().manual_seed(work.seed)
    with torch.no_grad():
        for name, layer in layers(start).items():
            factor = layer.lora_B["default"].weight
            factor.copy_(torch.randn(factor.shape, generator=generator))
            factor.mul_(wanted[name] / scaled(layer).norm())
    cost = {name: ours.about[name] for name in ("seconds", "cpu_seconds")}
    return Start(start, cost | {"magnitude": _magnitude(wanted)})


def _general(work: Work) -> list[Row]:
    if not work.general:
        raise MethodFailed("it learns from general text, and there is none")
    return work.general


def _ours(
    work: Work,
    extras: Mapping[Role, list[Row]] = MappingProxyType({}),
    ranks: Literal["budget"] | None = None,
    **options: Any,
) -> Start:
    """Run the worker from files to files, and load its files on the unmodified base as a user would."""
    spec = InitializationSpec(
        base_model=work.model,
        dataset_id="bench",
        lora=LoraSpec(r=work.protocol.r, lora_alpha=work.protocol.lora_alpha, ranks=ranks),
        max_length=work.protocol.max_length,
        seed=work.seed,
        dtype="bfloat16" if work.protocol.autocast else "auto",
        **options,
    )
    file = _file(work.directory / "rows.jsonl", work.rows)
    files = {role: _file(work.directory / f"{role}.jsonl", rows) for role, rows in extras.items()}

    def make(out: Path) -> dict[str, Any]:
        result = initialize(spec, file, files, out=out, settings=WorkerSettings(), on_progress=lambda *_: None)
        return {"start": result.summary.start, "weights": result.summary.weights}

    asked = spec.model_copy(update={"base_model": model_identity(work.model)}).model_dump_json()
    rows = digest(one.path for one in [file, *files.values()])
    start = kept(work, [asked, code_identity("ours"), rows], make)
    wanted = {name: scaled(layer).norm().item() for name, layer in layers(start.model).items()}
    return Start(start.model, start.about | {"magnitude": _magnitude(wanted)})


def _file(path: Path, rows: list[Row]) -> DatasetFile:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DatasetFile(path, Format.JSONL)


def _magnitude(norms: dict[str, float]) -> float:
    """Return the norm of all layers' ``s B A`` together."""
    return round(sum(norm**2 for norm in norms.values()) ** 0.5, 6)

"""The adapter's files, in the form that stock PEFT, TRL and vLLM read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save

from d2lora.initializations import ResultFile
from worker.factors import Factors
from worker.report import Report, model_card

MANIFEST = "manifest.json"


def write_adapter(
    directory: Path, *, config: LoraConfig, factors: Mapping[str, Factors], report: Report
) -> list[ResultFile]:
    """Write every file, the manifest last, and return them in that order.

    The manifest's existence says that all others are complete; it lists their sizes and checksums, not its own.
    """
    tensors = {}
    for name, layer in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.cpu().contiguous()
    (directory / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    config.save_pretrained(str(directory))
    (directory / "README.md").write_text(model_card(report), encoding="utf-8")
    (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")

    names = ["adapter_config.json", "adapter_model.safetensors", "README.md", "report.json"]
    files = [describe(directory / name) for name in names]
    manifest = {"version": 1, "files": [file.model_dump() for file in files]}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return [*files, describe(directory / MANIFEST)]


def describe(path: Path) -> ResultFile:
    """Return name, size and checksum of a file."""
    with path.open("rb") as file:
        return ResultFile(
            name=path.name, size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest()
        )

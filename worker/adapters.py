"""The adapter's files, in the form that stock PEFT, TRL and vLLM read."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save

from d2lora.initializations import ResultFile
from worker.factors import Factors
from worker.model_card import model_card
from worker.rank_patterns import with_ranks
from worker.report import Report

MANIFEST = "manifest.json"


def write_adapter(
    directory: Path, *, config: LoraConfig, factors: Mapping[str, Factors], report: Report
) -> list[ResultFile]:
    """Write every file, the manifest last, and return them in that order."""
    tensors = {}
    for name, layer in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.cpu().contiguous()
    (directory / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    if report.spec.lora.ranks is not None:
        config = with_ranks(config, report.spec.lora, factors)
    config.save_pretrained(str(directory))
    _write_report(directory, report)
    return _with_manifest(directory, ["adapter_config.json", "adapter_model.safetensors", "README.md", "report.json"])


def write_collection(directory: Path, report: Report, folders: Mapping[str, Sequence[ResultFile]]) -> list[ResultFile]:
    """Write what is said of several adapters together, whose own files are in these folders of the directory.

    Returns all files, the manifest last.
    """
    _write_report(directory, report)
    names = [f"{folder}/{file.name}" for folder, files in folders.items() for file in files]
    return _with_manifest(directory, [*names, "README.md", "report.json"])


def _with_manifest(directory: Path, names: Sequence[str]) -> list[ResultFile]:
    """Write the manifest, and return all files.

    Its existence says that all others are complete; it lists their sizes and checksums, not its own.
    """
    files = [describe(directory, name) for name in names]
    manifest = {"version": 1, "files": [file.model_dump() for file in files]}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return [*files, describe(directory, MANIFEST)]


def describe(directory: Path, name: str) -> ResultFile:
    """Return name, size and checksum of a file."""
    path = directory / name
    with path.open("rb") as file:
        return ResultFile(name=name, size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _write_report(directory: Path, report: Report) -> None:
    (directory / "README.md").write_text(model_card(report), encoding="utf-8")
    (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")

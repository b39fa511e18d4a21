"""Files that one worker leaves for another: safetensors with a format version and their meaning in the header.

Every reader refuses what another version wrote and what is damaged, before any of it enters a sum.

Shape legend
    B  batches    R  rows    S  sequences    N  tokens of all sequences, without padding
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d2lora.errors import ChecksumMismatch, FormatMismatch, FormatOutdated
from d2lora.initializations import Frozen
from worker.batches import Batch
from worker.factors import Direction
from worker.low_rank import LowRank
from worker.models import BaseModel
from worker.objectives import Scores

FORMAT = 5
"""Raised when a file's meaning changes, so that old and new workers never mix them up."""

_KEY = "d2lora"


class BasePin(Frozen):
    """The base model as the job's first worker loaded it, so that all workers take the same weights."""

    identity: str
    revision: str | None
    dtype: str
    configuration_sha256: str | None = None
    """Of a local model; None also where an earlier version of the worker wrote the pin."""

    @staticmethod
    def of(base: BaseModel) -> "BasePin":
        """Return what other workers need to load the same weights in the same type."""
        dtype = str(base.model.dtype).removeprefix("torch.")
        return BasePin(
            identity=base.identity,
            revision=base.revision,
            dtype=dtype,
            configuration_sha256=base.configuration_sha256,
        )

    def fits(self, base: BaseModel) -> bool:
        """Return whether that is the model; what this pin does not say may be anything."""
        loaded = BasePin.of(base)
        if self.configuration_sha256 is None:
            loaded = loaded.model_copy(update={"configuration_sha256": None})
        return loaded == self


def write(path: Path, holds: str, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a file that `read` takes; the same content gives the same bytes."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(content, path, metadata=metadata(holds, about))


def metadata(holds: str, about: dict[str, Any]) -> dict[str, str]:
    """Return what the header of such a file says beside the tensors' places."""
    return {_KEY: json.dumps({"format": FORMAT, "holds": holds, **about})}


def read(path: Path, holds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what the header says, and all tensors.

    Raises:
        FormatMismatch: another version of the worker wrote the file; FormatOutdated if it was an older one.
        ChecksumMismatch: it is damaged, or something else than asked for.
    """
    about = header(path, holds)
    try:
        with safe_open(path, framework="pt") as file:
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except SafetensorError as error:
        raise damaged(path) from error


def header(path: Path, holds: str) -> dict[str, Any]:
    """Return what the header says; raises as `read` does."""
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()[_KEY])
            version = about["format"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise damaged(path) from error
    check_format(version, path.name)
    if about.get("holds") != holds:
        raise damaged(path)
    return about


def check_format(version: object, name: str) -> None:
    """Raise FormatMismatch, and FormatOutdated if it is an older one, unless this worker reads that format."""
    if version == FORMAT:
        return
    what = f"{name} has format {version!r} and this worker reads {FORMAT}"
    if isinstance(version, int) and version < FORMAT:
        raise FormatOutdated(f"{what}; the job has to begin anew")
    raise FormatMismatch(f"{what}; a worker of that version has to take it")


def damaged(path: Path) -> ChecksumMismatch:
    """Return the error for a file that is not what it should be."""
    return ChecksumMismatch(f"{path.name} is damaged or belongs to another job")


def sha256(path: Path) -> str:
    """Return the digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_batches(path: Path, batches: Sequence[Batch], base: BasePin, *, pad_token_id: int) -> None:
    """Write batches as they are, but for the padding."""
    about = {"base": base.model_dump(), "paired": batches[0].paired, "pad_token_id": pad_token_id}
    present = [batch.attention_mask.bool() for batch in batches]
    tensors = {
        "tokens_N": torch.cat([batch.input_ids[mask] for batch, mask in zip(batches, present, strict=True)]).int(),
        "learned_N": torch.cat([batch.completion_mask[mask] for batch, mask in zip(batches, present, strict=True)]),
        "lengths_S": torch.cat([mask.sum(1) for mask in present]).int(),
        "rows_R": torch.tensor([row for batch in batches for row in batch.rows]),
        "folds_B": torch.tensor([batch.fold for batch in batches]),
        "sizes_B": torch.tensor([len(batch.rows) for batch in batches]),
    }
    labels = [batch.desirable for batch in batches if batch.desirable is not None]
    if labels:
        tensors["desirable_R"] = torch.cat(labels)
    write(path, "batches", about, tensors)


def read_batches(path: Path) -> tuple[BasePin, list[Batch]]:
    """Return the batches of a file and the base model that they were tokenized for; raises as `read` does."""
    about, tensors = read(path, "batches")
    try:
        base = BasePin.model_validate(about["base"])
        paired, pad_token_id = bool(about["paired"]), int(about["pad_token_id"])
        lengths, sizes = tensors["lengths_S"].tolist(), tensors["sizes_B"].tolist()
        sequences = iter(
            zip(tensors["tokens_N"].long().split(lengths), tensors["learned_N"].split(lengths), strict=True)
        )
        labels = tensors["desirable_R"].split(sizes) if "desirable_R" in tensors else [None] * len(sizes)
        batches = []
        for rows, fold, own_labels in zip(
            tensors["rows_R"].split(sizes), tensors["folds_B"].tolist(), labels, strict=True
        ):
            own = [next(sequences) for _ in range(len(rows) * (2 if paired else 1))]
            padded = _padded(own, pad_token_id, paired=paired, rows=tuple(rows.tolist()), fold=fold)
            batches.append(replace(padded, desirable=own_labels))
    except (KeyError, ValueError, RuntimeError, StopIteration, ValidationError) as error:
        raise damaged(path) from error
    if not batches or next(sequences, None) is not None:
        raise damaged(path)
    return base, batches


def write_scores(path: Path, scores: Scores, *, made_from: str) -> None:
    """Write the scores of a shard's rows, in the order of its batches."""
    write(path, "scores", {"made_from": made_from}, scores.tensors())


def read_scores(path: Path, *, made_from: str, sizes: Sequence[int]) -> list[Scores]:
    """Return the scores of batches of these sizes; raises as `read` does."""
    about, tensors = read(path, "scores")
    if about.get("made_from") != made_from or any(len(tensor) != sum(sizes) for tensor in tensors.values()):
        raise damaged(path)
    try:
        return Scores(**tensors).split(sizes)
    except TypeError as error:
        raise damaged(path) from error


def write_direction(path: Path, direction: Direction) -> None:
    """Write the step of size 1 in every layer."""
    tensors: dict[str, Tensor] = {}
    for name, layer in direction.items():
        step = layer.taken(1.0)
        tensors |= {f"{name}/left": step.left, f"{name}/values": step.values, f"{name}/right": step.right}
        tensors[f"{name}/energies"] = torch.tensor([step.energy, step.missed], dtype=torch.float64)
    write(path, "direction", {"layers": list(direction)}, tensors)


def read_direction(path: Path, device: torch.device) -> dict[str, LowRank]:
    """Return the step of a file as a direction, on the device; raises as `read` does."""
    about, tensors = read(path, "direction")

    def layer(name: str) -> LowRank:
        left, values, right = (tensors[f"{name}/{part}"].to(device) for part in ("left", "values", "right"))
        energy, missed = tensors[f"{name}/energies"].tolist()
        return LowRank(left, values, right, energy, missed)

    try:
        return {name: layer(name) for name in about["layers"]}
    except (KeyError, ValueError) as error:
        raise damaged(path) from error


def _padded(
    sequences: Sequence[tuple[Tensor, Tensor]], pad_token_id: int, *, paired: bool, rows: tuple[int, ...], fold: int
) -> Batch:
    size = (len(sequences), max(len(tokens) for tokens, _ in sequences))
    input_ids = torch.full(size, pad_token_id)
    attention_mask = torch.zeros(size, dtype=torch.int64)
    completion_mask = torch.zeros(size, dtype=torch.bool)
    for index, (tokens, learned) in enumerate(sequences):
        input_ids[index, : len(tokens)] = tokens
        attention_mask[index, : len(tokens)] = 1
        completion_mask[index, : len(tokens)] = learned
    return Batch(input_ids, attention_mask, completion_mask, paired, rows, fold)

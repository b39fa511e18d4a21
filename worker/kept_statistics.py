"""What a job keeps of its pass, so that later ones need none: sums, fold by fold, and every row's scores.

No text and no tokens are kept; a row is known by its digest. The sums are those of `worker/sketch_files.py`.

Shape legend
    R  rows
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from worker.batches import Batch
from worker.data import TokenSequence, digest_of
from worker.objectives import Basis, Scores
from worker.shard_files import FORMAT, BasePin, check_format, damaged, read, write
from worker.units import KEPT_INDEX, KeptHead

_ROWS = "kept-rows.safetensors"


class KeptIndex(KeptHead):
    """What the sums of a job are, for whoever goes on from them."""

    base: BasePin
    seed: int
    kind: str
    """As files of sums name it."""
    bases: list[Basis]
    chosen_only: bool
    """Whether rejected completions took no part, so that digests are those of the chosen sequences."""
    sums: list[str]
    """The file of every fold."""


@dataclass(frozen=True)
class KeptRows:
    """Rows that have been passed; equal ones appear as often as they were passed."""

    digests: list[str]
    folds: list[int]
    scores: Scores
    """Under the base model."""

    @cached_property
    def places(self) -> dict[str, int]:
        """Where a row of each digest is."""
        return {digest: index for index, digest in enumerate(self.digests)}

    def scores_of(self, digests: Sequence[str]) -> Scores:
        """Return the scores of rows by their digests; equal rows have equal scores."""
        index = torch.tensor([self.places[digest] for digest in digests])
        return Scores(**{name: tensor[index] for name, tensor in self.scores.tensors().items()})

    def with_rows(self, others: "KeptRows") -> "KeptRows":
        """Return these rows and others."""
        return KeptRows(
            [*self.digests, *others.digests],
            [*self.folds, *others.folds],
            Scores.concatenate([self.scores, others.scores]),
        )


@dataclass(frozen=True)
class Kept:
    """The statistics that a request is based on, as files in a directory."""

    index: KeptIndex
    rows: KeptRows
    sums: list[Path]
    """Of every fold."""


def rows_of(scored: Iterable[tuple[Batch, Scores]]) -> KeptRows:
    """Return the rows of batches with their scores."""
    digests: list[str] = []
    folds: list[int] = []
    parts = []
    for batch, scores in scored:
        digests += batch_digests(batch)
        folds += [batch.fold] * len(batch.rows)
        parts.append(scores)
    return KeptRows(digests, folds, Scores.concatenate(parts))


def batch_digests(batch: Batch) -> list[str]:
    """Return the digest of every row of a batch, as `worker.data` has given it to the example."""

    def sequence(index: int) -> TokenSequence:
        present = batch.attention_mask[index].bool()
        return TokenSequence(batch.input_ids[index][present].tolist(), batch.completion_mask[index][present].tolist())

    rows = len(batch.rows)
    return [
        digest_of(
            [sequence(row), sequence(rows + row)] if batch.paired else [sequence(row)],
            None if batch.desirable is None else bool(batch.desirable[row]),
        )
        for row in range(rows)
    ]


def write_kept(directory: Path, index: KeptIndex, rows: KeptRows) -> None:
    """Write what belongs to the sums, which lie in the directory already."""
    tensors: dict[str, Tensor] = {
        "digests_R": torch.frombuffer(bytearray(bytes.fromhex("".join(rows.digests))), dtype=torch.uint8),
        "folds_R": torch.tensor(rows.folds),
    }
    write(directory / _ROWS, "kept rows", {}, tensors | rows.scores.tensors())
    (directory / KEPT_INDEX).write_text(index.model_dump_json() + "\n", encoding="utf-8")


def kept_index(
    *, base: BasePin, rank: int, rows: int, seed: int, kind: str, bases: Sequence[Basis], chosen_only: bool, sums: int
) -> KeptIndex:
    """Return the index of sums in so many folds, under the names that their files get."""
    names = [f"fold-{fold}.safetensors" for fold in range(sums)]
    return KeptIndex(
        format=FORMAT,
        files=[*names, _ROWS, KEPT_INDEX],
        r=rank,
        rows=rows,
        base=base,
        seed=seed,
        kind=kind,
        bases=list(bases),
        chosen_only=chosen_only,
        sums=names,
    )


def read_kept(directory: Path) -> Kept:
    """Return the statistics in a directory.

    Raises:
        FormatMismatch: another version of the worker wrote them.
        ChecksumMismatch: they are damaged.
    """
    path = directory / KEPT_INDEX
    try:
        text = path.read_bytes()
        check_format(KeptHead.model_validate_json(text, extra="ignore").format, path.name)
        index = KeptIndex.model_validate_json(text)
        _, tensors = read(directory / _ROWS, "kept rows")
        digests = tensors.pop("digests_R").numpy().tobytes().hex()
        folds = tensors.pop("folds_R").tolist()
        rows = KeptRows([digests[start : start + 64] for start in range(0, len(digests), 64)], folds, Scores(**tensors))
    except (OSError, ValidationError, KeyError, TypeError) as error:
        raise damaged(path) from error
    sizes = {len(rows.digests), len(folds), *(len(tensor) for tensor in rows.scores.tensors().values())}
    if sizes != {index.rows} or set(folds) != set(range(len(index.sums))):
        raise damaged(path)
    return Kept(index, rows, [directory / name for name in index.sums])

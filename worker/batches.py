"""From examples to token batches: folds, and rows of similar lengths padded to one size.

Shape legend
    S  sequences (chosen first, then rejected)    T  tokens of the longest sequence in the batch    R  rows
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from d2lora.supervision import Supervision, supervision_of
from worker.data import Example, digest_of

_BATCHES_WORTH_THE_LIMIT = 16
"""So many batches more are worth ``max_tokens`` of padding less; a pass takes some time for a batch of any size."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one fold, padded on the right."""

    input_ids: Int[Tensor, "S T"]
    attention_mask: Int[Tensor, "S T"]
    completion_mask: Bool[Tensor, "S T"]
    paired: bool
    """True: the first half of the sequences are chosen, the second half the same rows' rejected ones."""
    rows: tuple[int, ...]
    """Indices into the examples."""
    fold: int
    desirable: Bool[Tensor, " R"] | None = None
    """The rows' labels, if they have some."""

    @property
    def supervision(self) -> Supervision:
        """What the rows say of their completions."""
        return supervision_of(paired=self.paired, labeled=self.desirable is not None)

    def halves(self) -> tuple["Batch", "Batch"]:
        """Return the batch in two parts by rows; a pair stays together."""
        middle = len(self.rows) // 2
        return self.part(range(middle)), self.part(range(middle, len(self.rows)))

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.completion_mask.to(device),
            self.paired,
            self.rows,
            self.fold,
            None if self.desirable is None else self.desirable.to(device),
        )

    def part(self, rows: Sequence[int]) -> "Batch":
        """Return some of the rows; a pair stays together."""
        index = [*rows, *(len(self.rows) + row for row in rows)] if self.paired else [*rows]
        return Batch(
            self.input_ids[index],
            self.attention_mask[index],
            self.completion_mask[index],
            self.paired,
            tuple(self.rows[row] for row in rows),
            self.fold,
            None if self.desirable is None else self.desirable[[*rows]],
        )


def groups_of(examples: Sequence[Example], *, by_label: bool = True) -> list[str]:
    """Return every example's group: rows that share a sequence, directly or by way of others, are of one.

    A row of a group must not be held out from the others: its own completion would be among what they have taught. By
    label, rows of different labels have no group in common.
    """
    return _united(
        [
            [
                digest_of([one], example.desirable if by_label else None)
                for one in (example.chosen, example.rejected)
                if one
            ]
            for example in examples
        ]
    )


def groups_in(batches: Sequence[Batch]) -> list[str]:
    """Return the group of every row of the batches, in order, labels aside; rows outside them join none."""
    names = []
    for batch in batches:
        own = [
            hashlib.sha256(str((ids[real].tolist(), mask[real].tolist())).encode()).hexdigest()
            for ids, mask, real in zip(batch.input_ids, batch.completion_mask, batch.attention_mask.bool(), strict=True)
        ]
        names += [own[row :: len(batch.rows)] for row in range(len(batch.rows))]
    return _united(names)


def _united(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return every row's group, where rows that share a name are of one."""
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while above[name] != name:
            above[name] = name = above[above[name]]
        return name

    for names in rows:
        tops = [top(above.setdefault(name, name)) for name in names]
        above |= dict.fromkeys(tops, min(tops))  # the least, so that the order of rows changes nothing
    return [top(names[0]) for names in rows]


def distinct_rows(examples: Sequence[Example]) -> int:
    """Return how many groups of rows there are, or of labeled rows those of the rarer label."""
    return min(map(len, _by_label(examples, groups_of(examples)).values()))


def assign_folds(examples: Sequence[Example], *, folds: int, seed: int) -> list[int]:
    """Return every example's fold: the rank of hash(seed, group) modulo the number of folds, label by label.

    So no row is held out from one that shares a completion with it, and the order of rows changes nothing.
    """
    fold_of: dict[str, int] = {}
    groups = groups_of(examples)
    for own in _by_label(examples, groups).values():
        ranked = sorted(own, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
        fold_of |= {group: rank % folds for rank, group in enumerate(ranked)}
    return [fold_of[group] for group in groups]


def _by_label(examples: Sequence[Example], groups: Sequence[str]) -> dict[bool | None, set[str]]:
    by_label: dict[bool | None, set[str]] = {}
    for example, group in zip(examples, groups, strict=True):
        by_label.setdefault(example.desirable, set()).add(group)
    return by_label


def make_batches(
    examples: Sequence[Example], folds: Sequence[int], *, max_tokens: int, pad_token_id: int
) -> list[Batch]:
    """Return batches of one fold each, of similar lengths, with at most ``max_tokens`` padded tokens.

    A row that is longer alone makes a batch of its own. Rows are sorted by length and content, so the batches do not
    depend on the order of the dataset.
    """
    batches = []
    for fold in sorted(set(folds)):
        own = [index for index, of in enumerate(folds) if of == fold]
        own.sort(key=lambda index: (examples[index].length, examples[index].digest))
        sizes = [examples[index].length * (2 if examples[index].rejected else 1) for index in own]
        # KTO's mismatched completions come from the same batch, so labeled rows want as many as fit.
        labeled = examples[own[0]].desirable is not None
        cost = max_tokens if labeled else max_tokens // _BATCHES_WORTH_THE_LIMIT
        batches += [
            _batch(examples, own[start:end], fold, pad_token_id)
            for start, end in _cheapest_runs(sizes, max_tokens, cost)
        ]
    return batches


def _cheapest_runs(sizes: Sequence[int], max_tokens: int, cost: int) -> list[tuple[int, int]]:
    """Return where batches of rows of these ascending sizes begin and end, for the fewest padded tokens and costs."""
    fewest, starts = [0], [0]  # for the first rows, and where their last batch begins
    for end, size in enumerate(sizes, start=1):
        first = max(0, end - max(1, max_tokens // size))
        tokens, start = min((fewest[start] + (end - start) * size, start) for start in range(first, end))
        fewest.append(tokens + cost)
        starts.append(start)
    runs = [(starts[-1], len(sizes))]
    while runs[-1][0] > 0:
        runs.append((starts[runs[-1][0]], runs[-1][0]))
    return runs[::-1]


def groups_by_length(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Return the sequences' indices in groups, each with its longest length; the shortest has 70 % of that or more.

    On real preferences, whose sides differ in length, a quarter of a batch is padding, and of its groups 5 %.
    """
    groups: list[tuple[list[int], int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not groups or 10 * lengths[index] < 7 * groups[-1][1]:
            groups.append(([], lengths[index]))
        groups[-1][0].append(index)
    return groups


def _batch(examples: Sequence[Example], rows: Sequence[int], fold: int, pad_token_id: int) -> Batch:
    chosen = [examples[row].chosen for row in rows]
    rejected = [sequence for row in rows if (sequence := examples[row].rejected) is not None]
    sequences = chosen + rejected
    size = (len(sequences), max(len(sequence.input_ids) for sequence in sequences))
    input_ids = torch.full(size, pad_token_id)
    attention_mask = torch.zeros(size, dtype=torch.int64)
    completion_mask = torch.zeros(size, dtype=torch.bool)
    for index, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        input_ids[index, :length] = torch.tensor(sequence.input_ids)
        attention_mask[index, :length] = 1
        completion_mask[index, :length] = torch.tensor(sequence.completion_mask)
    labels = [label for row in rows if (label := examples[row].desirable) is not None]
    desirable = torch.tensor(labels) if labels else None
    return Batch(input_ids, attention_mask, completion_mask, bool(rejected), tuple(rows), fold, desirable)

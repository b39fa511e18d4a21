"""Rows as tokens, as TRL's trainers tokenize them: the prompt alone, and prompt with completion and end token."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bench.quality.datasets import Row


@dataclass(frozen=True)
class Sequence:
    """Tokens, and where the learned ones begin."""

    ids: list[int]
    begin: int

    @property
    def tokens(self) -> int:
        """Number of learned tokens."""
        return len(self.ids) - self.begin


def encode(row: Row, field: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Sequence:
    """Return a row's ``completion``, ``chosen``, ``rejected`` or ``text`` after its prompt, cut at its end."""
    prompt, completion = row.get("prompt", ""), row[field]
    whole = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"][:max_length]
    alone = tokenizer(prompt)["input_ids"] if prompt else []
    same = 0
    while same < min(len(alone), len(whole)) and alone[same] == whole[same]:
        same += 1
    return Sequence(whole, max(1, same))


def fits(row: Row, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> bool:
    """Return whether all of a row's completions stay whole; text without a prompt may be cut."""
    return "text" in row or all(
        len(encode(row, field, tokenizer, max_length=max_length + 1).ids) <= max_length
        for field in row
        if field != "prompt"
    )


def field_of(row: Row) -> str:
    """Return the field that is learned by likelihood."""
    return next(name for name in ("chosen", "completion", "text") if name in row)


def padded(sequences: list[Sequence], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, attention mask and the mask of learned tokens, padded on the right; all (sequences, tokens)."""
    length = max(len(sequence.ids) for sequence in sequences)
    ids = torch.full((len(sequences), length), pad)
    attention, learned = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for index, sequence in enumerate(sequences):
        ids[index, : len(sequence.ids)] = torch.tensor(sequence.ids)
        attention[index, : len(sequence.ids)] = 1
        learned[index, sequence.begin : len(sequence.ids)] = True
    return ids.to(device), attention.to(device), learned.to(device)

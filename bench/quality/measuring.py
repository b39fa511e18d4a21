"""Losses and preferences by explicit log-probabilities; the reference is the base model for every initializer.

TRL takes an adapter that it is given as DPO's reference, which would hide a start that is not zero; so nothing here
comes from a trainer.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from bench.quality import encoding
from bench.quality.datasets import Row
from bench.quality.encoding import encode, field_of, padded

_BATCH = 16


@dataclass(frozen=True)
class Scores:
    """Per row: summed log-probabilities and numbers of learned tokens."""

    chosen: Tensor
    chosen_tokens: Tensor
    rejected: Tensor | None = None
    rejected_tokens: Tensor | None = None

    def detached(self) -> "Scores":
        """Return the same numbers as constants."""
        rejected = None if self.rejected is None else self.rejected.detach()
        return Scores(self.chosen.detach(), self.chosen_tokens, rejected, self.rejected_tokens)


class Held:
    """Rows that losses are measured on, as tokens."""

    def __init__(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int, autocast: bool = False
    ) -> None:
        self.pad, self.autocast = tokenizer.pad_token_id, autocast
        self.chosen = [encode(row, field_of(row), tokenizer, max_length=max_length) for row in rows]
        self.rejected = [encode(row, "rejected", tokenizer, max_length=max_length) for row in rows if "rejected" in row]

    def part(self, rows: Sequence[int]) -> "Held":
        """Return some of the rows."""
        part = object.__new__(Held)
        part.pad, part.autocast = self.pad, self.autocast
        part.chosen, part.rejected = ([own[row] for row in rows if own] for own in (self.chosen, self.rejected))
        return part

    def batches(self, order: Sequence[int] | None = None) -> Iterator["Held"]:
        """Yield the rows in parts, in their own or another order."""
        order = range(len(self.chosen)) if order is None else order
        for begin in range(0, len(order), _BATCH):
            yield self.part(order[begin : begin + _BATCH])


def score(model: nn.Module, held: Held) -> Scores:
    """Return the log-probabilities of a few rows; gradients flow where they are enabled."""
    chosen = _logps(model, held.chosen, held)
    counts = _counts(held.chosen)
    if not held.rejected:
        return Scores(chosen, counts)
    return Scores(chosen, counts, _logps(model, held.rejected, held), _counts(held.rejected))


def score_all(model: nn.Module, held: Held) -> Scores:
    """Return the log-probabilities of all rows, in float32 on the CPU, in evaluation mode and without gradients."""
    training = model.training
    model.eval()
    by_length = sorted(range(len(held.chosen)), key=lambda row: len(held.chosen[row].ids))
    with torch.no_grad():
        parts = [score(model, part) for part in held.batches(by_length)]
    model.train(training)
    places = torch.tensor(by_length).argsort()

    def joined(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found).float().cpu()[places]

    return Scores(*(joined(name) for name in ("chosen", "chosen_tokens", "rejected", "rejected_tokens")))  # type: ignore[arg-type]  # the first two are never None


def row_losses(trainer: str, scores: Scores, reference: Scores, *, beta: float) -> Tensor:
    """Return each row's loss; for SFT per token, so that `mean_loss` weighs rows by their tokens."""
    if trainer == "sft":
        return -scores.chosen / scores.chosen_tokens
    assert scores.rejected is not None
    assert scores.rejected_tokens is not None
    if trainer == "dpo":
        return -logsigmoid(beta * margins(scores, reference))
    chosen, rejected = scores.chosen / scores.chosen_tokens, scores.rejected / scores.rejected_tokens
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * logsigmoid(odds)


def mean_loss(trainer: str, scores: Scores, reference: Scores, *, beta: float) -> Tensor:
    """Return the loss over rows: a mean over tokens for SFT, as TRL's, and over rows otherwise."""
    losses = row_losses(trainer, scores, reference, beta=beta)
    if trainer == "sft":
        return (losses * scores.chosen_tokens).sum() / scores.chosen_tokens.sum()
    return losses.mean()


def margins(scores: Scores, reference: Scores) -> Tensor:
    """Return per row how much more than the base the model prefers the chosen completion, in nats."""
    assert scores.rejected is not None
    assert reference.rejected is not None
    return (scores.chosen - reference.chosen) - (scores.rejected - reference.rejected)


def preference(scores: Scores, reference: Scores) -> dict[str, float]:
    """Return accuracies (ties count half) and the mean margin against the base, and what length alone would score."""
    assert scores.rejected is not None
    assert scores.rejected_tokens is not None
    margin = margins(scores, reference)
    return {
        "accuracy": _won(margin),
        "margin": margin.mean().item(),
        "likelihood_accuracy": _won(scores.chosen - scores.rejected),
        "length_accuracy": _won(scores.chosen_tokens - scores.rejected_tokens),
    }


def finite(value: float) -> float | None:
    """Return the value, or None for what JSON cannot say: a loss that has diverged."""
    return round(value, 6) if math.isfinite(value) else None


def _won(difference: Tensor) -> float:
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item()


def _log1mexp(value: Tensor) -> Tensor:
    return torch.log1p(-torch.exp(value.clamp(max=-1e-6)))


def _counts(sequences: Sequence[encoding.Sequence]) -> Tensor:
    return torch.tensor([float(sequence.tokens) for sequence in sequences])


def _logps(model: nn.Module, sequences: list[encoding.Sequence], held: Held) -> Tensor:
    ids, attention, learned = padded(sequences, held.pad, next(model.parameters()).device)
    # Prompts need no logits: with a large vocabulary these would cost as much as the layers.
    kept = learned[:, 1:].any(0).nonzero()[:, 0]
    with compute(ids.device.type, autocast=held.autocast):
        output = model(input_ids=ids, attention_mask=attention, use_cache=False, logits_to_keep=kept)
    taken = torch.log_softmax(output.logits.float(), -1).gather(-1, ids[:, 1 + kept, None])[..., 0]
    return (taken * learned[:, 1 + kept]).sum(1).cpu()


def compute(device: str, *, autocast: bool) -> torch.autocast:
    """Return the context in which matrices are multiplied in bfloat16, or one that changes nothing."""
    return torch.autocast(device, torch.bfloat16, enabled=autocast)

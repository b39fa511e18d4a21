"""The pass over the data: one forward and one activations-only backward for all objectives (docs/method.md, eq. 1-3).

A hook on every target layer puts an identity after its output. In the backward the identity sees the gradient of the
output together with the layer's inputs, and hands both to that layer's `LayerStatistics`. No weight
requires a gradient.

Shape legend
    S  sequences    T  tokens of a padded sequence    K  bases
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from d2lora.errors import NumericalFailure, TargetUnsupported
from worker.batches import Batch, groups_by_length
from worker.halving import in_halves
from worker.logprobs import sequence_logps, sequence_logps_and_gradient
from worker.models import BaseModel
from worker.objectives import Away, Basis, Counts, Scores, count, sequence_weights
from worker.projections import Remembered
from worker.sketching import LayerStatistics


@dataclass
class Statistics:
    """Summed bases of every layer, with what normalizes them."""

    layers: Mapping[str, LayerStatistics]
    counts: Counts = field(default_factory=Counts)


@runtime_checkable
class Sums(Protocol):
    """What a pass adds a layer's batches to."""

    def add(
        self,
        inputs: Float[Tensor, "S T I"],
        output_grads: Float[Tensor, "S T O"],
        weights: Float[Tensor, "K S"],
        *,
        paired: bool,
    ) -> None:
        """Add a batch; all of it or, if memory runs out, nothing."""


_Added = tuple[Basis | None, str]
"""A layer's name, and which of a batch's backward passes it was: None for the completions' own."""


@dataclass
class _Recorder:
    """What a backward pass adds where; ``done`` survives a pass that runs out of memory."""

    layers: Mapping[str, Sums]
    done: set[_Added]
    paired: bool
    size: tuple[int, int]
    """S and T."""
    present: Int[Tensor, "S T"] | None = None
    """0 at padding, where layers then get inputs of 0; None where that makes no difference to them."""
    weights: Float[Tensor, "K S"] | None = None
    only: Basis | None = None
    masked: Remembered | None = None
    """The inputs that were masked last."""
    skip: frozenset[_Added] = field(init=False)
    """What an earlier attempt has added, for more rows than these."""

    def __post_init__(self) -> None:
        self.skip = frozenset(self.done)

    def record(self, name: str, inputs: Tensor, output_grads: Tensor) -> None:
        assert self.weights is not None
        if (self.only, name) in self.skip:
            return
        if (self.only, name) in self.done:
            raise TargetUnsupported(
                f"lora.target_modules: {name!r} runs more than once in a forward pass; leave it out"
            )
        # One number tells: a sum over a NaN or an infinity is not finite either.
        if not math.isfinite(output_grads.sum().item()) and not bool(torch.isfinite(output_grads).all()):
            raise NumericalFailure(f"the gradient at the output of layer {name!r} is not finite; try dtype float32")
        inputs = self._by_sequence(name, inputs)
        if self.present is not None:
            inputs = self._masked(inputs, self.present)
        output_grads = self._by_sequence(name, output_grads)
        self.layers[name].add(inputs, output_grads, self.weights.to(inputs.device), paired=self.paired)
        self.done.add((self.only, name))

    def _masked(self, inputs: Float[Tensor, "S T _"], present: Int[Tensor, "S T"]) -> Float[Tensor, "S T _"]:
        """Return a copy with zeros at padding; layers in turn with the same inputs share it, and its products."""
        if self.masked is None or not self.masked.is_of(inputs, self.size):
            self.masked = Remembered.of(inputs, self.size, inputs * present.to(inputs)[..., None])
        return self.masked.product

    def check_complete(self) -> None:
        """Return if every layer has been added.

        Raises:
            TargetUnsupported: one has not: its statistics would stay zero.
        """
        missing = [name for name in self.layers if (None, name) not in self.done]
        if missing:
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise TargetUnsupported(
                f"lora.target_modules: no token passes {missing[0]!r}{others}, so no gradient comes out; leave them out"
            )

    def _by_sequence(self, name: str, tokens: Tensor) -> Float[Tensor, "S T _"]:
        """Return a tensor of all tokens as S x T; mixtures of experts flatten it on their way."""
        if tokens.shape[:-1] not in {self.size, (math.prod(self.size),)}:
            raise TargetUnsupported(
                f"lora.target_modules: {name!r} sees a part of the tokens only, and cannot tell of which sequences; "
                "leave it out"
            )
        return tokens.reshape(*self.size, -1)


class _Tap(torch.autograd.Function):
    """The identity on a layer's output, whose backward hands (inputs, gradient of the output) to ``record``.

    The inputs are saved through autograd and not by a closure, so that activation checkpointing frees them too. The
    output is handed on detached and not as a view, so that a model may add to it in place (Falcon does).
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, record: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.record = record
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.record(inputs.detach(), grad)
        return grad, None, None


@contextmanager
def _recording(targets: Mapping[str, nn.Module], recorder: _Recorder) -> Iterator[None]:
    """Tap the outputs of the targets while the block runs."""
    handles = [module.register_forward_hook(partial(_tapped, recorder, name)) for name, module in targets.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tapped(recorder: _Recorder, name: str, _module: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> Tensor:
    if not isinstance(output, Tensor):  # a router's, for one
        raise TargetUnsupported(f"lora.target_modules: {name!r} does not return a tensor; leave it out")
    return _Tap.apply(output, arguments[0], partial(recorder.record, name))


@contextmanager
def _differentiable_outputs(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the graph start at the first of the modules to run: without this it has no leaf, and no hook fires."""

    def require_grad(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.requires_grad_()

    handles = [module.register_forward_hook(require_grad) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gather(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    layers: Mapping[str, Sums],
    batches: Sequence[Batch],
    bases: Sequence[Basis],
    *,
    on_batch: Callable[[Batch, Scores], None],
    mask_inputs: bool = False,
    away: Callable[[Batch], Away] | None = None,
) -> Counts:
    """Add the batches to ``layers`` and return what normalizes them; on request with inputs of 0 at padding.

    The graph begins at the lowest target, so that the backward ends there.

    ``on_batch`` is told of every batch when all of it has been added, with its rows' scores under the model as it is.
    ``away`` tells of a batch what its bases need where that is not the reference.

    Raises:
        NumericalFailure: a log-probability or a gradient is not finite; the message names the layer.
        OutOfMemory: a batch of a single row does not fit.
        TargetUnsupported: a layer is not run once over all tokens.
    """

    def run(part: Batch, done: set[_Added]) -> Scores:
        size = (part.input_ids.shape[0], part.input_ids.shape[1])
        padded = mask_inputs and not bool(part.attention_mask.all())
        recorder = _Recorder(layers, done, part.paired, size, part.attention_mask if padded else None)
        return _forward_and_backward(base, targets, recorder, part, bases, away)

    counts = Counts()
    for batch in batches:
        for part, scores in in_halves(base, batch, run):
            counts += count(scores)
            on_batch(part, scores)
    return counts


def _forward_and_backward(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    recorder: _Recorder,
    batch: Batch,
    bases: Sequence[Basis],
    away: Callable[[Batch], Away] | None,
) -> Scores:
    with torch.enable_grad(), _differentiable_outputs(targets.values()), _recording(targets, recorder):
        hidden = base.hidden_states(batch.input_ids, batch.attention_mask)
        logps, gradient = sequence_logps_and_gradient(
            base.head, hidden, batch.input_ids, batch.completion_mask, vocabulary=base.vocabulary
        )
        scores = _scores(base, batch, logps)
        recorder.weights = sequence_weights(bases, scores, away(batch) if away else None).to(base.device)
        whole_sequences = Basis.SEQUENCE in bases
        hidden.backward(gradient, retain_graph=whole_sequences)
        recorder.check_complete()
        if whole_sequences:
            # The prompt's tokens have a cotangent of their own, which only this basis takes.
            mask = _prompt_mask(batch)
            prompt_logps, gradient = sequence_logps_and_gradient(
                base.head, hidden, batch.input_ids, mask, vocabulary=base.vocabulary
            )
            scores = _with_prompt(scores, prompt_logps, mask)
            recorder.only = Basis.SEQUENCE
            recorder.weights = recorder.weights * torch.tensor([[basis is Basis.SEQUENCE] for basis in bases]).to(
                recorder.weights
            )
            hidden.backward(gradient)
    return scores


def plain_pass(base: BaseModel, targets: Mapping[str, nn.Module], batch: Batch) -> None:
    """Run the forward and the activations-only backward alone: the limit that the statistics are measured against."""
    with torch.enable_grad(), _differentiable_outputs(targets.values()):
        hidden = base.hidden_states(batch.input_ids, batch.attention_mask)
        _, gradient = sequence_logps_and_gradient(
            base.head, hidden, batch.input_ids, batch.completion_mask, vocabulary=base.vocabulary
        )
        hidden.backward(gradient)


def score(base: BaseModel, batch: Batch, *, with_prompt: bool = False) -> Scores:
    """Return the rows' log-probabilities by a forward pass alone, on request with the chosen prompts' as well.

    Raises:
        NumericalFailure: a log-probability is not finite.
        OutOfMemory: a single row does not fit; more than one are taken in halves.
    """

    def run(part: Batch, _done: set[None]) -> Scores:
        return _score(base, part, with_prompt=with_prompt)

    return Scores.concatenate([scores for _, scores in in_halves(base, batch, run)])


def _score(base: BaseModel, batch: Batch, *, with_prompt: bool) -> Scores:
    """Return the scores; sequences run beside those of similar length, since chosen and rejected may differ much."""
    prompt_mask = _prompt_mask(batch)
    masks = [batch.completion_mask, *([prompt_mask] if with_prompt else [])]
    logps, *prompt_logps = (torch.empty(len(mask), dtype=torch.float64) for mask in masks)
    with torch.no_grad():
        for group, length in groups_by_length(batch.attention_mask.sum(1).tolist()):
            ids = batch.input_ids[group, :length]
            hidden = base.hidden_states(ids, batch.attention_mask[group, :length])
            for into, mask in zip([logps, *prompt_logps], masks, strict=True):
                into[group] = sequence_logps(
                    base.head, hidden, ids, mask[group, :length], vocabulary=base.vocabulary
                ).cpu()
    scores = _scores(base, batch, logps)
    return _with_prompt(scores, prompt_logps[0], prompt_mask) if with_prompt else scores


def _with_prompt(scores: Scores, prompt_logps: Float[Tensor, " S"], mask: Bool[Tensor, "S T"]) -> Scores:
    rows = len(scores.chosen_logps)
    return replace(scores, prompt_logps=prompt_logps[:rows].cpu(), prompt_tokens=mask[:rows, 1:].sum(1).cpu())


def _prompt_mask(batch: Batch) -> Bool[Tensor, "S T"]:
    """Tokens of the chosen sequences that are no completion; the first of a sequence is never predicted."""
    mask = batch.attention_mask.bool() & ~batch.completion_mask
    mask[len(batch.rows) :] = False
    return mask


def _scores(base: BaseModel, batch: Batch, logps: Float[Tensor, " S"]) -> Scores:
    if not torch.isfinite(logps).all():
        raise NumericalFailure(_first_non_finite(base, batch))
    logps, tokens = logps.cpu(), batch.completion_mask.sum(1).cpu()
    if not batch.paired:
        desirable = None if batch.desirable is None else batch.desirable.cpu()
        return Scores(chosen_logps=logps, chosen_tokens=tokens, desirable=desirable)
    rows = len(batch.rows)
    return Scores(
        chosen_logps=logps[:rows],
        chosen_tokens=tokens[:rows],
        rejected_logps=logps[rows:],
        rejected_tokens=tokens[rows:],
    )


def _first_non_finite(base: BaseModel, batch: Batch) -> str:
    """Return a sentence that names the first module, in the order of the forward, whose output is not finite."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else None
            if not found and isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in base.model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            base.head(base.hidden_states(batch.input_ids, batch.attention_mask))
    finally:
        for handle in handles:
            handle.remove()
    place = f"the output of layer {found[0]!r} is" if found else "the log-probabilities are"
    return f"{place} not finite on a batch of {len(batch.rows)} rows; try dtype float32"

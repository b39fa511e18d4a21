"""What PEFT's data-driven initializers learn from the rows, by PEFT's own functions.

They hang hooks, attributes and gradients on the model's layers. `_left_as_found` takes all of it away again, also when
a pass is stopped half way: the model is shared between jobs.
"""

import copy
import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from d2lora.errors import NumericalFailure, RankTooLarge
from d2lora.initializations import Phase
from worker.batches import Batch, make_batches
from worker.data import Example
from worker.factors import Factors
from worker.logprobs import sequence_logps_and_gradient
from worker.models import BaseModel, layer_sizes
from worker.progress import PhaseCounter
from worker.units import OnProgress

MAX_EVA_PASSES = 200
"""Forwards over all batches after which EVA gives up; PEFT itself would go on for ever."""


@dataclass(frozen=True)
class Gathered:
    """What the rows tell about the layers."""

    factors: dict[str, Factors]
    """Of the layers that are done."""
    attributes: dict[str, dict[str, Any]]
    """Layer -> what PEFT looks for on it when it makes the adapter."""


def sample(examples: Sequence[Example], *, count: int, seed: int) -> list[Example]:
    """Return the chosen sides of so many examples, drawn by seed and content: their order changes nothing.

    Undesirable ones are not among them, since the methods imitate what they see.
    """
    imitated = [example for example in examples if example.desirable is not False]
    ranked = sorted(imitated, key=lambda example: hashlib.sha256(f"{seed}:{example.digest}".encode()).digest())
    return [replace(example, rejected=None, desirable=None) for example in ranked[:count]]


def input_directions(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    config: LoraConfig,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    on_progress: OnProgress,
) -> Gathered:
    """Return EVA's factors, from the layers' inputs at completion tokens.

    Raises:
        RankTooLarge: no batch has ``r`` completion tokens, without which PEFT sees no directions.
        NumericalFailure: the directions still turn after `MAX_EVA_PASSES` passes.
    """
    from peft.tuners.lora.eva import get_eva_state_dict  # noqa: PLC0415  # only this method needs it

    # PEFT prints a line for every batch that is too small, and leaves it out.
    batches = [batch for batch in _batches(base, examples, max_tokens) if int(batch.completion_mask.sum()) >= config.r]
    if not batches:
        raise RankTooLarge(f"lora.r: eva needs batches of at least r = {config.r} completion tokens; use more rows")
    most = MAX_EVA_PASSES * len(batches)
    count = PhaseCounter(Phase.STATISTICS, most, on_progress)
    forwards = 0

    def forward(_model: nn.Module, inputs: dict[str, Tensor]) -> None:
        nonlocal forwards
        if forwards > most:
            raise NumericalFailure(
                f"eva: after {MAX_EVA_PASSES} passes the components are not as alike as tau = {config.eva_config.tau}; "
                "lower tau or r, or use more rows"
            )
        base.hidden_states(inputs["input_ids"], inputs["attention_mask"])
        forwards += 1
        count()

    loader = [
        {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.input_ids.masked_fill(~batch.completion_mask, config.eva_config.label_mask_value),
        }
        for batch in batches
    ]
    with _left_as_found(base, targets):
        # The names of a list match these layers and no others.
        directions = get_eva_state_dict(base.model, loader, config, forward_fn=forward, show_progress_bar=False)
    on_progress(Phase.STATISTICS, most, most)
    factors = {}
    for name, module in targets.items():
        out_features, _ = layer_sizes(module)
        lora_A = directions[name].float().contiguous()
        factors[name] = Factors(lora_A, torch.zeros(out_features, len(lora_A), device=lora_A.device))
    return Gathered(factors, {name: {} for name in targets})


def covariances(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    config: LoraConfig,
    examples: Sequence[Example],
    *,
    on_progress: OnProgress,
) -> Gathered:
    """Return CorDA's decompositions, from the covariance of the layers' inputs; row by row, as PEFT's hook needs it.

    These are the steps of PEFT's ``preprocess_corda``, but for one layer at a time after the pass: all layers' full
    decompositions at once would take several times the model's memory, with no moment to stop in between.
    """
    from peft.tuners.lora.corda import (  # noqa: PLC0415  # only this method needs it
        calib_cov_distribution,
        collect_eigens_for_layer,
        crop_corda_eigens,
    )

    count = PhaseCounter(Phase.STATISTICS, len(examples) + len(targets), on_progress)

    def run() -> None:
        for example in sorted(examples, key=lambda one: one.digest):
            ids = torch.tensor([example.chosen.input_ids], device=base.device)
            base.hidden_states(ids, torch.ones_like(ids))
            count()

    alone = copy.copy(config)
    alone.target_modules = ["layer"]
    attributes: dict[str, dict[str, Any]] = {}
    with _left_as_found(base, targets), peft_failures("corda"), torch.no_grad():
        calib_cov_distribution(base.model, config, run, base.model, None)
        for name, module in targets.items():
            own: Any = module
            own.rank, own.corda_method = config.r, config.corda_config.corda_method
            own.eigens = collect_eigens_for_layer(module, config)
            crop_corda_eigens(nn.ModuleDict({"layer": module}), alone)
            attributes[name] = {"eigens": own.eigens}
            del own.covariance_matrix
            count()
    return Gathered({}, attributes)


def gradients(
    base: BaseModel,
    targets: Mapping[str, nn.Module],
    config: LoraConfig,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    on_progress: OnProgress,
) -> Gathered:
    """Return LoRA-GA's gradients of the mean loss per completion token over all these rows."""
    from peft.tuners.lora.loraga import preprocess_loraga  # noqa: PLC0415  # only this method needs it

    batches = _batches(base, examples, max_tokens)
    tokens = sum(int(batch.completion_mask.sum()) for batch in batches)
    count = PhaseCounter(Phase.STATISTICS, len(examples), on_progress)

    def train_step() -> None:
        for batch in batches:
            on_device = batch.to(base.device)
            hidden = base.hidden_states(on_device.input_ids, on_device.attention_mask)
            logps, gradient = sequence_logps_and_gradient(
                base.head, hidden, on_device.input_ids, on_device.completion_mask, vocabulary=base.vocabulary
            )
            if not math.isfinite(logps.sum().item()):
                raise NumericalFailure("lora_ga: a log-probability is not finite")
            # PEFT divides the sum by the number of backwards; so the mean is one over tokens, however rows are batched.
            hidden.backward(gradient * (-len(batches) / tokens))
            count(len(batch.rows))

    with _left_as_found(base, targets), warnings.catch_warnings():
        # PEFT counts backwards by a hook; the first layers' inputs need no gradient, and it counts there all the same.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(base.model, config, train_step)
        return Gathered(
            {},
            {name: {"_peft_loraga_grad": module._peft_loraga_grad} for name, module in targets.items()},  # noqa: SLF001  # PEFT's name
        )


def _batches(base: BaseModel, examples: Sequence[Example], max_tokens: int) -> list[Batch]:
    return make_batches(examples, [0] * len(examples), max_tokens=max_tokens, pad_token_id=base.pad_token_id)


@contextmanager
def peft_failures(what: str) -> Iterator[None]:
    """Turn what PEFT and LAPACK raise about the numbers into our error."""
    try:
        yield
    except (ValueError, TypeError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # torch has it
        raise NumericalFailure(f"PEFT's {what}: {error}") from error


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def _left_as_found(base: BaseModel, targets: Mapping[str, nn.Module]) -> Iterator[None]:
    """Take away whatever the block leaves on the model's layers and parameters; their values are only read in it."""
    attributes = {name: set(vars(module)) for name, module in targets.items()}
    hooks = {name: [list(vars(module)[kind]) for kind in _HOOKS] for name, module in targets.items()}
    training = base.model.training
    try:
        yield
    finally:
        for name, module in targets.items():
            for added in set(vars(module)) - attributes[name]:
                delattr(module, added)
            for kind, kept in zip(_HOOKS, hooks[name], strict=True):
                own = vars(module)[kind]
                for key in set(own) - set(kept):
                    del own[key]
        base.model.train(training)
        for parameter in base.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

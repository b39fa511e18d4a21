"""The usual way to gradients, which the pass is compared with: whole weight gradients, an objective at a time.

Every side uses this project's chunked head, which is cheaper than full logits; the peers gain by it.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, LoraGAConfig
from peft.tuners.lora import preprocess_loraga
from torch import Tensor, nn

from bench.subjects import Subject
from worker.batches import Batch
from worker.logprobs import sequence_logps, sequence_logps_and_gradient
from worker.models import BaseModel
from worker.objectives import Basis, Scores, sequence_weights


def lora_ga(subject: Subject) -> None:
    """Let PEFT's LoRA-GA estimate the gradients of SFT on the chosen sequences; leaves nothing behind."""
    batch = subject.chosen
    config = LoraConfig(
        target_modules=sorted(subject.targets), init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )

    def train_step() -> None:
        _backward(subject.base, batch, lambda scores: sequence_weights((Basis.LIKELIHOOD,), scores)[0])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # PEFT's counter; no input needs one
        preprocess_loraga(subject.base.model, config, train_step)
    for module in subject.targets.values():
        del module._peft_loraga_grad  # noqa: SLF001  # PEFT's own mark on the module


def three_objectives(subject: Subject) -> dict[str, dict[str, Tensor]]:
    """Return the weight gradients of the bases of SFT, DPO and ORPO, a forward and a backward for each.

    DPO has the forward of its reference. ORPO's basis is that of its odds ratio; its likelihood term would change the
    cotangents and not the cost.
    """
    base, batch = subject.base, subject.batch
    gradients = {}
    with _weights_require_grad(subject.targets):
        _backward(base, subject.chosen, lambda scores: sequence_weights((Basis.LIKELIHOOD,), scores)[0])
        gradients["sft"] = _taken(subject.targets)
        with torch.no_grad():
            hidden = base.hidden_states(batch.input_ids, batch.attention_mask)
            sequence_logps(base.head, hidden, batch.input_ids, batch.completion_mask, vocabulary=base.vocabulary)
        _backward(base, batch, lambda scores: sequence_weights((Basis.MARGIN,), scores)[0])
        gradients["dpo"] = _taken(subject.targets)
        _backward(base, batch, lambda scores: sequence_weights((Basis.ODDS,), scores)[0])
        gradients["orpo"] = _taken(subject.targets)
    return gradients


def _backward(base: BaseModel, batch: Batch, weigh: Callable[[Scores], Tensor]) -> None:
    """Add the gradient of ``sum_s weights[s] L_s`` to every weight that requires one."""
    with torch.enable_grad():
        hidden = base.hidden_states(batch.input_ids, batch.attention_mask)
        logps, gradient = sequence_logps_and_gradient(
            base.head, hidden, batch.input_ids, batch.completion_mask, vocabulary=base.vocabulary
        )
        logps, tokens, rows = logps.cpu(), batch.completion_mask.sum(1).cpu(), len(batch.rows)
        scores = (
            Scores(logps[:rows], tokens[:rows], logps[rows:], tokens[rows:]) if batch.paired else Scores(logps, tokens)
        )
        hidden.backward(gradient * weigh(scores).to(gradient)[:, None, None])


@contextmanager
def _weights_require_grad(targets: Mapping[str, nn.Module]) -> Iterator[None]:
    for module in targets.values():
        module.weight.requires_grad_(True)
    try:
        yield
    finally:
        for module in targets.values():
            module.weight.requires_grad_(False)


def _taken(targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    gradients = {name: module.weight.grad for name, module in targets.items()}
    for module in targets.values():
        module.weight.grad = None
    return gradients

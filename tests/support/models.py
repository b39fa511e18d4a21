"""Tiny causal language models with random weights, and a tokenizer made in code."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from cluster.tiny_model import VOCABULARY, tiny_llama, tiny_tokenizer
from worker.models import BaseModel

__all__ = ["VOCABULARY", "as_base", "tiny_gpt2", "tiny_llama", "tiny_tokenizer"]


def tiny_gpt2(*, seed: int = 0, hidden: int = 24) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=hidden,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def as_base(model: PreTrainedModel) -> BaseModel:
    return BaseModel(
        name="tiny", revision=None, weights_sha256="0" * 64, license="unknown", model=model, tokenizer=tiny_tokenizer()
    )

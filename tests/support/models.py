"""Tiny causal language models with random weights, and a tokenizer made in code."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from worker.models import BaseModel

VOCABULARY = 97


def tiny_llama(*, seed: int = 0, layers: int = 2, hidden: int = 24, tie: bool = False) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


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


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Characters as tokens; 0 pads, 1 begins, 2 ends."""
    characters = [chr(code) for code in range(32, 126)]
    tokenizer = Tokenizer(
        models.WordLevel(
            {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: 3 + i for i, c in enumerate(characters)}, unk_token="~"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def as_base(model: PreTrainedModel) -> BaseModel:
    return BaseModel(
        name="tiny", revision=None, weights_sha256="0" * 64, license="unknown", model=model, tokenizer=tiny_tokenizer()
    )

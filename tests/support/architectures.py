"""A tiny instance of every architecture that is promised to work, with random weights and its own peculiarities on.

Sizes are odd where the architecture allows it; windows are shorter than the rows, so that they cut.
"""

from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from cluster.tiny_model import VOCABULARY, tiny_llama
from tests.support.models import tiny_gpt2


def _tiny(name: str, *, config: str | None = None, **changes: object) -> PreTrainedModel:
    """Return a model of the class ``<name>ForCausalLM``; its configuration is ``<name>Config`` unless named."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    made = getattr(transformers, config or f"{name}Config")(**sizes | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(made).eval().requires_grad_(False)
    _randomize(model)
    return model


def _randomize(model: PreTrainedModel) -> None:
    """Draw what starts at zero or one: biases and the scales of norms, which would hide what they do."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.1)
        elif name.endswith("gate.weight"):  # a router's, at its initial zero, sends every token the same way
            nn.init.normal_(parameter, std=0.5)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama-tied": partial(_tiny, "Llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": partial(_tiny, "Qwen2", tie_word_embeddings=True),
    "qwen2-window": partial(_tiny, "Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": partial(_tiny, "Qwen3", head_dim=8),
    "mistral-window": partial(_tiny, "Mistral", sliding_window=4, head_dim=8),
    "gemma": partial(_tiny, "Gemma", head_dim=8, num_key_value_heads=1),
    "gemma2": partial(
        _tiny,
        "Gemma2",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
    ),
    "gemma3": partial(
        _tiny,
        "Gemma3",
        config="Gemma3TextConfig",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=3.0,
    ),
    "phi": partial(_tiny, "Phi", partial_rotary_factor=0.5, qk_layernorm=True, hidden_size=32),
    "phi3-window": partial(_tiny, "Phi3", sliding_window=4),
    "gpt2": tiny_gpt2,
    "gpt-neox": partial(_tiny, "GPTNeoX", rotary_pct=0.5, hidden_size=32, use_parallel_residual=True),
    "falcon": partial(_tiny, "Falcon", multi_query=True, parallel_attn=True, bias=True),
    "falcon-alibi": partial(_tiny, "Falcon", alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "falcon-new": partial(_tiny, "Falcon", new_decoder_architecture=True, num_kv_heads=2, bias=False),
    "bloom": partial(_tiny, "Bloom", n_layer=2, n_head=4),
    "mixtral": partial(_tiny, "Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "qwen2-moe": partial(
        _tiny,
        "Qwen2Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=20,
    ),
    "qwen3-moe": partial(
        _tiny,
        "Qwen3Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        head_dim=8,
        norm_topk_prob=True,
    ),
    # Its second layer is dense, with names that checkpoints give to experts.
    "qwen3-moe-partly-dense": partial(
        _tiny,
        "Qwen3Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        head_dim=8,
        mlp_only_layers=[1],
    ),
    "granite": partial(
        _tiny,
        "Granite",
        logits_scaling=3.0,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
    ),
    "cohere": partial(_tiny, "Cohere", logit_scale=0.25, use_qk_norm=True),
}

"""Shapes of models that benchmarks time, with random weights: options of transformers' configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quest_attention.errors import QuestValueError

__all__ = ["SERVED_SHAPES", "SHAPES", "check_shape"]

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "small": {  # for a CPU
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "tiny": {  # for trying a script out
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}
"""Options of `LlamaConfig`, by the name that a record has."""

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 5e5}
SERVED_SHAPES: dict[str, dict[str, Any]] = {name: {**_LLAMA, **shape} for name, shape in SHAPES.items()} | {
    # Qwen3-Next-80B-A3B with a quarter of its experts, as many of which work on a token: 12 full layers of 48.
    "qwen3-next": {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        "vocab_size": 151936,
    },
    # GPT-OSS-20B with weights of 16 bits: 12 full layers of 24, the others with windows of 128 tokens, sinks in all.
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        # Its own factor, 32, has no positions behind 128K, where the benchmark writes some. vLLM asks for yarn.
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1.5e5,
            "factor": 33.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
        "vocab_size": 201088,
    },
}
"""What `config.json` of a served model has; those of Llama are `SHAPES`."""


def check_shape(name: str, shapes: Mapping[str, object] = SHAPES) -> str:
    """The name, where there is such a shape.

    Raises:
        QuestValueError: There is none.
    """
    if name not in shapes:
        raise QuestValueError("model", name, f"one of {', '.join(shapes)}")
    return name

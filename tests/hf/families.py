"""Tiny random models of every family in the support table, as transformers builds them from its own configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class Family:
    """A model family and what Quest makes of it.

    Attributes:
        prefix: Of the classes: `{prefix}Config`, `{prefix}ForCausalLM`.
        kinds: What each attention layer becomes; layers without attention are not listed.
        options: Configuration beyond `BASE`.
        num_dense_layers: Of the config with which they become that.
        eager: Whether its dense attention is eager (softcap, sinks).
    """

    prefix: str
    kinds: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    num_dense_layers: int = 1
    eager: bool = False


ALL_QUEST = ("dense", "quest", "quest", "quest")
EVERY_SECOND_WINDOWED = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
WINDOWED_FIRST = ("windowed", "dense", "windowed", "quest")

FAMILIES = {
    "llama": Family("Llama", ALL_QUEST),
    "qwen2": Family("Qwen2", ALL_QUEST),
    "qwen3": Family("Qwen3", ALL_QUEST),
    "qwen3_moe": Family("Qwen3Moe", ALL_QUEST, MOE),
    "mistral": Family("Mistral", ALL_QUEST, {"sliding_window": None}),
    "mixtral": Family("Mixtral", ALL_QUEST, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "phi3": Family("Phi3", ALL_QUEST, {"sliding_window": None}),
    "olmo2": Family("Olmo2", ALL_QUEST),
    "granite": Family("Granite", ALL_QUEST),
    "glm4": Family("Glm4", ALL_QUEST),
    "smollm3": Family("SmolLM3", ALL_QUEST),
    "gemma2": Family(
        "Gemma2",
        WINDOWED_FIRST,
        EVERY_SECOND_WINDOWED | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        eager=True,
    ),
    "gemma3": Family("Gemma3", WINDOWED_FIRST, EVERY_SECOND_WINDOWED | {"query_pre_attn_scalar": 8}),
    "cohere2": Family("Cohere2", WINDOWED_FIRST, EVERY_SECOND_WINDOWED),
    "gpt_oss": Family(
        "GptOss", WINDOWED_FIRST, EVERY_SECOND_WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 2}, eager=True
    ),
    "llama4": Family(
        "Llama4",
        WINDOWED_FIRST,
        {
            "attention_chunk_size": 16,
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "moe_layers": [],
        },
    ),
    "gemma3n": Family(
        "Gemma3n",
        ("windowed", "quest"),
        EVERY_SECOND_WINDOWED
        | {
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "intermediate_size": [48] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        num_dense_layers=0,  # the others share the cache of one
    ),
    "gemma4": Family(
        "Gemma4",
        ("windowed", "quest"),
        EVERY_SECOND_WINDOWED
        | {
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "global_head_dim": 8,
        },
        num_dense_layers=0,  # the others share the cache of one
    ),
    "qwen3_next": Family(
        "Qwen3Next",
        ("dense", "quest"),
        MOE
        | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3_5": Family(
        "Qwen3_5",
        ("dense", "quest"),
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "lfm2": Family("Lfm2", ("dense", "quest"), {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "jamba": Family(
        "Jamba",
        ("dense", "quest"),
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": Family(
        "Bamba",
        ("dense", "quest"),
        {
            "attn_layer_indices": [1, 3],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "granite_hybrid": Family(
        "GraniteMoeHybrid",
        ("dense", "quest"),
        {
            "layer_types": ["mamba", "attention", "mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
            "shared_intermediate_size": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "nemotron_h": Family(
        "NemotronH",
        ("dense", "quest"),
        {
            "layers_block_type": ["mamba", "attention", "mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
}
"""What runs Quest."""

IS_GPTJ_SERVED = transformers.GPTJForCausalLM._can_set_attn_implementation()
"""Since transformers 5.24 its attention goes through the interface."""
if IS_GPTJ_SERVED:
    FAMILIES["gptj"] = Family(
        "GPTJ",
        ALL_QUEST,
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "bos_token_id": None, "eos_token_id": None},
    )


def build(family: Family, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    name = family.prefix
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = config_class(**(BASE | family.options))
    model_class: Callable[[Any], PreTrainedModel] = getattr(transformers, f"{name}ForCausalLM")
    return model_class(config).eval()


def build_refused(name: str) -> PreTrainedModel:
    """A model that Quest refuses, by the name that the support table has for it."""
    small = {"hidden_size": 32, "vocab_size": 97, "pad_token_id": 0}
    builders: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
        "mistral_windowed": lambda: ("Mistral", BASE | {"sliding_window": 16}),
        "deepseek_v32": lambda: (
            "DeepseekV32",
            BASE | LATENT | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 8},
        ),
        "falcon": lambda: ("Falcon", small | {"num_hidden_layers": 2, "num_attention_heads": 4}),
        "gptj": lambda: ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 97}),
        "bloom": lambda: ("Bloom", small | {"n_layer": 2, "n_head": 4}),
        "mpt": lambda: ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 97}),
        "mamba": lambda: ("Mamba", small | {"num_hidden_layers": 2, "state_size": 4}),
        "rwkv": lambda: ("Rwkv", small | {"num_hidden_layers": 2, "attention_hidden_size": 32}),
        "t5": lambda: ("T5", {"d_model": 32, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 97, "d_kv": 8}),
        "bart": lambda: (
            "Bart",
            {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 97}
            | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
        ),
    }
    prefix, options = builders[name]()
    config = getattr(transformers, f"{prefix}Config")(**options)
    for head in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"):
        if head == "ForCausalLM" and prefix == "Bart":
            continue  # the encoder-decoder, not its decoder alone
        if hasattr(transformers, prefix + head):
            model_class: Callable[[Any], PreTrainedModel] = getattr(transformers, prefix + head)
            return model_class(config).eval()
    raise AssertionError(f"no model class for {prefix}")


LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
"""Multi-head latent attention, as in DeepSeek V3."""

"""Tiny random models of families whose layers are not all full attention, for vLLM's CPU engine: no hub is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 256
BASE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = 64
"""Shorter than the prompts, of two blocks [tokens]."""


@dataclass(frozen=True)
class Family:
    """A family of models, and how its tiny one is read.

    Attributes:
        prefix: Of transformers' classes: `{prefix}TextConfig` or `{prefix}Config`, `{prefix}ForCausalLM`.
        options: Of its configuration, beside `BASE`.
        sparse: Layers that choose what they read, by index, with `num_dense_layers` 1.
        quest: Options under "quest"; the form of metadata is left to vLLM's adapter unless it is among them.
        engine: Options of the engine.
        blocks: Of the pool of the sparse engine: where few, some are used again, by layers of another kind.
    """

    prefix: str
    options: dict[str, Any]
    sparse: tuple[int, ...] = (3,)
    quest: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    blocks: int = 256


def alternating(first: str, second: str = "full_attention", layers: int = 4) -> dict[str, Any]:
    """Layers of two kinds in turn."""
    return {"layer_types": [first, second] * (layers // 2), "num_hidden_layers": layers}


WINDOWED = alternating("sliding_attention") | {"sliding_window": WINDOW}

GEMMA_4 = {
    "global_head_dim": 64,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCABULARY,
}

FAMILIES = {
    "gemma3": Family(
        "Gemma3",
        WINDOWED | {"query_pre_attn_scalar": 32},
        quest={"metadata": "sketch", "selection_unit": "token"},
    ),
    # Six windowed layers and two full ones, as many in a group: four groups.
    "gemma3_deep": Family(
        "Gemma3",
        {
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
            "num_hidden_layers": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
        },
        sparse=(7,),
        quest={"metadata": "bounds"},
        blocks=64,
    ),
    # Two windowed layers and six full ones, as many in a group: the full ones are in three groups.
    "gemma3_full": Family(
        "Gemma3",
        {
            "layer_types": (["sliding_attention"] + ["full_attention"] * 3) * 2,
            "num_hidden_layers": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
        },
        sparse=(2, 3, 5, 6, 7),
        quest={"metadata": "bounds"},
    ),
    "gemma2": Family(
        "Gemma2",
        WINDOWED | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0},
        quest={"metadata": "bounds"},
    ),
    # Keys and values of other shapes in layers with full attention.
    "gemma4": Family("Gemma4", WINDOWED | GEMMA_4),
    # The other way round: a block of a layer with full attention holds two pages.
    "gemma4_pages": Family("Gemma4", WINDOWED | GEMMA_4 | {"head_dim": 64, "global_head_dim": 32}),
    # Of six layers the last two read the keys and values of the third and the fourth.
    "gemma4_shared": Family(
        "Gemma4",
        alternating("sliding_attention", layers=6) | {"sliding_window": WINDOW} | GEMMA_4 | {"num_kv_shared_layers": 2},
        sparse=(3, 5),
    ),
    "gemma3n": Family(
        "Gemma3n",
        alternating("sliding_attention", layers=6)
        | {
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "intermediate_size": [64] * 6,
            "activation_sparsity_pattern": [0.0] * 6,
        },
        sparse=(3, 5),
        quest={"metadata": "bounds"},
    ),
    "gpt_oss": Family("GptOss", WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss_mass": Family(
        "GptOss",
        WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 2},
        quest={"metadata": "sketch", "group_reduction": "mass"},
    ),
    "cohere2": Family("Cohere2", WINDOWED, quest={"metadata": "bounds"}),
    "llama4": Family(
        "Llama4",
        alternating("chunked_attention")
        | {
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0, 1, 0],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "moe_layers": [1, 3],
            "interleave_moe_layer_step": 2,
        },
    ),
}
"""What vLLM's CPU engine runs, with windows or chunks."""
LINEAR = alternating("linear_attention") | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
CONVOLUTION = {
    **dict.fromkeys(("block_dim", "conv_dim", "conv_dim_out"), BASE["hidden_size"]),
    "block_ff_dim": BASE["intermediate_size"],
    "block_auto_adjust_ff_dim": False,
    "block_multiple_of": 64,
    "block_ffn_dim_multiplier": 1.0,
}
"""Names that vLLM reads of LFM2's configuration."""
# The CPU engine of vLLM 0.32 fails where it is to keep states of state-space layers for its prefix cache.
NO_PREFIX_CACHE = {"enable_prefix_caching": False}
WITH_STATES = {
    "lfm2": Family(
        "Lfm2",
        alternating("conv") | CONVOLUTION,
        quest={"metadata": "bounds"},
        engine={"max_num_batched_tokens": 1024},  # of a prompt in chunks the engine makes something else
    ),
    "qwen3_next": Family(
        "Qwen3Next",
        LINEAR
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        engine={"dtype": "bfloat16"},  # alone taken by the engine's linear attention
    ),
    "granite_hybrid": Family(
        "GraniteMoeHybrid",
        alternating("mamba", "attention")
        | {
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "mamba_chunk_size": 64,
            "shared_intermediate_size": 32,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
        },
        quest={"metadata": "sketch", "selection_unit": "token"},
        engine=NO_PREFIX_CACHE,
    ),
    "nemotron_h": Family(
        "NemotronH",
        {
            "layers_block_type": ["mamba", "attention"] * 2,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 32,
            "n_groups": 2,
            "chunk_size": 64,
        },
        engine=NO_PREFIX_CACHE,
    ),
}
"""Likewise, with layers that keep a state. Their blocks hold several pages, those of LFM2 one."""
ON_A_GPU = {
    "gemma3_wide": Family("Gemma3", WINDOWED | {"query_pre_attn_scalar": 64, "head_dim": 64}),
    "gpt_oss_wide": Family("GptOss", WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64}),
}
"""Whose heads a GPU's kernels for sketches take by bits."""
ALL = FAMILIES | WITH_STATES | ON_A_GPU


def save(family: Family, folder: Path) -> str:
    """Write a model with random weights to a folder, as `from_pretrained` reads it; gives its architecture."""
    torch.manual_seed(0)
    name = family.prefix
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**(BASE | family.options)))
    model.save_pretrained(folder)
    return type(model).__name__


def token_prompts(lengths: tuple[int, ...]) -> list[dict[str, list[int]]]:
    """Prompts of random tokens, of so many each."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"prompt_token_ids": torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()}
        for length in lengths
    ]

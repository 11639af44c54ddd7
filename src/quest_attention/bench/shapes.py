"""Shapes of models that several benchmarks time, with random weights: options of transformers' `LlamaConfig`."""

from __future__ import annotations

from quest_attention.errors import QuestValueError

__all__ = ["SHAPES", "check_shape"]

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
"""By the name that a record has."""


def check_shape(name: str) -> str:
    """The name, where there is such a shape.

    Raises:
        QuestValueError: There is none.
    """
    if name not in SHAPES:
        raise QuestValueError("model", name, f"one of {', '.join(SHAPES)}")
    return name

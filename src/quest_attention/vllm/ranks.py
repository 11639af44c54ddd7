"""Which layers of a model are sparse: by rank among the full-attention layers, as everywhere in Quest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quest_attention.vllm.refusals import BACKEND_NAME

__all__ = ["is_bounded", "sparse_layers"]


def sparse_layers(layers: Mapping[str, Any], num_dense_layers: int, index_of: Callable[[str], int]) -> list[str]:
    """Names of the layers that choose their pages, in the order of the model.

    A layer's index would not say it: some models have layers with a window, a state or no attention at all, which stand
    for none of the dense ones.

    Args:
        layers: vLLM's `static_forward_context`: what an engine step finds by name, attention, states and experts.
        num_dense_layers: Leading full-attention layers that read everything [layers].
        index_of: Index of a layer in the model, by name.
    """
    full = [name for name, layer in layers.items() if _is_full_attention(layer)]
    return sorted(full, key=index_of)[num_dense_layers:]


def is_bounded(layer: Any) -> bool:
    """Whether a layer reads a bounded part whatever Quest does: through a window, in chunks, or from a state."""
    return (
        getattr(layer, "sliding_window", None) is not None
        or getattr(layer, "attention_chunk_size", None) is not None
        or hasattr(layer, "get_state_shape")  # vLLM's `MambaBase`
    )


def _is_full_attention(layer: Any) -> bool:
    backend = getattr(layer, "attn_backend", None)
    kind = getattr(layer, "attn_type", "decoder")
    return (
        backend is not None
        and backend.get_name() == BACKEND_NAME
        and getattr(layer, "sliding_window", None) is None
        and str(getattr(kind, "value", kind)) == "decoder"
    )

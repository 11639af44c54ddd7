"""Which layers of a model are sparse: by rank among the full-attention layers, as everywhere in Quest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quest_attention.vllm.refusals import BACKEND_NAME

__all__ = ["is_bounded", "is_of_draft", "mark_target", "sparse_layers"]

_OF_TARGET = "quest_of_target"


def sparse_layers(layers: Mapping[str, Any], num_dense_layers: int, index_of: Callable[[str], int]) -> list[str]:
    """Names of the layers that choose their pages, in the order of the model.

    A layer's index would not say it: some models have layers with a window, a state or no attention at all, which stand
    for none of the dense ones. A layer that reads the keys and values of an earlier one is as dense as that one, and is
    not counted.

    Args:
        layers: vLLM's `static_forward_context`: what an engine step finds by name, attention, states and experts.
        num_dense_layers: Leading full-attention layers that read everything [layers].
        index_of: Index of a layer in the model, by name.
    """
    full = sorted((name for name, layer in layers.items() if _is_full_attention(layer)), key=index_of)
    sources = {name: _source(layers, name) for name in full}
    chosen = [name for name in full if sources[name] == name][num_dense_layers:]
    return [name for name in full if sources[name] in chosen]


def _source(layers: Mapping[str, Any], name: str) -> str:
    """Of whose keys and values a layer reads."""
    target = getattr(layers[name], "kv_sharing_target_layer_name", None)
    return name if target is None else _source(layers, target)


def is_bounded(layer: Any) -> bool:
    """Whether a layer reads a bounded part whatever Quest does: through a window, in chunks, or from a state."""
    return (
        getattr(layer, "sliding_window", None) is not None
        or getattr(layer, "attention_chunk_size", None) is not None
        or hasattr(layer, "get_state_shape")  # vLLM's `MambaBase`
    )


def mark_target(layers: Mapping[str, Any]) -> bool:
    """Tell the layers of a model from those of the draft that vLLM is about to make; whether Quest is in some.

    Called when a configuration without Quest is made of one with it: vLLM does so for drafts alone, once the layers of
    the model are there, and adds theirs to the same mapping.

    Args:
        layers: See `sparse_layers`.
    """
    if not any(_is_full_attention(layer) for layer in layers.values()):
        return False
    if not any(getattr(layer, _OF_TARGET, False) for layer in layers.values()):
        for layer in layers.values():
            setattr(layer, _OF_TARGET, True)
    return True


def is_of_draft(layer: Any, layers: Mapping[str, Any]) -> bool:
    """Whether a layer came after those of the model that is served."""
    return not getattr(layer, _OF_TARGET, False) and any(getattr(one, _OF_TARGET, False) for one in layers.values())


def _is_full_attention(layer: Any) -> bool:
    backend = getattr(layer, "attn_backend", None)
    kind = getattr(layer, "attn_type", "decoder")
    return (
        backend is not None
        and backend.get_name() == BACKEND_NAME
        and getattr(layer, "sliding_window", None) is None
        and str(getattr(kind, "value", kind)) == "decoder"
    )

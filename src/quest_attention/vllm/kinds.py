"""`other_layers`: what a model has beside full attention, by its configuration, and what follows for its metadata."""

from __future__ import annotations

from typing import Any

__all__ = ["full_layers", "note_on_others", "other_layers"]

_FULL = ("full_attention", "attention")
"""transformers' names in `layer_types`: the second in models with states."""


def other_layers(model: Any) -> str | None:
    """The layers of a model that read a bounded part whatever Quest does, in words, or None where it has none.

    Args:
        model: vLLM's `ModelConfig`.

    >>> from types import SimpleNamespace as Made
    >>> text = Made(layer_types=["sliding_attention", "full_attention"])
    >>> other_layers(Made(hf_text_config=text, is_hybrid=False, get_sliding_window=lambda: 512))
    'layers of sliding_attention'
    """
    kinds = sorted(set(_layer_types(model)) - set(_FULL))
    if kinds:
        return f"layers of {', '.join(kinds)}"
    if model.is_hybrid:
        return "layers with states"
    window = model.get_sliding_window()
    return None if window is None else f"a sliding window of {window}"


def note_on_others(others: str, metadata: str) -> str:
    """What a worker's log says of a model that has other layers.

    Args:
        others: See `other_layers`.
        metadata: The form of the pages' metadata.

    >>> note_on_others("layers of sliding_attention", "sketch")[:78]
    'the model also has layers of sliding_attention, which run as without Quest. So'
    """
    why = "few layers see what is far away, and with bounds they lose more facts than other models"
    return (
        f"the model also has {others}, which run as without Quest. So {why} (docs/vllm.md, Models). Metadata is "
        f"{metadata}"
    )


def full_layers(model: Any) -> int | None:
    """How many layers with full attention a configuration tells of, or None where it does not tell kinds apart."""
    kinds = _layer_types(model)
    if kinds:
        return sum(kind in _FULL for kind in kinds)
    return None if model.get_sliding_window() is None else 0


def _layer_types(model: Any) -> list[str]:
    return list(getattr(model.hf_text_config, "layer_types", None) or ())

"""Which models Quest can serve, and why not the others; which of their methods it cannot."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestStateError, QuestValueError, QuestWarning, UnsupportedModelError
from quest_attention.forms import form_of
from quest_attention.hf.cache import layer_kinds

__all__ = ["REFUSED_METHODS", "check_supported", "needs_eager"]


def check_supported(model: object, quest: QuestConfig) -> None:
    """Refuse a model that Quest cannot serve, and warn of one that will run dense.

    Raises:
        UnsupportedModelError: The message says why.
        QuestValueError: The metadata cannot be of heads with so many channels.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model: got {type(model).__name__}, expected a transformers PreTrainedModel{_inside(model)}"
        )
    name = type(model).__name__
    generation: Any = model  # its generate() side, which a type checker does not see on a PreTrainedModel

    def refuse(why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"model: got {name}, {why}")

    if model.config.is_encoder_decoder:
        raise refuse("expected a decoder-only model: an encoder-decoder's cache is not one growing sequence")
    if not model.can_generate():
        raise refuse("expected a model with a language-model head: this one has no generate()")
    if not model._can_set_attn_implementation() or not hasattr(model, "_supports_default_dynamic_cache"):
        raise refuse("expected one that calls transformers' attention interface: this one's attention has no such seam")
    if any("Indexer" in type(module).__name__ for module in model.modules()):
        raise refuse("expected one without sparse attention of its own: this one selects tokens with an indexer")
    if not generation._supports_default_dynamic_cache():
        raise refuse("expected one that uses transformers' DynamicCache: this one keeps a state of its own")
    kinds = layer_kinds(model.config, quest)
    if not kinds:
        raise refuse("expected one with attention layers: this one has none")
    if all(kind in ("windowed", "other") for kind in kinds.values()):
        raise refuse(
            "expected one with full-attention layers: all of this one's are windowed, so reads are bounded already"
        )
    _check_head_dim(model, quest)
    if "quest" not in kinds.values():
        why = f"num_dense_layers={quest.num_dense_layers} leaves no layer of {name} to Quest"
        if set(kinds.values()) == {"latent"}:
            why = f"{name} rebuilds its keys from a latent cache (MLA), which page bounds cannot see"
        warnings.warn(f"{why}: every layer runs dense", QuestWarning, stacklevel=4)


def _check_head_dim(model: PreTrainedModel, quest: QuestConfig) -> None:
    """Refuse heads that the metadata cannot be of, where the configuration says it: layers would find it one by one.

    Raises:
        QuestValueError: The metadata's shape has no room for so many channels.
    """
    text = model.config.get_text_config(decoder=True)
    dim = getattr(text, "head_dim", None)
    if dim is None and hasattr(text, "num_attention_heads"):
        dim = text.hidden_size // text.num_attention_heads
    if isinstance(dim, int):
        try:
            form_of(quest).shape(quest.page_size, dim)
        except QuestValueError as error:
            raise quest.mistake(error.argument, error.got, error.expected) from None


def _inside(wrapper: object) -> str:
    """Where the model is that somebody wrapped: `torch.compile`, data parallelism, adapters, a pipeline."""
    inner: dict[str, object] = dict(wrapper.named_modules()) if isinstance(wrapper, nn.Module) else {}
    inner.setdefault("model", getattr(wrapper, "model", None))
    path = next((name for name, part in inner.items() if isinstance(part, PreTrainedModel)), None)
    if path is None:
        return ""
    order = ", and compile it after enabling" if path.split(".")[-1] == "_orig_mod" else ""
    return f": pass the model inside it, wrapper.{path}{order}"


def needs_eager(model: PreTrainedModel) -> bool:
    """Whether the model's dense attention must be its own eager function.

    transformers' scaled_dot_product_attention knows no logit softcap (5.17 drops it silently) and no attention sinks.
    """
    text = model.config.get_text_config(decoder=True)
    return (
        not model._supports_sdpa
        or getattr(text, "attn_logit_softcapping", None) is not None
        or model.config._attn_implementation == "eager"
    )


def _refuse_attention(*args: Any, **kwargs: Any) -> NoReturn:
    raise QuestStateError(
        "set_attn_implementation: got a model with Quest, whose attention is Quest's: choose it before enable_quest(), "
        "whose dense steps then follow it, or after disable()"
    )


def _refuse_copy(*args: Any) -> NoReturn:
    raise QuestStateError(
        "copy or pickle: got a model with Quest, which is tied to its handle: do it before enable_quest() or after "
        "disable(); save_pretrained() and state_dict() work meanwhile"
    )


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedModelError(
        "generate_batch: got a model with Quest, expected one without, whose paged cache knows only transformers' own "
        "attention: use generate(), or disable() Quest first"
    )


_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
REFUSED_METHODS = {
    "set_attn_implementation": _refuse_attention,
    "__reduce_ex__": _refuse_copy,  # looked up by copy.deepcopy and pickle
    **dict.fromkeys(_BATCHING, _refuse_continuous_batching),
}
"""Methods of a model that are refused while Quest is enabled on it, and what stands in their places."""

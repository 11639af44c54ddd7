"""`Context`: a text that a model has read once, for every method to start from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from quest_attention.config import QuestConfig
from quest_attention.eval.observation import Observation
from quest_attention.hf import cache_argument, enable_quest, layer_kinds
from quest_attention.hf.attention import AttentionForward
from quest_attention.hf.layer import LAYER_ATTRIBUTE

__all__ = ["PREFILL_CHUNK", "Context", "copy_cache", "prefill", "read_context"]

PREFILL_CHUNK = 512
"""Tokens per forward pass of a prefill: as fast as larger ones on a CPU, and often enough for a progress bar."""


@dataclass
class Context:
    """What a model keeps of a text.

    Attributes:
        cache: Its keys and values, all of them.
        observations: What was attended to while it was read, by layer; empty unless somebody asked.
    """

    cache: DynamicCache
    observations: dict[int, Observation] = field(default_factory=dict)


def read_context(
    model: PreTrainedModel,
    tokens: Tensor | Sequence[int],
    *,
    observe: bool = False,
    num_dense_layers: int = 0,
    chunk_size: int = PREFILL_CHUNK,
    on_progress: Callable[[int], None] | None = None,
) -> Context:
    """Run a text through the model with full attention.

    Args:
        model: In evaluation mode.
        tokens: One sequence of token ids, or `[B, T]` int64.
        observe: Whether to note what every token attends to, for methods that evict by it: slower.
        num_dense_layers: Leading full-attention layers that are not observed [layers].
        chunk_size: Tokens per forward pass [tokens].
        on_progress: Called with the tokens done after each chunk.

    Raises:
        UnsupportedModelError: Observing needs an attention that Quest can take the place of.
    """
    cache = DynamicCache(config=model.config)
    if not observe:
        prefill(model, tokens, cache, chunk_size=chunk_size, on_progress=on_progress)
        return Context(cache)
    quest = QuestConfig.paper(num_dense_layers=num_dense_layers)  # no layer of it keeps metadata
    observations = {}
    for index, kind in layer_kinds(model.config, quest).items():
        if kind == "quest":
            observations[index] = Observation()
            cache.layers[index] = _ObservedLayer(observations[index])
    with enable_quest(model, quest, cuda_graphs=False):
        prefill(model, tokens, cache, chunk_size=chunk_size, on_progress=on_progress)
    return Context(cache, observations)


def prefill(
    model: PreTrainedModel,
    tokens: Tensor | Sequence[int],
    cache: Cache,
    *,
    chunk_size: int = PREFILL_CHUNK,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Fill a cache, in chunks. See `read_context` for the arguments; the cache is empty, and filled in place."""
    ids = tokens if isinstance(tokens, Tensor) else torch.tensor([list(tokens)])
    ids = ids.to(model.device)  # [B, T]
    with torch.inference_mode():
        for start in range(0, ids.shape[1], chunk_size):
            chunk = ids[:, start : start + chunk_size]
            model(chunk, **cache_argument(cache), use_cache=True, logits_to_keep=1)
            if on_progress is not None:
                on_progress(min(start + chunk_size, ids.shape[1]))


class _ObservedLayer(DynamicLayer):
    """Keeps everything, reads everything, and notes what was attended to."""

    def __init__(self, observation: Observation) -> None:
        super().__init__()
        self._observation = observation

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        keys = keys[:, :, :]  # a view, so that the stored tensor does not hold the layer that holds it
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, values

    def attend(
        self,
        dense: AttentionForward,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See `hf.attention.AttentionForward`."""
        self._observation.observe(query, key, **kwargs)
        return dense(query, key, value, attention_mask, **kwargs)


def copy_cache(source: DynamicCache, target: Cache) -> None:
    """Write the contents of one cache into another, layer by layer.

    Full attention's keys and values go through the target's `update`; what another layer holds (a window, a state) is
    copied as it is, since no method reads it otherwise.

    Args:
        source: A prefilled cache; it stays as it is.
        target: An empty cache for the same model.
    """
    with torch.inference_mode():
        for index, layer in enumerate(source.layers):
            if type(layer) is DynamicLayer or isinstance(layer, _ObservedLayer):
                assert layer.keys is not None and layer.values is not None, "prefilled"
                target.update(layer.keys, layer.values, index)
            else:
                target.layers[index] = copy.deepcopy(layer)

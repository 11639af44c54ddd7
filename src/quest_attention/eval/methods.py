"""Methods under comparison: how decode steps read the KV cache. Each runs the code that serves.

    with QuestMethod(config).session(model) as session:
        session.load(context)              # or prefill with session.cache
        model(token, past_key_values=session.cache)
        session.reads()

All methods leave the same leading layers dense and read at most the same number of tokens in the others, so that a
table compares what they read, not how much.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestStateError, UnsupportedModelError
from quest_attention.hf import OnSelect, QuestHandle, enable_quest

__all__ = ["Full", "LayerReads", "Method", "Quest", "Session", "SlidingWindow", "copy_cache"]


@dataclass(frozen=True)
class LayerReads:
    """What the decode steps of one layer read since the counts were reset, per KV head.

    Attributes:
        layer: Index in the model.
        is_sparse: Whether the method may read less than everything here.
        steps: Decode steps counted [steps].
        tokens_read: Summed over the steps [tokens].
        tokens_held: What reading everything would have read [tokens].
    """

    layer: int
    is_sparse: bool
    steps: int
    tokens_read: int
    tokens_held: int


class Session(ABC):
    """One sequence under one method: its cache, and what has been read of it.

    Attributes:
        cache: Pass it to the model as `past_key_values`.
    """

    cache: Cache

    def load(self, context: DynamicCache) -> None:
        """Take over the keys and values of a prefilled context, as if this session had prefilled it.

        Right only for methods whose prefill is dense and that keep nothing but keys and values of it.

        Raises:
            UnsupportedModelError: The context has layers that do not hold all keys.
        """
        copy_cache(context, self.cache)
        self.reset_counts()

    @abstractmethod
    def reset_counts(self) -> None:
        """Count reads from here on."""

    @abstractmethod
    def reads(self) -> list[LayerReads]:
        """What decode steps have read since `reset_counts`, layer by layer."""


class Method(ABC):
    """A way to read the KV cache.

    Attributes:
        name: As tables show it.
        summary: One line that says what it reads, for people.
    """

    name: str
    summary: str

    @abstractmethod
    def session(self, model: PreTrainedModel) -> Any:
        """A context manager that gives a `Session`; the model is as it was when it ends."""


class _LengthSession(Session):
    """A session whose reads follow from the length: each step reads `window` tokens or all, whichever is less."""

    def __init__(self, cache: DynamicCache, window: int | None, num_dense_layers: int) -> None:
        self.cache = cache
        self._window = window
        self._num_dense_layers = num_dense_layers
        self.reset_counts()

    def reset_counts(self) -> None:
        self._start = self.cache.get_seq_length()

    def reads(self) -> list[LayerReads]:
        lengths = range(self._start + 1, self.cache.get_seq_length() + 1)
        reads = []
        for layer in range(len(self.cache.layers)):
            is_sparse = self._window is not None and layer >= self._num_dense_layers
            most = self._window if is_sparse and self._window is not None else lengths.stop
            read = sum(min(length, most) for length in lengths)
            reads.append(LayerReads(layer, is_sparse, len(lengths), read, sum(lengths)))
        return reads


class Full(Method):
    """Every layer reads everything: transformers as it comes, `DynamicCache` and its own attention."""

    name = "full"
    summary = "reads everything"

    @contextmanager
    def session(self, model: PreTrainedModel) -> Iterator[Session]:
        """See `Method.session`."""
        yield _LengthSession(DynamicCache(config=model.config), None, 0)


class SlidingWindow(Method):
    """The last `window` tokens and nothing else, past the leading dense layers.

    Source: the window of Beltagy et al., "Longformer", arXiv:2004.05150, section 3.1. Two deviations: the prefill is
    dense and the window slides from the first decode step on, as for the other methods here; and keys keep the rotary
    positions they were written with. It is StreamingLLM (Xiao et al., arXiv:2309.17453) without its sink tokens and
    without moving the positions into the cache.

    Args:
        window: Tokens a step reads, its own included [tokens].
        num_dense_layers: Leading layers that read everything [layers].
    """

    name = "sliding window"
    summary = "reads the last tokens"

    def __init__(self, window: int, num_dense_layers: int) -> None:
        self.window = window
        self.num_dense_layers = num_dense_layers

    @contextmanager
    def session(self, model: PreTrainedModel) -> Iterator[Session]:
        """See `Method.session`.

        Raises:
            UnsupportedModelError: The model's attention takes a mask even where nothing is masked.
        """
        if model.config._attn_implementation != "sdpa":
            # Keys of two lengths go through one forward pass; sdpa alone makes no mask for a single query.
            found = model.config._attn_implementation
            raise UnsupportedModelError(f"model: got attention {found!r}, expected 'sdpa' for a sliding window")
        cache = DynamicCache(config=model.config)
        _check_plain(cache)
        for index in range(self.num_dense_layers, len(cache.layers)):
            cache.layers[index] = _WindowLayer(self.window)
        yield _LengthSession(cache, self.window, self.num_dense_layers)


class _WindowLayer(DynamicLayer):
    """Holds the whole prefill, and from the first decode step on the last `window` tokens. One sequence, no padding."""

    is_croppable = False

    def __init__(self, window: int) -> None:
        super().__init__()
        self._window = window
        self._length = 0
        self._has_slid = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = key_states.shape[-2]
        if new > 1 and self._has_slid:
            raise QuestStateError("a sliding window has dropped the context already: feed further tokens one by one")
        if new == 1 and self.keys is not None and self.values is not None:
            self._has_slid = True
            start = max(0, self.keys.shape[-2] - (self._window - 1))
            self.keys = self.keys[:, :, start:]
            self.values = self.values[:, :, start:]
        self._length += new
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0


class Quest(Method):
    """The pages whose bounds promise the largest logits: this library.

    Args:
        config: What a step reads.
        on_select: Called after each sparse step of a layer.
    """

    name = "quest"
    summary = "reads the pages that matter to the query"

    def __init__(self, config: QuestConfig, on_select: OnSelect | None = None) -> None:
        self.config = config
        self.on_select = on_select

    @contextmanager
    def session(self, model: PreTrainedModel) -> Iterator[Session]:
        """See `Method.session`. Raises what `enable_quest` raises."""
        with enable_quest(model, self.config, on_select=self.on_select) as handle:
            yield _QuestSession(handle)


class _QuestSession(Session):
    def __init__(self, handle: QuestHandle) -> None:
        self._handle = handle
        self.cache = handle.make_cache()

    def reset_counts(self) -> None:
        self._handle.counters.reset()

    def reads(self) -> list[LayerReads]:
        """Whole pages, the one being written included, times the tokens of a page."""
        size = self._handle.config.page_size
        return [
            LayerReads(
                counter.layer,
                counter.sparse_steps > 0,
                counter.sparse_steps + counter.dense_steps,
                counter.pages_read * size,
                counter.pages_held * size,
            )
            for counter in self._handle.counters.layers
        ]


def copy_cache(source: DynamicCache, target: Cache) -> None:
    """Write the keys and values of one cache into another, layer by layer.

    Args:
        source: A prefilled cache; it stays as it is.
        target: An empty cache for the same model.

    Raises:
        UnsupportedModelError: A layer of the source does not hold all keys (a window, a state).
    """
    _check_plain(source)
    with torch.no_grad():
        for index, layer in enumerate(source.layers):
            assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None, "prefilled"
            target.update(layer.keys, layer.values, index)


def _check_plain(cache: DynamicCache) -> None:
    for index, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            kind = type(layer).__name__
            raise UnsupportedModelError(f"model: got a {kind} at layer {index}, expected full attention in every layer")

"""`ReadingSession`: a session whose layers read in a way of their own, where Quest's layers would choose pages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from quest_attention.errors import UnsupportedModelError
from quest_attention.eval.context import Context, copy_cache
from quest_attention.eval.methods.method import LayerReads, Session
from quest_attention.hf import QuestHandle, QuestLayer
from quest_attention.hf.attention import AttentionForward
from quest_attention.hf.layer import LAYER_ATTRIBUTE
from quest_attention.hf.reading import Reading

__all__ = ["ReadingLayer", "ReadingSession", "refuse_mask"]


class ReadingLayer(DynamicLayer):
    """A cache layer with an attention of its own: see `AttentionForward` in `hf.attention`.

    Args:
        index: Of the layer in the model.
        token_budget: Tokens a step reads, its own included [tokens].

    Attributes:
        reading: What the attention of the pass reads whose tokens came last; None before the first.
        tokens_read: Summed over decode steps, per KV head and sequence [tokens].
    """

    def __init__(self, index: int, token_budget: int) -> None:
        super().__init__()
        self.index = index
        self.token_budget = token_budget
        self.reading: Reading | None = None
        self.tokens_read = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Views of all keys and values so far, the keys with the layer itself, by which `attend` is found."""
        new = key_states.shape[2]
        self.reading = Reading.of(new, self.get_seq_length() + new, self.token_budget)
        self.make_room()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        keys = keys[:, :, :]  # a view, so that the stored tensor does not hold the layer that holds it
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, values

    def make_room(self) -> None:
        """Before the tokens of a pass are written: drop what goes, by `reading`."""

    @abstractmethod
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


def refuse_mask(attention_mask: Tensor | None) -> None:
    """Refuse a decode step of padded sequences, among which methods would have to choose row by row.

    Raises:
        UnsupportedModelError: There is a mask.
    """
    if attention_mask is not None:
        raise UnsupportedModelError("attention_mask: got a tensor, expected None: sequences of one length, unpadded")


class ReadingSession(Session):
    """A session on a model that Quest is enabled on, with other layers in place of Quest's.

    Leading dense layers read everything; windowed and other layers stay transformers' own, and are not counted.

    Args:
        handle: Of `enable_quest`, with as many dense layers as the method has.
        make_layer: Makes the layer of an index.

    Attributes:
        layers: Those made, by index.
    """

    def __init__(self, handle: QuestHandle, make_layer: Callable[[int], ReadingLayer]) -> None:
        self.cache = handle.make_cache()
        self.layers: dict[int, ReadingLayer] = {}
        self._dense: list[int] = []
        for index, layer in enumerate(self.cache.layers):
            if not isinstance(layer, QuestLayer):
                continue
            if layer.is_dense:
                self._dense.append(index)
                self.cache.layers[index] = DynamicLayer()
            else:
                self.cache.layers[index] = self.layers[index] = make_layer(index)
        self.reset_counts()

    def load(self, context: Context) -> None:
        """See `Session.load`."""
        copy_cache(context.cache, self.cache)
        self.reset_counts()

    def reset_counts(self) -> None:
        """See `Session.reset_counts`."""
        self._start = self.cache.get_seq_length()
        for layer in self.layers.values():
            layer.tokens_read = 0

    def reads(self) -> list[LayerReads]:
        """See `Session.reads`."""
        lengths = range(self._start + 1, self.cache.get_seq_length() + 1)
        held = sum(lengths)
        reads = []
        for index in sorted((*self._dense, *self.layers)):
            read = held if index in self._dense else self.layers[index].tokens_read
            reads.append(LayerReads(index, read < held, len(lengths), read, held))
        return reads

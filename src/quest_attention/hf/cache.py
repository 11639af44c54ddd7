"""`QuestCache`: a transformers cache whose full-attention layers keep page metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from quest_attention.config import QuestConfig, check_integer
from quest_attention.errors import QuestValueError
from quest_attention.hf.cache_dtype import CacheDtype, check_cache_dtype
from quest_attention.hf.compiler import kept_from_compilers
from quest_attention.hf.counters import LayerCounter, QuestCounters
from quest_attention.hf.held_memory import HeldMemory
from quest_attention.hf.layer import QuestLayer
from quest_attention.hf.offload import Offload, PoolSize
from quest_attention.hf.reading import Reading
from quest_attention.hf.reporting import OnSelect
from quest_attention.hf.rows import RowLengths
from quest_attention.hf.workspaces import Workspaces

OnTake = Callable[["QuestCache", Sequence[int], Sequence[int]], None]
"""Takes the tokens of each sequence from the first number to the second into the metadata of a cache [tokens]."""

__all__ = ["OnTake", "QuestCache", "check_on_select", "layer_kinds"]


def layer_kinds(config: PretrainedConfig, quest: QuestConfig) -> dict[int, str]:
    """What Quest makes of each attention layer, by index: `"quest"`, `"dense"` or why it is left alone.

    The leading dense layers are counted among the full-attention layers, as in the paper's models, which have no other:
    layers with a window or a state read a bounded part whatever Quest does, so they stand for none of the dense ones.

    Args:
        config: Configuration of the model.
        quest: What to read.

    Raises:
        QuestValueError: An argument is of another type.
    """
    if not isinstance(config, PretrainedConfig):
        raise QuestValueError("config", config, "the config of a transformers model")
    if not isinstance(quest, QuestConfig):
        raise QuestValueError("quest", quest, "a QuestConfig")
    kinds: dict[int, str] = {}
    num_full = 0
    is_mla = getattr(config.get_text_config(decoder=True), "kv_lora_rank", None) is not None
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if not isinstance(layer, CacheLayerMixin):
            continue
        if is_mla:
            kinds[index] = "latent"
        elif type(layer) is not DynamicLayer:  # a subclass keeps something that we would not
            kinds[index] = "windowed" if getattr(layer, "is_sliding", False) else "other"
        else:
            kinds[index] = "dense" if num_full < quest.num_dense_layers else "quest"
            num_full += 1
    return kinds


def check_on_select(on_select: object) -> None:
    """Refuse what cannot be called.

    Raises:
        QuestValueError: It cannot.
    """
    if on_select is not None and not callable(on_select):
        raise QuestValueError("on_select", on_select, "a function of a layer, a selection and its pages, or None")


def _check_offload(offload: object, *, is_lossless: bool) -> None:
    if offload is not None and not isinstance(offload, Offload):
        raise QuestValueError("offload", offload, "an Offload, as the handle of a model makes it, or None")
    if offload is not None and is_lossless:
        raise QuestValueError("offload", offload, "None with lossless=True, whose checks read the whole cache")


class QuestCache(DynamicCache):
    """A KV cache for a model on which Quest is enabled, for people who hold their cache themselves.

    Full-attention layers become `QuestLayer`; windowed, chunked, linear and latent layers stay transformers' own.

    Args:
        config: Configuration of the model.
        quest: What to read; metadata "auto" becomes a form with the first tokens, for the device that they are on.
        max_length: Tokens to make room for at once, where known [tokens].
        counters: Counters to go on counting in, of a cache of the same model and config; new ones by default.
        on_select: Called after each sparse decode step of a layer with its index, the selection and its pages.
        is_estimate: Whether fewer tokens than `max_length` may come: then there is room for twice the first at most.
        is_lossless: Whether everything is read unless a token is drafted, as `enable_quest(lossless=True)` has it.
        offload: Keys and values of layers that choose lie in host memory, hot units on the device of the tokens. It is
            what a handle makes of `offload="host"`; made by hand it works on a CPU too, where it saves nothing.
        kv_cache_dtype: As `enable_quest` takes it. In 8 bits only the attention of a model that is enabled reads it.

    Attributes:
        rows: Of a lossless cache what its layers share, else None.
        is_kept: Whether somebody has the cache after `generate()`, as whoever gave it has.

    Raises:
        QuestValueError: An argument is wrong.
    """

    def __init__(
        self, config: PretrainedConfig, quest: QuestConfig | None = None, *, max_length: int | None = None,
        counters: QuestCounters | None = None, on_select: OnSelect | None = None, is_estimate: bool = False,
        is_lossless: bool = False, offload: Offload | None = None, kv_cache_dtype: CacheDtype = "auto",
    ) -> None:  # fmt: skip
        self._given = QuestConfig() if quest is None else quest
        kinds = layer_kinds(config, self._given)
        if max_length is not None:
            check_integer("max_length", max_length, minimum=1)
        check_on_select(on_select)
        _check_offload(offload, is_lossless=is_lossless)
        check_cache_dtype(kv_cache_dtype)
        if counters is None:
            counters = QuestCounters([LayerCounter(index, kind, self._given) for index, kind in kinds.items()])
        elif not isinstance(counters, QuestCounters):
            raise QuestValueError("counters", counters, "QuestCounters")
        counted = {counter.layer: counter.kind for counter in counters.layers}
        if counted != kinds:
            raise QuestValueError("counters", counted, f"those of this model and config: {kinds}")
        super().__init__(config=config)
        self.counters = counters
        self.rows = RowLengths() if is_lossless else None
        self.is_kept = True
        self.offload_to = offload
        pool = None if offload is None else PoolSize(offload, sum(kind == "quest" for kind in kinds.values()))
        workspaces = Workspaces()
        for counter in self.counters.layers:
            if counter.kind in ("quest", "dense"):
                self.layers[counter.layer] = QuestLayer(
                    self._given, counter, is_dense=counter.kind == "dense", workspaces=workspaces,
                    max_length=max_length, is_estimate=is_estimate, on_select=on_select, rows=self.rows,
                    pool=pool, kv_cache_dtype=kv_cache_dtype,
                )  # fmt: skip

    @property
    def quest(self) -> QuestConfig:
        """What to read, with a form of metadata once there are tokens."""
        return next((layer.config for layer in self.layers if isinstance(layer, QuestLayer)), self._given)

    @property
    def memory(self) -> HeldMemory:
        """What layers with full attention hold, with the room that is left for more tokens."""
        layers = [layer.storage for layer in self.layers if isinstance(layer, QuestLayer)]
        return HeldMemory.total(storage.memory for storage in layers if storage is not None)

    def reading_of(self, new: int) -> Reading:
        """What a pass of `new` tokens of each sequence will read in layers that may choose."""
        if self.rows is None:
            return Reading.of(new, self.get_seq_length() + new, self.quest.token_budget)
        length = self.get_seq_length() if self.rows.lengths is None else max(self.rows.lengths)
        return self.rows.reading_of(new, length + new, self.quest.token_budget)

    def chooses_at(self, length: int) -> bool:
        """Whether a decode step at `length` tokens, its own included, leaves something out in some layer."""
        has_choice = any(counter.kind == "quest" for counter in self.counters.layers)
        return has_choice and Reading.of(1, length, self.quest.token_budget) is Reading.SPARSE

    def settle(self, before: Sequence[int], after: Sequence[int], *, take: OnTake | None = None) -> None:
        """Keep so much of what a check of several tokens wrote, and make the metadata that of what is kept.

        Pages are taken anew from their beginnings: what is kept of a page holds every token that it was given, drafts
        that were refused among them.

        Args:
            before: Tokens of each sequence before the check, B of them [tokens].
            after: What stays of each [tokens].
            take: Called in place of `take`.
        """
        size = self.quest.page_size
        starts = [length // size * size for length in before]
        if take is None:
            self.take(starts, after)
        else:
            take(self, starts, after)
        for layer in self.layers:
            if isinstance(layer, QuestLayer):
                layer.settle(max(after))

    def expect_attention(self) -> None:
        """The cache is given to an enabled model, whose attention will read the keys, also those that others wrote."""
        for layer in self.layers:
            if isinstance(layer, QuestLayer):
                layer.is_attended = True

    def take(self, starts: Sequence[int], ends: Sequence[int]) -> None:
        """Take the tokens of each sequence from the first number to the second into the metadata of all layers.

        Args:
            starts: B of them; a page that begins at or after its sequence's starts anew [tokens].
            ends: Likewise [tokens].
        """
        start: int | Tensor
        end: int | Tensor
        stored = [layer.storage for layer in self.layers if isinstance(layer, QuestLayer) and layer.storage is not None]
        start, end = starts[0], ends[0]
        if len(set(starts)) > 1 or len(set(ends)) > 1:
            start, end = torch.tensor([list(starts), list(ends)], dtype=torch.int32, device=stored[0].keys.device)
        for storage in stored:
            storage.take(start, end)

    def keep(self, length: int) -> None:
        """Let every layer have the first `length` tokens of each sequence, whatever a pass left it that failed."""
        for layer in self.layers:
            if isinstance(layer, QuestLayer):
                layer.crop(min(0, length - layer.get_seq_length()))

    @kept_from_compilers
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See transformers' `Cache`. `torch.compile` leaves it as it is and compiles what is around it.

        It writes in place and counts on the host, of which a compiled graph would make a copy for each layer.
        """
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

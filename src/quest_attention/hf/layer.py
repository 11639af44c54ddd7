"""`QuestLayer`: the KV cache of one attention layer, with page metadata beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestStateError
from quest_attention.hf.cache_dtype import CacheDtype, check_stored, stored_dtype
from quest_attention.hf.counters import LayerCounter
from quest_attention.hf.host_storage import HostStorage
from quest_attention.hf.offload import PoolSize
from quest_attention.hf.reading import Reading
from quest_attention.hf.reporting import OnSelect, StepReporter
from quest_attention.hf.rows import RowLengths
from quest_attention.hf.storage import KVStorage
from quest_attention.hf.stored import StoredLayer
from quest_attention.hf.tokens import check_alike, check_fits, refuse_gradients
from quest_attention.hf.workspaces import Workspaces
from quest_attention.ops import QuestOutput
from quest_attention.pages import num_pages

__all__ = ["GROWTH", "LAYER_ATTRIBUTE", "QuestLayer", "StorageDtypeError"]

LAYER_ATTRIBUTE = "_quest_layer"
"""Attribute of the key view that `update` returns, by which the attention function finds the layer.

Attention modules hand the tensors of `update` to the attention function unchanged, so the layer travels with them:
right with several caches at once, with threads that share a model and with layers that share keys. A model that
rebuilds its keys in between (multi-head latent attention) loses the attribute and stays dense.
"""

GROWTH = 2
"""Factor by which full storage grows: a token is copied once on average, not at every step."""


class StorageDtypeError(QuestStateError):
    """A captured step has tokens of a wider dtype than the storage, which an eager step would widen."""


class QuestLayer(StepReporter, StoredLayer):
    """Keys and values `[B, HKV, capacity, D]` that grow by doubling, and the bounds of their pages.

    `update` writes in place and returns views: no token is copied again at each step, as `torch.cat` does.

    Args:
        config: What to read; metadata "auto" becomes a form with the first tokens.
        counter: Where steps are counted.
        is_dense: Whether the layer always reads everything; it then keeps no metadata.
        workspaces: Scratch memory shared with the other layers of the cache.
        max_length: Tokens to make room for at once, where known [tokens].
        is_estimate: Whether fewer may come, as in `generate()`, which may end early: then there is room for twice the
            first tokens at most to begin with.
        on_select: Called after each sparse step.
        rows: Of a lossless cache, shared with its other layers: the layer reads everything unless a token is drafted.
        pool: Keys and values lie in host memory, if the layer chooses what it reads, and so much of them is hot; None
            where they do not.
        kv_cache_dtype: In what keys and values are stored: `"auto"`, in the dtype of tokens, or `"fp8"`.

    Attributes:
        captured_lengths: While a decode step is captured as a CUDA graph, `[B]` int32, tokens per sequence with the
            step's own; else None.
    """

    def __init__(
        self, config: QuestConfig, counter: LayerCounter, *, is_dense: bool, workspaces: Workspaces,
        max_length: int | None = None, is_estimate: bool = False, on_select: OnSelect | None = None,
        rows: RowLengths | None = None, pool: PoolSize | None = None, kv_cache_dtype: CacheDtype = "auto",
    ) -> None:  # fmt: skip
        StepReporter.__init__(self, counter, on_select)
        self.config = config
        self.is_dense = is_dense
        self.workspaces = workspaces
        self.max_length = max_length
        self.is_estimate = is_estimate
        self.rows = rows
        self.pool = pool
        self.kv_cache_dtype: CacheDtype = kv_cache_dtype
        self.captured_lengths: Tensor | None = None
        self._chose_at = 0  # the draft of a round that chose last
        StoredLayer.__init__(self)

    @property
    def num_pages(self) -> int:
        """Pages that hold a token [pages]."""
        return num_pages(self._length, self.config.page_size)

    @property
    def tokens_held(self) -> int:
        """Tokens of a sequence, in whole units [tokens]."""
        return num_pages(self._length, self.config.unit_size) * self.config.unit_size

    @property
    def keys_ranked(self) -> int:
        """Keys of a sequence that a sparse step ranks tokens by, those of whole candidates [tokens]."""
        config = self.config
        held = self.num_pages * config.page_size if config.candidate_pages else self.tokens_held
        return min(held, config.candidate_tokens)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the first tokens `[B, HKV, T, D]`."""
        if self.config.metadata == "auto":
            self.config = self.config.resolved(key_states.device.type)
            self.counter.count_by(self.config)
        new, dtype = key_states.shape[2], torch.promote_types(key_states.dtype, value_states.dtype)
        check_stored(self.kv_cache_dtype, dtype, key_states.device, self.config.backend)
        given: dict[str, Any] = {
            "batch": key_states.shape[0], "length": max(new, self._first_room(new)), "dtype": dtype,
            "config": self.config, "has_metadata": not self.is_dense, "workspaces": self.workspaces,
            "has_gaps": self.rows is not None, "stored": stored_dtype(self.kv_cache_dtype),
        }  # fmt: skip
        if self.pool is not None:
            self.pool.offload.check(self.config)  # by the first layer too, before anything is stored
        if self.pool is None or self.is_dense:
            self._hold(KVStorage(key_states, value_states, **given))
        else:
            storage = HostStorage(
                key_states, value_states, pool=self.pool, counts=self.counter.fetched.on(key_states.device), **given
            )  # fmt: skip
            storage.say_sizes(self.counter.fetched)
            self._hold(storage)
        self.is_initialized = True

    def _first_room(self, new: int) -> int:
        """Tokens to make room for when the first `new` ones come [tokens]."""
        if self.max_length is not None and not self.is_estimate:
            return self.max_length
        begin = GROWTH * new if new > 1 else self.config.token_budget
        if self.max_length is not None:
            return min(self.max_length, begin)
        return begin if new == 1 else new

    def _more_room(self, end: int) -> int:
        """Tokens to make room for when there are `end`: some times as many as before, but no more than will come."""
        more = max(end, GROWTH * self.capacity)
        return more if self.max_length is None or end > self.max_length else min(more, self.max_length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens and take them into the bounds of their pages.

        Args:
            key_states: `[B, HKV, T, D]`.
            value_states: `[B, HKV, T, DV]`.
            *args: Ignored, as in transformers' own layers.
            **kwargs: Likewise.

        Returns:
            All keys and values so far, views unless attention reads all of what is stored in 8 bits; the keys carry the
            layer itself.

        Raises:
            QuestValueError: The tokens do not fit those in the cache (another batch or model); nothing is written.
                Tokens of another dtype do fit: the storage takes the wider one, as transformers' own does. In 8 bits
                none are stored of float64.
            QuestStateError: Gradients are being recorded, which writing in place would break; or a step is to read what
                it chose in 8 bits, and Quest's attention never saw the layer.

        Warns:
            QuestWarning: The model decodes past the budget without Quest's attention.
        """
        refuse_gradients(key_states, value_states)
        if self.captured_lengths is not None:
            return self._update_captured(key_states, value_states, self.captured_lengths)
        check_alike(key_states, value_states)  # before storage takes its shape from them
        if self.storage is None:
            self.lazy_initialization(key_states, value_states)
        assert self.storage is not None, "storage allocated"
        check_fits("key_states", key_states, self.storage.keys)
        check_fits("value_states", value_states, self.storage.values)
        new = key_states.shape[2]
        start = self._length
        if self.rows is not None and self.rows.lengths is not None:
            start = max(self.rows.lengths)
        end = start + new
        reading = self._reading_of(new, end)
        chooses = reading is Reading.SPARSE
        if chooses and self.storage.is_quantised and not self.is_attended:
            raise QuestStateError(
                "kv_cache_dtype: got 'fp8' in a QuestCache whose keys do not reach Quest's attention, which alone "
                "reads them: call enable_quest(model) first"
            )
        widest = self._widest(key_states, value_states)
        if end > self.capacity or widest != self.dtype:
            check_stored(self.kv_cache_dtype, widest, key_states.device, self.config.backend)
            length = self.capacity if end <= self.capacity else self._more_room(end)
            self._hold(self.storage.moved(start, length=length, dtype=widest))
        self.storage.before_write(start)
        self._write(key_states, value_states, start)
        self._length = end
        self._begin(reading, new)
        keys, values = self.storage.for_attention(key_states, value_states, end, chooses=chooses)
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, values

    def _write(self, keys: Tensor, values: Tensor, start: int) -> None:
        """Write tokens after the first `start` ones, or where the rows of a lossless pass end.

        What a check of drafts writes, `QuestCache.settle` takes into the metadata when it is known how much stays, and
        what plain steps between checks write, when drafting goes on.
        """
        storage, rows = self.storage, self.rows
        assert storage is not None, "storage allocated"
        if rows is not None and rows.lengths is not None and not rows.is_drafting:
            storage.put(keys, values, start if rows.ends is None else rows.ends.long() - keys.shape[2])
        elif rows is None or rows.ends is None:
            storage.write(keys, values, start)
        else:
            storage.append(keys.to(storage.dtype), values.to(storage.dtype), rows.ends)

    @property
    def tokens_since_choice(self) -> int:
        """Tokens of a sequence since the step that chose what this one reads; 0 where it chooses itself [tokens]."""
        if self.rows is None or self.storage is None or not self.storage.has_kept or not self.rows.drafts_since:
            return 0
        return self.rows.drafts_since - self._chose_at

    def decode(self, query: Tensor, seq_lens: Tensor | int, **options: Any) -> QuestOutput:
        """A sparse step: of a draft that is not the first, over what that one chose. See `KVStorage.decode`."""
        storage = self.storage
        assert storage is not None, "storage allocated"
        if self.tokens_since_choice:
            return storage.attend_to_kept(query, seq_lens, **options)
        step = storage.decode(query, seq_lens, **options)
        if self.rows is not None:
            storage.keep(step.selected, seq_lens)
            self._chose_at = self.rows.drafts_since  # not the first where the storage has grown since
        return step

    def settle(self, length: int) -> None:
        """The longest sequence keeps so many tokens [tokens]."""
        self._length = length

    @property
    def seq_lens(self) -> int | Tensor:
        """Tokens of every sequence, or `[B]` int32 of each where rows are not alike [tokens]."""
        return self._length if self.rows is None or self.rows.ends is None else self.rows.ends

    def _reading_of(self, new: int, length: int) -> Reading:
        decide = Reading.of if self.rows is None else self.rows.reading_of
        return decide(new, length, self.config.token_budget, is_dense=self.is_dense)

    def _widest(self, keys: Tensor, values: Tensor) -> torch.dtype:
        """The dtype that holds what is stored and these tokens, as `torch.cat` would choose it.

        Autocast makes keys and values of different dtypes, and may begin or end between two steps.
        """
        assert self.dtype is not None, "storage allocated"
        return torch.promote_types(self.dtype, torch.promote_types(keys.dtype, values.dtype))

    def _update_captured(self, keys: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Write the tokens of a step where the device says; what the host knows moves on at each replay."""
        assert self.storage is not None and self.dtype is not None, "storage allocated"
        if self._widest(keys, values) != self.dtype:
            raise StorageDtypeError(f"tokens of {self._widest(keys, values)} for a cache of {self.dtype}")
        start = self._length if self.rows is None or self.rows.lengths is None else max(self.rows.lengths)
        self.reading = self._reading_of(keys.shape[2], start + keys.shape[2])
        if keys.shape[2] > 1:
            self.storage.put(keys, values, lengths.long() - keys.shape[2])
        else:
            self.storage.append(keys.to(self.dtype), values.to(self.dtype), lengths)
        everything = self.storage.keys[:, :, :]
        setattr(everything, LAYER_ATTRIBUTE, self)
        return everything, self.storage.values

    def take_again(self, lengths: Sequence[int]) -> None:
        """Make the metadata of the last pages that of the first `lengths` tokens alone, B of them [tokens]."""
        if self.storage is None:
            return
        if len(set(lengths)) == 1:
            self.storage.cut(lengths[0])
            return
        size = self.config.page_size
        ends = torch.tensor(list(lengths), dtype=torch.int32, device=self.device)
        self.storage.take(ends // size * size, ends)

    def count_captured_step(self, batch: int, start: int, new: int) -> None:
        """A captured step of `new` tokens of `batch` sequences after `start` ones: length and counters follow."""
        self._length = start + new
        if isinstance(self.storage, HostStorage):
            self.storage.fresh = self._length
        self._begin(self._reading_of(new, self._length), new)
        self.count_attention(batch)
        if self.reading is Reading.SPARSE:
            if self.rows is not None and not self.rows.drafts_since:
                self._chose_at = 0
            chosen = 0 if self.counter.is_told_by_device else self.config.unit_budget * self.config.unit_size
            read = chosen + self.tokens_since_choice
            ranked = 0 if self.tokens_since_choice else self.keys_ranked
            self.counter.count_sparse(batch * read, batch * self.tokens_held, batch * ranked)

"""`KVStorage`: the memory of one attention layer's cache, which stays where it is as long as it lives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.forms import FP8, Bounds, as_bits, form_of, metadata_dtype, round_near
from quest_attention.hf.held_memory import HeldMemory, bytes_of
from quest_attention.hf.workspaces import Workspaces
from quest_attention.ops import (
    QuestOutput,
    Selection,
    Workspace,
    append_token,
    quest_decode,
    sparse_decode_attention,
    update_page_metadata,
)
from quest_attention.pages import PagedKV, num_pages

__all__ = ["KEPT_TOKENS", "KVStorage"]

KEPT_TOKENS = 7
"""Tokens after a step that chose, which read what it chose. So of eight drafts, the most that were measured
(docs/speed.md), one chooses [tokens]."""


class KVStorage:
    """Keys and values of a batch for a fixed number of tokens, metadata of their pages, and what a step needs beside.

    More room, another dtype or another batch is another storage. So a captured CUDA graph, which holds addresses,
    belongs to a storage as an object: an allocator may give the tensors of the next one the addresses of this one's,
    while page table, metadata and workspace lie elsewhere.

    Args:
        keys: Of a layer with the same heads, channels and device: `[_, HKV, _, D]`; none are copied.
        values: Likewise, `[_, HKV, _, DV]`.
        batch: Sequences, B.
        length: Tokens per sequence to have room for; whole pages are made [tokens].
        dtype: Of keys and values as tokens bring them and attention reads them.
        stored: Of keys and values in memory, and of metadata of a form that keeps it in theirs, unless in 8 bits. None
            is `dtype`; the other there is is float8_e4m3fn, with scales of 1: whoever reads, reads what is stored.
        config: What to read.
        has_metadata: Whether what is read is chosen. Otherwise no metadata is kept.
        workspaces: Scratch memory shared with the other layers of the cache.
        has_gaps: Whether sequences may end before others, and what lies behind an end is read and masked. It is 0 then:
            memory that nobody wrote may hold NaN, which a mask lets through.

    Attributes:
        keys: `[B, HKV, capacity, D]`, as they are stored.
        values: `[B, HKV, capacity, DV]`, likewise.
        metadata: `[B, HKV, capacity / page_size, *form.shape]`, of keys as they are stored, or None.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, *, batch: int, length: int, dtype: torch.dtype, config: QuestConfig,
        has_metadata: bool, workspaces: Workspaces, has_gaps: bool = False, stored: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self._config = config
        self._workspaces = workspaces
        self._others: dict[str, Any] = {
            "config": config, "has_metadata": has_metadata, "workspaces": workspaces, "has_gaps": has_gaps,
            "stored": stored,
        }  # fmt: skip
        self._dtype = dtype
        stored = stored or dtype
        heads, pages = keys.shape[1], num_pages(length, config.page_size)
        # What is made under inference mode could not be written outside of it, by the next turn of a conversation.
        with torch.inference_mode(False):
            self.keys = self._empty(keys, (batch, heads, pages * config.page_size, keys.shape[3]), stored)
            self.values = self._empty(values, (batch, heads, pages * config.page_size, values.shape[3]), stored)
            if has_gaps and batch > 1:
                self.keys.zero_()
                self.values.zero_()
            self.metadata: Tensor | None = None
            if has_metadata:
                shape = form_of(config).shape(config.page_size, keys.shape[3])
                self.metadata = keys.new_empty(batch, heads, pages, *shape, dtype=metadata_dtype(config, stored))
            self._scale = keys.new_ones(1, dtype=torch.float32) if stored == FP8 else None
        self._paged: PagedKV | None = None
        self._every_page: Selection | None = None
        self._scratch: dict[int, Workspace | None] = {}
        self._positions: Tensor | None = None
        self._kept: Selection | None = None
        self._ahead: Tensor | None = None
        self._kept_slots: tuple[int, int] | None = None

    def _empty(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for keys or values."""
        return like.new_empty(shape, dtype=dtype)

    def _like(self, batch: int, length: int, dtype: torch.dtype) -> KVStorage:
        """Another storage, empty."""
        return KVStorage(self.keys, self.values, batch=batch, length=length, dtype=dtype, **self._others)

    @property
    def batch_size(self) -> int:
        """Sequences, B."""
        return self.keys.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens per sequence there is room for [tokens]."""
        return self.keys.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values as tokens bring them and attention reads them."""
        return self._dtype

    @property
    def is_quantised(self) -> bool:
        """Whether they are stored in 8 bits."""
        return self.keys.dtype == FP8

    @property
    def memory(self) -> HeldMemory:
        """What the storage takes, without scratch memory."""
        return HeldMemory(0, bytes_of(self.keys, self.values, self.metadata))

    # A captured graph holds the addresses of all that follows, so each is made once.

    @property
    def paged(self) -> PagedKV:
        """Keys, values and metadata as pages; where none is kept, all pages share a placeholder for theirs."""
        if self._paged is None:
            with torch.inference_mode(False):
                self._paged = self._as_pages()
        return self._paged

    def _as_pages(self) -> PagedKV:
        scales = {"key_scale": self._scale, "value_scale": self._scale}
        if self.metadata is not None:
            return PagedKV.from_contiguous(self.keys, self.values, self.metadata, form=form_of(self._config), **scales)
        batch, heads, capacity, dim = self.keys.shape
        pages, page_size = capacity // self._config.page_size, self._config.page_size
        shape = (batch, heads, pages, *Bounds().shape(page_size, dim))
        paged = PagedKV.from_contiguous(self.keys, self.values, self.keys.new_empty(shape), **scales)
        nothing = self.keys.new_empty(dim).expand(paged.metadata.shape)
        return dataclasses.replace(paged, metadata=nothing, contiguous=None)  # the tensor of the shape goes again

    @property
    def every_page(self) -> Selection:
        """All pages there is room for, as a layer reads them that never chooses, when only the device knows lengths."""
        if self._every_page is None:
            paged = self.paged
            with torch.inference_mode(False):
                pages = torch.arange(paged.max_pages, dtype=torch.int32, device=paged.keys.device)
                pages = pages.expand(paged.batch_size, paged.num_kv_heads, -1)
                counts = torch.full(pages.shape[:2], paged.max_pages, dtype=torch.int32, device=pages.device)
            self._every_page = Selection(pages, counts, paged.page_size)
        return self._every_page

    def workspace(self, num_query_heads: int) -> Workspace | None:
        """Scratch memory for sparse steps of so many query heads; None where the backend needs none."""
        if num_query_heads not in self._scratch:
            self._scratch[num_query_heads] = self._workspaces.get(self.paged, num_query_heads, self._config)
        return self._scratch[num_query_heads]

    def arrive(self) -> None:
        """Have what was written be there for what reads it next, where writing takes its time."""

    def before_write(self, start: int) -> None:
        """Tokens from `start` on are about to be written, of every sequence [tokens]."""

    def for_attention(self, keys: Tensor, values: Tensor, end: int, *, chooses: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `end` tokens, in `dtype`: views, or what they are in 8 bits written out.

        Args:
            keys: Those of the pass, its last ones, `[B, HKV, T, D]`.
            values: Likewise.
            end: Tokens per sequence [tokens].
            chooses: Whether attention is `decode`, which reads what it chose where it lies: views as they are stored.
        """
        del keys, values
        stored = self.keys[:, :, :end], self.values[:, :, :end]
        return stored if chooses else (stored[0].to(self.dtype), stored[1].to(self.dtype))

    def decode(self, query: Tensor, seq_lens: Tensor | int, **options: Any) -> QuestOutput:
        """A sparse step over what is stored: see `ops.quest_decode`.

        Args:
            query: `[B, HQ, D]`, in `dtype`.
            seq_lens: Tokens per sequence, with the step's own [tokens].
            **options: Of `quest_decode`, but its memory.
        """
        workspace = self.workspace(query.shape[1])
        return quest_decode(query, self.paged, seq_lens, self._config, **options, workspace=workspace)

    @property
    def has_kept(self) -> bool:
        """Whether a step's choice is kept."""
        return self._kept is not None

    def keep(self, selected: Selection, seq_lens: Tensor | int) -> None:
        """Copy what a step chose, for the `KEPT_TOKENS` after it, with the units that these will be in.

        Their memory is made once, since a captured graph holds its address.

        Args:
            selected: What it chose, the unit of its own token among it.
            seq_lens: Tokens per sequence, with the step's own [tokens].
        """
        size, (batch, heads, slots) = selected.unit_size, selected.units.shape
        ahead = num_pages(KEPT_TOKENS, size)
        if self._kept is None:
            device, most = selected.units.device, self._config.unit_budget + 1  # padding may shift a unit
            with torch.inference_mode(False):
                units = torch.full((batch, heads, most + ahead), -1, dtype=torch.int32, device=device)
                self._kept = Selection(units, torch.zeros(batch, heads, dtype=torch.int32, device=device), size)
                self._ahead = torch.arange(1, ahead + 1, dtype=torch.int32, device=device)
        kept, nth = self._kept, self._ahead
        assert nth is not None, "made with it"
        last = (seq_lens - 1) // size
        kept.units[:, :, :slots] = selected.units
        kept.units[:, :, slots : slots + ahead] = nth + (last[:, None, None] if isinstance(last, Tensor) else last)
        kept.units[:, :, slots + ahead :] = -1
        kept.counts.copy_(selected.counts)
        # Elsewhere a replayed step would not say so, and attention masks what it reads anyway.
        is_here = selected.units.device.type == "cpu"
        self._kept_slots = None if isinstance(last, Tensor) or not is_here else (slots, last)

    def attend_to_kept(self, query: Tensor, seq_lens: Tensor | int, **options: Any) -> QuestOutput:
        """A step that reads what is kept and the tokens since then, and chooses nothing.

        Args:
            query: `[B, HQ, D]`, in `dtype`.
            seq_lens: Tokens per sequence, at most `KEPT_TOKENS` more than when it was chosen [tokens].
            **options: As `decode` takes them.
        """
        kept = self._kept
        assert kept is not None, "a step before kept it"
        if self._kept_slots is not None and isinstance(seq_lens, int):
            # Without units that no token is in yet, which would have to be masked.
            slots, last = self._kept_slots
            used = slots + (seq_lens - 1) // kept.unit_size - last
            kept = kept._replace(units=kept.units[:, :, :used])
        backend = self._config.backend
        output, _ = sparse_decode_attention(query, self.paged, seq_lens, kept, **options, backend=backend)
        return QuestOutput(output, kept)

    def write(self, keys: Tensor, values: Tensor, start: int) -> None:
        """Write the tokens from `start` on, and take them into the metadata of their pages.

        Args:
            keys: `[B, HKV, T, D]`, of any dtype that `dtype` holds.
            values: `[B, HKV, T, DV]`, likewise.
            start: Tokens per sequence before them [tokens].
        """
        self.put(keys, values, start)
        self.take(start, start + keys.shape[2])

    def put(self, keys: Tensor, values: Tensor, start: int | Tensor) -> None:
        """Write tokens and leave the metadata as it is, until `take`.

        Args:
            keys: `[B, HKV, T, D]`, of any dtype that `dtype` holds.
            values: `[B, HKV, T, DV]`, likewise.
            start: Tokens before them, of every sequence or `[B]` int64 of each [tokens].
        """
        new = keys.shape[2]
        keys, values = round_near(keys, self.keys.dtype), round_near(values, self.values.dtype)
        if not isinstance(start, Tensor):
            self.keys[:, :, start : start + new] = keys
            self.values[:, :, start : start + new] = values
            return
        self._scatter(keys, values, (start[:, None] + torch.arange(new, device=start.device))[:, None, :, None])

    def _scatter(self, keys: Tensor, values: Tensor, where: Tensor) -> None:
        """Write tokens as they are stored where `[B, 1, T, 1]` int64 says."""
        for stored, new in ((self.keys, keys), (self.values, values)):
            as_bits(stored).scatter_(2, where.expand_as(new), as_bits(new))

    def take(self, start: int | Tensor, end: int | Tensor) -> None:
        """Take the tokens from `start` to `end` into the metadata of their pages.

        Args:
            start: Of every sequence or `[B]` int32 of each [tokens]. A page that begins at or after it starts anew.
            end: Likewise [tokens].
        """
        if self.metadata is not None:
            update_page_metadata(self.paged, end, end - start, self._config.backend)

    def cut(self, length: int) -> None:
        """Take the metadata of a page anew of which only the tokens before `length` remain [tokens].

        That of a form that takes whole pages is not asked for until the page is complete again.
        """
        if self.metadata is not None:
            update_page_metadata(self.paged, length, length % self._config.page_size, self._config.backend)

    def append(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """Write one token of each sequence where the device says, and take it into the metadata of its page.

        Args:
            keys: `[B, HKV, 1, D]`, in `dtype`.
            values: `[B, HKV, 1, DV]`, in `dtype`.
            lengths: `[B]` int32, tokens per sequence, the new one included, so at least 1 [tokens].
        """
        if self.metadata is not None:
            append_token(self.paged, keys[:, :, 0], values[:, :, 0], lengths, self._config.backend)
            return
        # Nobody chooses among these pages, and `append_token` knows no cache without metadata.
        if self._positions is None:
            with torch.inference_mode(False):
                self._positions = torch.empty(lengths.shape, dtype=torch.int64, device=lengths.device)
        where = torch.sub(lengths, 1, out=self._positions)[:, None, None, None]
        self._scatter(round_near(keys, self.keys.dtype), round_near(values, self.values.dtype), where)

    def moved(self, used: int, *, length: int, dtype: torch.dtype) -> KVStorage:
        """Another storage with the same tokens.

        Args:
            used: Tokens per sequence in this one [tokens].
            length: Tokens per sequence to have room for [tokens].
            dtype: Of the other's keys and values, as tokens bring them.
        """
        return self._copied(used, lambda tensor: tensor, self.batch_size, length, dtype)

    def repeated(self, repeats: int, used: int) -> KVStorage:
        """Another storage with `repeats` copies of each sequence of `used` tokens [tokens]."""
        batch = self.batch_size * repeats
        return self._copied(used, lambda tensor: tensor.repeat_interleave(repeats, 0), batch, self.capacity, self.dtype)

    def selected(self, rows: Tensor, used: int) -> KVStorage:
        """The sequences `rows`: in place if they are as many as before, as in beam search, else in another storage.

        Args:
            rows: `[B']` int64.
            used: Tokens per sequence in the storage [tokens].
        """

        def pick(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, rows)

        if rows.shape[0] != self.batch_size:
            return self._copied(used, pick, rows.shape[0], self.capacity, self.dtype)
        for tensor, filled in self._used(used):
            tensor[:, :, :filled] = pick(tensor[:, :, :filled])
        return self

    def _copied(
        self, used: int, pick: Callable[[Tensor], Tensor], batch: int, length: int, dtype: torch.dtype
    ) -> KVStorage:
        """Another storage, with those sequences that `pick` chooses."""
        other = self._like(batch, length, dtype)
        for (old, filled), (new, _) in zip(self._used(used), other._used(used), strict=True):
            new[:, :, :filled] = pick(old[:, :, :filled])
        return other

    def _used(self, length: int) -> list[tuple[Tensor, int]]:
        """Tensors with the part of their third dimension that holds `length` tokens."""
        stored = [(self.keys, length), (self.values, length)]
        pages = num_pages(length, self._config.page_size)
        return stored if self.metadata is None else [*stored, (self.metadata, pages)]

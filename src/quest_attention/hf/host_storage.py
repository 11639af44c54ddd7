"""`HostStorage`: keys and values of a layer in host memory, metadata and a pool of hot units on the device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from quest_attention.forms import form_of, round_near
from quest_attention.hf.fetch_counter import FetchCounter
from quest_attention.hf.held_memory import HeldMemory, bytes_of
from quest_attention.hf.host_memory import host_empty
from quest_attention.hf.offload import PoolSize, check_host
from quest_attention.hf.outgoing import Outgoing
from quest_attention.hf.storage import KVStorage
from quest_attention.ops import HotUnits, QuestOutput, quest_decode, update_page_metadata
from quest_attention.pages import PagedKV, num_pages

__all__ = ["HostStorage"]


class HostStorage(KVStorage):
    """A `KVStorage` whose keys and values the device reaches over the bus, so that it reads as few as it can.

    To the device they are tensors like others (`host_empty`), so whatever writes, moves or takes them is the same. A
    sparse step reads metadata on the device, fetches what it chose and is not hot, and attends to the pool; a prompt
    brings the layer's keys and values to the device while it attends to them, and its own go out meanwhile.

    Args:
        pool: How much is hot in each layer of the cache.
        counts: `[5]` int64 on the device, to count fetches in: see `HotUnits`.
        others: As `KVStorage` takes them.

    Attributes:
        fresh: Tokens per sequence that the pool's copies are right for: all at the last sparse step [tokens].
    """

    def __init__(
        self, keys: Tensor, values: Tensor, *, pool: PoolSize, counts: Tensor | None = None,
        before: HotUnits | None = None, **others: Any,
    ) -> None:  # fmt: skip
        self._pool = pool
        self._counts = counts
        self._before = before
        self._hot: HotUnits | None = None
        self.fresh = 0
        self._outgoing = Outgoing()
        super().__init__(keys, values, **others)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVStorage:
        # Its tensors copied one by one would lie on the device, and two pools must not share memory.
        other = self.moved(self.capacity, length=self.capacity, dtype=self.dtype)
        assert isinstance(other, HostStorage), "as this one"
        other._before, other._counts = None, copy.deepcopy(self._counts, memo)  # the copy's counters have the same copy
        memo[id(self)] = other
        return other

    def _empty(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        check_host(shape, dtype)
        return host_empty(shape, dtype, like.device)

    def _like(self, batch: int, length: int, dtype: torch.dtype) -> HostStorage:
        return HostStorage(
            self.keys, self.values, pool=self._pool, counts=self._counts, before=self._hot, batch=batch, length=length,
            dtype=dtype, **self._others,
        )  # fmt: skip

    def say_sizes(self, counter: FetchCounter) -> None:
        """Tell a counter how large what it counts is."""
        counter.unit_size = self._config.unit_size
        counter.key_bytes = self.keys.shape[3] * self.keys.element_size()
        counter.value_bytes = self.values.shape[3] * self.values.element_size()

    @property
    def memory(self) -> HeldMemory:
        """See `KVStorage.memory`: keys and values on the host, the rest on the device, the pool once there is one."""
        hot = self._hot
        pool = () if hot is None else (hot.keys, hot.values, hot.table, hot.owners, hot.stamps, hot.valued)
        return HeldMemory(bytes_of(self.keys, self.values), bytes_of(self.metadata, *pool))

    @property
    def hot(self) -> HotUnits:
        """The pool, made at the first sparse step: what is free then is what a prompt has left."""
        if self._hot is None:
            slots = self._pool.slots(self.keys, self.values, self._config)
            with torch.inference_mode(False):
                self._hot = HotUnits.allocate(
                    self.paged, self._config.unit_size, slots, counts=self._counts, before=self._before
                )
            self._before = None
        return self._hot

    def arrive(self) -> None:
        """See `KVStorage.arrive`: a prompt's copies are waited for."""
        self._outgoing.wait()

    def before_write(self, start: int) -> None:
        """Forget the hot units that tokens from `start` on are written to, or that were written since they came."""
        self.arrive()
        if self._hot is not None and start != self.fresh:
            self._hot.forget(min(start, self.fresh) // self._config.unit_size)
            self.fresh = start

    def write(self, keys: Tensor, values: Tensor, start: int) -> None:
        """See `KVStorage.write`; several tokens go out while the device computes what follows.

        So their metadata is of the keys on the device, which spares the bus the way back too.
        """
        if keys.shape[2] == 1:
            super().write(keys, values, start)
            return
        keys, values = round_near(keys, self.keys.dtype), round_near(values, self.values.dtype)
        self._take_near(keys, start)
        self._outgoing.send(lambda: self.put(keys, values, start), keys, values)

    def _take_near(self, keys: Tensor, start: int) -> None:
        """Take keys on the device, `[B, HKV, T, D]` as they are stored, into the metadata of their pages."""
        assert self.metadata is not None, "a layer that chooses"
        size, new = self._config.page_size, keys.shape[2]
        first, end = start // size * size, start + new
        pages = slice(first // size, num_pages(end, size))
        near = keys.new_empty(*keys.shape[:2], (pages.stop - pages.start) * size, keys.shape[3])
        near[:, :, : start - first] = self.keys[:, :, first:start]
        near[:, :, start - first : end - first] = keys
        metadata = self.metadata[:, :, pages].contiguous()
        scales = {"key_scale": self._scale, "value_scale": self._scale}
        kv = PagedKV.from_contiguous(near, near, metadata, form=form_of(self._config), **scales)
        update_page_metadata(kv, end - first, new, self._config.backend)
        self.metadata[:, :, pages] = metadata

    def cut(self, length: int) -> None:
        """See `KVStorage.cut`."""
        self.arrive()
        super().cut(length)

    def _used(self, length: int) -> list[tuple[Tensor, int]]:
        self.arrive()
        return super()._used(length)

    def for_attention(self, keys: Tensor, values: Tensor, end: int, *, chooses: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `end` tokens, brought to the device if more than one token attends to them.

        One layer at a time: they go when its attention is done.
        """
        if keys.shape[2] == 1:
            return super().for_attention(keys, values, end, chooses=chooses)
        start, near = end - keys.shape[2], []
        for stored, new in ((self.keys, keys), (self.values, values)):
            brought = torch.empty(*stored.shape[:2], end, stored.shape[3], dtype=self.dtype, device=new.device)
            brought[:, :, :start] = stored[:, :, :start]
            brought[:, :, start:] = round_near(new, stored.dtype)
            near.append(brought)
        return near[0], near[1]

    def decode(self, query: Tensor, seq_lens: Tensor | int, **options: Any) -> QuestOutput:
        """See `KVStorage.decode`: the same step, over the pool."""
        step = quest_decode(
            query, self.paged, seq_lens, self._config, **options, workspace=self.workspace(query.shape[1]), hot=self.hot
        )
        if isinstance(seq_lens, int):
            self.fresh = seq_lens
        return step

    def selected(self, rows: Tensor, used: int) -> KVStorage:
        """See `KVStorage.selected`; nothing of other sequences stays hot."""
        other = super().selected(rows, used)
        if other is self and self._hot is not None:
            self._hot.forget(0)
        return other

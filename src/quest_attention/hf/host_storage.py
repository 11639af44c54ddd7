"""`HostStorage`: keys and values of a layer in host memory, metadata and a pool of hot units on the device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from quest_attention.hf.host_memory import host_empty
from quest_attention.hf.offload import PoolSize, check_host
from quest_attention.hf.storage import KVStorage
from quest_attention.ops import HotUnits, QuestOutput, quest_decode

__all__ = ["HostStorage"]


class HostStorage(KVStorage):
    """A `KVStorage` whose keys and values the device reaches over the bus, so that it reads as few as it can.

    To the device they are tensors like others (`host_empty`), so whatever writes, moves or takes them is the same. A
    sparse step reads metadata on the device, fetches what it chose and is not hot, and attends to the pool; a prompt
    brings the layer's keys and values to the device while it attends to them.

    Args:
        pool: How much is hot in each layer of the cache.
        counts: `[3]` int64 on the device, to count fetches in: see `HotUnits`.
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

    @property
    def unit_bytes(self) -> int:
        """Keys and values of a unit in one KV head [bytes]."""
        return self._config.unit_size * (self.keys.shape[3] + self.values.shape[3]) * self.dtype.itemsize

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

    def before_write(self, start: int) -> None:
        """Forget the hot units that tokens from `start` on are written to, or that were written since they came."""
        if self._hot is not None and start != self.fresh:
            self._hot.forget(min(start, self.fresh) // self._config.unit_size)
            self.fresh = start

    def for_attention(self, keys: Tensor, values: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `end` tokens, brought to the device if more than one token attends to them.

        One layer at a time: they go when its attention is done.
        """
        if keys.shape[2] == 1:
            return super().for_attention(keys, values, end)
        start, near = end - keys.shape[2], []
        for stored, new in ((self.keys, keys), (self.values, values)):
            brought = torch.empty(*stored.shape[:2], end, stored.shape[3], dtype=self.dtype, device=new.device)
            brought[:, :, :start] = stored[:, :, :start]
            brought[:, :, start:] = new
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

"""`HotUnits`: a pool that holds some units of a cache a second time, in memory that is faster than the cache's.

Keys and values of long contexts may lie in memory that is large and slow to read, a host's beside a GPU. A step then
chooses by metadata alone, which is near, fetches into the pool what it chose and is not there, and attends to the pool.
A unit that is read again soon is found there: it is hot. Room is made by a clock: a hand goes round the slots, lets be
what was used since it passed last, and takes the next other. So as little is looked at as is needed, however large the
pool, and what is used often stays. Of candidates, which keys alone rank, only the keys are fetched; the values of those
that are chosen follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quest_attention.config import QuestConfig, check_integer, check_unit_size
from quest_attention.errors import QuestValueError
from quest_attention.ops.checks import check_cache
from quest_attention.pages import PagedKV

__all__ = ["ABSENT", "HotUnits", "check_pool", "least_slots"]

ABSENT = -1
"""Stands in the table for the slot of a unit that is not in the pool, and for the owner of a slot that is free."""


def least_slots(config: QuestConfig, max_units: int) -> int:
    """Slots of a row that hold what a step reads together: what it selects, or the candidates among which [units].

    A mask may shift what is selected by one unit.
    """
    return min(max_units, max(config.unit_slots + 1, config.candidate_budget))


def check_pool(hot: object) -> None:
    """A pool, where anything may have been given."""
    if not isinstance(hot, HotUnits):
        raise QuestValueError("hot", hot, "a pool that HotUnits.allocate makes")


@dataclass(frozen=True, eq=False)
class HotUnits:
    """Which units of a cache `[B, HKV, capacity, D]` lie in a pool of slots, and the pool; one row a KV head.

    All of it is on the device that attends, so that a step in which units come and go can be captured as a CUDA graph.

    Attributes:
        keys: `[B, HKV, S * unit_size, D]`, contiguous, S slots of a row.
        values: `[B, HKV, S * unit_size, DV]`, likewise.
        table: `[B, HKV, U]` int32, where each unit lies, as a page of the pool, or `ABSENT`.
        owners: `[B, HKV, S]` int32, the unit that each slot holds, or `ABSENT`.
        stamps: `[B, HKV, S]` int32, the fetch that used each slot last, 0 for none since the hand passed it.
        valued: `[B, HKV, S]` uint8, 1 where the values of the owner are in the slot, 0 where only its keys are.
        hands: `[B, HKV]` int32, the slot that the hand of each row comes to next.
        clock: `[B, HKV]` int32, fetches so far.
        counts: `[5]` int64: units that were looked up, those of them that were not there, those whose keys were
            copied and those whose values were, the ones being written among them, which are copied again [units]; and
            tokens whose keys kernels read where the cache is: of a sample, where it is not hot, and of more candidates
            than the pool gets [tokens].
        unit_size: Tokens of a unit [tokens].
        key_scale: Of a cache in 8 bits, else None: see `PagedKV`. The pool holds what the cache does.
        value_scale: Likewise of values.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    owners: Tensor
    stamps: Tensor
    valued: Tensor
    hands: Tensor
    clock: Tensor
    counts: Tensor
    unit_size: int
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @classmethod
    def allocate(
        cls, kv: PagedKV, unit_size: int, slots: int, *, counts: Tensor | None = None, before: HotUnits | None = None
    ) -> HotUnits:
        """An empty pool for a cache.

        Args:
            kv: A contiguous one.
            unit_size: Tokens of a unit, which divide those of a page [tokens].
            slots: Of each row [units].
            counts: To go on counting in.
            before: A pool whose memory may be used again, where it is of the same shape and dtype.

        Raises:
            QuestValueError: Units do not divide a page, or there are no slots.
        """
        check_cache(kv)
        check_unit_size("unit_size", unit_size, kv.page_size)
        check_integer("slots", slots, minimum=1)
        batch, heads, device = kv.batch_size, kv.num_kv_heads, kv.page_table.device
        shape = (batch, heads, slots * unit_size)
        if before is not None and before.is_of(kv, shape):
            keys, values = before.keys, before.values
        else:
            keys = torch.empty(*shape, kv.head_dim, dtype=kv.keys.dtype, device=device)
            values = torch.empty(*shape, kv.values.shape[3], dtype=kv.keys.dtype, device=device)
        units = kv.max_pages * (kv.page_size // unit_size)
        owners = torch.full((batch, heads, slots), ABSENT, dtype=torch.int32, device=device)
        return cls(
            keys, values, owners.new_full((batch, heads, units), ABSENT), owners, torch.zeros_like(owners),
            torch.zeros_like(owners, dtype=torch.uint8), owners.new_zeros(batch, heads), owners.new_zeros(batch, heads),
            owners.new_zeros(5, dtype=torch.int64) if counts is None else counts, unit_size, kv.key_scale,
            kv.value_scale,
        )  # fmt: skip

    def is_of(self, kv: PagedKV, shape: tuple[int, int, int]) -> bool:
        """Whether the pool is of a cache of such heads, and has so many tokens, `[B, HKV, S * unit_size]`."""
        like = (*shape, kv.head_dim), (*shape, kv.values.shape[3])
        same = (tuple(self.keys.shape), tuple(self.values.shape)) == like
        return same and (self.keys.dtype, self.keys.device) == (kv.keys.dtype, kv.page_table.device)

    @property
    def slots(self) -> int:
        """Slots of a row, S [units]."""
        return self.owners.shape[2]

    @cached_property
    def paged(self) -> PagedKV:
        """The pool as pages of one unit each, with a page table of each KV head; nothing is copied."""
        scales = {"key_scale": self.key_scale, "value_scale": self.value_scale}
        return PagedKV.from_pool(self.keys, self.values, self.table, self.unit_size, **scales)

    def forget(self, unit: int) -> None:
        """Have none of the units from this one on, of any row: they are written over, or gone."""
        gone = self.owners >= unit
        self.owners.masked_fill_(gone, ABSENT)
        self.stamps.masked_fill_(gone, 0)
        self.table[:, :, unit:] = ABSENT

    def check(self, kv: PagedKV, unit_size: int, together: int) -> None:
        """Refuse a pool of another cache, of other units, or of fewer slots than are wanted together.

        Raises:
            QuestValueError: It is; or the cache is not contiguous, or has other scales than it had for the pool.
        """
        if kv.contiguous is None:
            raise QuestValueError("kv", "pages that lie apart", "a contiguous cache beside hot units")
        if kv.key_scale is not self.key_scale or kv.value_scale is not self.value_scale:
            raise QuestValueError("kv.key_scale, kv.value_scale", "others", "those that the pool was allocated with")
        shape = (kv.batch_size, kv.num_kv_heads, kv.max_pages * (kv.page_size // self.unit_size))
        if tuple(self.table.shape) != shape or not self.is_of(kv, (*shape[:2], self.slots * self.unit_size)):
            got = f"{list(self.table.shape)} units {self.keys.dtype} on {self.keys.device}"
            raise QuestValueError("hot", got, f"{list(shape)} units {kv.keys.dtype}, as the cache")
        if self.unit_size != unit_size:
            raise QuestValueError("hot.unit_size", self.unit_size, f"{unit_size}, as what is selected")
        if self.slots < together:
            raise QuestValueError("hot.slots", self.slots, f"at least {together}, which a step wants together")

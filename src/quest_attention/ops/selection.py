"""What passes between the verbs: the selected units, and memory to reuse from step to step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.pages import PagedKV

__all__ = ["DecodeWorkspace", "Selection", "Workspace"]


class Selection(NamedTuple):
    """Units to read, one list per sequence and KV head: pages, or runs of fewer tokens that fill a page.

    `select_pages` gives them in ascending order, unused slots last. `sparse_decode_attention` reads any list of
    different units, in any order, and skips what is no unit of the sequence: a negative number, or one past its end.
    Lists may differ in length; those that `select_pages` gives differ between sequences alone.

    Attributes:
        units: `[B, HKV, K]` int32, logical units, -1 in unused slots: unit `u` has the tokens from `u * unit_size` on.
        counts: `[B, HKV]` int32, used slots [units].
        unit_size: Tokens of a unit, which divide those of a page [tokens].
    """

    units: Tensor
    counts: Tensor
    unit_size: int

    def within(self, seq_lens: Tensor | int) -> Selection:
        """The units in which there is a token, ascending, and how many they are; unused slots last.

        Args:
            seq_lens: `[B]` on the device, or the length of every sequence [tokens].
        """
        ends = (seq_lens + self.unit_size - 1) // self.unit_size
        ends = ends[:, None, None] if isinstance(ends, Tensor) else ends
        is_unit = (self.units >= 0) & (self.units < ends)
        last = torch.iinfo(self.units.dtype).max
        units = self.units.masked_fill(~is_unit, last).sort(-1).values
        return Selection(units.masked_fill(units == last, -1), is_unit.sum(-1, dtype=torch.int32), self.unit_size)

    @property
    def units_read(self) -> Tensor:
        """Units of all sequences per KV head: the mean over KV heads, rounded down, `[]` on the device [units]."""
        return self.counts.sum() // max(1, self.counts.shape[1])


class Workspace(Protocol):
    """Scratch memory of a backend's decode step; `ops.make_workspace` allocates it."""

    @property
    def scores(self) -> Tensor | None:
        """Float32, at least one for each sequence, KV head and unit of a step that fits; contiguous. Or None."""
        ...

    def fits(self, kv: PagedKV, num_query_heads: int, config: QuestConfig) -> bool:
        """Whether a step of this shape can use the workspace."""
        ...


class DecodeWorkspace(NamedTuple):
    """Scratch memory of a decode step whose size grows with the context, so that a step allocates none of it.

    Layers that run one after the other can share one workspace; threads must not.

    Attributes:
        scores: `[B, HKV, U]` float32.
        ordered: `[B, HKV, U]` int32.
        keys: `[B, HKV, U]` int64.
        below: `[U]` int64, U - 1 down to 0.
    """

    scores: Tensor
    ordered: Tensor
    keys: Tensor
    below: Tensor

    @classmethod
    def allocate(cls, batch: int, num_kv_heads: int, max_units: int, device: torch.device) -> DecodeWorkspace:
        """Memory for `batch` sequences of up to `max_units` units."""
        shape = (batch, num_kv_heads, max_units)
        return cls(
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(shape, dtype=torch.int64, device=device),
            torch.arange(max_units - 1, -1, -1, dtype=torch.int64, device=device),
        )

    @classmethod
    def for_cache(
        cls, kv: PagedKV, num_query_heads: int, config: QuestConfig, batch_sizes: Iterable[int] | None = None
    ) -> DecodeWorkspace:
        """Memory for steps over a cache, whatever the query heads and the budget; for its own batch alone."""
        del num_query_heads, batch_sizes
        return cls.allocate(kv.batch_size, kv.num_kv_heads, kv.max_pages * config.units_per_page, kv.keys.device)

    def fits(self, kv: PagedKV, num_query_heads: int, config: QuestConfig) -> bool:
        """Whether a step over this cache can use the workspace."""
        del num_query_heads
        shape = (kv.batch_size, kv.num_kv_heads, kv.max_pages * config.units_per_page)
        return self.scores.shape == shape and self.scores.device == kv.keys.device

"""Units of a cache copied into its pool of hot ones: `ops.fetch_units` for the PyTorch path."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_attention.ops.hot_units import ABSENT, HotUnits
from quest_attention.pages import PagedKV

__all__ = ["fetch_units"]


def fetch_units(kv: PagedKV, hot: HotUnits, units: Tensor, seq_lens: Tensor | int, *, is_again: bool = False) -> None:
    """See `ops.fetch_units`. Only what is missing is copied, so the host waits to know what that is."""
    cache, size = kv.contiguous, hot.unit_size
    assert cache is not None, "checked with the step"
    wanted = units.long()
    ends = seq_lens[:, None, None] if isinstance(seq_lens, Tensor) else seq_lens
    is_unit = (wanted >= 0) & (wanted * size < ends)
    slot = hot.table.gather(2, wanted.masked_fill(~is_unit, 0)).long()  # [B, HKV, K], as pages of the pool
    is_hot = is_unit & (slot >= 0)
    is_missing = is_unit & ~is_hot
    hot.clock.add_(1)
    first = torch.arange(hot.owners.shape[0] * hot.owners.shape[1], device=units.device).view(*units.shape[:2], 1)
    first = first * hot.slots  # rows of the pool: pages of a KV head begin behind those of the ones before
    shift = _head_pages(hot, units.device)  # what the head adds to a page's number to make its row
    owners, stamps = hot.owners.view(-1), hot.stamps.view(-1)
    stamps[(slot + shift)[is_hot]] = hot.clock
    oldest = hot.stamps.argsort(dim=2, stable=True)  # slots not used for the longest time; of equals the lower
    nth = is_missing.cumsum(2) - 1
    taken = (oldest.gather(2, nth.clamp(min=0)) + first)[is_missing]  # rows of the pool that the missing ones get
    table = hot.table.view(-1)
    first_unit = first // hot.slots * hot.table.shape[2]
    gone = owners[taken].long()
    begins = first_unit.expand_as(wanted)[is_missing]
    table[(begins + gone)[gone >= 0]] = ABSENT
    owners[taken] = wanted[is_missing].to(torch.int32)
    stamps[taken] = hot.clock
    table[begins + wanted[is_missing]] = (taken - shift.expand_as(wanted)[is_missing]).to(torch.int32)

    # The unit being written has a token more than when it was copied.
    is_copied = is_missing | (is_unit & (wanted == (ends - 1) // size))
    rows = (hot.table.gather(2, wanted.masked_fill(~is_unit, 0)) + shift)[is_copied]
    source = (cache.first_rows * (kv.page_size // size) + wanted)[is_copied]
    for pool, stored in ((hot.keys, cache.keys), (hot.values, cache.values)):
        run = size * pool.shape[3]
        pool.view(-1, run).index_copy_(0, rows, stored.view(-1, run).index_select(0, source))
    hot.counts.add_(torch.stack([is_unit.sum() * (not is_again), is_missing.sum(), is_copied.sum()]))


def _head_pages(hot: HotUnits, device: torch.device) -> Tensor:
    """`[1, HKV, 1]`: a KV head's pages begin so many behind those of the first, as the stride of heads has it."""
    return torch.arange(hot.owners.shape[1], device=device).view(1, -1, 1) * hot.slots

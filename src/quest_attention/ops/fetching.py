"""Units of a cache copied into its pool of hot ones: `ops.fetch_units` for the PyTorch path."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_attention.forms import as_bits
from quest_attention.ops.hot_units import ABSENT, HotUnits
from quest_attention.pages import PagedKV

__all__ = ["fetch_units"]


def fetch_units(
    kv: PagedKV, hot: HotUnits, units: Tensor, seq_lens: Tensor | int, *, is_again: bool = False,
    keys_only: bool = False,
) -> None:  # fmt: skip
    """See `ops.fetch_units`. Only what is missing is copied, so the host waits to know what that is."""
    cache, size = kv.contiguous, hot.unit_size
    assert cache is not None, "checked with the step"
    batch, heads, slots = hot.owners.shape
    wanted = units.long()
    ends = seq_lens[:, None, None] if isinstance(seq_lens, Tensor) else seq_lens
    is_unit = (wanted >= 0) & (wanted * size < ends)
    wanted = wanted.masked_fill(~is_unit, 0)
    page = hot.table.gather(2, wanted)  # [B, HKV, K]
    is_hot = is_unit & (page != ABSENT)
    is_missing = is_unit & ~is_hot

    # All rows of the pool, and all units of the table, one after the other; a page's number begins with the sequence.
    head = torch.arange(heads, device=units.device)[:, None] * slots  # [HKV, 1]
    first_slot = torch.arange(batch, device=units.device)[:, None, None] * (heads * slots) + head  # [B, HKV, 1]
    first_unit = first_slot // slots * hot.table.shape[2]
    table, owners, stamps = hot.table.view(-1), hot.owners.view(-1), hot.stamps.view(-1)
    is_looked_up = is_unit
    if is_again:
        is_looked_up = is_unit & ~(is_hot & (stamps[(page + head).clamp(min=0)] == hot.clock[..., None]))
    hot.clock.add_(1)
    now = hot.clock[..., None].expand_as(wanted)
    stamps[(page + head)[is_hot]] = now[is_hot]
    taken = (_taken(hot, is_missing) + first_slot)[is_missing]
    gone, missing = owners[taken], (first_unit + wanted)[is_missing]
    table[(first_unit.expand_as(wanted)[is_missing] + gone)[gone != ABSENT]] = ABSENT
    owners[taken] = wanted[is_missing].to(torch.int32)
    stamps[taken] = now[is_missing]
    table[missing] = (taken - head.expand_as(wanted)[is_missing]).to(torch.int32)

    # The unit being written has a token more than when it was copied.
    is_new = is_missing | (is_unit & (wanted == (ends - 1) // size))
    place, row = hot.table.gather(2, wanted) + head, cache.first_rows * (kv.page_size // size) + wanted
    valued = hot.valued.view(-1)
    valued[place[is_new]] = 0
    lacks_values = torch.zeros_like(is_new) if keys_only else is_unit & (valued[place.clamp(min=0)] == 0)
    valued[place[lacks_values]] = 1
    for pool, stored, is_copied in ((hot.keys, cache.keys, is_new), (hot.values, cache.values, lacks_values)):
        run = size * pool.shape[3]
        copied = as_bits(stored).view(-1, run).index_select(0, row[is_copied])
        as_bits(pool).view(-1, run).index_copy_(0, place[is_copied], copied)
    hot.counts[:4].add_(torch.stack([part.sum() for part in (is_looked_up, is_missing, is_new, lacks_values)]))


def _taken(hot: HotUnits, is_missing: Tensor) -> Tensor:
    """Slots that the missing units of each row get, `[B, HKV, K]` int64; anything where none is missing.

    All turns of the clock at once: a slot that is passed in the first round and used is reached in the second, so its
    place in the order is that of its round. What this fetch has used comes last.
    """
    slots, stamps, now = hot.slots, hot.stamps, hot.clock[..., None]
    round_trip = (torch.arange(slots, device=stamps.device) - hot.hands[..., None]) % slots  # [B, HKV, S]
    is_used = (stamps != 0).long()
    order = round_trip + slots * (is_used + (stamps == now))
    reached, found = order.sort(2)
    nth = (is_missing.cumsum(2) - 1).clamp(min=0)
    count = is_missing.sum(2, keepdim=True)
    last = (count - 1).clamp(min=0)
    end = reached.gather(2, last)  # where the hand is when the last one is found; what it passed is used no more
    is_passed = (count > 0) & (is_used != 0) & (stamps != now) & (round_trip < end)
    stamps.masked_fill_(is_passed, 0)
    hand = (found.gather(2, last) + 1) % slots
    hot.hands.copy_(torch.where(count > 0, hand, hot.hands[..., None].long())[..., 0])
    return found.gather(2, nth)

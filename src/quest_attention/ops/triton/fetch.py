"""Kernels: units of a cache into its pool of hot ones, in two launches.

place   which of the wanted units of a row are there, and which slots the others get; a program for each row
copy    the keys and values that are not, many rows in flight: the cache may lie in memory that is far
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.ops.hot_units import HotUnits
from quest_attention.ops.triton.arguments import by_head, length_of, lengths_argument, side_by_side
from quest_attention.ops.triton.launch import launch, starts_early, wait_for_launch
from quest_attention.pages import PagedKV

__all__ = ["Pool", "copy_kernel", "fetch_units", "load_keys", "place_kernel", "place_units", "pool_argument"]

_LOOKED_AT = 1024
"""Slots that the hand passes at a time."""
_COPIED = 4096
"""Channels of keys and of values that a program copies."""
KEYS, VALUES = tl.constexpr(1), tl.constexpr(2)
"""Bits that say what of a unit is copied."""


class Pool(NamedTuple):
    """The keys of hot tokens, a page of the pool each, for kernels that read those that they find there.

    Attributes:
        table: `[B * HKV, U]` int32; see `HotUnits`.
        units: Tokens of a row of it, U.
        keys: `[B, HKV, S, D]`.
        head: Numbers from one KV head to the next.
        counts: `[5]` int64; see `HotUnits`.
    """

    table: Any
    units: Any
    keys: Any
    head: Any
    counts: Any


def pool_argument(hot: HotUnits | None) -> Pool | None:
    """A pool of single tokens as an argument; None where there is none."""
    if hot is None:
        return None
    return Pool(hot.table, hot.table.shape[2], hot.keys, hot.keys.stride(1), hot.counts)


def fetch_units(
    kv: PagedKV, hot: HotUnits, units: Tensor, seq_lens: Tensor | int, *, is_again: bool = False,
    keys_only: bool = False,
) -> None:  # fmt: skip
    """See `ops.fetch_units`. The host waits for nothing, so that a CUDA graph can replay it."""
    place_units(kv, hot, units, seq_lens, is_again=is_again, keys_only=keys_only)


def place_units(
    kv: PagedKV, hot: HotUnits, units: Tensor, seq_lens: Tensor | int, *, is_again: bool = False,
    keys_only: bool = False, is_looked_up: bool = True,
) -> Tensor:  # fmt: skip
    """`fetch_units`; gives where the units are then, as pages of the pool, `[B, HKV, K]` int32: 0 for what is none.

    Without `is_looked_up` only what is copied is counted.
    """
    cache, size = kv.contiguous, hot.unit_size
    assert cache is not None, "checked with the step"
    units = side_by_side(units)
    batch, heads, count = units.shape
    places = torch.empty(batch, heads, count, dtype=torch.int32, device=units.device)
    if count == 0:
        return places
    follows = starts_early(units)
    copied, victims = torch.empty_like(places), torch.empty_like(places)
    lengths = lengths_argument(seq_lens)
    launch(
        place_kernel, (batch * heads,),
        by_head(units), lengths, hot.table, hot.owners, hot.stamps, hot.valued, hot.hands, hot.clock, hot.counts,
        places, copied, victims, heads, count, hot.table.shape[2], hot.slots,
        SIZE=size, IS_AGAIN=is_again, KEYS_ONLY=keys_only, COUNTS=is_looked_up,
        BLOCK_K=max(16, triton.next_power_of_2(count)),
        BLOCK_S=min(_LOOKED_AT, max(16, triton.next_power_of_2(hot.slots))), num_warps=8, **follows,
    )  # fmt: skip
    dim, width = hot.keys.shape[3], hot.values.shape[3]
    block_d, block_dv = (max(16, triton.next_power_of_2(each)) for each in (dim, width))
    block_t = max(1, _COPIED // max(block_d, block_dv))
    parts = triton.cdiv(count * size, block_t)
    launch(
        copy_kernel, (batch * heads * parts,),
        by_head(units), cache.keys, cache.values, hot.keys, hot.values, places, copied, heads, count,
        cache.keys.shape[2], hot.slots, parts,
        SIZE=size, DIM=dim, WIDTH=width, KEYS_ONLY=keys_only, BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_DV=block_dv,
        num_warps=4, **follows,
    )  # fmt: skip
    return places


@triton.jit(do_not_specialize=["lengths", "num_kv_heads", "count", "max_units", "slots"])
def place_kernel(
    units, lengths, table, owners, stamps, valued, hands, clock, counts, places, copied, victims, num_kv_heads, count,
    max_units, slots,
    SIZE: tl.constexpr, IS_AGAIN: tl.constexpr, KEYS_ONLY: tl.constexpr, COUNTS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """The clock of a row: see `reference.fetch_units`. `copied` has of each unit what is to be copied of it."""
    row = tl.program_id(0)
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    wait_for_launch(FOLLOWS)
    end = length_of(lengths, b)
    now = tl.load(clock + row) + 1
    row_table = table + row.to(tl.int64) * max_units
    row_owners = owners + row.to(tl.int64) * slots
    row_stamps = stamps + row.to(tl.int64) * slots
    row_lists = row.to(tl.int64) * count
    first = (b * num_kv_heads * slots).to(tl.int32)  # of the sequence's pages in the pool
    k = tl.arange(0, BLOCK_K)
    unit = tl.load(units.base + b * units.row + h * units.head + k, mask=k < count, other=-1)
    is_unit = (unit >= 0) & (unit * SIZE < end)
    page = tl.load(row_table + unit, mask=is_unit, other=-1)
    is_missing = is_unit & (page < 0)
    is_hot = is_unit & (page >= 0)
    is_looked_up = is_unit
    if IS_AGAIN:
        is_looked_up &= tl.load(row_stamps + (page - first), mask=is_hot, other=now) != now - 1
        tl.debug_barrier()  # every thread has loaded what is written over: several load the same, and one writes
    tl.store(row_stamps + (page - first), now, mask=is_hot)
    wanted = tl.sum(is_missing.to(tl.int32))
    found = 0
    hand = tl.load(hands + row)
    here = tl.arange(0, BLOCK_S)
    passed = 0  # no more than twice all slots: in the second round none is used but by this fetch
    while (found < wanted) & (passed < 2 * slots):
        tl.debug_barrier()  # other threads have written what is loaded here
        ahead = passed + here
        slot = (hand + ahead) % slots
        # A block ends with the round, so that no slot is in it twice.
        is_here = (ahead < 2 * slots) & (ahead // slots == passed // slots)
        stamp = tl.load(row_stamps + slot, mask=is_here, other=now)
        is_free = is_here & (stamp == 0)
        nth = found + tl.cumsum(is_free.to(tl.int32)) - 1
        is_taken = is_free & (nth < wanted)
        # What lies behind the last one that is taken the hand has not come to.
        is_passed = is_here & (nth + (~is_free).to(tl.int32) < wanted)
        tl.debug_barrier()  # as above
        tl.store(row_stamps + slot, 0, mask=is_passed & ~is_free & (stamp != now))
        tl.store(row_stamps + slot, now, mask=is_taken)
        gone = tl.load(row_owners + slot, mask=is_taken, other=-1)
        tl.store(row_table + gone, -1, mask=is_taken & (gone >= 0))
        tl.store(victims + row_lists + nth, slot, mask=is_taken)
        passed += tl.sum(is_passed.to(tl.int32))
        found += tl.sum(is_taken.to(tl.int32))
    tl.debug_barrier()
    tl.store(clock + row, now)
    tl.store(hands + row, (hand + passed) % slots)
    nth = tl.cumsum(is_missing.to(tl.int32)) - 1
    slot = tl.load(victims + row_lists + nth, mask=is_missing, other=0)
    tl.store(row_table + unit, first + slot, mask=is_missing)
    tl.store(row_owners + slot, unit, mask=is_missing)
    is_new = is_missing | (is_unit & (unit == (end - 1) // SIZE))  # the one being written has a token more
    place = tl.where(is_missing, first + slot, page)
    row_valued = valued + row.to(tl.int64) * slots + (place - first)
    parts = tl.where(is_new, KEYS, 0)
    if KEYS_ONLY:
        tl.store(row_valued, 0, mask=is_new)
    else:
        lacks_values = is_new | (is_hot & (tl.load(row_valued, mask=is_hot, other=1) == 0))
        tl.debug_barrier()
        tl.store(row_valued, 1, mask=lacks_values)
        tl.atomic_add(counts + 3, tl.sum(lacks_values.to(tl.int64)))
        parts += tl.where(lacks_values, VALUES, 0)
    tl.store(places + row_lists + k, tl.where(is_unit, place, 0), mask=k < count)
    tl.store(copied + row_lists + k, parts, mask=k < count)
    if COUNTS:
        tl.atomic_add(counts, tl.sum(is_looked_up.to(tl.int64)))
        tl.atomic_add(counts + 1, wanted.to(tl.int64))
    tl.atomic_add(counts + 2, tl.sum(is_new.to(tl.int64)))


@triton.jit
def load_keys(keys, pool, row, h, physical, token, is_live, newest, SHAPE: tl.constexpr):
    """Keys of some tokens of a row, `[N, BLOCK_D]`: from the pool where there is one and they are hot, else in place.

    The pool may hold what was there before the `newest` token, which its fetch copies each time: that is read in place.
    """
    channel = tl.arange(0, SHAPE.block_d)
    offset = (token % SHAPE.page_size).to(tl.int64) * keys.token
    at = keys.base + h * keys.head + physical.to(tl.int64) * keys.page + offset
    inside = is_live[:, None] & (channel < SHAPE.head_dim)[None, :]
    if pool is None:
        k = tl.load(at[:, None] + channel[None, :], mask=inside, other=0.0)
    else:
        is_looked_up = is_live & (token != newest)
        page = tl.load(pool.table + row.to(tl.int64) * pool.units + token, mask=is_looked_up, other=-1)
        is_hot = (page >= 0)[:, None]
        tl.atomic_add(pool.counts + 4, tl.sum((is_live & (page < 0)).to(tl.int64)))
        near = pool.keys + h * pool.head + page.to(tl.int64) * SHAPE.head_dim
        far = tl.load(at[:, None] + channel[None, :], mask=inside & ~is_hot, other=0.0)
        k = tl.where(is_hot, tl.load(near[:, None] + channel[None, :], mask=inside & is_hot, other=0.0), far)
    return k


@triton.jit(do_not_specialize=["num_kv_heads", "count", "capacity", "slots", "parts"])
def copy_kernel(
    units, keys, values, hot_keys, hot_values, places, copied, num_kv_heads, count, capacity, slots, parts,
    SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS_ONLY: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """Some tokens of a row's list from the cache to the pool, keys and values in one go."""
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    token = part * BLOCK_T + tl.arange(0, BLOCK_T)
    at = token // SIZE
    is_listed = at < count
    wait_for_launch(FOLLOWS)
    lists = row.to(tl.int64) * count
    parts_copied = tl.load(copied + lists + at, mask=is_listed, other=0)
    is_copied = parts_copied != 0
    unit = tl.load(units.base + b * units.row + h * units.head + at, mask=is_copied, other=0).to(tl.int64)
    place = tl.load(places + lists + at, mask=is_copied, other=0).to(tl.int64) + h * slots
    source = row.to(tl.int64) * capacity + unit * SIZE + token % SIZE
    to = place * SIZE + token % SIZE
    channel = tl.arange(0, BLOCK_D)
    inside = (parts_copied & KEYS != 0)[:, None] & (channel < DIM)[None, :]
    k = tl.load(keys + source[:, None] * DIM + channel[None, :], mask=inside, other=0.0)
    if not KEYS_ONLY:
        value_channel = tl.arange(0, BLOCK_DV)
        value_inside = (parts_copied & VALUES != 0)[:, None] & (value_channel < WIDTH)[None, :]
        v = tl.load(values + source[:, None] * WIDTH + value_channel[None, :], mask=value_inside, other=0.0)
        tl.store(hot_values + to[:, None] * WIDTH + value_channel[None, :], v, mask=value_inside)
    tl.store(hot_keys + to[:, None] * DIM + channel[None, :], k, mask=inside)

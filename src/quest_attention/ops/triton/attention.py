"""Kernels: attend to the tokens of the selected units, split over programs and merged by log-sum-exp.

A list of units to read holds the place of each in the cache: its physical page times the units of a page, plus where in
the page it lies. Where units are pages, that is the page.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.ops.selection import Selection
from quest_attention.ops.step import Step
from quest_attention.ops.triton.arguments import (
    Shape,
    by_head,
    keys_argument,
    length_of,
    lengths_argument,
    load_query,
    shape_of,
    side_by_side,
    values_argument,
)
from quest_attention.ops.triton.arithmetic import LOG2_E, cap, dot, round_to, widen
from quest_attention.ops.triton.launch import check_kernel_dtype, launch
from quest_attention.ops.triton.merge import LOWEST, Partial, merge_kernel, store_partial
from quest_attention.ops.triton.tuning import ATTEND_STAGES, attended_block, attending_programs

__all__ = ["attend_slots", "attend_splits", "merge_found", "place_of", "sparse_decode_attention"]

_LISTED = 128
"""Units a program looks up in the page table at a time."""


def sparse_decode_attention(
    step: Step, selected: Selection, *, return_lse: bool = False, is_own: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See `ops.sparse_decode_attention`; whoever chose the units, the kernel looks."""
    return merge_found(step, *attend_splits(step, selected), return_lse=return_lse)


def attend_splits(step: Step, selected: Selection, *, room: int = 0) -> tuple[Partial, Shape]:
    """What the splits of each row found, not merged yet; `room` is for so many more, which are left to be written."""
    kv, token_mask, softcap = step.kv, step.token_mask, step.softcap
    check_kernel_dtype(kv.keys)
    query, table, units = side_by_side(step.query), side_by_side(kv.page_table), side_by_side(selected.units)
    batch, heads = kv.batch_size, kv.num_kv_heads
    group, width, device = query.shape[1] // heads, kv.values.shape[-1], query.device
    slots = units.shape[2]
    splits = attending_programs(slots, selected.unit_size, batch * heads, device)
    found = Partial(
        torch.empty(batch * heads, splits + room, group, width, dtype=torch.float32, device=device),
        torch.empty(batch * heads, splits + room, group, dtype=torch.float32, device=device),
    )
    places = torch.empty(batch * heads, slots, dtype=torch.int32, device=device)
    mask = None if token_mask is None else side_by_side(token_mask)
    shape = shape_of(kv.page_size, group, kv.head_dim, width, unit=selected.unit_size, multiplies=True)
    launch(
        _attend_kernel, (batch * heads * splits,),
        by_head(query), keys_argument(kv), values_argument(kv), table, table.stride(0),
        table.stride(1) if kv.has_table_by_head else 0,
        lengths_argument(step.seq_lens), by_head(units), mask, 0 if mask is None else mask.stride(0),
        0 if mask is None else mask.shape[1], places, None if mask is None else torch.empty_like(places), found,
        float(step.scale), None if softcap is None else float(softcap), heads, slots, splits, splits + room,
        triton.cdiv(slots, splits),
        SHAPE=shape, BLOCK_L=_LISTED, BLOCK_T=attended_block(kv), STAGES=ATTEND_STAGES, num_warps=4,
    )  # fmt: skip
    return found, shape


def merge_found(step: Step, found: Partial, shape: Shape, *, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """The output `[B, HQ, DV]` of all splits together, with sinks, and the log-sum-exp where it is asked for."""
    query, sinks, heads = step.query, step.sinks, step.kv.num_kv_heads
    batch, group, splits = query.shape[0], query.shape[1] // heads, found.partial.shape[1]
    output = torch.empty(*query.shape[:2], shape.value_dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if return_lse else None
    launch(
        merge_kernel, (batch * heads * triton.cdiv(group, shape.merged),),
        by_head(output), found, None if sinks is None else side_by_side(sinks), lse, heads, splits,
        SHAPE=shape, BLOCK_S=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return output, lse


@triton.jit
def attend_slots(
    q, keys, values, h, places, units, first_token, last_token, mask_row, mask_width, scale, softcap,
    SHAPE: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of `q` over tokens `first_token` to `last_token` of one row, counted along its list of units.

    `q` is `[BLOCK_G, BLOCK_D]`. The list is in the order of the sequence: the `places` of the units to read and, looked
    at where there is a mask, the logical `units` themselves.

    Returns:
        Largest logit in base 2 and sum of weights, `[BLOCK_G]` each, and the weighted values `[BLOCK_G, BLOCK_DV]`.
    """
    BLOCK_G: tl.constexpr = SHAPE.block_g
    BLOCK_DV: tl.constexpr = SHAPE.block_dv
    PER_PAGE: tl.constexpr = SHAPE.page_size // SHAPE.unit
    channel = tl.arange(0, SHAPE.block_d)
    value_channel = tl.arange(0, BLOCK_DV)
    # Without a matrix product each token of the block keeps a softmax of its own, merged once at the end: nothing
    # crosses warps in the loop.
    LANES: tl.constexpr = BLOCK_T if BLOCK_G == 1 else BLOCK_G
    largest = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    gathered = tl.zeros([LANES, BLOCK_DV], tl.float32)
    if keys.scale is not None:
        scale = scale * tl.load(keys.scale + h * keys.scale_head)
    for start in tl.range(first_token, last_token, BLOCK_T, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_T)
        slot = token // SHAPE.unit
        offset = token % SHAPE.unit
        is_live = token < last_token
        # Written in this very launch, in the fused kernel on another multiprocessor: past the L1 cache. One list to
        # look up, not two: the compiler's pipeline is as deep as the loads that wait for one another.
        place = tl.load(places + slot, mask=is_live, other=0, cache_modifier=".cg").to(tl.int64)
        if mask_row is not None:
            position = tl.load(units + slot, mask=is_live, other=0) * SHAPE.unit + offset
            known = is_live & (position < mask_width)
            is_live = is_live & (tl.load(mask_row + position, mask=known, other=0) != 0)
        page, offset = place, offset.to(tl.int64)
        if SHAPE.unit != SHAPE.page_size:
            page, offset = place // PER_PAGE, place % PER_PAGE * SHAPE.unit + offset
        key_at = keys.base + h * keys.head + (page * keys.page + offset * keys.token)[:, None] + channel[None, :]
        k = tl.load(key_at, mask=is_live[:, None] & (channel < SHAPE.head_dim)[None, :], other=0.0)
        value_at = values.base + h * values.head + (page * values.page + offset * values.token)[:, None]
        value_at = value_at + value_channel[None, :]
        v = tl.load(value_at, mask=is_live[:, None] & (value_channel < SHAPE.value_dim)[None, :], other=0.0)
        if BLOCK_G == 1:
            logit = cap(tl.sum(q.to(tl.float32) * widen(k, tl.float32), 1) * scale, softcap) * LOG2_E
            new_largest = tl.where(is_live, tl.maximum(largest, logit), largest)
            weight = tl.where(is_live, tl.exp2(logit - new_largest), 0.0)
            shrink = tl.exp2(largest - new_largest)
            total = total * shrink + weight
            gathered = gathered * shrink[:, None] + weight[:, None] * widen(v, tl.float32)
        else:
            logit = dot(q, tl.trans(widen(k, q.dtype)), tl.zeros([BLOCK_G, BLOCK_T], tl.float32))
            logit = tl.where(is_live[None, :], cap(logit * scale, softcap) * LOG2_E, LOWEST)
            new_largest = tl.maximum(largest, tl.max(logit, 1))
            weight = tl.where(is_live[None, :], tl.exp2(logit - new_largest[:, None]), 0.0)
            shrink = tl.exp2(largest - new_largest)
            v = widen(v, q.dtype)
            rounded = round_to(weight, v.dtype)
            total = total * shrink + tl.sum(rounded.to(tl.float32), 1)  # of what is multiplied: rounding cancels
            gathered = dot(rounded, v, gathered * shrink[:, None])
        largest = new_largest
    if BLOCK_G == 1:
        top = tl.max(largest, 0)
        weight = tl.exp2(largest - top)
        gathered = tl.sum(gathered * weight[:, None], 0)[None, :]
        total = tl.sum(total * weight, 0) + tl.zeros([1], tl.float32)
        largest = top + tl.zeros([1], tl.float32)
    if values.scale is not None:
        gathered = gathered * tl.load(values.scale + h * values.scale_head)
    return largest, total, gathered


@triton.jit
def place_of(table, unit, is_live, SHAPE: tl.constexpr):
    """Where some units of a sequence lie: see above."""
    PER_PAGE: tl.constexpr = SHAPE.page_size // SHAPE.unit
    if PER_PAGE == 1:
        place = tl.load(table + unit, mask=is_live, other=0)
    else:
        place = tl.load(table + unit // PER_PAGE, mask=is_live, other=0) * PER_PAGE + (unit % PER_PAGE).to(tl.int32)
    return place


@triton.jit
def _look_up(
    units, table, places, logical, first_slot, last_slot, end, SHAPE: tl.constexpr, BLOCK_L: tl.constexpr
):  # fmt: skip
    """List the units of a sequence that some slots of a row name, one after the other, the newest of them last.

    Returns:
        The tokens on the list, which end where the sequence does.
    """
    total = tl.cdiv(end, SHAPE.unit)
    found = tl.full([], 0, tl.int64)  # how many, and from bit 24 on the sum of where they stand
    newest = tl.full([], -1, tl.int64)  # where it stands, and from bit 32 on the unit
    for first in range(first_slot, last_slot, BLOCK_L):
        slot = first + tl.arange(0, BLOCK_L)
        unit = tl.load(units + slot, mask=slot < last_slot, other=-1)
        is_live = (unit >= 0) & (unit < total)
        tl.store(places + slot, place_of(table, unit, is_live, SHAPE), mask=is_live)
        if logical is not None:
            tl.store(logical + slot, unit, mask=is_live)
        stand = (slot - first_slot).to(tl.int64)
        found += tl.sum(tl.where(is_live, (stand << 24) + 1, 0))
        newest = tl.maximum(newest, tl.max(tl.where(is_live, (unit.to(tl.int64) << 32) + stand, -1)))
    count = found & 0xFFFFFF
    newest_stand = newest & 0xFFFFFFFF
    # Without a gap the sum is the least that so many can have. `select_pages` leaves none.
    is_in_order = (found >> 24 == count * (count - 1) // 2) & (newest_stand == count - 1)
    if (count > 0) & (is_in_order == 0):
        tl.debug_barrier()  # what was written above is written over
        kept = 0
        for first in range(first_slot, last_slot, BLOCK_L):
            slot = first + tl.arange(0, BLOCK_L)
            unit = tl.load(units + slot, mask=slot < last_slot, other=-1)
            is_kept = (unit >= 0) & (unit < total) & (slot - first_slot != newest_stand)
            at = first_slot + kept + tl.cumsum(is_kept.to(tl.int32)) - 1
            tl.store(places + at, place_of(table, unit, is_kept, SHAPE), mask=is_kept)
            if logical is not None:
                tl.store(logical + at, unit, mask=is_kept)
            kept += tl.sum(is_kept.to(tl.int32))
        tl.store(places + first_slot + kept, place_of(table, newest >> 32, newest >= 0, SHAPE))
        if logical is not None:
            tl.store(logical + first_slot + kept, (newest >> 32).to(tl.int32))
    past = tl.maximum(0, ((newest >> 32).to(tl.int32) + 1) * SHAPE.unit - end)
    return tl.where(count > 0, count.to(tl.int32) * SHAPE.unit - past, 0)


@triton.jit(do_not_specialize=["lengths", "mask_width", "slots", "splits", "all_splits", "units_per_split"])
def _attend_kernel(
    query, keys, values, page_table, table_stride, table_head, lengths, units, token_mask, mask_stride, mask_width,
    places, logical, found, scale, softcap, num_kv_heads, slots, splits, all_splits, units_per_split,
    SHAPE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = program % splits
    row = program // splits
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = length_of(lengths, b)
    q = load_query(query, b, h, SHAPE)
    row_units = units.base + b * units.row + h * units.head
    row_table = page_table + b * table_stride + h * table_head
    row_places = places + row.to(tl.int64) * slots
    row_logical = logical
    mask_row = token_mask
    if token_mask is not None:
        row_logical = logical + row.to(tl.int64) * slots
        mask_row = token_mask + b * mask_stride
    first = split * units_per_split
    last = tl.minimum(first + units_per_split, slots)
    held = _look_up(row_units, row_table, row_places, row_logical, first, last, end, SHAPE, BLOCK_L)
    tl.debug_barrier()  # the list is read by other threads than those that wrote it
    largest, total, gathered = attend_slots(
        q, keys, values, h, row_places, row_logical, first * SHAPE.unit, first * SHAPE.unit + held,
        mask_row, mask_width, scale, softcap, SHAPE, BLOCK_T, STAGES,
    )  # fmt: skip
    store_partial(found, row, split, all_splits, largest, total, gathered, SHAPE)

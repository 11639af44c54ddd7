"""Kernels: attend to the tokens of the selected pages, split over programs and merged by log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.ops.selection import Selection
from quest_attention.ops.step import Step
from quest_attention.ops.triton.launch import (
    LOG2_E,
    check_kernel_dtype,
    dot,
    launch,
    lengths_argument,
    narrow,
    side_by_side,
)
from quest_attention.ops.triton.merge import heads_merged_at_once, merge_kernel, store_partial
from quest_attention.ops.triton.scores import dot_block, load_query
from quest_attention.ops.triton.tuning import ATTEND_STAGES, attended_block, attending_programs

__all__ = ["attend_slots", "sparse_decode_attention"]

_LOWEST = tl.constexpr(-1e30)
"""Stands for the largest logit where there was none: finite, so that no difference is NaN."""

_LISTED = 128
"""Pages a program looks up in the page table at a time."""


def sparse_decode_attention(
    step: Step, selected: Selection, *, return_lse: bool = False, is_own: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See `ops.sparse_decode_attention`; whoever chose the pages, the kernel looks."""
    kv, seq_lens, token_mask, softcap, sinks = step.kv, step.seq_lens, step.token_mask, step.softcap, step.sinks
    check_kernel_dtype(kv.keys)
    query, table, pages = side_by_side(step.query), side_by_side(kv.page_table), side_by_side(selected.pages)
    batch, heads = kv.batch_size, kv.num_kv_heads
    group, width, device = query.shape[1] // heads, kv.values.shape[-1], query.device
    slots = pages.shape[2]
    output = torch.empty(batch, query.shape[1], width, dtype=query.dtype, device=device)
    lse = torch.empty(batch, query.shape[1], dtype=torch.float32, device=device) if return_lse else None
    splits = attending_programs(slots, kv.page_size, batch * heads, device)
    partial = torch.empty(batch * heads, splits, group, width, dtype=torch.float32, device=device)
    partial_lse = torch.empty(batch * heads, splits, group, dtype=torch.float32, device=device)
    physical = torch.empty(batch * heads, slots, dtype=torch.int32, device=device)
    logical = physical if token_mask is None else torch.empty_like(physical)
    lengths, length = lengths_argument(seq_lens, table)
    mask = query if token_mask is None else side_by_side(token_mask)
    merge_heads = heads_merged_at_once(group)
    launch(
        _attend_kernel,
        (batch * heads * splits,),
        query,
        kv.keys,
        kv.values,
        table,
        lengths,
        length,
        pages,
        mask,
        0 if token_mask is None else token_mask.shape[1],
        physical,
        logical,
        partial,
        partial_lse,
        float(step.scale),
        float(softcap or 0.0),
        *query.stride()[:2],
        *kv.keys.stride()[:3],
        *kv.values.stride()[:3],
        table.stride(0),
        *pages.stride()[:2],
        0 if token_mask is None else mask.stride(0),
        heads,
        slots,
        splits,
        triton.cdiv(slots, splits),
        RAGGED=isinstance(seq_lens, Tensor),
        MASKED=token_mask is not None,
        SOFTCAP=softcap is not None,
        PAGE_SIZE=kv.page_size,
        GROUP=group,
        BLOCK_G=dot_block(group),
        HEAD_DIM=kv.head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(kv.head_dim)),
        VALUE_DIM=width,
        BLOCK_DV=max(16, triton.next_power_of_2(width)),
        BLOCK_L=_LISTED,
        BLOCK_T=attended_block(kv),
        STAGES=ATTEND_STAGES,
        num_warps=4,
    )
    launch(
        merge_kernel,
        (batch * heads * triton.cdiv(group, merge_heads),),
        partial,
        partial_lse,
        query if sinks is None else side_by_side(sinks),
        output,
        output if lse is None else lse,
        *output.stride()[:2],
        heads,
        splits,
        HAS_SINKS=sinks is not None,
        WITH_LSE=return_lse,
        GROUP=group,
        HEADS=merge_heads,
        VALUE_DIM=width,
        BLOCK_DV=triton.next_power_of_2(width),
        BLOCK_S=triton.next_power_of_2(splits),
        num_warps=4,
    )
    return output, lse


@triton.jit
def attend_slots(
    q,  # [BLOCK_G, BLOCK_D]
    keys,  # of the row's head
    values,  # of the row's head
    physical,  # of the row: the pages to read, in the order of the sequence
    pages,  # of the row: the same as logical pages; read where MASKED
    first_token,
    last_token,
    mask_row,
    mask_width,
    scale,
    softcap,
    key_page_stride,
    key_token_stride,
    value_page_stride,
    value_token_stride,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention over tokens `first_token` to `last_token` of one row, counted along its list of pages.

    Returns:
        Largest logit in base 2 and sum of weights, `[BLOCK_G]` each, and the weighted values `[BLOCK_G, BLOCK_DV]`.
    """
    channel = tl.arange(0, BLOCK_D)
    value_channel = tl.arange(0, BLOCK_DV)
    # Without a matrix product each token of the block keeps a softmax of its own, merged once at the end: nothing
    # crosses warps in the loop.
    LANES: tl.constexpr = BLOCK_T if BLOCK_G == 1 else BLOCK_G
    largest = tl.full([LANES], _LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    gathered = tl.zeros([LANES, BLOCK_DV], tl.float32)
    for start in tl.range(first_token, last_token, BLOCK_T, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_T)
        slot = token // PAGE_SIZE
        offset = token % PAGE_SIZE
        is_live = token < last_token
        # Written in this very launch, in the fused kernel on another multiprocessor: past the L1 cache. One list to
        # look up, not two: the compiler's pipeline is as deep as the loads that wait for one another.
        page = tl.load(physical + slot, mask=is_live, other=0, cache_modifier=".cg").to(tl.int64)
        if MASKED:
            position = tl.load(pages + slot, mask=is_live, other=0) * PAGE_SIZE + offset
            known = is_live & (position < mask_width)
            is_live = is_live & (tl.load(mask_row + position, mask=known, other=0) != 0)
        offset = offset.to(tl.int64)
        key_at = keys + (page * key_page_stride + offset * key_token_stride)[:, None] + channel[None, :]
        k = tl.load(key_at, mask=is_live[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
        value_at = values + (page * value_page_stride + offset * value_token_stride)[:, None]
        value_at = value_at + value_channel[None, :]
        v = tl.load(value_at, mask=is_live[:, None] & (value_channel < VALUE_DIM)[None, :], other=0.0)
        if BLOCK_G == 1:
            logit = _cap(tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale, softcap, SOFTCAP)
            new_largest = tl.where(is_live, tl.maximum(largest, logit), largest)
            weight = tl.where(is_live, tl.exp2(logit - new_largest), 0.0)
            shrink = tl.exp2(largest - new_largest)
            total = total * shrink + weight
            gathered = gathered * shrink[:, None] + weight[:, None] * v.to(tl.float32)
        else:
            logit = dot(q, tl.trans(k), tl.zeros([BLOCK_G, BLOCK_T], tl.float32))
            logit = tl.where(is_live[None, :], _cap(logit * scale, softcap, SOFTCAP), _LOWEST)
            new_largest = tl.maximum(largest, tl.max(logit, 1))
            weight = tl.where(is_live[None, :], tl.exp2(logit - new_largest[:, None]), 0.0)
            shrink = tl.exp2(largest - new_largest)
            rounded = narrow(weight, v.dtype)
            total = total * shrink + tl.sum(rounded.to(tl.float32), 1)  # of what is multiplied: rounding cancels
            gathered = dot(rounded, v, gathered * shrink[:, None])
        largest = new_largest
    if BLOCK_G == 1:
        top = tl.max(largest, 0)
        weight = tl.exp2(largest - top)
        gathered = tl.sum(gathered * weight[:, None], 0)[None, :]
        total = tl.sum(total * weight, 0) + tl.zeros([1], tl.float32)
        largest = top + tl.zeros([1], tl.float32)
    return largest, total, gathered


@triton.jit
def _look_up(
    pages,
    table,
    physical,
    logical,
    first_slot,
    last_slot,
    end,
    MASKED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """List the pages of a sequence that some slots of a row name, one after the other, the newest of them last.

    Returns:
        The tokens on the list, which end where the sequence does.
    """
    total = tl.cdiv(end, PAGE_SIZE)
    found = tl.full([], 0, tl.int64)  # how many, and from bit 24 on the sum of their places
    newest = tl.full([], -1, tl.int64)  # its place, and from bit 32 on the page
    for first in range(first_slot, last_slot, BLOCK_L):
        slot = first + tl.arange(0, BLOCK_L)
        page = tl.load(pages + slot, mask=slot < last_slot, other=-1)
        is_live = (page >= 0) & (page < total)
        tl.store(physical + slot, tl.load(table + page, mask=is_live, other=0), mask=is_live)
        if MASKED:
            tl.store(logical + slot, page, mask=is_live)
        place = (slot - first_slot).to(tl.int64)
        found += tl.sum(tl.where(is_live, (place << 24) + 1, 0))
        newest = tl.maximum(newest, tl.max(tl.where(is_live, (page.to(tl.int64) << 32) + place, -1)))
    count = found & 0xFFFFFF
    newest_place = newest & 0xFFFFFFFF
    # Without a gap the sum of the places is the least that so many can have. `select_pages` leaves none.
    is_in_order = (found >> 24 == count * (count - 1) // 2) & (newest_place == count - 1)
    if (count > 0) & (is_in_order == 0):
        tl.debug_barrier()  # what was written above is written over
        kept = 0
        for first in range(first_slot, last_slot, BLOCK_L):
            slot = first + tl.arange(0, BLOCK_L)
            page = tl.load(pages + slot, mask=slot < last_slot, other=-1)
            is_kept = (page >= 0) & (page < total) & (slot - first_slot != newest_place)
            at = first_slot + kept + tl.cumsum(is_kept.to(tl.int32)) - 1
            tl.store(physical + at, tl.load(table + page, mask=is_kept, other=0), mask=is_kept)
            if MASKED:
                tl.store(logical + at, page, mask=is_kept)
            kept += tl.sum(is_kept.to(tl.int32))
        tl.store(physical + first_slot + kept, tl.load(table + (newest >> 32)))
        if MASKED:
            tl.store(logical + first_slot + kept, (newest >> 32).to(tl.int32))
    past = tl.maximum(0, ((newest >> 32).to(tl.int32) + 1) * PAGE_SIZE - end)
    return tl.where(count > 0, count.to(tl.int32) * PAGE_SIZE - past, 0)


@triton.jit
def _cap(logit, softcap, SOFTCAP: tl.constexpr):
    """Scaled logits in base 2, capped if asked."""
    if SOFTCAP:
        logit = softcap * _tanh(logit / softcap)
    return logit * LOG2_E


@triton.jit
def _tanh(x):
    """From the exponential, which Triton's interpreter has too: off by a few float32 roundings of 1."""
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit(do_not_specialize=["length", "mask_width", "slots", "splits", "pages_per_split"])
def _attend_kernel(
    query,
    keys,
    values,
    page_table,
    seq_lens,
    length,
    pages,
    token_mask,
    mask_width,
    physical,
    logical,
    partial,
    partial_lse,
    scale,
    softcap,
    query_batch_stride,
    query_head_stride,
    key_page_stride,
    key_token_stride,
    key_head_stride,
    value_page_stride,
    value_token_stride,
    value_head_stride,
    table_stride,
    pages_batch_stride,
    pages_head_stride,
    mask_stride,
    num_kv_heads,
    slots,
    splits,
    pages_per_split,
    RAGGED: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    split = program % splits
    row = program // splits
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = length
    if RAGGED:
        end = tl.load(seq_lens + b).to(tl.int32)
    head = tl.arange(0, BLOCK_G)
    q = load_query(
        query + b * query_batch_stride + h * GROUP * query_head_stride,
        query_head_stride,
        GROUP,
        BLOCK_G,
        HEAD_DIM,
        BLOCK_D,
    )
    row_pages = pages + b * pages_batch_stride + h * pages_head_stride
    row_physical = physical + row.to(tl.int64) * slots
    row_logical = logical + row.to(tl.int64) * slots
    first_slot = split * pages_per_split
    held = _look_up(
        row_pages,
        page_table + b * table_stride,
        row_physical,
        row_logical,
        first_slot,
        tl.minimum(first_slot + pages_per_split, slots),
        end,
        MASKED,
        PAGE_SIZE,
        BLOCK_L,
    )
    tl.debug_barrier()  # the list is read by other threads than those that wrote it
    largest, total, gathered = attend_slots(
        q,
        keys + h * key_head_stride,
        values + h * value_head_stride,
        row_physical,
        row_logical,
        first_slot * PAGE_SIZE,
        first_slot * PAGE_SIZE + held,
        token_mask + b * mask_stride,
        mask_width,
        scale,
        softcap,
        key_page_stride,
        key_token_stride,
        value_page_stride,
        value_token_stride,
        MASKED,
        SOFTCAP,
        PAGE_SIZE,
        BLOCK_G,
        HEAD_DIM,
        BLOCK_D,
        VALUE_DIM,
        BLOCK_DV,
        BLOCK_T,
        STAGES,
    )
    at = (row.to(tl.int64) * splits + split) * GROUP + head
    store_partial(partial, partial_lse, at, largest, total, gathered, GROUP, BLOCK_G, VALUE_DIM, BLOCK_DV)

"""Kernels: what the splits of a row found, written and merged by log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from quest_attention.ops.triton.launch import LOG2_E, narrow

__all__ = ["heads_merged_at_once", "merge_kernel", "merge_splits", "store_partial"]

_LOWEST = tl.constexpr(-1e30)
"""Stands for the largest logit where there was none: finite, so that no difference is NaN."""
_MERGE_ELEMENTS = tl.constexpr(2048)
"""Channels of partial results that a merging program adds up at a time."""
_MERGES_IN_FLIGHT = tl.constexpr(4)
"""Such portions asked for before the first is added: the merge waits for memory, not for bandwidth."""


def heads_merged_at_once(group: int) -> int:
    """Query heads whose partial results one program merges side by side."""
    return min(4, int(triton.next_power_of_2(group)))


@triton.jit
def store_partial(
    partial,
    partial_lse,
    at,  # [BLOCK_G]
    largest,
    total,
    gathered,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Write what one split found: its output and the base-2 log-sum-exp that weighs it."""
    is_head = tl.arange(0, BLOCK_G) < GROUP
    channel = tl.arange(0, BLOCK_DV)
    divisor = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, largest + tl.log2(divisor), float("-inf"))
    mine = gathered / divisor[:, None]
    tl.store(partial_lse + at, lse, mask=is_head)
    inside = is_head[:, None] & (channel < VALUE_DIM)[None, :]
    tl.store(partial + at[:, None] * VALUE_DIM + channel[None, :], mine, mask=inside)


@triton.jit
def merge_splits(
    partial,
    partial_lse,
    sinks,  # of the row's heads
    output,  # of the row's heads
    lse_out,  # of the row's heads
    output_head_stride,
    row,
    splits,
    first_head,
    HAS_SINKS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write the output, and the natural log-sum-exp if asked, of HEADS query heads from what their splits found."""
    head = first_head + tl.arange(0, HEADS)
    channel = tl.arange(0, BLOCK_DV)
    is_head = head < GROUP
    split = tl.arange(0, BLOCK_S)
    at = (row.to(tl.int64) * splits + split[:, None]) * GROUP + head[None, :]
    known = (split < splits)[:, None] & is_head[None, :]
    # Another multiprocessor may have written them in this very launch: past the L1 cache.
    lse = tl.load(partial_lse + at, mask=known, other=float("-inf"), cache_modifier=".cg")
    largest = tl.maximum(tl.max(lse, 0), _LOWEST)  # [HEADS]
    sink = largest
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=is_head, other=float("-inf")).to(tl.float32) * LOG2_E
        largest = tl.maximum(largest, sink)
    total = tl.sum(tl.exp2(lse - largest[None, :]), 0)
    if HAS_SINKS:  # one more logit that takes weight and gives no value
        total += tl.exp2(sink - largest)
    CHUNK: tl.constexpr = _MERGE_ELEMENTS // (HEADS * BLOCK_DV) if HEADS * BLOCK_DV < _MERGE_ELEMENTS else 1
    merged = tl.zeros([CHUNK, HEADS, BLOCK_DV], tl.float32)
    for start in range(0, splits, CHUNK * _MERGES_IN_FLIGHT):
        for ahead in tl.static_range(_MERGES_IN_FLIGHT):
            part = start + ahead * CHUNK + tl.arange(0, CHUNK)
            from_part = (row.to(tl.int64) * splits + part[:, None]) * GROUP + head[None, :]
            is_part = (part < splits)[:, None] & is_head[None, :]
            part_lse = tl.load(partial_lse + from_part, mask=is_part, other=float("-inf"), cache_modifier=".cg")
            wanted = is_part[:, :, None] & (channel < VALUE_DIM)[None, None, :]
            found = partial + from_part[:, :, None] * VALUE_DIM + channel[None, None, :]
            values = tl.load(found, mask=wanted, other=0.0, cache_modifier=".cg")
            merged += tl.exp2(part_lse - largest[None, :])[:, :, None] * values
    divisor = tl.where(total > 0, total, 1.0)
    merged = tl.sum(merged, 0) / divisor[:, None]
    to = output + head[:, None] * output_head_stride + channel[None, :]
    inside = is_head[:, None] & (channel < VALUE_DIM)[None, :]
    tl.store(to, narrow(merged, output.dtype.element_ty), mask=inside)
    if WITH_LSE:
        lse_total = tl.where(total > 0, (largest + tl.log2(divisor)) / LOG2_E, float("-inf"))
        tl.store(lse_out + head, lse_total, mask=is_head)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    partial,
    partial_lse,
    sinks,
    output,
    lse,
    output_batch_stride,
    output_head_stride,
    num_kv_heads,
    splits,
    HAS_SINKS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """`merge_splits` as a launch of its own: a program for each row and share of its heads."""
    shares: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    row = tl.program_id(0) // shares
    b = (row // num_kv_heads).to(tl.int64)
    first = (row % num_kv_heads).to(tl.int64) * GROUP
    merge_splits(
        partial,
        partial_lse,
        sinks + first,
        output + b * output_batch_stride + first * output_head_stride,
        lse + b * num_kv_heads * GROUP + first,
        output_head_stride,
        row,
        splits,
        (tl.program_id(0) % shares) * HEADS,
        HAS_SINKS,
        WITH_LSE,
        GROUP,
        HEADS,
        VALUE_DIM,
        BLOCK_DV,
        BLOCK_S,
    )

"""Kernels: what the splits of a row found, written and merged by log-sum-exp."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from quest_attention.ops.triton.arithmetic import LOG2_E, round_to

__all__ = ["LOWEST", "Partial", "merge_if_last", "merge_kernel", "merge_splits", "store_partial"]

LOWEST = tl.constexpr(-1e30)
"""Stands for the largest logit where there was none: finite, so that no difference is NaN."""
_MERGE_ELEMENTS = tl.constexpr(2048)
"""Channels of partial results that a merging program adds up at a time."""
_MERGES_IN_FLIGHT = tl.constexpr(4)
"""Such portions asked for before the first is added: the merge waits for memory, not for bandwidth."""


class Partial(NamedTuple):
    """What the splits of each row found; a workspace of the fused kernel has the same under the same names.

    Attributes:
        partial: Outputs, `[B * HKV, splits, G, DV]` float32.
        partial_lse: Base-2 log-sum-exps, `[B * HKV, splits, G]` float32.
    """

    partial: Any
    partial_lse: Any


@triton.jit
def store_partial(found, row, split, splits, largest, total, gathered, SHAPE: tl.constexpr):
    """Write what one split of a row found: its output and the base-2 log-sum-exp that weighs it."""
    head = tl.arange(0, SHAPE.block_g)
    at = (row.to(tl.int64) * splits + split) * SHAPE.group + head
    is_head = head < SHAPE.group
    channel = tl.arange(0, SHAPE.block_dv)
    divisor = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, largest + tl.log2(divisor), float("-inf"))
    mine = gathered / divisor[:, None]
    tl.store(found.partial_lse + at, lse, mask=is_head)
    inside = is_head[:, None] & (channel < SHAPE.value_dim)[None, :]
    tl.store(found.partial + at[:, None] * SHAPE.value_dim + channel[None, :], mine, mask=inside)


@triton.jit
def merge_splits(
    found, sinks, output, output_head_stride, lse_out, row, splits, first_head,
    SHAPE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Write the output, and the natural log-sum-exp if asked, of some query heads from what their splits found.

    `sinks`, `output` and `lse_out` are those of the row's heads; the first and the last may be None.
    """
    HEADS: tl.constexpr = SHAPE.merged
    BLOCK_DV: tl.constexpr = SHAPE.block_dv
    head = first_head + tl.arange(0, HEADS)
    channel = tl.arange(0, BLOCK_DV)
    is_head = head < SHAPE.group
    split = tl.arange(0, BLOCK_S)
    at = (row.to(tl.int64) * splits + split[:, None]) * SHAPE.group + head[None, :]
    known = (split < splits)[:, None] & is_head[None, :]
    # Another multiprocessor may have written them in this very launch: past the L1 cache.
    lse = tl.load(found.partial_lse + at, mask=known, other=float("-inf"), cache_modifier=".cg")
    largest = tl.maximum(tl.max(lse, 0), LOWEST)  # [HEADS]
    sink = largest
    if sinks is not None:
        sink = tl.load(sinks + head, mask=is_head, other=float("-inf")).to(tl.float32) * LOG2_E
        largest = tl.maximum(largest, sink)
    total = tl.sum(tl.exp2(lse - largest[None, :]), 0)
    if sinks is not None:  # one more logit that takes weight and gives no value
        total += tl.exp2(sink - largest)
    CHUNK: tl.constexpr = _MERGE_ELEMENTS // (HEADS * BLOCK_DV) if HEADS * BLOCK_DV < _MERGE_ELEMENTS else 1
    merged = tl.zeros([CHUNK, HEADS, BLOCK_DV], tl.float32)
    for start in range(0, splits, CHUNK * _MERGES_IN_FLIGHT):
        for ahead in tl.static_range(_MERGES_IN_FLIGHT):
            part = start + ahead * CHUNK + tl.arange(0, CHUNK)
            from_part = (row.to(tl.int64) * splits + part[:, None]) * SHAPE.group + head[None, :]
            is_part = (part < splits)[:, None] & is_head[None, :]
            part_lse = tl.load(found.partial_lse + from_part, mask=is_part, other=float("-inf"), cache_modifier=".cg")
            wanted = is_part[:, :, None] & (channel < SHAPE.value_dim)[None, None, :]
            values_at = found.partial + from_part[:, :, None] * SHAPE.value_dim + channel[None, None, :]
            values = tl.load(values_at, mask=wanted, other=0.0, cache_modifier=".cg")
            merged += tl.exp2(part_lse - largest[None, :])[:, :, None] * values
    divisor = tl.where(total > 0, total, 1.0)
    merged = tl.sum(merged, 0) / divisor[:, None]
    to = output + head[:, None] * output_head_stride + channel[None, :]
    inside = is_head[:, None] & (channel < SHAPE.value_dim)[None, :]
    tl.store(to, round_to(merged, output.dtype.element_ty), mask=inside)
    if lse_out is not None:
        lse_total = tl.where(total > 0, (largest + tl.log2(divisor)) / LOG2_E, float("-inf"))
        tl.store(lse_out + head, lse_total, mask=is_head)


@triton.jit
def merge_if_last(
    space, sinks, output, h, row, split, splits, largest, total, gathered, SHAPE: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Write what a split of a row found; whoever is last of the row merges them all, and resets its counter.

    `sinks` are those of all heads, or None; rows of the output are side by side.
    """
    store_partial(space, row, split, splits, largest, total, gathered, SHAPE)
    tl.debug_barrier()
    arrived = tl.atomic_add(space.counters + row, 1, sem="acq_rel", scope="gpu")
    if arrived == splits - 1:
        row_sinks = sinks
        if sinks is not None:
            row_sinks = sinks + h * SHAPE.group
        to = output + row.to(tl.int64) * SHAPE.group * SHAPE.value_dim
        GROUP: tl.constexpr = SHAPE.group  # Triton 3.6 takes a range's limits only by such names
        HEADS: tl.constexpr = SHAPE.merged
        for head in tl.static_range(0, GROUP, HEADS):
            merge_splits(space, row_sinks, to, SHAPE.value_dim, None, row, splits, head, SHAPE, BLOCK_S)
        tl.store(space.counters + row, 0)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(output, found, sinks, lse, num_kv_heads, splits, SHAPE: tl.constexpr, BLOCK_S: tl.constexpr):
    """`merge_splits` as a launch of its own: a program for each row and share of its heads."""
    shares: tl.constexpr = (SHAPE.group + SHAPE.merged - 1) // SHAPE.merged
    row = tl.program_id(0) // shares
    b = (row // num_kv_heads).to(tl.int64)
    first = (row % num_kv_heads).to(tl.int64) * SHAPE.group
    row_sinks = sinks
    if sinks is not None:
        row_sinks = sinks + first
    row_lse = lse
    if lse is not None:
        row_lse = lse + b * num_kv_heads * SHAPE.group + first
    row_output = output.base + b * output.row + first * output.head
    first_head = (tl.program_id(0) % shares) * SHAPE.merged
    merge_splits(found, row_sinks, row_output, output.head, row_lse, row, splits, first_head, SHAPE, BLOCK_S)

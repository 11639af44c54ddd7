"""Kernel: add what a step read to counters on the device, where a graph can replay it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quest_attention.ops.selection import Selection
from quest_attention.ops.triton.arguments import side_by_side
from quest_attention.ops.triton.launch import launch

__all__ = ["count_reads"]

_BLOCK = 256
"""Rows counted at a time."""


def count_reads(selected: Selection, seq_lens: Tensor, counters: Tensor, token_budget: int) -> None:
    """See `ops.count_reads`. One launch of one program: a batch has few rows."""
    counts = side_by_side(selected.counts)
    launch(
        _count_kernel, (1,),
        counts, side_by_side(seq_lens), counters, counters.stride(0), counts.stride(0), *counts.shape,
        selected.unit_size, token_budget,
        BLOCK=_BLOCK, num_warps=1,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["counter_stride", "count_stride", "num_rows", "num_kv_heads", "unit_size", "token_budget"]
)
def _count_kernel(
    counts, seq_lens, counters, counter_stride, count_stride, num_rows, num_kv_heads, unit_size, token_budget,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sparse = tl.zeros([BLOCK], tl.int64)
    dense = tl.zeros([BLOCK], tl.int64)
    read = tl.zeros([BLOCK], tl.int64)
    held = tl.zeros([BLOCK], tl.int64)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        length = tl.load(seq_lens + row, mask=row < num_rows, other=0).to(tl.int64)
        sparse += (length > token_budget).to(tl.int64)
        dense += ((length > 0) & (length <= token_budget)).to(tl.int64)
        for head in range(num_kv_heads):
            count = tl.load(counts + row * count_stride + head, mask=row < num_rows, other=0)
            read += count.to(tl.int64)
        held += (length + unit_size - 1) // unit_size
    tl.store(counters, tl.load(counters) + tl.sum(sparse))
    counters += counter_stride
    tl.store(counters, tl.load(counters) + tl.sum(dense))
    counters += counter_stride
    tl.store(counters, tl.load(counters) + tl.sum(read) // num_kv_heads)
    counters += counter_stride
    tl.store(counters, tl.load(counters) + tl.sum(held))

"""`Fold`: a cache whose KV heads are folded into its blocks: a stock kernel then reads other blocks for each head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Fold"]


class Fold:
    """A layer's cache seen as one of a single KV head, with a block for each block and head.

    So a kernel that takes one block table for a sequence takes one for each sequence and KV head.

    Args:
        cache: `[B, H, N, 2 D]`, as vLLM's CPU backend has it, whatever the strides of block and head.

    Attributes:
        cache: `[B', 1, N, 2 D]`, the same memory.
        records: `[B', 2 N D]`, the same again: what a block has of one head.

    >>> fold = Fold(torch.arange(24).view(3, 2, 2, 2))  # three blocks, two heads
    >>> table = fold.table(torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([[[0], [1]]], dtype=torch.int32))
    >>> fold.cache[table.flatten()][:, 0, 0].tolist()  # block 2 of head 0, block 0 of head 1
    [[16, 17], [4, 5]]
    """

    def __init__(self, cache: Tensor) -> None:
        blocks, heads, tokens, width = cache.shape
        block_stride, head_stride = cache.stride()[:2]
        unit = math.gcd(block_stride, head_stride)
        self._block_step = block_stride // unit
        self._heads = torch.arange(heads, device=cache.device)[None, :, None] * (head_stride // unit)
        reach = (blocks - 1) * self._block_step + (heads - 1) * (head_stride // unit) + 1
        self.cache = cache.as_strided((reach, 1, tokens, width), (unit, unit, width, 1), cache.storage_offset())
        self.records = self.cache.view(reach, tokens * width)

    def table(self, block_table: Tensor, pages: Tensor) -> Tensor:
        """Block table of the folded rows.

        Args:
            block_table: `[R, P]` int32.
            pages: `[R, H, K]` int32, logical pages, -1 in unused slots.

        Returns:
            `[R * H, K]` int32; unused slots hold some block, which the length of the row leaves out.
        """
        rows, heads, slots = pages.shape
        physical = block_table[:, None].expand(-1, heads, -1).gather(2, pages.clamp(min=0).long())
        return (physical * self._block_step + self._heads).to(torch.int32).view(rows * heads, slots)

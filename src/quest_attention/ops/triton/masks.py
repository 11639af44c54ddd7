"""Kernel: the tokens that a mask lets a step attend to, page by page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.ops.triton.arguments import length_of, lengths_argument
from quest_attention.ops.triton.launch import launch

__all__ = ["count_live_tokens", "load_seen"]

_COUNTED_TOKENS = 2048
"""Tokens of a mask that a program counts at once: 16 a thread."""


def count_live_tokens(token_mask: Tensor, seq_lens: Tensor | int, page_size: int, max_pages: int) -> Tensor:
    """Tokens of each page that may be attended to, `[B, P]` int32."""
    batch, width = token_mask.shape
    live_tokens = torch.empty(batch, max_pages, dtype=torch.int32, device=token_mask.device)
    block_t = triton.next_power_of_2(page_size)
    block_p = max(1, _COUNTED_TOKENS // block_t)
    blocks = triton.cdiv(max_pages, block_p)
    launch(
        _live_kernel, (batch * blocks,),
        token_mask, token_mask.stride(0), width, lengths_argument(seq_lens), live_tokens, max_pages, blocks,
        PAGE_SIZE=page_size, BLOCK_T=block_t, BLOCK_P=block_p, num_warps=4,
    )  # fmt: skip
    return live_tokens


@triton.jit
def load_seen(mask_row, mask_width, page, end, PAGE_SIZE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Whether each token of some pages may be attended to, `[BLOCK_P, BLOCK_T]`."""
    token = tl.arange(0, BLOCK_T)
    position = page[:, None] * PAGE_SIZE + token[None, :]
    known = (token < PAGE_SIZE)[None, :] & (position < end) & (position < mask_width)
    return tl.load(mask_row + position, mask=known, other=0)


@triton.jit(do_not_specialize=["lengths", "mask_width", "max_pages", "blocks"])
def _live_kernel(
    token_mask, mask_stride, mask_width, lengths, live_tokens, max_pages, blocks,
    PAGE_SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    page = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    end = length_of(lengths, b)
    seen = load_seen(token_mask + b * mask_stride, mask_width, page, end, PAGE_SIZE, BLOCK_T)
    tl.store(live_tokens + b * max_pages + page, tl.sum((seen != 0).to(tl.int32), 1), mask=page < max_pages)

"""Kernels: the tokens that a mask lets a step attend to, page by page; and as bits, with where forced pages end.

A word of bits is of 16 tokens of a page: of four bits each time two, for the first token and the ninth, and so on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.ops.step import Step
from quest_attention.ops.triton.arguments import length_of, lengths_argument, side_by_side
from quest_attention.ops.triton.launch import launch, let_next_start

__all__ = [
    "END",
    "FIRST",
    "FREE",
    "LIVE",
    "RECENT",
    "RECENT_START",
    "SINKS_END",
    "SPAN",
    "LiveTokens",
    "count_live_tokens",
    "count_tokens",
    "is_live_token",
    "load_seen",
    "mark_live_tokens",
]

_COUNTED_TOKENS = 2048
"""Tokens of a mask that a program counts at once: 16 a thread."""

SPAN = tl.constexpr(8)
"""Numbers of a sequence in `LiveTokens.spans`, of which these are the places:"""
LIVE = tl.constexpr(0)
"""how many tokens are live,"""
FIRST = tl.constexpr(1)
"""the first of them,"""
END = tl.constexpr(2)
"""the place after the last of them,"""
SINKS_END = tl.constexpr(3)
"""where the first page begins that is no forced sink,"""
RECENT_START = tl.constexpr(4)
"""where the first forced recent page begins: at 0 where all live tokens fit the budget, so that all are read,"""
RECENT = tl.constexpr(5)
"""how many live tokens there are from there on,"""
FREE = tl.constexpr(6)
"""and how many between the two: those among which is chosen."""


class LiveTokens(NamedTuple):
    """What the kernels of `token_decode` want to know of a mask.

    Attributes:
        words: Which tokens are live, `[B, words]` int32.
        spans: `[B, SPAN]` int32.
    """

    words: Any
    spans: Any


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


def mark_live_tokens(step: Step, counters: Tensor, **follows: bool) -> LiveTokens | None:
    """The tokens that a step may attend to, in one launch, the first of a step; None where it has no mask.

    Args:
        step: What to read and how.
        counters: `[B]` int32 at least, zero, and left so.
        follows: `FOLLOWS`, as the launches after this one have it.
    """
    if step.token_mask is None:
        return None
    kv, config, mask = step.kv, step.config, side_by_side(step.token_mask)
    batch, max_pages, page_size, device = kv.batch_size, kv.max_pages, kv.page_size, mask.device
    words = torch.empty(batch, max_pages * triton.cdiv(page_size, 16), dtype=torch.int32, device=device)
    live = LiveTokens(words, torch.empty(batch, SPAN.value, dtype=torch.int32, device=device))
    block = max(16, triton.next_power_of_2(page_size))
    pages = max(1, _COUNTED_TOKENS // block)
    parts = triton.cdiv(max_pages, pages)
    launch(
        _mark_kernel, (batch * parts,),
        mask, mask.stride(0), mask.shape[1], lengths_argument(step.seq_lens), live,
        torch.empty(batch, parts, 4, dtype=torch.int32, device=device), counters, config.token_budget,
        config.num_sink_pages, max(1, config.num_recent_pages), parts, max_pages * page_size,
        PAGE=page_size, ROOM=block // 16, PAGES=pages, PARTS=triton.next_power_of_2(parts), num_warps=4, **follows,
    )  # fmt: skip
    return live


@triton.jit
def count_tokens(words):
    """How many tokens each word names."""
    pairs = (words & 0x11111111) + ((words >> 1) & 0x11111111)
    fours = (pairs & 0x0F0F0F0F) + ((pairs >> 4) & 0x0F0F0F0F)
    return (fours * 0x01010101) >> 24


@triton.jit
def is_live_token(words, token, known, PAGE: tl.constexpr):
    """Whether some tokens of a sequence are live, by its words."""
    WORDS: tl.constexpr = (PAGE + 15) // 16
    word = tl.load(words + token // PAGE * WORDS + token % PAGE // 16, mask=known, other=0)
    bit = token % PAGE % 16
    return ((word >> (bit % 8 * 4 + bit // 8)) & 1) != 0


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


@triton.jit(do_not_specialize=[
    "mask_stride", "mask_width", "lengths", "token_budget", "num_sink_pages", "num_recent_pages", "parts", "most",
])  # fmt: skip
def _mark_kernel(
    token_mask, mask_stride, mask_width, lengths, live, found, counters, token_budget, num_sink_pages,
    num_recent_pages, parts, most,
    PAGE: tl.constexpr, ROOM: tl.constexpr, PAGES: tl.constexpr, PARTS: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """The words of some pages of a sequence; whoever is last of its programs writes its span."""
    let_next_start(FOLLOWS)
    b = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    end = tl.minimum(length_of(lengths, b), most)
    WORDS: tl.constexpr = (PAGE + 15) // 16
    words = live.words + b * (most // PAGE * WORDS)
    page = part * PAGES + tl.arange(0, PAGES)
    word = tl.arange(0, ROOM)
    bit = tl.arange(0, 16)
    offset = word[:, None] * 16 + bit[None, :]
    position = page[:, None, None] * PAGE + offset[None, :, :]
    known = (offset < PAGE)[None, :, :] & (position < end) & (position < mask_width)
    seen = tl.load(token_mask + b * mask_stride + position, mask=known, other=0) != 0
    named = tl.sum(seen.to(tl.int32) << (bit % 8 * 4 + bit // 8)[None, None, :], 2)
    inside = (page * PAGE < most)[:, None] & (word < WORDS)[None, :]
    tl.store(words + page[:, None] * WORDS + word[None, :], named, mask=inside)
    tokens = tl.sum(count_tokens(named), 1)
    to = found + (b * parts + part) * 4
    tl.store(to, tl.sum(tokens))
    tl.store(to + 1, tl.sum((tokens > 0).to(tl.int32)))
    tl.store(to + 2, tl.min(tl.where(seen, position, most)))
    tl.store(to + 3, tl.max(tl.where(seen, position + 1, 0)))
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + b, 1, sem="acq_rel", scope="gpu")
    if arrived == parts - 1:
        nth = tl.arange(0, PARTS)
        at = found + (b * parts + nth) * 4
        # Another multiprocessor may have written them in this very launch: past the L1 cache.
        tokens_of = tl.load(at, mask=nth < parts, other=0, cache_modifier=".cg")
        pages_of = tl.load(at + 1, mask=nth < parts, other=0, cache_modifier=".cg")
        firsts = tl.load(at + 2, mask=nth < parts, other=most, cache_modifier=".cg")
        ends = tl.load(at + 3, mask=nth < parts, other=0, cache_modifier=".cg")
        total = tl.sum(tokens_of)
        last = tl.max(ends)
        pages = tl.sum(pages_of)
        sinks_end, up_to_sinks = _live_page(num_sink_pages + 1, words, tokens_of, pages_of, most, PAGE, ROOM, PAGES)
        recent_start, up_to_recent = _live_page(
            pages - num_recent_pages + 1, words, tokens_of, pages_of, most, PAGE, ROOM, PAGES
        )
        # Forced pages fit the budget. So where there are more tokens than that, sinks end before recent pages begin.
        is_whole = total <= token_budget
        span = live.spans + b * SPAN
        tl.store(span + LIVE, total)
        tl.store(span + FIRST, tl.minimum(tl.min(firsts), last))
        tl.store(span + END, last)
        tl.store(span + SINKS_END, tl.where(is_whole, 0, sinks_end))
        tl.store(span + RECENT_START, tl.where(is_whole, 0, recent_start))
        tl.store(span + RECENT, tl.where(is_whole, total, total - up_to_recent))
        tl.store(span + FREE, tl.where(is_whole, 0, up_to_recent - up_to_sinks))
        tl.store(counters + b, 0)


@triton.jit
def _live_page(
    nth, words, tokens_of, pages_of, most, PAGE: tl.constexpr, ROOM: tl.constexpr, PAGES: tl.constexpr
):  # fmt: skip
    """Where the `nth` page with a live token begins, counted from 1, and how many live tokens are before it.

    `tokens_of` and `pages_of` are how many of them each part of `PAGES` pages has.
    """
    WORDS: tl.constexpr = (PAGE + 15) // 16
    is_before = tl.cumsum(pages_of) < nth
    part = tl.sum(is_before.to(tl.int32))
    page = part * PAGES + tl.arange(0, PAGES)
    word = tl.arange(0, ROOM)
    inside = (page * PAGE < most)[:, None] & (word < WORDS)[None, :]
    named = tl.load(words + page[:, None] * WORDS + word[None, :], mask=inside, other=0, cache_modifier=".cg")
    tokens = tl.sum(count_tokens(named), 1)
    rank = tl.sum(tl.where(is_before, pages_of, 0)) + tl.cumsum((tokens > 0).to(tl.int32))
    start = tl.sum(tl.where((tokens > 0) & (rank == nth), page * PAGE, 0))
    return start, tl.sum(tl.where(is_before, tokens_of, 0)) + tl.sum(tl.where(rank < nth, tokens, 0))

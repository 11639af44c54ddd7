"""Kernel: rank tokens by the signs of their sketches where `scan` does not fit; and the sample that gives a threshold.

Of the pages of a row some are drawn, the ranks of their tokens say which rank about as many tokens reach as are wanted,
and of all tokens it is then written which reach that: as words of 16 tokens (`masks`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from quest_attention.ops.triton.arguments import length_of
from quest_attention.ops.triton.arithmetic import LOG2_E, cap
from quest_attention.ops.triton.launch import wait_for_launch
from quest_attention.ops.triton.masks import (
    END,
    FIRST,
    FREE,
    LIVE,
    RECENT_START,
    SINKS_END,
    SPAN,
    count_tokens,
    is_live_token,
)
from quest_attention.ops.triton.preparation import norms_of
from quest_attention.ops.triton.sharing import live_sequences, sharing
from quest_attention.ops.triton.sketch import estimates, turned_queries

__all__ = ["choice_of", "drawn_page", "rank_kernel"]


@triton.jit
def _drawn_of(whole, PAGE: tl.constexpr, SAMPLED: tl.constexpr):
    """How many of a row's whole pages are drawn, and by how many bits their numbers in the sample are shifted."""
    rare = 0
    for _ in tl.static_range(16):
        rare += ((whole >> rare) * PAGE > SAMPLED).to(tl.int32)
    return whole >> rare, rare


@triton.jit
def drawn_page(nth, rare):
    """Of every `1 << rare` pages that follow one another, the one that is drawn."""
    return (nth << rare) + ((nth * 40503 >> 4) & ((1 << rare) - 1))


@triton.jit
def choice_of(end, num_sink_pages, num_recent_pages, PAGE: tl.constexpr):
    """First of the pages among whose tokens is chosen, and the one after the last."""
    total = tl.cdiv(end, PAGE)
    first_page = tl.minimum(num_sink_pages, total)
    return first_page, tl.maximum(total - num_recent_pages, first_page)


@triton.jit(do_not_specialize=[
    "lengths", "num_kv_heads", "table_stride", "token_budget", "num_sink_pages", "num_recent_pages", "wanted",
    "sequences", "each", "parts_of_row", "capacity", "most",
])  # fmt: skip
def rank_kernel(
    query, key_scale, scale_head, metadata, page_table, table_stride, lengths, live, space, scale, softcap,
    num_kv_heads, sequences, each, parts_of_row, capacity, token_budget, num_sink_pages, num_recent_pages, wanted, most,
    AT_ONCE: tl.constexpr, IS_SAMPLE: tl.constexpr, COUNTS: tl.constexpr, SHAPE: tl.constexpr, PACKING: tl.constexpr,
    PAGES: tl.constexpr, SAMPLED: tl.constexpr, FEWEST: tl.constexpr, NORMS: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """What `scan` does, for any shape and in the interpreter, with queries that are not rounded.

    Pages count from the one of the first live token, and end before the one of the last, which is read anyway.
    """
    live_batch = live_sequences(lengths, sequences)
    parts = sharing(live_batch, sequences, num_kv_heads, each, tl.num_programs(0), parts_of_row, AT_ONCE)
    live_rows = live_batch * num_kv_heads
    is_needed = tl.program_id(0) < live_rows * parts
    row = tl.minimum(tl.program_id(0) // parts, live_rows - 1)
    part = tl.program_id(0) % parts
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = tl.minimum(length_of(lengths, b), most)
    PAGE: tl.constexpr = SHAPE.page_size
    BLOCK: tl.constexpr = SHAPE.block_page
    whole = tl.where(end > token_budget, (end - 1) // PAGE, 0)
    factor = scale * LOG2_E
    if key_scale is not None:
        factor = factor * tl.load(key_scale + h * scale_head)
    q_top, q_rest = turned_queries(query, b, h, SHAPE, PACKING)
    wait_for_launch(FOLLOWS)
    begin = 0
    row_live = live
    span = live
    if live is not None:
        span = live.spans + b * SPAN
        row_live = live.words + b * capacity
        begin = tl.load(span + FIRST) // PAGE
        whole = tl.where(tl.load(span + LIVE) > token_budget, (tl.load(span + END) - 1) // PAGE - begin, 0)
    drawn, rare = _drawn_of(whole, PAGE, SAMPLED)
    norm = norms_of(space.norms, row, SHAPE, NORMS)
    token = tl.arange(0, BLOCK)
    ranked = drawn if IS_SAMPLE else whole
    share = tl.cdiv(tl.cdiv(ranked, parts), PAGES) * PAGES
    last = tl.where(is_needed, tl.minimum((part + 1) * share, ranked), 0)
    low = 0.0
    number = 0
    first_page, last_page = choice_of(end, num_sink_pages, num_recent_pages, PAGE)
    if not IS_SAMPLE:
        if is_needed:
            free = (last_page - first_page) * PAGE
            if live is not None:
                first_page = tl.load(span + SINKS_END) // PAGE
                last_page = tl.load(span + RECENT_START) // PAGE
                free = tl.load(span + FREE)
            low = _threshold(
                space.sample + row * SAMPLED, row_live, drawn, rare, begin, first_page, last_page, free, wanted,
                PAGE, SAMPLED, FEWEST,
            )  # fmt: skip
    for start in range(part * share, last, PAGES):
        nth = start + tl.arange(0, PAGES)
        page = begin + (drawn_page(nth, rare) if IS_SAMPLE else nth)
        physical = tl.load(page_table + b * table_stride + page, mask=nth < last, other=0).to(tl.int64)
        sketch = metadata.base + h * metadata.head + physical * metadata.page
        logit = estimates(sketch, q_top, q_rest, SHAPE, PACKING) * factor
        if softcap is not None:
            logit = cap(logit, softcap * LOG2_E)
        weight = logit - norm[None, None, :]
        is_unknown = weight != weight
        rank = tl.max(tl.where(is_unknown, float("-inf"), weight), 2)
        rank = tl.where(tl.sum(is_unknown.to(tl.int32), 2) > 0, float("nan"), rank).to(tl.float16)
        inside = (nth < last)[:, None] & (token < PAGE)[None, :]
        if IS_SAMPLE:
            tl.store(space.sample + row * SAMPLED + nth[:, None] * PAGE + token[None, :], rank, mask=inside)
        else:
            WORDS: tl.constexpr = (PAGE + 15) // 16
            ROOM: tl.constexpr = BLOCK // 16 if BLOCK > 16 else 1
            EACH: tl.constexpr = min(BLOCK, 16)
            passes = (inside & ~(rank.to(tl.float32) < low)).to(tl.int32)  # NaN passes
            bit = tl.arange(0, EACH)
            passes = tl.reshape(passes, [PAGES, ROOM, EACH]) << (bit % 8 * 4 + bit // 8)[None, None, :]
            word = tl.arange(0, ROOM)
            to = space.passing + row.to(tl.int64) * capacity + page[:, None] * WORDS + word[None, :]
            named = tl.sum(passes, 2)
            tl.store(to, named, mask=(nth < last)[:, None] & (word < WORDS)[None, :])
            if COUNTS:
                is_free = (page >= first_page) & (page < last_page)
                if live is not None:
                    at = row_live + page[:, None] * WORDS + word[None, :]
                    named &= tl.load(at, mask=is_free[:, None] & (word < WORDS)[None, :], other=0)
                number += tl.sum(tl.where(is_free[:, None], count_tokens(named), 0))
    if COUNTS:
        tl.store(space.passed + row * parts + part, number, mask=is_needed)


@triton.jit
def _threshold(
    sample, live, drawn, rare, begin, first_page, last_page, free, wanted,
    PAGE: tl.constexpr, SAMPLED: tl.constexpr, FEWEST: tl.constexpr,
):  # fmt: skip
    """A rank that about `wanted` of the `free` tokens of some pages of a row reach, by what a sample of the ranks says.

    `live` are the words of the row, None without a mask.
    """
    at = tl.arange(0, SAMPLED)
    page = begin + drawn_page(at // PAGE, rare)
    inside = (at // PAGE < drawn) & (page >= first_page) & (page < last_page)
    if live is not None:
        inside &= is_live_token(live, page * PAGE + at % PAGE, inside, PAGE)
    rank = tl.load(sample + at, mask=inside, other=0.0).to(tl.float32)
    # What is not finite, of a page whose keys are not, reaches every limit and sets none.
    is_finite = inside & (tl.abs(rank) < float("inf"))
    lowest = tl.min(tl.where(is_finite, rank, 65504.0))
    highest = tl.max(tl.where(is_finite, rank, -65504.0))
    rank = tl.where(inside, tl.where(is_finite, rank, 65504.0), float("-inf"))
    known = tl.sum(inside.to(tl.int32))
    share = wanted.to(tl.float32) / tl.maximum(free, 1).to(tl.float32)
    most = tl.maximum((share * known.to(tl.float32)).to(tl.int32), FEWEST)
    low, high = lowest, highest
    for _ in range(6):
        third = (high - low) * 0.33333334
        lower, upper = low + third, high - third
        both = tl.sum((rank >= lower).to(tl.int32) + (rank >= upper).to(tl.int32) * 65536)
        is_lower, is_upper = (both & 0xFFFF) >= most, (both >> 16) >= most
        high = tl.where(is_upper, high, tl.where(is_lower, upper, lower))
        low = tl.where(is_upper, upper, tl.where(is_lower, lower, low))
    return tl.where(most < known, low, -65504.0)

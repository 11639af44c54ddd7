"""Kernels: list what passes the threshold where estimates alone choose, and attend to it in the same launch.

A pool of hot tokens and several query tokens have attention of their own: for them the tokens are listed alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quest_attention.ops.triton.arguments import length_of, load_query
from quest_attention.ops.triton.attention import attend_slots
from quest_attention.ops.triton.candidates import list_tokens, store_run, store_unused
from quest_attention.ops.triton.launch import wait_for_launch
from quest_attention.ops.triton.masks import END, FIRST, FREE, LIVE, RECENT, RECENT_START, SINKS_END, SPAN, count_tokens
from quest_attention.ops.triton.merge import merge_if_last
from quest_attention.ops.triton.ranks import choice_of

__all__ = ["attend_passing_kernel", "list_passing_kernel"]


@triton.jit(do_not_specialize=[
    "lengths", "num_kv_heads", "table_stride", "token_budget", "num_sink_pages", "num_recent_pages", "parts",
    "counted", "tile", "slots", "capacity", "most",
])  # fmt: skip
def attend_passing_kernel(
    page_table, table_stride, lengths, live, space, units, counts, num_kv_heads, token_budget, num_sink_pages,
    num_recent_pages, parts, counted, tile, slots, capacity, most, query, keys, values, sinks, output, scale, softcap,
    SHAPE: tl.constexpr, PARTS: tl.constexpr, COUNTED: tl.constexpr, PICKED: tl.constexpr, BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """Attention over a part of what is read of a row; whoever is last of it merges."""
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    h = (row % num_kv_heads).to(tl.int64)
    q = load_query(query, (row // num_kv_heads).to(tl.int64), h, SHAPE)
    start, stop = _list_part(
        page_table, table_stride, lengths, live, space, units, counts, row, part, num_kv_heads, token_budget,
        num_sink_pages, num_recent_pages, parts, counted, tile, slots, capacity, most,
        SHAPE.page_size, COUNTED, PICKED, FOLLOWS,
    )  # fmt: skip
    places = space.places + row.to(tl.int64) * slots
    tl.debug_barrier()  # the list is read by other threads than those that wrote it
    largest, weight, gathered = attend_slots(
        q, keys, values, h, places, None, start, stop, None, 0, scale, softcap, SHAPE, BLOCK_T, STAGES
    )
    merge_if_last(space, sinks, output, h, row, part, parts, largest, weight, gathered, SHAPE, PARTS)


@triton.jit(do_not_specialize=[
    "lengths", "num_kv_heads", "table_stride", "token_budget", "num_sink_pages", "num_recent_pages", "parts",
    "counted", "tile", "slots", "capacity", "most",
])  # fmt: skip
def list_passing_kernel(
    page_table, table_stride, lengths, live, space, units, counts, num_kv_heads, token_budget, num_sink_pages,
    num_recent_pages, parts, counted, tile, slots, capacity, most,
    PAGE: tl.constexpr, COUNTED: tl.constexpr, PICKED: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """What is read of a row, and where it lies."""
    _list_part(
        page_table, table_stride, lengths, live, space, units, counts, tl.program_id(0) // parts,
        tl.program_id(0) % parts, num_kv_heads, token_budget, num_sink_pages, num_recent_pages, parts, counted, tile,
        slots, capacity, most, PAGE, COUNTED, PICKED, FOLLOWS,
    )  # fmt: skip


@triton.jit
def _list_part(
    page_table, table_stride, lengths, live, space, units, counts, row, part, num_kv_heads, token_budget,
    num_sink_pages, num_recent_pages, parts, counted, tile, slots, capacity, most,
    PAGE: tl.constexpr, COUNTED: tl.constexpr, PICKED: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """List a part of what is read of a row behind the parts before it; gives where the part begins and ends.

    Each of the `counted` programs that ranked a row has said how many pass of its share, some times `tile` pages. A
    part takes the shares of some of them. The first has the forced tokens at the beginning as well, the last those at
    the end. Should more pass than there is room for, those farthest back are left out.
    """
    WORDS: tl.constexpr = (PAGE + 15) // 16
    b = (row // num_kv_heads).to(tl.int64)
    end = tl.minimum(length_of(lengths, b), most)
    table = page_table + b * table_stride
    units += row.to(tl.int64) * slots
    places = space.places + row.to(tl.int64) * slots
    first_page, last_page = choice_of(end, num_sink_pages, num_recent_pages, PAGE)
    begin = 0
    ranked = (end - 1) // PAGE
    is_whole = end <= token_budget
    sinks = first_page * PAGE
    recent = end - last_page * PAGE
    lives = live
    if live is not None:
        wait_for_launch(FOLLOWS)
        lives = live.words + b * capacity
        span = live.spans + b * SPAN
        begin = tl.load(span + FIRST) // PAGE
        end = tl.load(span + END)
        ranked = (end - 1) // PAGE - begin
        first_page = tl.load(span + SINKS_END) // PAGE
        last_page = tl.load(span + RECENT_START) // PAGE
        recent = tl.load(span + RECENT)
        sinks = tl.load(span + LIVE) - recent - tl.load(span + FREE)
        is_whole = tl.load(span + LIVE) <= token_budget
    share = tl.cdiv(tl.cdiv(ranked, counted), tile) * tile  # pages of one that ranked
    together = tl.cdiv(counted, parts)
    first = tl.maximum(begin + part * together * share, first_page) * WORDS
    last = tl.minimum(begin + (part + 1) * together * share, last_page) * WORDS
    at = first + tl.arange(0, PICKED)
    physical = tl.load(table + at // WORDS, mask=at < last, other=0)
    if live is None:
        wait_for_launch(FOLLOWS)
    if is_whole:
        if live is None:
            each = tl.cdiv(tl.cdiv(end, parts), 16) * 16
            start = tl.minimum(part * each, end)
            stop = tl.minimum(start + each, end)
            store_run(table, units, places, start, start, stop - start, PAGE)
        else:
            every = tl.cdiv(end, PAGE) * WORDS
            each = tl.cdiv(every - begin * WORDS, parts)
            first = tl.minimum(begin * WORDS + part * each, every)
            start = 0
            for before in range(begin * WORDS, first, PICKED):
                at = before + tl.arange(0, PICKED)
                start += tl.sum(count_tokens(tl.load(lives + at, mask=at < first, other=0)))
            last = tl.minimum(first + each, every)
            stop = _list_words(units, places, table, lives, None, first, last, start, 0, slots, PAGE, PICKED)
    else:
        words = space.passing + row.to(tl.int64) * capacity
        passing = tl.load(words + at, mask=at < last, other=0)
        if live is not None:
            passing &= tl.load(lives + at, mask=at < last, other=0)
        ranking = tl.arange(0, COUNTED)
        passed = tl.load(space.passed + row * counted + ranking, mask=ranking < counted, other=0)
        over = tl.maximum(tl.sum(passed) - (token_budget - sinks - recent), 0)
        kept = sinks - over + tl.sum(tl.where(ranking < part * together, passed, 0))
        start = tl.maximum(kept, sinks)
        kept = list_tokens(units, places, physical, at, passing, kept, sinks, slots, PAGE)
        kept = _list_words(units, places, table, words, lives, first + PICKED, last, kept, sinks, slots, PAGE, PICKED)
        stop = tl.maximum(kept, start)
        if part == 0:
            if live is None:
                store_run(table, units, places, 0, 0, sinks, PAGE)
            else:
                from_words, to_words = begin * WORDS, first_page * WORDS
                none = tl.full([], 0, tl.int32)
                _list_words(units, places, table, lives, None, from_words, to_words, none, 0, slots, PAGE, PICKED)
            start = 0
        if part == parts - 1:
            if live is None:
                store_run(table, units, places, last_page * PAGE, stop, recent, PAGE)
            else:
                from_words, to_words = last_page * WORDS, tl.cdiv(end, PAGE) * WORDS
                _list_words(units, places, table, lives, None, from_words, to_words, stop, 0, slots, PAGE, PICKED)
            stop += recent
    if part == parts - 1:
        store_unused(units, stop, slots)
        tl.store(counts + row, stop)
    return start, stop


@triton.jit
def _list_words(
    units, places, table, words, lives, first, last, kept, least, most, PAGE: tl.constexpr, PICKED: tl.constexpr
):  # fmt: skip
    """Write the tokens of words `first` to `last`, with `lives` those alone that are live; see `list_tokens`."""
    WORDS: tl.constexpr = (PAGE + 15) // 16
    for start in range(first, last, PICKED):
        at = start + tl.arange(0, PICKED)
        named = tl.load(words + at, mask=at < last, other=0)
        if lives is not None:
            named &= tl.load(lives + at, mask=at < last, other=0)
        physical = tl.load(table + at // WORDS, mask=at < last, other=0)
        kept = list_tokens(units, places, physical, at, named, kept, least, most, PAGE)
    return kept

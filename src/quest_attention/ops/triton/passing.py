"""Kernel: attend to all tokens that pass the threshold, where estimates alone choose."""

from __future__ import annotations

import triton
import triton.language as tl

from quest_attention.ops.triton.arguments import length_of, load_query
from quest_attention.ops.triton.attention import attend_slots
from quest_attention.ops.triton.candidates import list_tokens, store_run, store_unused
from quest_attention.ops.triton.launch import wait_for_launch
from quest_attention.ops.triton.merge import merge_if_last
from quest_attention.ops.triton.ranks import choice_of

__all__ = ["attend_passing_kernel"]


@triton.jit(do_not_specialize=[
    "lengths", "num_kv_heads", "table_stride", "token_budget", "num_sink_pages", "num_recent_pages", "parts",
    "counted", "tile", "slots", "capacity", "most",
])  # fmt: skip
def attend_passing_kernel(
    query, keys, values, page_table, table_stride, lengths, space, units, counts, sinks, output, scale, softcap,
    num_kv_heads, token_budget, num_sink_pages, num_recent_pages, parts, counted, tile, slots, capacity, most,
    SHAPE: tl.constexpr, PARTS: tl.constexpr, COUNTED: tl.constexpr, PICKED: tl.constexpr, BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """Attention over a part of a row's tokens that pass, listed behind those of the parts before it.

    Each of the `counted` programs that ranked a row has said how many pass of its share, some times `tile` pages. A
    part takes the shares of some of them. The first has the forced tokens at the beginning as well, the last those at
    the end. Should more pass than there is room for, those farthest back are left out. Whoever is last of a row merges.
    """
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = tl.minimum(length_of(lengths, b), most)
    PAGE: tl.constexpr = SHAPE.page_size
    WORDS: tl.constexpr = (PAGE + 15) // 16
    q = load_query(query, b, h, SHAPE)
    table = page_table + b * table_stride
    units += row.to(tl.int64) * slots
    places = space.places + row.to(tl.int64) * slots
    first_page, last_page = choice_of(end, num_sink_pages, num_recent_pages, PAGE)
    share = tl.cdiv(tl.cdiv((end - 1) // PAGE, counted), tile) * tile  # pages of one that ranked
    together = tl.cdiv(counted, parts)
    first = tl.maximum(part * together * share, first_page) * WORDS
    last = tl.minimum((part + 1) * together * share, last_page) * WORDS
    at = first + tl.arange(0, PICKED)
    physical = tl.load(table + at // WORDS, mask=at < last, other=0)
    wait_for_launch(FOLLOWS)
    if end <= token_budget:
        each = tl.cdiv(tl.cdiv(end, parts), 16) * 16
        start = tl.minimum(part * each, end)
        stop = tl.minimum(start + each, end)
        store_run(table, units, places, start, start, stop - start, PAGE)
    else:
        words = space.passing + row.to(tl.int64) * capacity
        passing = tl.load(words + at, mask=at < last, other=0)
        ranking = tl.arange(0, COUNTED)
        passed = tl.load(space.passed + row * counted + ranking, mask=ranking < counted, other=0)
        sinks_end = first_page * PAGE
        recent = end - last_page * PAGE
        room = token_budget - sinks_end - recent
        over = tl.maximum(tl.sum(passed) - room, 0)
        kept = sinks_end - over + tl.sum(tl.where(ranking < part * together, passed, 0))
        start = tl.maximum(kept, sinks_end)
        kept = list_tokens(units, places, physical, at, passing, kept, sinks_end, slots, PAGE)
        for ahead in range(first + PICKED, last, PICKED):
            more = ahead + tl.arange(0, PICKED)
            passing = tl.load(words + more, mask=more < last, other=0)
            physical = tl.load(table + more // WORDS, mask=more < last, other=0)
            kept = list_tokens(units, places, physical, more, passing, kept, sinks_end, slots, PAGE)
        stop = tl.maximum(kept, start)
        if part == 0:
            store_run(table, units, places, 0, 0, sinks_end, PAGE)
            start = 0
        if part == parts - 1:
            store_run(table, units, places, last_page * PAGE, stop, recent, PAGE)
            stop += recent
    if part == parts - 1:
        store_unused(units, stop, slots)
        tl.store(counts + row, stop)
    tl.debug_barrier()  # the list is read by other threads than those that wrote it
    largest, weight, gathered = attend_slots(
        q, keys, values, h, places, None, start, stop, None, 0, scale, softcap, SHAPE, BLOCK_T, STAGES
    )
    merge_if_last(space, sinks, output, h, row, part, parts, largest, weight, gathered, SHAPE, PARTS)

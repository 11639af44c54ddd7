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
from quest_attention.ops.triton.sharing import live_sequences, share_of_list, sharing

__all__ = ["attend_passing_kernel", "list_passing_kernel"]


@triton.jit(do_not_specialize=[
    "lengths", "num_kv_heads", "table_stride", "token_budget", "num_sink_pages", "num_recent_pages", "sequences",
    "each", "rank_each", "rank_programs", "rank_parts", "tile", "slots", "capacity", "most",
])  # fmt: skip
def attend_passing_kernel(
    page_table, table_stride, lengths, live, space, units, counts, num_kv_heads, token_budget, num_sink_pages,
    num_recent_pages, sequences, each, rank_each, rank_programs, rank_parts, tile, slots, capacity, most, query, keys,
    values, sinks, output, scale, softcap,
    SHAPE: tl.constexpr, AT_ONCE: tl.constexpr, MOST_PARTS: tl.constexpr, PARTS: tl.constexpr, COUNTED: tl.constexpr,
    PICKED: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """Attention over a part of what is read of a row; whoever is last of it merges.

    Rows are shared as `Shares` says: `each` and `MOST_PARTS` are this launch's, `rank_...` are those of the one that
    ranked, each of whose programs has ranked some times `tile` pages.
    """
    live_batch = live_sequences(lengths, sequences)
    counted = sharing(live_batch, sequences, num_kv_heads, rank_each, rank_programs, rank_parts, AT_ONCE)
    parts = sharing(live_batch, sequences, num_kv_heads, each, tl.num_programs(0), MOST_PARTS, AT_ONCE)
    live_rows = live_batch * num_kv_heads
    index = tl.program_id(0)
    if live_rows + index < sequences * num_kv_heads:
        _leave_empty(units, counts, live_rows + index, slots)
        _store_zeros(output + (live_rows + index).to(tl.int64) * SHAPE.group * SHAPE.value_dim, SHAPE)
    if index < live_rows * parts:
        row = index // parts
        part = index % parts
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
    "lengths", "num_kv_heads", "table_stride", "token_budget", "num_sink_pages", "num_recent_pages", "sequences",
    "each", "rank_each", "rank_programs", "rank_parts", "tile", "slots", "capacity", "most",
])  # fmt: skip
def list_passing_kernel(
    page_table, table_stride, lengths, live, space, units, counts, num_kv_heads, token_budget, num_sink_pages,
    num_recent_pages, sequences, each, rank_each, rank_programs, rank_parts, tile, slots, capacity, most,
    AT_ONCE: tl.constexpr, MOST_PARTS: tl.constexpr, PAGE: tl.constexpr, COUNTED: tl.constexpr, PICKED: tl.constexpr,
    FOLLOWS: tl.constexpr,
):  # fmt: skip
    """What is read of a row, and where it lies; arguments are those of `attend_passing_kernel`."""
    live_batch = live_sequences(lengths, sequences)
    counted = sharing(live_batch, sequences, num_kv_heads, rank_each, rank_programs, rank_parts, AT_ONCE)
    parts = sharing(live_batch, sequences, num_kv_heads, each, tl.num_programs(0), MOST_PARTS, AT_ONCE)
    live_rows = live_batch * num_kv_heads
    index = tl.program_id(0)
    if live_rows + index < sequences * num_kv_heads:
        _leave_empty(units, counts, live_rows + index, slots)
    if index < live_rows * parts:
        _list_part(
            page_table, table_stride, lengths, live, space, units, counts, index // parts, index % parts, num_kv_heads,
            token_budget, num_sink_pages, num_recent_pages, parts, counted, tile, slots, capacity, most,
            PAGE, COUNTED, PICKED, FOLLOWS,
        )  # fmt: skip


@triton.jit
def _leave_empty(units, counts, row, slots):
    """Nothing is read of a row that pads a batch."""
    store_unused(units + row.to(tl.int64) * slots, 0, slots)
    tl.store(counts + row, 0)


@triton.jit
def _store_zeros(output, SHAPE: tl.constexpr):
    """The output of the heads of a row of which nothing is read."""
    head = tl.arange(0, SHAPE.block_g)
    channel = tl.arange(0, SHAPE.block_dv)
    inside = (head < SHAPE.group)[:, None] & (channel < SHAPE.value_dim)[None, :]
    to = output + head[:, None] * SHAPE.value_dim + channel[None, :]
    tl.store(to, 0.0, mask=inside)


@triton.jit
def _list_part(
    page_table, table_stride, lengths, live, space, units, counts, row, part, num_kv_heads, token_budget,
    num_sink_pages, num_recent_pages, parts, counted, tile, slots, capacity, most,
    PAGE: tl.constexpr, COUNTED: tl.constexpr, PICKED: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """List a part of what is read of a row, as many tokens in each; gives where in the list it begins and ends.

    The list has the forced tokens at the beginning of the sequence, those that pass, and the forced ones at its end.
    Each of the `counted` programs that ranked a row has said how many pass of its share, some times `tile` pages, or
    none where a row is shorter than its table has room for; so a part knows among whose words it has to look. Should
    more pass than there is room for, those farthest back are left out.
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
    tokens = end  # that may be read
    sinks = first_page * PAGE
    recent = end - last_page * PAGE
    lives = live
    wait_for_launch(FOLLOWS)
    if live is not None:
        lives = live.words + b * capacity
        span = live.spans + b * SPAN
        begin = tl.load(span + FIRST) // PAGE
        end = tl.load(span + END)
        ranked = (end - 1) // PAGE - begin
        first_page = tl.load(span + SINKS_END) // PAGE
        last_page = tl.load(span + RECENT_START) // PAGE
        recent = tl.load(span + RECENT)
        tokens = tl.load(span + LIVE)
        sinks = tokens - recent - tl.load(span + FREE)
    if tokens <= token_budget:
        total = tokens
        start, stop = share_of_list(total, part, parts)
        if live is None:
            store_run(table, units, places, start, start, stop - start, PAGE)
        else:
            none, to_word = tl.full([], 0, tl.int32), tl.cdiv(end, PAGE) * WORDS
            _list_words(units, places, table, lives, None, begin * WORDS, to_word, none, start, stop, PAGE, PICKED)
    else:
        nth = tl.arange(0, COUNTED)
        passed = tl.load(space.passed + row * counted + nth, mask=nth < counted, other=0)
        through = tl.cumsum(passed)
        number = tl.sum(passed)
        over = tl.maximum(number - (token_budget - sinks - recent), 0)
        behind = sinks + number - over  # where the forced tokens at the end are listed
        total = behind + recent
        start, stop = share_of_list(total, part, parts)
        from_nth, to_nth = tl.maximum(start, sinks) + over - sinks, tl.minimum(stop, behind) + over - sinks
        if from_nth < to_nth:
            share = tl.cdiv(tl.cdiv(ranked, counted), tile) * tile  # pages of one that ranked
            nearer = (through <= from_nth) & (nth < counted)
            first = tl.maximum(begin + tl.sum(nearer.to(tl.int32)) * share, first_page) * WORDS
            reached = (through - passed < to_nth) & (nth < counted)
            last = tl.minimum(begin + tl.sum(reached.to(tl.int32)) * share, last_page) * WORDS
            kept = sinks - over + tl.sum(tl.where(nearer, passed, 0))
            words = space.passing + row.to(tl.int64) * capacity
            least, most_of_part = tl.maximum(start, sinks), tl.minimum(stop, behind)
            _list_words(units, places, table, words, lives, first, last, kept, least, most_of_part, PAGE, PICKED)
        if start < sinks:
            if live is None:
                store_run(table, units, places, start, start, tl.minimum(stop, sinks) - start, PAGE)
            else:
                none, from_word, to_word = tl.full([], 0, tl.int32), begin * WORDS, first_page * WORDS
                _list_words(
                    units, places, table, lives, None, from_word, to_word, none, start, tl.minimum(stop, sinks), PAGE,
                    PICKED,
                )  # fmt: skip
        if stop > behind:
            from_slot = tl.maximum(start, behind)
            if live is None:
                token = last_page * PAGE + from_slot - behind
                store_run(table, units, places, token, from_slot, stop - from_slot, PAGE)
            else:
                from_word, to_word = last_page * WORDS, tl.cdiv(end, PAGE) * WORDS
                _list_words(
                    units, places, table, lives, None, from_word, to_word, behind, from_slot, stop, PAGE, PICKED
                )  # fmt: skip
    if part == parts - 1:
        store_unused(units, total, slots)
        tl.store(counts + row, total)
    return start, stop


@triton.jit
def _list_words(
    units, places, table, words, lives, first, last, kept, least, most, PAGE: tl.constexpr, PICKED: tl.constexpr
):  # fmt: skip
    """Write the tokens of words `first` to `last`, with `lives` those alone that are live; see `list_tokens`."""
    WORDS: tl.constexpr = (PAGE + 15) // 16
    at = first + tl.arange(0, PICKED)
    named = _load_words(words, lives, at, last)
    while (first < last) & (kept < most):
        behind = kept + tl.sum(count_tokens(named))
        following = _load_words(words, lives, at + PICKED, last)  # early: it is far away
        if behind > least:
            physical = tl.load(table + at // WORDS, mask=at < last, other=0)
            list_tokens(units, places, physical, at, named, kept, least, most, PAGE)
        kept = behind
        named = following
        at += PICKED
        first += PICKED


@triton.jit
def _load_words(words, lives, at, last):
    """Words up to `last`, with `lives` those tokens of them alone that are live."""
    named = tl.load(words + at, mask=at < last, other=0)
    if lives is not None:
        named &= tl.load(lives + at, mask=at < last, other=0)
    return named

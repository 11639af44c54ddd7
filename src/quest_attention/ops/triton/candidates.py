"""Kernels: list the tokens that passed, rank them by their keys, and choose the best of a row.

Beside a pool of hot tokens the first two are apart: what is listed is fetched before it is ranked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quest_attention.ops.triton.arguments import length_of, load_query
from quest_attention.ops.triton.arithmetic import LOG2_E, cap, dot, widen
from quest_attention.ops.triton.choice import DEAD, FORCED, LARGEST, choose_pages
from quest_attention.ops.triton.fetch import load_keys
from quest_attention.ops.triton.launch import wait_for_launch
from quest_attention.ops.triton.masks import END, FIRST, RECENT, RECENT_START, SINKS_END, SPAN, count_tokens
from quest_attention.ops.triton.preparation import norms_of
from quest_attention.ops.triton.ranks import choice_of

__all__ = [
    "MISSING",
    "choose_kernel",
    "list_tokens",
    "pick_kernel",
    "store_run",
    "store_unused",
    "weigh_kernel",
]

MISSING = tl.constexpr(1 << 24)
"""Stands for what a part has found that has not said so: rows have fewer tokens, and 64 of it fit an int32."""


@triton.jit(do_not_specialize=[
    "lengths", "num_kv_heads", "table_stride", "token_budget", "num_sink_pages", "num_recent_pages", "parts", "listed",
    "capacity", "most", "fetched",
])  # fmt: skip
def pick_kernel(
    query, keys, page_table, table_stride, lengths, live, space, scale, softcap, num_kv_heads, token_budget,
    num_sink_pages, num_recent_pages, parts, listed, capacity, most, fetched,
    SHAPE: tl.constexpr, PARTS: tl.constexpr, NORMS: tl.constexpr, PICKED: tl.constexpr, RANKED: tl.constexpr,
    RANKS: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """The candidates of a part of a row, behind those of the parts before it, with their ranks by their keys.

    With a mask forced tokens are no runs of a known length. So those of sink pages are candidates whose rank nothing
    reaches, and those of recent pages are listed as well, where the room for candidates ends.

    Where it `RANKS` none, the first `fetched` of a row are fetched next: -1 stands for those that there are not.
    """
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = tl.minimum(length_of(lengths, b), most)
    PAGE: tl.constexpr = SHAPE.page_size
    WORDS: tl.constexpr = (PAGE + 15) // 16
    q = load_query(query, b, h, SHAPE)
    wait_for_launch(FOLLOWS)
    first_page, last_page = choice_of(end, num_sink_pages, num_recent_pages, PAGE)
    is_listed = end > token_budget
    row_live = live
    sinks_end = 0
    recent_start = 0
    room = listed
    if live is not None:
        is_listed = True  # within the budget too: only here it is known which tokens those are
        row_live = live.words + b * capacity
        span = live.spans + b * SPAN
        first_page = tl.load(span + FIRST) // PAGE
        last_page = tl.cdiv(tl.load(span + END), PAGE)
        sinks_end = tl.load(span + SINKS_END)
        recent_start = tl.load(span + RECENT_START)
        room = listed - tl.load(span + RECENT)
    if not RANKS:
        if (part == 0) & ~is_listed:
            store_unused(space.candidates + row.to(tl.int64) * listed, 0, fetched)
    if is_listed:
        words = space.passing + row.to(tl.int64) * capacity
        candidates = space.candidates + row.to(tl.int64) * listed
        share = tl.cdiv((last_page - first_page) * WORDS, parts)
        first = first_page * WORDS + part * share
        last = tl.minimum(first + share, last_page * WORDS)
        at = first + tl.arange(0, PICKED)
        passing = _words(words, row_live, at, last, sinks_end, recent_start, PAGE)
        mine = tl.sum(count_tokens(passing))
        for start in range(first + PICKED, last, PICKED):
            more = start + tl.arange(0, PICKED)
            mine += tl.sum(count_tokens(_words(words, row_live, more, last, sinks_end, recent_start, PAGE)))
        tl.atomic_xchg(space.found + row * parts + part, mine + 1, sem="relaxed", scope="gpu")
        norm = norms_of(space.norms, row, SHAPE, NORMS)
        before = _found_before(space.found + row * parts, part, PARTS)
        kept = list_tokens(candidates, None, None, at, passing, before, 0, room, PAGE)
        for start in range(first + PICKED, last, PICKED):
            more = start + tl.arange(0, PICKED)
            passing = _words(words, row_live, more, last, sinks_end, recent_start, PAGE)
            kept = list_tokens(candidates, None, None, more, passing, kept, 0, room, PAGE)
        kept = tl.minimum(kept, room)
        if live is not None:
            _list_recent(candidates, row_live, first, last, recent_start // PAGE * WORDS, room, listed, PAGE, PICKED)
        if RANKS:
            factor = _factor_of(scale, keys, h)
            table = page_table + b * table_stride
            tl.debug_barrier()  # the list is read by other threads than those that wrote it
            _rank(
                q, keys, None, table, space, row, h, before, kept, listed, sinks_end, -1, norm, factor, softcap,
                SHAPE, RANKED,
            )  # fmt: skip
        elif part == parts - 1:
            store_unused(candidates, kept, tl.minimum(fetched, room))


@triton.jit(do_not_specialize=["lengths", "num_kv_heads", "table_stride", "parts", "listed", "most"])
def weigh_kernel(
    query, keys, pool, page_table, table_stride, lengths, live, space, scale, softcap, num_kv_heads, parts, listed,
    most,
    SHAPE: tl.constexpr, PARTS: tl.constexpr, NORMS: tl.constexpr, RANKED: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """The ranks by their keys of a share of a row's candidates, as `pick_kernel` has listed them."""
    row = tl.program_id(0) // parts
    share = tl.program_id(0) % parts
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    q = load_query(query, b, h, SHAPE)
    wait_for_launch(FOLLOWS)
    sinks_end = 0
    room = listed
    if live is not None:
        span = live.spans + b * SPAN
        sinks_end = tl.load(span + SINKS_END)
        room = listed - tl.load(span + RECENT)
    part = tl.arange(0, PARTS)
    found = tl.load(space.found + row * parts + part, mask=part < parts, other=1)
    total = tl.minimum(tl.sum(found - 1), room)  # below zero where nothing was listed
    each = tl.cdiv(tl.maximum(total, 0), parts)
    first = share * each
    if first < total:
        newest = tl.minimum(length_of(lengths, b), most) - 1
        norm = norms_of(space.norms, row, SHAPE, NORMS)
        factor = _factor_of(scale, keys, h)
        table = page_table + b * table_stride
        _rank(
            q, keys, pool, table, space, row, h, first, tl.minimum(first + each, total), listed, sinks_end, newest,
            norm, factor, softcap, SHAPE, RANKED,
        )  # fmt: skip


@triton.jit
def _factor_of(scale, keys, h):
    """What a product of a query and a stored key is multiplied with, so that it is a logit in base 2."""
    factor = scale * LOG2_E
    if keys.scale is not None:
        factor = factor * tl.load(keys.scale + h * keys.scale_head)
    return factor


@triton.jit
def _rank(
    q, keys, pool, table, space, row, h, first, last, listed, sinks_end, newest, norm, factor, softcap,
    SHAPE: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """Write of some of a row's candidates the ranks by their keys, and where they lie in the cache."""
    PAGE: tl.constexpr = SHAPE.page_size
    to = row.to(tl.int64) * listed
    for start in range(first, last, RANKED):
        here = start + tl.arange(0, RANKED)
        is_live = here < last
        candidate = tl.load(space.candidates + to + here, mask=is_live, other=0)
        physical = tl.load(table + candidate // PAGE, mask=is_live, other=0)
        k = load_keys(keys, pool, row, h, physical, candidate, is_live, newest, SHAPE)
        rank = tl.where(candidate < sinks_end, FORCED, _rank_by_keys(q, k, norm, factor, softcap, SHAPE))
        tl.store(space.exact + to + here, rank, mask=is_live)
        tl.store(space.located + to + here, physical * PAGE + candidate % PAGE, mask=is_live)


@triton.jit
def _words(passing, live, at, last, sinks_end, recent_start, PAGE: tl.constexpr):
    """Words of the tokens that are candidates: with a mask live ones that passed, and all live ones of sink pages."""
    words = tl.load(passing + at, mask=at < last, other=0)
    if live is not None:
        WORDS: tl.constexpr = (PAGE + 15) // 16
        start = at // WORDS * PAGE
        lives = tl.load(live + at, mask=at < last, other=0)
        words = tl.where(start < recent_start, tl.where(start < sinks_end, lives, words & lives), 0)
    return words


@triton.jit
def _list_recent(
    candidates, live, first, last, recent, room, listed, PAGE: tl.constexpr, PICKED: tl.constexpr
):  # fmt: skip
    """Write the live tokens of words `first` to `last` from word `recent` on behind the `room` of the candidates."""
    kept = room
    for start in range(recent, first, PICKED):
        at = start + tl.arange(0, PICKED)
        kept += tl.sum(count_tokens(tl.load(live + at, mask=at < first, other=0)))
    for start in range(tl.maximum(first, recent), last, PICKED):
        at = start + tl.arange(0, PICKED)
        words = tl.load(live + at, mask=at < last, other=0)
        kept = list_tokens(candidates, None, None, at, words, kept, 0, listed, PAGE)


@triton.jit
def list_tokens(to, places, physical, at, passing, kept, least, most, PAGE: tl.constexpr):
    """Write the tokens that pass behind the `kept` ones before them, from `least` to `most`; gives how many there are.

    Where there are `places`, where they lie too: `physical` has the page of each word.
    """
    WORDS: tl.constexpr = (PAGE + 15) // 16
    each = count_tokens(passing)
    slot = kept + tl.cumsum(each) - each
    token = at // WORDS * PAGE + at % WORDS * 16
    rest = passing
    for _ in range(tl.max(each)):  # few pass: a turn for each is less than one for each of 16 places
        first_half = rest & 0x11111111
        some = tl.where(first_half != 0, first_half, rest)
        bit = some & -some
        number = (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # of the bit, by its float's exponent
        offset = number // 4 + number % 4 * 8
        is_listed = (rest != 0) & (slot >= least) & (slot < most)
        tl.store(to + slot, token + offset, mask=is_listed)
        if places is not None:
            tl.store(places + slot, physical * PAGE + at % WORDS * 16 + offset, mask=is_listed)
        slot += 1
        rest ^= bit
    return kept + tl.sum(each)


@triton.jit
def _found_before(found, part, PARTS: tl.constexpr):
    """How many candidates the parts before one have: waits until all have said so.

    With fewer parts than threads several threads load the same count, each at its own time, and a sum over the program
    takes it from any of them: in Triton 3.8 from whichever stored last. So one sum says both whether a part is missing
    and how many there are. Two could take them from different loads.
    """
    other = tl.arange(0, PARTS)
    total = MISSING
    while total >= MISSING:
        counts = tl.load(found + other, mask=other < part, other=1, volatile=True)
        total = tl.sum(tl.where(counts == 0, MISSING, counts - 1))
    return total


@triton.jit(do_not_specialize=[
    "lengths", "num_kv_heads", "table_stride", "token_budget", "num_sink_pages", "num_recent_pages", "parts", "slots",
    "listed", "most",
])  # fmt: skip
def choose_kernel(
    page_table, table_stride, lengths, live, space, units, counts, num_kv_heads, token_budget, num_sink_pages,
    num_recent_pages, parts, slots, listed, most,
    PAGE: tl.constexpr, PARTS: tl.constexpr, HELD: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """The tokens of a row to attend to, in the order of the sequence, and where they lie."""
    row = tl.program_id(0)
    b = row // num_kv_heads
    end = tl.minimum(length_of(lengths, b), most)
    table = page_table + b.to(tl.int64) * table_stride
    units += row.to(tl.int64) * slots
    places = space.places + row.to(tl.int64) * slots
    if live is not None:
        wait_for_launch(FOLLOWS)
        recent = tl.load(live.spans + b * SPAN + RECENT)
        each = tl.arange(0, PARTS)
        found = tl.load(space.found + row * parts + each, mask=each < parts, other=1)
        start = row.to(tl.int64) * listed
        here = tl.arange(0, HELD)
        rank = tl.load(space.exact + start + here, mask=here < listed, other=DEAD, cache_modifier=".cg")
        room = listed - recent
        total = tl.minimum(tl.sum(found - 1), room)
        want = tl.minimum(token_budget - recent, total)
        tl.store(counts + row, want + recent)
        for first in range(0, recent, 128):
            nth = first + tl.arange(0, 128)
            token = tl.load(space.candidates + start + room + nth, mask=nth < recent, other=0)
            place = tl.load(table + token // PAGE, mask=nth < recent, other=0) * PAGE + token % PAGE
            tl.store(units + want + nth, token, mask=nth < recent)
            tl.store(places + want + nth, place, mask=nth < recent)
        store_unused(units, want + recent, slots)
        _choose(space, start, rank, units, places, total, want, HELD)
        _put_back(space.found + row * parts, parts, PARTS)
    elif end <= token_budget:
        wait_for_launch(FOLLOWS)
        store_run(table, units, places, 0, 0, end, PAGE)
        store_unused(units, end, slots)
        tl.store(counts + row, end)
    else:
        first_page, last_page = choice_of(end, num_sink_pages, num_recent_pages, PAGE)
        sinks = first_page * PAGE
        recent = end - last_page * PAGE
        # All that is read always, in one go if a run of it is no longer than this.
        RUN: tl.constexpr = 64
        forced = tl.arange(0, 2 * RUN)
        token = tl.where(forced < RUN, forced, last_page * PAGE + forced - RUN)
        is_forced = (forced < sinks) & (forced < RUN) | (forced >= RUN) & (forced - RUN < recent)
        place = tl.load(table + token // PAGE, mask=is_forced, other=0) * PAGE + token % PAGE
        wait_for_launch(FOLLOWS)
        each = tl.arange(0, PARTS)
        found = tl.load(space.found + row * parts + each, mask=each < parts, other=1)
        start = row.to(tl.int64) * listed
        here = tl.arange(0, HELD)
        # Asked for before it is known how many there are, so that the two wait together.
        rank = tl.load(space.exact + start + here, mask=here < listed, other=DEAD, cache_modifier=".cg")
        total = tl.minimum(tl.sum(found - 1), listed)
        want = tl.minimum(token_budget - sinks - recent, total)
        tl.store(counts + row, sinks + want + recent)
        slot = tl.where(forced < RUN, forced, sinks + want + forced - RUN)
        tl.store(units + slot, token, mask=is_forced)
        tl.store(places + slot, place, mask=is_forced)
        if sinks > RUN:
            store_run(table, units, places, RUN, RUN, sinks - RUN, PAGE)
        if recent > RUN:
            store_run(table, units, places, last_page * PAGE + RUN, sinks + want + RUN, recent - RUN, PAGE)
        store_unused(units, sinks + want + recent, slots)
        _choose(space, start, rank, units + sinks, places + sinks, total, want, HELD)
        _put_back(space.found + row * parts, parts, PARTS)


@triton.jit
def _put_back(found, parts, PARTS: tl.constexpr):
    """Zero what the parts of a row have found, for the next step."""
    part = tl.arange(0, PARTS)
    tl.debug_barrier()  # every thread has loaded it: with few parts all load the same, and one writes
    tl.store(found + part, 0, mask=part < parts)


@triton.jit
def _rank_by_keys(q, k, norm, factor, softcap, SHAPE: tl.constexpr):
    """The largest log weight of a head that each token has by its key, or past all where one is not finite: `[N]`."""
    HEADS: tl.constexpr = SHAPE.block_g
    N: tl.constexpr = k.shape[0]
    k = widen(k, q.dtype)
    logit = dot(q, tl.trans(k), tl.zeros([HEADS, N], tl.float32)) * factor
    is_head = (tl.arange(0, HEADS) < SHAPE.group)[:, None]
    is_unknown = tl.sum((is_head & ~(tl.abs(logit) < float("inf"))).to(tl.int32), 0) > 0
    if softcap is not None:
        logit = cap(logit, softcap * LOG2_E)
    rank = tl.max(tl.where(is_head, logit - norm[:, None], float("-inf")), 0)
    return tl.where(is_unknown, LARGEST, rank)


@triton.jit
def store_run(table, units, places, first, slot, count, PAGE: tl.constexpr):
    """Tokens that follow one another from `first` on, which are read whatever their rank."""
    for start in range(0, count, 128):
        token = start + tl.arange(0, 128)
        place = tl.load(table + (first + token) // PAGE, mask=token < count, other=0) * PAGE + (first + token) % PAGE
        tl.store(units + slot + token, first + token, mask=token < count)
        tl.store(places + slot + token, place, mask=token < count)


@triton.jit
def store_unused(units, count, slots):
    """-1 in the slots that stay unused."""
    for start in range(count, slots, 128):
        unused = start + tl.arange(0, 128)
        tl.store(units + unused, -1, mask=unused < slots)


@triton.jit
def _choose(space, row_start, rank, units, places, total, want, HELD: tl.constexpr):
    """Write the `want` best of a row's candidates, the first of whose ranks are given, in the order of the sequence.

    More than are held at once come in turns: the best so far, and the next of the others.
    """
    exact = space.exact + row_start
    candidates = space.candidates + row_start
    located = space.located + row_start
    here = tl.arange(0, HELD)
    kept = tl.minimum(HELD, total)
    at = kept
    rank = tl.where(here < kept, rank, DEAD)
    # Asked for before it is known who is chosen, so that the two wait together.
    token = tl.load(candidates + here, mask=here < kept, other=0, cache_modifier=".cg")
    place = tl.load(located + here, mask=here < kept, other=0, cache_modifier=".cg")
    while at < total:
        chosen, slot = choose_pages(rank, kept, tl.minimum(want, kept))
        tl.debug_barrier()  # everybody has loaded what is written over
        tl.store(exact + slot, rank, mask=chosen)
        tl.store(candidates + slot, token, mask=chosen)
        tl.store(located + slot, place, mask=chosen)
        tl.debug_barrier()
        best = tl.minimum(want, kept)
        fresh = tl.minimum(HELD - best, total - at)
        kept = best + fresh
        source = tl.where(here < best, here, at + here - best)
        rank = tl.load(exact + source, mask=here < kept, other=DEAD, cache_modifier=".cg")
        token = tl.load(candidates + source, mask=here < kept, other=0, cache_modifier=".cg")
        place = tl.load(located + source, mask=here < kept, other=0, cache_modifier=".cg")
        at += fresh
    chosen, slot = choose_pages(rank, kept, want)
    tl.store(units + slot, token, mask=chosen)
    tl.store(places + slot, place, mask=chosen)


# Longer than 250 lines: programs of the first kernel wait for one another's counts, which the last one puts back.

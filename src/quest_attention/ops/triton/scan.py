"""Kernel: find the tokens of long sequences that reach a rank by the signs of their sketches, at the speed of memory.

A page's sketch is rows of one bit a channel. A tensor core multiplies such rows by rows of bits, and counts where both
are set: with the bits of a query's channels as rows too, four for the signs of keys and eight for the means of pages, a
product of integers is a few such counts, and nothing is unpacked (`bit_products`). Nor is a rank computed of each
token: from the threshold of a row (`threshold`) follows for each page and head which count its tokens must reach.

In Gluon, which lets a kernel say which thread holds what: a thread loads the words that its tensor core wants of it.
Triton's interpreter has no Gluon, and other shapes than these no such layout: there `token_decode` ranks otherwise.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quest_attention.ops.triton.bit_products import (
    for_all,
    limits_of,
    means_of,
    named_of,
    physical_of,
    signs_of,
    terms_of,
)
from quest_attention.ops.triton.masks import END, FIRST, FREE, LIVE, RECENT_START, SINKS_END, SPAN
from quest_attention.ops.triton.ranks import choice_of
from quest_attention.ops.triton.sharing import sharing
from quest_attention.ops.triton.threshold import drawn_page, threshold

__all__ = ["SCANNED_PAGES", "SCAN_PAGE_SIZE", "SCAN_WARPS", "scan_kernel"]

SCAN_WARPS = 4
"""Warps of a program."""
SCANNED_PAGES = 8 * SCAN_WARPS
"""Pages a program ranks at a time: eight a warp."""
SCAN_PAGE_SIZE = 16
"""Tokens of a page: the rows of a product."""
_choice_of, _sharing = gluon.jit(choice_of.fn), gluon.jit(sharing.fn)
"""The same arithmetic of scalars, which is of no language's own."""


@gluon.jit
def _words(at, head, WORDS: gl.constexpr):
    """A lane's word of each row: zero where a row has fewer than four."""
    if WORDS < 4:
        words = gl.load(at, mask=head < WORDS, other=0)
    else:
        words = gl.load(at)
    return words


@gluon.jit
def _rows_at(page, head, WORDS: gl.constexpr):
    """A lane's words of some pages: of two tokens and the mean, and where a row has eight words, the same once more."""
    one, two = _words(page, head, WORDS), _words(page + 8 * WORDS, head, WORDS)
    mean = _words(page + 16 * WORDS, head, WORDS)
    more_one, more_two, more_mean = one, two, mean
    if WORDS == 8:
        more_one, more_two = gl.load(page + 4), gl.load(page + (8 * WORDS + 4))
        more_mean = gl.load(page + (16 * WORDS + 4))
    return one, two, mean, more_one, more_two, more_mean


@gluon.jit
def _scales_at(at):
    """Of a lane's own page those of the mean and of the signs."""
    return gl.load(at).to(gl.float32, bitcast=True), gl.load(at + 1).to(gl.float32, bitcast=True)


@gluon.jit
def _planes(at, like, FIRST: gl.constexpr):
    """Two rows of bits a column, for all pages: `at` points to the words of the first of them."""
    return for_all(gl.load(at + FIRST * 32), like), for_all(gl.load(at + (FIRST * 32 + 32)), like)


@gluon.jit
def _pages_at(base, physical, page_stride):
    """Where pages begin, or words of them: one instruction each, as long as a stride has 32 bits."""
    if page_stride.dtype == gl.int32:
        product = [physical, page_stride, base]
        at = gl.inline_asm_elementwise(
            "mad.wide.u32 $0, $1, $2, $3;", "=l,r,r,l", product, dtype=gl.int64, is_pure=True, pack=1
        )
    else:
        at = base + physical.to(gl.int64) * page_stride
    return at.to(gl.pointer_type(gl.int32), bitcast=True)


@gluon.jit
def _tanh(x):
    """The hardware's own, off by up to 2 ** -11 of it: by 0.035 in base 2 at a cap of 50. It only nominates."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _limit_of(least, norm, softcap):
    """The logit in base 2, before a cap, whose log weight is `least`."""
    limit = least + norm
    if softcap is not None:
        share = limit / (softcap * 1.4426950408889634)
        inside = gl.minimum(gl.maximum(share, -0.999999), 0.999999)
        reached = softcap * (0.5 * (gl.log2(1.0 + inside) - gl.log2(1.0 - inside)))
        limit = gl.where(share >= 1.0, float("inf"), gl.where(share <= -1.0, float("-inf"), reached))
    return limit


@gluon.jit
def _weight_of(product, times, plus, norm, softcap):
    """Log weights in base 2 of tokens for four heads."""
    weight = product.to(gl.float32) * times + plus
    if softcap is not None:
        cap = softcap * 1.4426950408889634  # logits are in base 2
        weight = cap * _tanh(weight * (1.0 / cap))
    return weight - norm


@gluon.jit
def _norm_of(at, head, PARTS: gl.constexpr):
    """The normaliser of four heads from those of the parts of the sample, 0 where nothing had weight."""
    largest = gl.load(at + head)
    for part in gl.static_range(1, PARTS):
        largest = gl.maximum(largest, gl.load(at + part * 16 + head))
    largest = gl.maximum(largest, -1e30)
    total = gl.exp2(gl.load(at + head) - largest)
    for part in gl.static_range(1, PARTS):
        total += gl.exp2(gl.load(at + part * 16 + head) - largest)
    return gl.where(total > 0, largest + gl.log2(gl.maximum(total, 1e-30)), 0.0)


@gluon.jit
def _wait_for_launch(FOLLOWS: gl.constexpr):
    """See `launch.wait_for_launch`."""
    if FOLLOWS:
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def _factors_of(factor, norm_at, head, GROUP: gl.constexpr, NORMS: gl.constexpr):
    """Of a set of four heads: what products of means and of signs are worth, what to take from them, and normalisers.

    The normaliser of what is no head is larger than anything.
    """
    norm = gl.where(head < GROUP, _norm_of(norm_at, head, NORMS), float("inf"))
    return gl.load(factor + head), gl.load(factor + 16 + head), gl.load(factor + 32 + head), norm


@gluon.jit
def _number_of(words):
    """How many tokens each word names."""
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _largest(weight):
    """The largest of four heads, in all four places: float16."""
    rank = gl.max(weight, 3)
    return rank[:, :, :, None].to(gl.float16)


@gluon.jit
def _live_sequences(lengths, sequences, WARPS: gl.constexpr):
    """See `sharing.live_sequences`."""
    found = sequences
    if lengths.dtype.is_ptr():
        if sequences > 1:
            found = 1
            for start in range(0, sequences, 64 * WARPS):
                nth = start + gl.arange(0, 64 * WARPS, layout=gl.BlockedLayout([2], [32], [WARPS], [0]))
                length = gl.load(lengths + nth, mask=nth < sequences, other=0)
                found = gl.maximum(found, gl.max(gl.where(length > 0, nth + 1, 1), 0))
    return found


@gluon.jit(do_not_specialize=[
    "lengths", "num_kv_heads", "table_stride", "sequences", "each", "parts_of_row", "token_budget", "num_sink_pages",
    "num_recent_pages", "wanted", "capacity", "most",
])  # fmt: skip
def scan_kernel(
    metadata, page_stride, head_stride, page_table, table_stride, lengths, live_words, live_spans, planes, factors,
    norms, sample, passing, passed, softcap, num_kv_heads, sequences, each, parts_of_row, capacity, token_budget,
    num_sink_pages, num_recent_pages, wanted, most,
    AT_ONCE: gl.constexpr, IS_SAMPLE: gl.constexpr, COUNTS: gl.constexpr, GROUP: gl.constexpr, WORDS: gl.constexpr,
    SAMPLED: gl.constexpr, FEWEST: gl.constexpr, NORMS: gl.constexpr, WARPS: gl.constexpr, FOLLOWS: gl.constexpr,
):  # fmt: skip
    """Ranks of the tokens of a sample of a row's pages; or which tokens of all pages pass the threshold it gives.

    With `COUNTS` it is counted how many pass that are not read anyway.

    With a mask, of those pages from that of the first live token on, up to that of the last.

    `planes` has for each set of four heads, and each 128 channels, two tiles for signs and four for means; `factors`
    three rows of 16 heads: of a mean's product, of a sign's, and what to take from a level's.
    """
    PAGES: gl.constexpr = 8 * WARPS
    PAGE: gl.constexpr = 16
    SETS: gl.constexpr = (GROUP + 3) // 4
    HALVES: gl.constexpr = 2 if WORDS == 8 else 1
    WARP: gl.constexpr = [[1, 0, 0, 0], [2, 0, 0, 0]] if WARPS == 4 else [[1, 0, 0, 0]] if WARPS == 2 else []
    # Warps, their pages, rows of a page, and words of a row, which are heads of a set where products are.
    LAYOUT: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
        lane_bases=[[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]],
        warp_bases=WARP, block_bases=[], shape=[WARPS, 8, 8, 4],
    )  # fmt: skip
    OF_WARPS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    OF_PAGES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    OF_ROWS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT)))
    OF_WORDS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    OWN_WARPS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(1, LAYOUT)))
    OWN_ROWS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(1, LAYOUT)))
    OWN_WORDS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(1, LAYOUT)))
    live_batch = _live_sequences(lengths, sequences, WARPS)
    parts = _sharing(live_batch, sequences, num_kv_heads, each, gl.num_programs(0), parts_of_row, AT_ONCE)
    live_rows = live_batch * num_kv_heads
    is_needed = gl.program_id(0) < live_rows * parts
    row = gl.minimum(gl.program_id(0) // parts, live_rows - 1)
    part = gl.program_id(0) % parts
    b = row // num_kv_heads
    if lengths.dtype.is_ptr():
        end = gl.load(lengths + b).to(gl.int32)
    else:
        end = lengths
    end = gl.minimum(end, most)
    whole = gl.where(end > token_budget, (end - 1) // PAGE, 0)  # pages to rank: the one being written is read anyway
    begin = 0
    span = live_spans
    row_live = live_words
    if live_spans is not None:
        _wait_for_launch(FOLLOWS)
        span = live_spans + b * SPAN
        begin = gl.load(span + FIRST) // PAGE
        whole = gl.where(gl.load(span + LIVE) > token_budget, (gl.load(span + END) - 1) // PAGE - begin, 0)
    rare = 0
    for turn in gl.static_range(4):
        rare += gl.where((whole >> (rare + ((8 >> turn) - 1))) * PAGE > SAMPLED, 8 >> turn, 0)
    drawn = whole >> rare
    ranked = drawn if IS_SAMPLE else whole
    share = gl.cdiv(gl.cdiv(ranked, parts), PAGES) * PAGES
    first = part * share
    last = gl.where(is_needed, gl.minimum(first + share, ranked), 0)
    if first < last:
        table = page_table + b.to(gl.int64) * table_stride + begin
        base = (metadata + (row % num_kv_heads).to(gl.int64) * head_stride).to(gl.int64, bitcast=True)
        warp = gl.arange(0, WARPS, layout=OF_WARPS)[:, None, None, None]
        page_of = gl.arange(0, 8, layout=OF_PAGES)[None, :, None, None]
        row_of = gl.arange(0, 8, layout=OF_ROWS)[None, None, :, None]
        head = gl.arange(0, 4, layout=OF_WORDS)[None, None, None, :]
        like = gl.zeros([WARPS, 8, 8, 4], gl.int32, LAYOUT)
        rows = for_all(row_of, like)
        # A lane's own page is the one whose number is that of the lane's row.
        own = gl.arange(0, WARPS, layout=OWN_WARPS)[:, None, None] * 8 + gl.arange(0, 8, layout=OWN_ROWS)[None, :, None]
        own = own + 0 * gl.arange(0, 4, layout=OWN_WORDS)[None, None, :]
        base_of = for_all(base + ((row_of * WORDS + head) * 4).to(gl.int64), like)
        scales_of = base + (PAGE + 7) * WORDS * 4  # behind the rows of the mean
        # A drawn page's number is not its place in the sample.
        at = gl.minimum(first + own, last - 1)
        physical = gl.load(table + (drawn_page(at, rare) if IS_SAMPLE else at))
        page = _pages_at(base_of, physical_of(physical, like), page_stride)
        own_page = _pages_at(scales_of, physical, page_stride)
        one, two, mean, more_one, more_two, more_mean = _rows_at(page, head, WORDS)
        mean_scale, scale = _scales_at(own_page)
        at = gl.minimum(first + PAGES + own, last - 1)
        physical = gl.load(table + (drawn_page(at, rare) if IS_SAMPLE else at))
        if live_spans is None:
            _wait_for_launch(FOLLOWS)
        factor = factors + row * 48
        norm_at = norms + row * (16 * NORMS)
        SET: gl.constexpr = HALVES * 192
        bits_at = planes + row * (SETS * SET) + (row_of * 4 + head)
        bits, low, high = _planes(bits_at, like, 0), _planes(bits_at, like, 2), _planes(bits_at, like, 4)
        more_bits, more_low, more_high = bits, low, high
        if HALVES == 2:
            more_bits = _planes(bits_at, like, 6)
            more_low, more_high = _planes(bits_at, like, 8), _planes(bits_at, like, 10)
        per_mean, per_sign, less, norm = _factors_of(factor, norm_at, head, GROUP, NORMS)
        next_bits, next_low, next_high = bits, low, high
        next_more_bits, next_more_low, next_more_high = more_bits, more_low, more_high
        next_per_mean, next_per_sign, next_less, next_norm = per_mean, per_sign, less, norm
        if SETS == 2:
            next_at = bits_at + SET
            next_bits = _planes(next_at, like, 0)
            next_low, next_high = _planes(next_at, like, 2), _planes(next_at, like, 4)
            if HALVES == 2:
                next_more_bits = _planes(next_at, like, 6)
                next_more_low, next_more_high = _planes(next_at, like, 8), _planes(next_at, like, 10)
            next_per_mean, next_per_sign, next_less, next_norm = _factors_of(
                factor + 4, norm_at + 4, head, GROUP - 4, NORMS
            )
        worth = for_all(gl.where(row_of < 6, 1 << row_of, gl.where(row_of == 6, -64, 0)), like)
        first_page = 0
        last_page = 0
        if not IS_SAMPLE:
            if live_spans is None:
                first_page, last_page = _choice_of(end, num_sink_pages, num_recent_pages, PAGE)
                free = (last_page - first_page) * PAGE
            else:
                row_live = live_words + b.to(gl.int64) * capacity
                first_page = gl.load(span + SINKS_END) // PAGE
                last_page = gl.load(span + RECENT_START) // PAGE
                free = gl.load(span + FREE)
            least = threshold(
                sample + row * SAMPLED, row_live, drawn, rare, begin, first_page, last_page, free, wanted,
                FEWEST, SAMPLED, WARPS,
            )  # fmt: skip
            least -= gl.abs(least) * 0.0009765625 + 1e-6  # as far as its rounding to float16 goes
            norm, next_norm = _limit_of(least, norm, softcap), _limit_of(least, next_norm, softcap)
        per_mean, per_sign, less = for_all(per_mean, like), for_all(per_sign, like), for_all(less, like)
        norm = for_all(norm, like)
        next_per_mean, next_per_sign = for_all(next_per_mean, like), for_all(next_per_sign, like)
        next_less, next_norm = for_all(next_less, like), for_all(next_norm, like)
        number = gl.zeros([WARPS, 8, 4], gl.int32, gl.SliceLayout(1, LAYOUT))
        for start in range(first, last, PAGES):
            center = means_of(mean, low[0], low[1], high[0], high[1], worth)
            first_products, second_products = signs_of(one, two, bits[0], bits[1])
            next_center, next_first, next_second = center, first_products, second_products
            if SETS == 2:
                next_center = means_of(mean, next_low[0], next_low[1], next_high[0], next_high[1], worth)
                next_first, next_second = signs_of(one, two, next_bits[0], next_bits[1])
            if HALVES == 2:
                center += means_of(more_mean, more_low[0], more_low[1], more_high[0], more_high[1], worth)
                more_first, more_second = signs_of(more_one, more_two, more_bits[0], more_bits[1])
                first_products += more_first
                second_products += more_second
                if SETS == 2:
                    next_center += means_of(
                        more_mean, next_more_low[0], next_more_low[1], next_more_high[0], next_more_high[1], worth
                    )
                    more_first, more_second = signs_of(more_one, more_two, next_more_bits[0], next_more_bits[1])
                    next_first += more_first
                    next_second += more_second
            if IS_SAMPLE:
                times, plus = terms_of(center, rows, mean_scale, scale, per_mean, per_sign, less)
                rank = _weight_of(first_products, times, plus, norm, softcap)
                other = _weight_of(second_products, times, plus, norm, softcap)
                if SETS == 2:
                    times, plus = terms_of(
                        next_center, rows, mean_scale, scale, next_per_mean, next_per_sign, next_less
                    )
                    # NaN of a page whose keys are not finite is in both
                    rank = gl.maximum(rank, _weight_of(next_first, times, plus, next_norm, softcap))
                    other = gl.maximum(other, _weight_of(next_second, times, plus, next_norm, softcap))
                nth = warp * 8 + page_of
                to = sample + (row * SAMPLED + start * PAGE) + (nth * PAGE + row_of)
                inside = (nth < last - start) & (row_of < 8)
                gl.store(to, _largest(rank), mask=inside)
                gl.store(to + 8, _largest(other), mask=inside)
            else:
                limits = limits_of(center, rows, mean_scale, scale, per_mean, per_sign, less, norm)
                found = named_of(first_products, second_products, limits, rows)
                if SETS == 2:
                    limits = limits_of(
                        next_center, rows, mean_scale, scale, next_per_mean, next_per_sign, next_less, next_norm
                    )
                    found |= named_of(next_first, next_second, limits, rows)
                nth = warp * 8 + row_of
                to = passing + (row.to(gl.int64) * capacity + begin + start) + nth + 0 * like
                gl.store(to, found, mask=(head == 0) & (page_of == 0) & (nth < last - start))
                if COUNTS:
                    ranked_page = begin + start + own
                    is_free = (ranked_page >= first_page) & (ranked_page < last_page) & (own < last - start)
                    of_page = gl.max(found, 1)
                    if live_spans is not None:
                        of_page &= gl.load(row_live + ranked_page, mask=is_free, other=0)
                    number += gl.where(is_free, _number_of(of_page), 0)
            page = _pages_at(base_of, physical_of(physical, like), page_stride)
            own_page = _pages_at(scales_of, physical, page_stride)
            one, two, mean, more_one, more_two, more_mean = _rows_at(page, head, WORDS)
            mean_scale, scale = _scales_at(own_page)
            at = gl.minimum(start + 2 * PAGES + own, last - 1)
            physical = gl.load(table + (drawn_page(at, rare) if IS_SAMPLE else at))
        if COUNTS:  # all four heads have counted
            gl.store(passed + row * parts + part, gl.sum(gl.sum(gl.sum(number, 2), 1), 0) // 4)
    else:
        if live_spans is None:
            _wait_for_launch(FOLLOWS)
        if COUNTS:
            gl.store(passed + row * parts + part, 0, mask=is_needed)


# Longer than 250 lines: the layouts of one loop and its instructions, which only make sense together.

"""Kernel: rank all tokens of long sequences by the signs of their sketches, at the speed of memory.

A page's sketch is rows of one bit a channel. A tensor core multiplies such rows by rows of bits, and counts where both
are set: with the bits of a query's channels as rows too, four for the signs of keys and eight for the means of pages, a
product of integers is a few such counts, and nothing is unpacked. A product's columns are two bits of four heads each.

In Gluon, which lets a kernel say which thread holds what: a thread loads the words that its tensor core wants of it.
Triton's interpreter has no Gluon, and other shapes than these no such layout: there `token_decode` ranks otherwise.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quest_attention.ops.triton.masks import END, FIRST, FREE, LIVE, RECENT_START, SINKS_END, SPAN

__all__ = ["SCANNED_PAGES", "SCAN_PAGE_SIZE", "SCAN_WARPS", "scan_kernel"]

SCAN_WARPS = 4
"""Warps of a program."""
SCANNED_PAGES = 8 * SCAN_WARPS
"""Pages a program ranks at a time: eight a warp."""
SCAN_PAGE_SIZE = 16
"""Tokens of a page: the rows of a product."""


@gluon.jit
def _signs_of(words, low, high):
    """Products of 16 tokens' sign bits with four heads in four bits, `low` and `high` two of these each: int32."""
    return gl.inline_asm_elementwise(
        """
        { .reg .b32 z, c<4>, d<4>;
        mov.b32 z, 0;
        mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {c0,c1,c2,c3}, {$2,$3}, {$4}, {z,z,z,z};
        mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {d0,d1,d2,d3}, {$2,$3}, {$6}, {z,z,z,z};
        mad.lo.s32 c0, c1, 2, c0; mad.lo.s32 d0, d1, -2, d0; mad.lo.s32 $0, d0, 4, c0;
        mad.lo.s32 c2, c3, 2, c2; mad.lo.s32 d2, d3, -2, d2; mad.lo.s32 $1, d2, 4, c2; }
        """,
        "=&r,=&r,r,r,r,r,r,r",
        [words, low, high],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _means_of(words, b0, b1, b2, b3, worth):
    """Products of the means of two pages, a bit a row, with four heads in eight bits, in all rows alike: int32."""
    return gl.inline_asm_elementwise(
        """
        { .reg .b32 z, c<4>, d<4>, e<4>, f<4>, q;
        mov.b32 z, 0;
        mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {c0,c1,c2,c3}, {$2,$3}, {$4}, {z,z,z,z};
        mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {d0,d1,d2,d3}, {$2,$3}, {$6}, {z,z,z,z};
        mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {e0,e1,e2,e3}, {$2,$3}, {$8}, {z,z,z,z};
        mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {f0,f1,f2,f3}, {$2,$3}, {$10}, {z,z,z,z};
        mad.lo.s32 c0, c1, 2, c0; mad.lo.s32 d0, d1, 2, d0; mad.lo.s32 e0, e1, 2, e0; mad.lo.s32 f0, f1, -2, f0;
        mad.lo.s32 c2, c3, 2, c2; mad.lo.s32 d2, d3, 2, d2; mad.lo.s32 e2, e3, 2, e2; mad.lo.s32 f2, f3, -2, f2;
        mad.lo.s32 c0, d0, 4, c0; mad.lo.s32 e0, f0, 4, e0; mad.lo.s32 c0, e0, 16, c0; mul.lo.s32 c0, c0, $12;
        mad.lo.s32 c2, d2, 4, c2; mad.lo.s32 e2, f2, 4, e2; mad.lo.s32 c2, e2, 16, c2; mul.lo.s32 c2, c2, $12;
        shfl.sync.bfly.b32 q, c0, 4, 31, -1; add.s32 c0, c0, q; shfl.sync.bfly.b32 q, c2, 4, 31, -1; add.s32 c2, c2, q;
        shfl.sync.bfly.b32 q, c0, 8, 31, -1; add.s32 c0, c0, q; shfl.sync.bfly.b32 q, c2, 8, 31, -1; add.s32 c2, c2, q;
        shfl.sync.bfly.b32 q, c0, 16, 31, -1; add.s32 $0, c0, q; shfl.sync.bfly.b32 q, c2, 16, 31, -1;
        add.s32 $1, c2, q; }
        """,
        "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
        [words, b0, b1, b2, b3, worth],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _scales_of(words):
    """The two scales of each page, in all rows alike: the row behind the seven of the mean begins with them."""
    return gl.inline_asm_elementwise(
        """
        { .reg .b32 q;
        shfl.sync.idx.b32 q, $4, 28, 31, -1; mov.b32 $0, q; shfl.sync.idx.b32 q, $5, 28, 31, -1; mov.b32 $1, q;
        shfl.sync.idx.b32 q, $4, 29, 31, -1; mov.b32 $2, q; shfl.sync.idx.b32 q, $5, 29, 31, -1; mov.b32 $3, q; }
        """,
        "=&f,=&f,=&f,=&f,r,r",
        [words],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _largest_of_heads(weights):
    """The largest of the four heads, in all four places, of two tokens a register: float16."""
    return gl.inline_asm_elementwise(
        """
        { .reg .b32 p, q;
        cvt.rn.f16x2.f32 p, $2, $1;
        shfl.sync.bfly.b32 q, p, 1, 31, -1; max.f16x2 p, p, q;
        shfl.sync.bfly.b32 q, p, 2, 31, -1; max.f16x2 $0, p, q; }
        """,
        "=r,f,f",
        [weights],
        dtype=gl.float16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _passing(weights, low):
    """Which tokens of a page have a rank that is not below `low`, in all places alike: two bits of four for two."""
    return gl.inline_asm_elementwise(
        """
        { .reg .b32 p, q, l; .reg .pred e, o;
        cvt.rn.f16x2.f32 p, $3, $2; cvt.rn.f16x2.f32 l, $5, $4;
        shfl.sync.bfly.b32 q, p, 1, 31, -1; max.f16x2 p, p, q;
        shfl.sync.bfly.b32 q, p, 2, 31, -1; max.f16x2 p, p, q;
        setp.geu.f16x2 e|o, p, l;
        vote.sync.ballot.b32 p, e, -1; vote.sync.ballot.b32 q, o, -1;
        and.b32 p, p, 0x11111111; and.b32 q, q, 0x22222222; or.b32 $0, p, q; mov.b32 $1, $0; }
        """,
        "=&r,=&r,f,f,f,f",
        [weights, low],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _for_tokens(x, PAGES: gl.constexpr, TWICE: gl.constexpr, TOKENS: gl.constexpr):
    """What is alike in all rows of a mean, `[PAGES, 8, 4]`, for the rows of tokens, `[PAGES, 16, 4]`."""
    y = gl.convert_layout(x, gl.SliceLayout(2, TWICE), assert_trivial=True)[:, :, None, :]
    y, _ = gl.broadcast(y, gl.zeros([PAGES, 8, 2, 4], gl.float32, TWICE))
    return gl.convert_layout(y.reshape([PAGES, 16, 4]), TOKENS, assert_trivial=True)


@gluon.jit
def _words(pages, within, word, WORDS: gl.constexpr):
    """A thread's word of each row: zero where a row has fewer than four."""
    at = pages[:, None, None] + within
    if WORDS < 4:
        words = gl.load(at, mask=(word < WORDS)[None, None, :], other=0)
    else:
        words = gl.load(at)
    return words


@gluon.jit
def _planes(at, like, FIRST: gl.constexpr):
    """Two rows of bits a column, for all pages: `at` points to the words of the first of them."""
    a, _ = gl.broadcast(gl.load(at + FIRST * 32), like)
    b, _ = gl.broadcast(gl.load(at + (FIRST * 32 + 32)), like)
    return a, b


@gluon.jit
def _pages_at(base, physical, page_stride):
    """Where pages begin: one instruction each, as long as a stride has 32 bits."""
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
def _weights_of(
    signs, more_signs, mean, more_mean, planes, more_planes, low, high, more_low, more_high, worth, scale, mean_scale,
    per_mean, per_sign, less, norm, softcap, PAGES: gl.constexpr, HALVES: gl.constexpr, TWICE: gl.constexpr,
    TOKENS: gl.constexpr,
):  # fmt: skip
    """Log weights of the tokens of some pages for four heads, `[PAGES, 16, 4]`."""
    center = _means_of(mean, low[0], low[1], high[0], high[1], worth)
    rest = _signs_of(signs, planes[0], planes[1])
    if HALVES == 2:
        center += _means_of(more_mean, more_low[0], more_low[1], more_high[0], more_high[1], worth)
        rest += _signs_of(more_signs, more_planes[0], more_planes[1])
    add = center.to(gl.float32) * mean_scale * per_mean
    if softcap is None:
        add = add - (scale * less + norm)
    else:
        add = add - scale * less
    add = _for_tokens(add, PAGES, TWICE, TOKENS)
    weight = rest.to(gl.float32) * _for_tokens(scale * per_sign, PAGES, TWICE, TOKENS) + add
    if softcap is not None:
        cap = softcap * 1.4426950408889634  # logits are in base 2
        weight = cap * _tanh(weight * (1.0 / cap)) - _for_tokens(norm + gl.zeros_like(scale), PAGES, TWICE, TOKENS)
    return weight


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
def _threshold(
    sample, live, drawn, rare, begin, first_page, last_page, free, wanted,
    FEWEST: gl.constexpr, SAMPLED: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """See `ranks`, where the same is in Triton."""
    EACH: gl.constexpr = SAMPLED // (32 * WARPS)
    LAYOUT: gl.constexpr = gl.BlockedLayout([EACH], [32], [WARPS], [0])
    at = gl.arange(0, SAMPLED, layout=LAYOUT)
    nth = at // 16
    page = begin + _drawn_page(nth, rare)
    inside = (nth < drawn) & (page >= first_page) & (page < last_page)
    if live is not None:
        bit = at % 16
        lives = gl.load(live + page, mask=inside, other=0)
        inside &= ((lives >> (bit // 2 * 4 + bit % 2)) & 1) != 0
    rank = gl.load(sample + at, mask=inside, other=0.0).to(gl.float32)
    is_finite = inside & (rank > float("-inf")) & (rank < float("inf"))
    low = gl.min(gl.where(is_finite, rank, 65504.0), 0)
    high = gl.max(gl.where(is_finite, rank, -65504.0), 0)
    rank = gl.where(inside, gl.where(is_finite, rank, 65504.0), float("-inf"))
    known = gl.sum(inside.to(gl.int32), 0)
    share = wanted.to(gl.float32) / gl.maximum(free, 1).to(gl.float32)
    most = gl.maximum((share * known.to(gl.float32)).to(gl.int32), FEWEST)
    for _ in gl.static_range(6):
        third = (high - low) * 0.33333334
        lower = low + third
        upper = high - third
        both = gl.sum((rank >= lower).to(gl.int32) + (rank >= upper).to(gl.int32) * 65536, 0)
        is_lower = (both & 0xFFFF) >= most
        is_upper = (both >> 16) >= most
        high = gl.where(is_upper, high, gl.where(is_lower, upper, lower))
        low = gl.where(is_upper, upper, gl.where(is_lower, lower, low))
    return gl.where(most < known, low, -65504.0)


@gluon.jit
def _drawn_page(nth, rare):
    """Of every `1 << rare` pages that follow one another, the one that is drawn."""
    return (nth << rare) + ((nth * 40503 >> 4) & ((1 << rare) - 1))


@gluon.jit(do_not_specialize=[
    "lengths", "num_kv_heads", "table_stride", "parts", "token_budget", "num_sink_pages", "num_recent_pages",
    "candidate_budget", "capacity", "most",
])  # fmt: skip
def scan_kernel(
    metadata, page_stride, head_stride, page_table, table_stride, lengths, live_words, live_spans, planes, factors,
    norms, sample, passing, softcap, num_kv_heads, parts, capacity, token_budget, num_sink_pages, num_recent_pages,
    candidate_budget, most,
    IS_SAMPLE: gl.constexpr, GROUP: gl.constexpr, WORDS: gl.constexpr, SAMPLED: gl.constexpr, FEWEST: gl.constexpr,
    NORMS: gl.constexpr, WARPS: gl.constexpr, FOLLOWS: gl.constexpr,
):  # fmt: skip
    """Ranks of the tokens of a sample of a row's pages; or which tokens of all pages pass the threshold it gives.

    With a mask, of those pages from that of the first live token on, up to that of the last.

    `planes` has for each set of four heads, and each 128 channels, two tiles for signs and four for means; `factors`
    three rows of 16 heads: of a mean's product, of a sign's, and what to take from a level's.
    """
    PAGES: gl.constexpr = 8 * WARPS
    PAGE: gl.constexpr = 16
    SETS: gl.constexpr = (GROUP + 3) // 4
    HALVES: gl.constexpr = 2 if WORDS == 8 else 1
    WARP: gl.constexpr = [[8, 0, 0], [16, 0, 0]] if WARPS == 4 else [[8, 0, 0]] if WARPS == 2 else []
    TWICE_WARP: gl.constexpr = [[8, 0, 0, 0], [16, 0, 0, 0]] if WARPS == 4 else [[8, 0, 0, 0]] if WARPS == 2 else []
    TOKENS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        lane_bases=[[0, 0, 1], [0, 0, 2], [0, 2, 0], [0, 4, 0], [0, 8, 0]],
        warp_bases=WARP, block_bases=[], shape=[PAGES, PAGE, 4],
    )  # fmt: skip
    MEANS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[1, 0, 0], [2, 0, 0], [4, 0, 0]],
        lane_bases=[[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=WARP, block_bases=[], shape=[PAGES, 8, 4],
    )  # fmt: skip
    TWICE: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        lane_bases=[[0, 0, 0, 1], [0, 0, 0, 2], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
        warp_bases=TWICE_WARP, block_bases=[], shape=[PAGES, 8, 2, 4],
    )  # fmt: skip
    OF_PAGES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, TOKENS))
    OF_TOKENS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, TOKENS))
    OF_WORDS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, TOKENS))
    OF_MEAN_PAGES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, MEANS))
    OF_BITS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, MEANS))
    OF_HEADS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, MEANS))
    row = gl.program_id(0) // parts
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
    if live_spans is not None:
        _wait_for_launch(FOLLOWS)
        span = live_spans + b * SPAN
        begin = gl.load(span + FIRST) // PAGE
        whole = gl.where(gl.load(span + LIVE) > token_budget, (gl.load(span + END) - 1) // PAGE - begin, 0)
    rare = 0
    for turn in gl.static_range(16):  # noqa: B007 - `_` is used below
        rare += gl.where((whole >> rare) * PAGE > SAMPLED, 1, 0)
    drawn = whole >> rare
    ranked = drawn if IS_SAMPLE else whole
    tiles = gl.cdiv(gl.cdiv(ranked, parts), PAGES)
    first = part * tiles * PAGES
    last = gl.minimum(first + tiles * PAGES, ranked)
    if first < last:
        table = page_table + b.to(gl.int64) * table_stride + begin
        base = (metadata + (row % num_kv_heads).to(gl.int64) * head_stride).to(gl.int64, bitcast=True)
        page_of = gl.arange(0, PAGES, layout=OF_PAGES)
        token = gl.arange(0, PAGE, layout=OF_TOKENS)
        word = gl.arange(0, 4, layout=OF_WORDS)
        bit = gl.arange(0, 8, layout=OF_BITS)
        head = gl.arange(0, 4, layout=OF_HEADS)  # of a set; a lane's word and its head are one number
        within = token[None, :, None] * WORDS + word[None, None, :]
        mean_within = (PAGE + bit)[None, :, None] * WORDS + head[None, None, :]
        # A drawn page's number is not its place in the sample.
        at = gl.minimum(first + page_of, last - 1)
        physical = gl.load(table + (_drawn_page(at, rare) if IS_SAMPLE else at))
        page = _pages_at(base, physical, page_stride)
        mean_page = gl.convert_layout(page, OF_MEAN_PAGES, assert_trivial=True)
        signs = _words(page, within, word, WORDS)
        mean = _words(mean_page, mean_within, head, WORDS)
        more_signs, more_mean = signs, mean
        if HALVES == 2:
            more_signs = gl.load(page[:, None, None] + (within + 4))
            more_mean = gl.load(mean_page[:, None, None] + (mean_within + 4))
        at = gl.minimum(first + PAGES + page_of, last - 1)
        physical = gl.load(table + (_drawn_page(at, rare) if IS_SAMPLE else at))
        if live_spans is None:
            _wait_for_launch(FOLLOWS)
        factor = factors + row * 48
        norm_at = norms + row * (16 * NORMS)
        per_mean = gl.load(factor + head)[None, None, :]
        per_sign = gl.load(factor + 16 + head)[None, None, :]
        less = gl.load(factor + 32 + head)[None, None, :]
        norm = gl.where(head < GROUP, _norm_of(norm_at, head, NORMS), float("inf"))[None, None, :]
        tokens = gl.zeros([PAGES, PAGE, 4], gl.int32, TOKENS)
        means = gl.zeros([PAGES, 8, 4], gl.int32, MEANS)
        SET: gl.constexpr = HALVES * 192
        bits_at = planes + row * (SETS * SET) + ((token // 2)[None, :, None] * 4 + word[None, None, :])
        mean_at = planes + row * (SETS * SET) + (bit[None, :, None] * 4 + head[None, None, :])
        bits = _planes(bits_at, tokens, 0)
        low, high = _planes(mean_at, means, 2), _planes(mean_at, means, 4)
        more_bits, more_low, more_high = bits, low, high
        if HALVES == 2:
            more_bits = _planes(bits_at, tokens, 6)
            more_low, more_high = _planes(mean_at, means, 8), _planes(mean_at, means, 10)
        next_bits, next_low, next_high, next_norm = bits, low, high, norm
        next_more_bits, next_more_low, next_more_high = more_bits, more_low, more_high
        next_per_mean, next_per_sign, next_less = per_mean, per_sign, less
        if SETS == 2:
            next_bits = _planes(bits_at + SET, tokens, 0)
            next_low, next_high = _planes(mean_at + SET, means, 2), _planes(mean_at + SET, means, 4)
            if HALVES == 2:
                next_more_bits = _planes(bits_at + SET, tokens, 6)
                next_more_low = _planes(mean_at + SET, means, 8)
                next_more_high = _planes(mean_at + SET, means, 10)
            next_per_mean = gl.load(factor + 4 + head)[None, None, :]
            next_per_sign = gl.load(factor + 20 + head)[None, None, :]
            next_less = gl.load(factor + 36 + head)[None, None, :]
            next_norm = gl.where(head + 4 < GROUP, _norm_of(norm_at + 4, head, NORMS), float("inf"))[None, None, :]
        worth = gl.where(bit < 6, 1 << bit, gl.where(bit == 6, -64, 0))[None, :, None]
        worth, _ = gl.broadcast(worth, means)
        least = 0.0
        if not IS_SAMPLE:
            row_live = live_words
            if live_spans is None:
                total = gl.cdiv(end, PAGE)
                first_page = gl.minimum(num_sink_pages, total)
                last_page = gl.maximum(total - num_recent_pages, first_page)
                free = (last_page - first_page) * PAGE
            else:
                row_live = live_words + b.to(gl.int64) * capacity
                first_page = gl.load(span + SINKS_END) // PAGE
                last_page = gl.load(span + RECENT_START) // PAGE
                free = gl.load(span + FREE)
            least = _threshold(
                sample + row * SAMPLED, row_live, drawn, rare, begin, first_page, last_page, free, candidate_budget,
                FEWEST, SAMPLED, WARPS,
            )  # fmt: skip
        is_first = (word == 0)[None, None, :]
        for start in range(first, last, PAGES):
            mean_scale, scale = _scales_of(mean)
            weight = _weights_of(
                signs, more_signs, mean, more_mean, bits, more_bits, low, high, more_low, more_high, worth, scale,
                mean_scale, per_mean, per_sign, less, norm, softcap, PAGES, HALVES, TWICE, TOKENS,
            )  # fmt: skip
            if SETS == 2:
                other = _weights_of(
                    signs, more_signs, mean, more_mean, next_bits, next_more_bits, next_low, next_high, next_more_low,
                    next_more_high, worth, scale, mean_scale, next_per_mean, next_per_sign, next_less, next_norm,
                    softcap, PAGES, HALVES, TWICE, TOKENS,
                )  # fmt: skip
                weight = gl.maximum(weight, other)  # NaN of a page whose keys are not finite is in both
            found = _largest_of_heads(weight) if IS_SAMPLE else _passing(weight, least + gl.zeros_like(weight))
            page = _pages_at(base, physical, page_stride)
            mean_page = gl.convert_layout(page, OF_MEAN_PAGES, assert_trivial=True)
            signs = _words(page, within, word, WORDS)
            mean = _words(mean_page, mean_within, head, WORDS)
            more_signs, more_mean = signs, mean
            if HALVES == 2:
                more_signs = gl.load(page[:, None, None] + (within + 4))
                more_mean = gl.load(mean_page[:, None, None] + (mean_within + 4))
            at = gl.minimum(start + 2 * PAGES + page_of, last - 1)
            physical = gl.load(table + (_drawn_page(at, rare) if IS_SAMPLE else at))
            is_there = (page_of < last - start)[:, None, None]  # which keeps to 32 bits
            if IS_SAMPLE:
                to = sample + (row * SAMPLED + start * PAGE) + (page_of[:, None, None] * PAGE + token[None, :, None])
                gl.store(to + 0 * within, found, mask=is_first & is_there)
            else:
                to = passing + (row.to(gl.int64) * capacity + begin + start) + page_of[:, None, None] + 0 * within
                gl.store(to, found, mask=is_first & (token == 0)[None, :, None] & is_there)
    elif live_spans is None:
        _wait_for_launch(FOLLOWS)


# Longer than 250 lines: the layouts of one loop and its instructions, which only make sense together.

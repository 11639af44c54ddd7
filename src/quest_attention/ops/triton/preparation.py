"""Kernel: what the other kernels of `token_decode` want of the queries: their bits, and a normaliser of each head.

A normaliser makes logits of several heads comparable. It is the log-sum-exp of a sample of a head's logits. Where
estimates alone choose, it leaves out the largest: they are what the head looks at, and with them the estimates of a
head that found something may rank too low beside those of others. docs/choosing.md has what each such sum loses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quest_attention.ops.triton.arguments import length_of, load_query
from quest_attention.ops.triton.arithmetic import LOG2_E, cap, dot, widen
from quest_attention.ops.triton.fetch import load_keys
from quest_attention.ops.triton.launch import let_next_start, wait_for_launch
from quest_attention.ops.triton.masks import END, FIRST, LIVE, SPAN, is_live_token
from quest_attention.ops.triton.sketch import turn

__all__ = ["norms_of", "prepare_kernel"]


@triton.jit
def _store_bits(turned, bits, factors, row, SHAPE: tl.constexpr, PACKING: tl.constexpr):
    """Turned queries `[16, D]`, scaled as logits in base 2, as rows of bits: what `scan` multiplies with."""
    BYTES: tl.constexpr = PACKING.bytes8
    SETS: tl.constexpr = (SHAPE.group + 3) // 4
    HALVES: tl.constexpr = (SHAPE.head_dim + 127) // 128
    HEADS: tl.constexpr = SHAPE.block_g
    g = tl.arange(0, HEADS)
    top = tl.maximum(tl.max(tl.abs(turned), 1), 1e-30)
    of_mean = top / 127.0
    of_sign = top / 7.0
    fine = tl.floor(turned / of_mean[:, None] + 0.5).to(tl.int32)
    coarse = tl.floor(turned / of_sign[:, None] + 0.5).to(tl.int32)
    to = factors + row * 48 + g
    tl.store(to, of_mean)
    tl.store(to + 16, 2.0 * of_sign)  # a bit is one sign more than none, and two from one to the other
    tl.store(to + 32, of_sign * tl.sum(coarse, 1).to(tl.float32))
    byte = tl.arange(0, BYTES)
    # A tile has eight columns of 16 bytes; two tiles of signs come first, then four of means, for each 128 channels.
    tiles = bits.to(tl.pointer_type(tl.uint8)) + row.to(tl.int64) * (SETS * HALVES * 768) + g // 4 * (HALVES * 768)
    column = tiles[:, None] + (byte // 16 * 768 + byte % 16)[None, :] + (g % 4 * 32)[:, None]
    inside = (g < 4 * SETS)[:, None] & (byte < BYTES)[None, :]
    _store_planes(column, coarse, inside, BYTES)
    _store_planes(column + 256, fine, inside, BYTES)
    _store_planes(column + 512, fine >> 4, inside, BYTES)


@triton.jit
def _store_planes(column, code, inside, BYTES: tl.constexpr):
    """The low four bits of some codes `[HEADS, 8 * BYTES]`, each as rows of bits."""
    spread = ((code & 15) * 0x00204081) & 0x01010101  # each bit in a byte of its own
    spread = tl.reshape(spread, [code.shape[0], 8, BYTES]) << tl.arange(0, 8)[None, :, None]
    planes = tl.sum(spread, 1)
    for bit in tl.static_range(4):
        tl.store(column + (bit // 2 * 128 + bit % 2 * 16), (planes >> (8 * bit)).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["lengths", "num_kv_heads", "table_stride", "token_budget", "most"])
def prepare_kernel(
    query, keys, pool, page_table, table_stride, lengths, live, sinks, space, scale, softcap, num_kv_heads,
    token_budget, most,
    SHAPE: tl.constexpr, PACKING: tl.constexpr, SAMPLE: tl.constexpr, DROPPED: tl.constexpr, PARTS: tl.constexpr,
    HAS_BITS: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of a row's heads over a part of a sample of its tokens; and the bits of its queries.

    The sample is the first and the last tokens of the sequence, a page's worth each, and of those between about as many
    as there is room for, evenly apart but for a draw of each; these weigh as what they stand for. With a mask they lie
    between the first and the last live token, and dead ones among them weigh nothing. While a sequence grows by a few
    per cent the draws stay where they are, so that a pool of hot tokens that was given the sample has it. Of each part
    the `DROPPED` tokens of a head's largest weighted logits, and those of equal ones, are left out, if others remain.
    """
    if live is None:
        let_next_start(FOLLOWS)
    PROGRAMS: tl.constexpr = PARTS + HAS_BITS
    row = tl.program_id(0) // PROGRAMS
    part = tl.program_id(0) % PROGRAMS
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = tl.minimum(length_of(lengths, b), most)
    factor = scale * LOG2_E
    if keys.scale is not None:
        factor = factor * tl.load(keys.scale + h * keys.scale_head)
    q = load_query(query, b, h, SHAPE)
    if HAS_BITS:  # a constant: without it what is below does not compile for every shape
        if part == PARTS:
            turned = turn(q, SHAPE.head_dim, SHAPE.block_d, PACKING) * factor
            _store_bits(turned, space.bits, space.factors, row, SHAPE, PACKING)
    PAGE: tl.constexpr = SHAPE.page_size
    start = 0
    newest = end - 1
    is_sparse = end > token_budget
    if live is not None:
        wait_for_launch(FOLLOWS)
        span = live.spans + b * SPAN
        is_sparse = tl.load(span + LIVE) > token_budget
        start = tl.load(span + FIRST)
        end = tl.load(span + END)
    SAMPLED: tl.constexpr = SAMPLE * PARTS
    if pool is not None:
        if (part < PARTS) & ~is_sparse:
            tl.store(space.sampled + row.to(tl.int64) * SAMPLED + part * SAMPLE + tl.arange(0, SAMPLE), -1)
    if (part < PARTS) & is_sparse:
        EDGE: tl.constexpr = min(SHAPE.page_size, SAMPLED // 4)
        DRAWN: tl.constexpr = SAMPLED - 2 * EDGE
        head = tl.arange(0, SHAPE.block_g)
        at = part * SAMPLE + tl.arange(0, SAMPLE)
        between = tl.maximum(end - start - 2 * EDGE, 1)
        each = _sixteenths_apart(between, DRAWN)
        nth = at - 2 * EDGE
        # No two are one token: a draw leaves a whole token to the next.
        drawn = (nth * each + (((nth * 40503) >> 6 & 1023) * (each - 15) >> 10)) // 16
        position = tl.where(at < EDGE, start + at, tl.where(at < 2 * EDGE, end - 2 * EDGE + at, start + EDGE + drawn))
        is_live = (position >= start) & (position < tl.where(at < 2 * EDGE, end, end - EDGE))
        if live is not None:
            WORDS: tl.constexpr = (PAGE + 15) // 16
            is_live &= is_live_token(live.words + b * (most // PAGE * WORDS), position, is_live, PAGE)
        physical = tl.load(page_table + b * table_stride + position // PAGE, mask=is_live, other=0).to(tl.int64)
        if pool is not None:
            tl.store(space.sampled + row.to(tl.int64) * SAMPLED + at, tl.where(is_live, position, -1))
        k = load_keys(keys, pool, row, h, physical, position, is_live, newest, SHAPE)
        HEADS: tl.constexpr = SHAPE.block_g
        logit = dot(q, tl.trans(widen(k, q.dtype)), tl.zeros([HEADS, SAMPLE], tl.float32)) * factor
        if softcap is not None:  # of which a logit that is not finite is no finite one
            logit = tl.where(tl.abs(logit) < float("inf"), cap(logit, softcap * LOG2_E), float("inf"))
        logit += tl.where(at < 2 * EDGE, 0.0, tl.log2(each.to(tl.float32)) - 4.0)[None, :]
        is_known = is_live[None, :] & (tl.abs(logit) < float("inf"))
        logit = tl.where(is_known, logit, float("-inf"))
        largest = tl.max(logit, 1)
        for _ in tl.static_range(DROPPED):
            rest = tl.where(logit == largest[:, None], float("-inf"), logit)
            next_largest = tl.max(rest, 1)
            is_left = next_largest > float("-inf")  # not where all logits are equal, or few
            logit = tl.where(is_left[:, None], rest, logit)
            largest = tl.where(is_left, next_largest, largest)
        sink = tl.full([HEADS], float("-inf"), tl.float32)
        if sinks is not None:
            sink = tl.load(sinks + h * SHAPE.group + head, mask=head < SHAPE.group, other=0.0).to(tl.float32) * LOG2_E
            sink = tl.where(part == 0, sink, float("-inf"))
        largest = tl.maximum(tl.maximum(largest, sink), -1e30)
        total = tl.sum(tl.exp2(logit - largest[:, None]), 1) + tl.exp2(sink - largest)
        norm = tl.where(total > 0, largest + tl.log2(total), float("-inf"))
        tl.store(space.norms + (row * PARTS + part) * HEADS + head, norm)


@triton.jit
def _sixteenths_apart(between, DRAWN: tl.constexpr):
    """How far apart `DRAWN` tokens or somewhat fewer lie among `between` [sixteenths of a token], a token at least.

    Five bits of it count, so that it stays the same while there come to be a few per cent more.
    """
    least = tl.maximum(tl.cdiv(between * 16, DRAWN), 16)
    rare = 0
    for _ in tl.static_range(24):
        rare += ((least >> rare) >= 32).to(tl.int32)
    return tl.cdiv(least, 1 << rare) << rare


@triton.jit
def norms_of(norms, row, SHAPE: tl.constexpr, NORMS: tl.constexpr):
    """The normaliser of each head of a row, `[BLOCK_G]`: 0 where nothing had weight, inf where there is no head."""
    head = tl.arange(0, SHAPE.block_g)
    part = tl.arange(0, NORMS)
    HEADS: tl.constexpr = SHAPE.block_g
    lse = tl.load(norms + (row * NORMS + part[:, None]) * HEADS + head[None, :])
    largest = tl.maximum(tl.max(lse, 0), -1e30)
    total = tl.sum(tl.exp2(lse - largest[None, :]), 0)
    norm = tl.where(total > 0, largest + tl.log2(total), 0.0)
    return tl.where(head < SHAPE.group, norm, float("inf"))

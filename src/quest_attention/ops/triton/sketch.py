"""Kernels of the form `Sketch`: whole pages of keys as their mean and signs, and estimates of logits from these.

Channels are taken in the order in which their bits are packed, `j * head_dim / 8 + d` for bit `j` of byte `d`. A row of
bits has its bytes padded to a power of two, so that its eight bits are eight blocks of channels side by side.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.errors import QuestValueError
from quest_attention.forms import MetadataForm, Sketch
from quest_attention.forms.sketch import MEAN_BITS, SketchLayout
from quest_attention.ops.step import Step
from quest_attention.ops.triton.arguments import (
    Shape,
    by_head,
    keys_argument,
    length_of,
    lengths_argument,
    load_query,
    metadata_argument,
    scored_metadata_argument,
    shape_of,
    side_by_side,
)
from quest_attention.ops.triton.arithmetic import dot, widen
from quest_attention.ops.triton.launch import launch
from quest_attention.pages import PagedKV, num_pages

__all__ = [
    "Packing",
    "SketchEstimates",
    "estimates",
    "packing_of",
    "sketch_pages",
    "sketch_slots",
    "turn",
    "turned_queries",
]

_PAGES = 16
"""Pages whose tokens are estimated at a time: the fewest rows of a product with their means."""
_MEAN_BITS = tl.constexpr(MEAN_BITS)
_LARGEST_MEAN = tl.constexpr(2.0 ** (MEAN_BITS - 1) - 1)


class Packing(NamedTuple):
    """Where a sketch has what, a constant of the kernels.

    Attributes:
        row: As in `SketchLayout`, like the others up to the total.
        mean: Likewise.
        scales: Likewise.
        total: Likewise.
        bytes8: Bytes of a row that hold channels: an eighth of those.
        block8: The power of two that holds a row.
        order: Of the Hadamard matrices.
    """

    row: int
    mean: int
    scales: int
    total: int
    bytes8: int
    block8: int
    order: int


@cache
def packing_of(form: MetadataForm, page_size: int, dim: int) -> Packing:
    """See `Packing`.

    Raises:
        QuestValueError: The form scores tokens, and the kernels know another one that does.
    """
    if not isinstance(form, Sketch):
        raise QuestValueError("form", form, "bounds, moments or a sketch for the Triton kernels")
    at = SketchLayout.of(page_size, dim)
    block8 = triton.next_power_of_2(at.row)
    return Packing(at.row, at.mean, at.scales, at.total, dim // 8, block8, dim & -dim)


def sketch_pages(kv: PagedKV, seq_lens: Tensor | int, num_new_tokens: Tensor | int) -> None:
    """Sketch the pages that the last tokens of each sequence complete; see `ops.update_page_metadata`."""
    table = side_by_side(kv.page_table)
    touched = kv.max_pages
    if isinstance(num_new_tokens, int):
        touched = min(touched, num_pages(num_new_tokens, kv.page_size))
    launch(
        _update_kernel, (kv.batch_size * kv.num_kv_heads * touched,),
        keys_argument(kv), metadata_argument(kv.metadata), table, table.stride(0), lengths_argument(seq_lens),
        lengths_argument(num_new_tokens), kv.num_kv_heads, touched,
        SHAPE=_shape_of(kv), PACKING=packing_of(kv.form, kv.page_size, kv.head_dim), num_warps=4,
    )  # fmt: skip


def sketch_slots(kv: PagedKV, slots: Tensor) -> None:
    """Sketch the pages whose last token is written to one of the slots; see `ops.append_slots`."""
    slots = side_by_side(slots)
    launch(
        _slot_kernel, (slots.shape[0] * kv.num_kv_heads,),
        keys_argument(kv), metadata_argument(kv.metadata), slots, kv.num_kv_heads,
        SHAPE=_shape_of(kv), PACKING=packing_of(kv.form, kv.page_size, kv.head_dim), num_warps=4,
    )  # fmt: skip


def _shape_of(kv: PagedKV, group: int = 1) -> Shape:
    return shape_of(kv.page_size, group, kv.head_dim, kv.values.shape[-1], multiplies=True)


class SketchEstimates:
    """See `ops.masses.Estimates`: those of a step, by kernels."""

    def __init__(self, step: Step) -> None:
        kv = step.kv
        self._query, self._table, self._step = side_by_side(step.query), side_by_side(kv.page_table), step
        self._group = step.query.shape[1] // kv.num_kv_heads

    def of_all(self, pages: int) -> Tensor:
        """See `Estimates.of_all`."""
        step, kv = self._step, self._step.kv
        shape = (kv.batch_size, kv.num_kv_heads, pages * kv.page_size, self._group)
        logits = torch.empty(shape, dtype=torch.float32, device=kv.keys.device)
        programs = triton.cdiv(pages, _PAGES)
        launch(
            _estimate_kernel, (kv.batch_size * kv.num_kv_heads * programs,),
            by_head(self._query), scored_metadata_argument(kv), self._table, self._table.stride(0),
            lengths_argument(step.seq_lens), float(step.scale), kv.num_kv_heads, logits, pages, programs,
            SHAPE=_shape_of(kv, self._group), PACKING=packing_of(kv.form, kv.page_size, kv.head_dim), PAGES=_PAGES,
            num_warps=4,
        )  # fmt: skip
        return logits


@triton.jit
def _hadamard(row, column, DIM: tl.constexpr, PACKING: tl.constexpr):
    """Entries of the turning matrix without its norm, 1 and -1, and 0 outside of its blocks; float32."""
    both = (row & column) & (PACKING.order - 1)
    both = both ^ (both >> 4)
    both = both ^ (both >> 2)
    both = both ^ (both >> 1)
    inside = (row // PACKING.order == column // PACKING.order) & (row < DIM) & (column < DIM)
    return tl.where(inside, 1.0 - 2.0 * (both & 1).to(tl.float32), 0.0)


@triton.jit
def turn(x, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PACKING: tl.constexpr):
    """Keys or queries `[N, BLOCK_D]` turned, `[N, 8 * block8]` float32, channels as they are packed; others are 0."""
    WIDTH: tl.constexpr = 8 * PACKING.block8
    row = tl.arange(0, BLOCK_D)
    place = tl.arange(0, WIDTH)
    column = place // PACKING.block8 * PACKING.bytes8 + place % PACKING.block8
    column = tl.where(place % PACKING.block8 < PACKING.bytes8, column, DIM)
    matrix = _hadamard(row[:, None], column[None, :], DIM, PACKING)
    turned = tl.zeros([x.shape[0], WIDTH], tl.float32)
    if x.dtype == tl.float32:  # in three parts, so that tensor cores multiply, and a large matrix takes half the room
        for _ in tl.static_range(3):
            part = x.to(tl.bfloat16)
            turned = dot(part, matrix.to(tl.bfloat16), turned)
            x = x - part.to(tl.float32)
    else:
        turned = dot(x, matrix.to(x.dtype), turned)
    return turned * tl.rsqrt(tl.full([], PACKING.order, tl.float32))


@triton.jit
def _sketch_page(key, at, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, PACKING: tl.constexpr):
    """Write the sketch of a page's keys `[BLOCK_T, BLOCK_D]`, zero past its tokens and channels, to `at`."""
    BLOCK_T: tl.constexpr = key.shape[0]
    BLOCK8: tl.constexpr = PACKING.block8
    WIDTH: tl.constexpr = 8 * BLOCK8
    turned = turn(key, DIM, key.shape[1], PACKING)  # [BLOCK_T, WIDTH]
    token = tl.arange(0, BLOCK_T)
    place = tl.arange(0, WIDTH)
    is_channel = place % BLOCK8 < PACKING.bytes8
    inside = (token < PAGE_SIZE)[:, None] & is_channel[None, :]
    mean = tl.sum(turned, 0) / PAGE_SIZE  # what is past the page is zero
    top = tl.max(tl.abs(mean), 0)
    mean_scale = top / _LARGEST_MEAN
    code = tl.floor(mean / tl.where(top > 0, mean_scale, 1.0) + 0.5)
    rest = tl.where(inside, turned - (code * mean_scale)[None, :], 0.0)
    level = tl.sum(tl.sum(tl.abs(rest), 1), 0) / (PAGE_SIZE * DIM)
    is_finite = level < float("inf")  # false for NaN too
    bits = tl.where(is_finite, (inside & (rest >= 0)).to(tl.int32), 0)
    bit = tl.arange(0, 8)[None, :, None]
    byte = tl.arange(0, BLOCK8)
    signs = tl.sum(tl.reshape(bits, [BLOCK_T, 8, BLOCK8]) << bit, 1)
    to = at + token[:, None] * PACKING.row + byte[None, :]
    stored = (token < PAGE_SIZE)[:, None] & (byte < PACKING.row)[None, :]
    tl.store(to, signs.to(tl.uint8), mask=stored)
    code = tl.where(is_finite, code, 0.0).to(tl.int32)  # of which the low seven bits are kept
    row = tl.arange(0, 8)
    of_mean = (tl.reshape(code, [8, BLOCK8])[None, :, :] >> row[:, None, None]) & 1
    of_mean = tl.sum(of_mean << tl.arange(0, 8)[None, :, None], 1)
    to = at + PACKING.mean + row[:, None] * PACKING.row + byte[None, :]
    tl.store(to, of_mean.to(tl.uint8), mask=(row < _MEAN_BITS)[:, None] & (byte < PACKING.row)[None, :])
    padding = tl.arange(0, 16)  # less than that is behind the scales
    BEHIND: tl.constexpr = PACKING.scales + 8
    tl.store(at + BEHIND + padding, tl.zeros([16], tl.uint8), mask=padding < PACKING.total - BEHIND)
    scales = (at + PACKING.scales).to(tl.pointer_type(tl.float32))
    tl.store(scales, tl.where(is_finite, mean_scale, float("nan")))
    tl.store(scales + 1, tl.where(is_finite, level, float("nan")))


@triton.jit
def _sketch_from_cache(keys, metadata, page, h, SHAPE: tl.constexpr, PACKING: tl.constexpr):
    """Sketch a whole page of the cache. A product wants 16 rows at least."""
    ROWS: tl.constexpr = max(16, SHAPE.block_page)
    token = tl.arange(0, ROWS)
    channel = tl.arange(0, SHAPE.block_d)
    at = keys.base + page * keys.page + h * keys.head + token[:, None].to(tl.int64) * keys.token + channel[None, :]
    inside = (token < SHAPE.page_size)[:, None] & (channel < SHAPE.head_dim)[None, :]
    key = tl.load(at, mask=inside, other=0.0)
    if key.dtype == tl.float8e4nv:
        key = widen(key, tl.bfloat16)
    to = metadata.base + page * metadata.page + h * metadata.head
    _sketch_page(key, to, SHAPE.head_dim, SHAPE.page_size, PACKING)


@triton.jit(do_not_specialize=["lengths", "num_new_tokens", "table_stride", "num_kv_heads", "touched"])
def _update_kernel(
    keys, metadata, page_table, table_stride, lengths, num_new_tokens, num_kv_heads, touched,
    SHAPE: tl.constexpr, PACKING: tl.constexpr,
):  # fmt: skip
    """One page that the new tokens of a sequence complete, for one head."""
    row = tl.program_id(0) // touched
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = length_of(lengths, b)
    fresh = length_of(num_new_tokens, b)
    start = tl.maximum(end - fresh, 0)
    page = start // SHAPE.page_size + tl.program_id(0) % touched
    if ((page + 1) * SHAPE.page_size <= end) & (fresh > 0):
        physical = tl.load(page_table + b * table_stride + page).to(tl.int64)
        _sketch_from_cache(keys, metadata, physical, h, SHAPE, PACKING)


@triton.jit(do_not_specialize=["num_kv_heads"])
def _slot_kernel(keys, metadata, slots, num_kv_heads, SHAPE: tl.constexpr, PACKING: tl.constexpr):
    """The page that a token completes, for one head."""
    slot = tl.load(slots + tl.program_id(0) // num_kv_heads).to(tl.int64)
    h = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    if (slot >= 0) & (slot % SHAPE.page_size == SHAPE.page_size - 1):
        _sketch_from_cache(keys, metadata, slot // SHAPE.page_size, h, SHAPE, PACKING)


@triton.jit
def _in_halves(x):
    """A number as the sum of two that tensor cores multiply exactly."""
    top = x.to(tl.bfloat16)
    return top, (x - top.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _product(codes, q_top, q_rest, acc):
    """`codes @ q`, the codes small integers, exact in bfloat16."""
    acc = dot(codes.to(tl.bfloat16), q_top, acc)
    return dot(codes.to(tl.bfloat16), q_rest, acc)


@triton.jit
def _bits_of(at, known, PACKING: tl.constexpr):
    """The bits `[N, 8 * block8]` int32 of rows whose bytes `at` `[N, block8]` points to."""
    byte = tl.load(at, mask=known, other=0).to(tl.int32)
    bits = (byte[:, None, :] >> tl.arange(0, 8)[None, :, None]) & 1
    return tl.reshape(bits, [at.shape[0], 8 * PACKING.block8])


@triton.jit
def _means_of(sketch, q_top, q_rest, PACKING: tl.constexpr):
    """Products of queries with the means of pages whose sketches lie at `sketch` `[N]`: `[N, BLOCK_G]`."""
    N: tl.constexpr = sketch.shape[0]
    byte = tl.arange(0, PACKING.block8)
    known = (byte < PACKING.bytes8)[None, :]
    code = tl.zeros([N, 8 * PACKING.block8], tl.int32)
    for bit in tl.static_range(_MEAN_BITS):
        at = sketch[:, None] + (PACKING.mean + bit * PACKING.row + byte)[None, :]
        code += _bits_of(at, known, PACKING) * (-(1 << bit) if bit == _MEAN_BITS - 1 else 1 << bit)
    means = _product(code.to(tl.float32), q_top, q_rest, tl.zeros([N, q_top.shape[1]], tl.float32))
    return means * tl.load((sketch + PACKING.scales).to(tl.pointer_type(tl.float32)))[:, None]


@triton.jit
def turned_queries(query, b, h, SHAPE: tl.constexpr, PACKING: tl.constexpr):
    """The queries of a group, turned, in two parts `[8 * block8, BLOCK_G]`; 0 where there is no channel."""
    return _in_halves(tl.trans(turn(load_query(query, b, h, SHAPE), SHAPE.head_dim, SHAPE.block_d, PACKING)))


@triton.jit
def estimates(sketch, q_top, q_rest, SHAPE: tl.constexpr, PACKING: tl.constexpr):
    """Unscaled estimates of the logits of pages' tokens, `[PAGES, BLOCK_PAGE, BLOCK_G]`; sketches are at `sketch`."""
    PAGES: tl.constexpr = sketch.shape[0]
    BLOCK_G: tl.constexpr = SHAPE.block_g
    TOKENS: tl.constexpr = PAGES * SHAPE.block_page
    means = _means_of(sketch, q_top, q_rest, PACKING)
    token = tl.arange(0, SHAPE.block_page)
    byte = tl.arange(0, PACKING.block8)
    within = token[:, None] * PACKING.row + byte[None, :]
    at = tl.reshape(sketch[:, None, None] + within[None, :, :], [TOKENS, PACKING.block8])
    known = (token < SHAPE.page_size)[:, None] & (byte < PACKING.bytes8)[None, :]
    known = tl.broadcast_to(known[None, :, :], [PAGES, SHAPE.block_page, PACKING.block8])
    known = tl.reshape(known, [TOKENS, PACKING.block8])
    sign = (2 * _bits_of(at, known, PACKING) - 1).to(tl.float32)
    rest = _product(sign, q_top, q_rest, tl.zeros([TOKENS, BLOCK_G], tl.float32))
    rest = tl.reshape(rest, [PAGES, SHAPE.block_page, BLOCK_G])
    level = tl.load((sketch + (PACKING.scales + 4)).to(tl.pointer_type(tl.float32)))
    return means[:, None, :] + rest * level[:, None, None]


@triton.jit(do_not_specialize=["table_stride", "lengths", "num_kv_heads", "pages", "programs"])
def _estimate_kernel(
    query, metadata, page_table, table_stride, lengths, factor, num_kv_heads, logits, pages, programs,
    SHAPE: tl.constexpr, PACKING: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Estimates of the logits of some pages' tokens for the heads of a group."""
    row = tl.program_id(0) // programs
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = length_of(lengths, b)
    BLOCK_G: tl.constexpr = SHAPE.block_g
    q_top, q_rest = turned_queries(query, b, h, SHAPE, PACKING)
    page = tl.program_id(0) % programs * PAGES + tl.arange(0, PAGES)
    is_known = (page < pages) & (page * SHAPE.page_size < end)
    physical = tl.load(page_table + b * table_stride + page, mask=is_known, other=0)
    sketch = metadata.base + h * metadata.head + physical.to(tl.int64) * metadata.page
    found = estimates(sketch, q_top, q_rest, SHAPE, PACKING)
    if metadata.scale is not None:
        factor = factor * tl.load(metadata.scale + h * metadata.scale_head)
    found = found * factor
    token = tl.arange(0, SHAPE.block_page)
    position = page[:, None] * SHAPE.page_size + token[None, :]
    head = tl.arange(0, BLOCK_G)
    to = logits + row.to(tl.int64) * pages * SHAPE.page_size * SHAPE.group
    to = to + position[:, :, None] * SHAPE.group + head[None, None, :]
    is_here = ((page < pages)[:, None] & (token < SHAPE.page_size)[None, :])[:, :, None]
    tl.store(to, found, mask=is_here & (head < SHAPE.group)[None, None, :])


# Longer than 250 lines: how a sketch is written and read, which are one arithmetic of bits.

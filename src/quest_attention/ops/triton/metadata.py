"""Kernels: take new tokens into the metadata of their pages, after a prefill or as they are written."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quest_attention.forms import MetadataForm
from quest_attention.ops.triton.arguments import (
    Shape,
    by_head,
    keys_argument,
    length_of,
    lengths_argument,
    metadata_argument,
    shape_of,
    side_by_side,
    values_argument,
)
from quest_attention.ops.triton.arithmetic import round_to, widen
from quest_attention.ops.triton.forms import kernel_form, take_form
from quest_attention.ops.triton.launch import check_kernel_dtype, launch
from quest_attention.ops.triton.sketch import sketch_pages, sketch_slots
from quest_attention.pages import PagedKV, num_pages

__all__ = ["append_slots", "append_token", "update_page_metadata", "update_slot_metadata"]

_KEYS_PER_WARP = 2048
"""Numbers of a page's keys that a warp holds at once: 64 registers a thread in float32."""
_PAGES_PER_PROGRAM = 4
"""Pages one program takes after a prefill: enough bytes in flight per program, and a grid that still fills the GPU."""


def update_page_metadata(kv: PagedKV, seq_lens: Tensor | int, num_new_tokens: Tensor | int) -> None:
    """See `ops.update_page_metadata`. Reads no length on the host; the grid covers what the pages can hold."""
    check_kernel_dtype(kv.keys)
    if kv.form.takes_whole_pages:
        sketch_pages(kv, seq_lens, num_new_tokens)
        return
    table = side_by_side(kv.page_table)
    touched = kv.max_pages
    if isinstance(num_new_tokens, int):
        if num_new_tokens == 0:
            return
        touched = min(touched, num_pages(num_new_tokens - 1, kv.page_size) + 1)
    pages = 1 if touched <= 2 else _PAGES_PER_PROGRAM
    launch(
        _update_kernel, (triton.cdiv(touched, pages) * kv.num_kv_heads * kv.batch_size,),
        keys_argument(kv), metadata_argument(kv.metadata), table, table.stride(0), lengths_argument(seq_lens),
        lengths_argument(num_new_tokens), kv.num_kv_heads, triton.cdiv(touched, pages),
        FORM=kernel_form(kv.form), SHAPE=_shape_of(kv), PAGES=pages, num_warps=4,
    )  # fmt: skip


def append_token(kv: PagedKV, keys: Tensor, values: Tensor, seq_lens: Tensor) -> None:
    """See `ops.append_token`. One launch, and one that sketches the page if the token completes it."""
    check_kernel_dtype(kv.keys)
    table, is_by_token = side_by_side(kv.page_table), not kv.form.takes_whole_pages
    launch(
        _append_kernel, (kv.batch_size * kv.num_kv_heads,),
        by_head(keys), by_head(values), keys_argument(kv), values_argument(kv),
        metadata_argument(kv.metadata) if is_by_token else None, table, table.stride(0), side_by_side(seq_lens),
        kv.num_kv_heads, FORM=kernel_form(kv.form) if is_by_token else None, SHAPE=_shape_of(kv), num_warps=1,
    )  # fmt: skip
    if not is_by_token:
        sketch_pages(kv, seq_lens, 1)


def append_slots(kv: PagedKV, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """See `ops.append_slots`. One launch, and one that sketches the pages that the tokens complete."""
    is_by_token = not kv.form.takes_whole_pages
    _launch_slots(kv.metadata if is_by_token else None, keys, slots, kv.page_size, kv.form, kv, values)
    if not is_by_token:
        sketch_slots(kv, slots)


def update_slot_metadata(metadata: Tensor, keys: Tensor, slots: Tensor, page_size: int, form: MetadataForm) -> None:
    """See `ops.update_slot_metadata`. One launch."""
    _launch_slots(metadata, keys, slots, page_size, form)


def _shape_of(kv: PagedKV) -> Shape:
    return shape_of(kv.page_size, 1, kv.head_dim, kv.values.shape[-1])


def _launch_slots(
    metadata: Tensor | None, keys: Tensor, slots: Tensor, page_size: int, form: MetadataForm,
    kv: PagedKV | None = None, values: Tensor | None = None,
) -> None:  # fmt: skip
    """One program for each token and KV head; K and V are written where a cache is given."""
    check_kernel_dtype(keys)
    heads, dim = keys.shape[1:]
    shape = shape_of(page_size, 1, dim, dim if values is None else values.shape[-1])
    launch(
        _slot_kernel, (slots.shape[0] * heads,),
        by_head(keys), None if values is None else by_head(values), None if kv is None else keys_argument(kv),
        None if kv is None else values_argument(kv), None if metadata is None else metadata_argument(metadata),
        side_by_side(slots), slots.shape[0], heads,
        FORM=None if metadata is None else kernel_form(form), SHAPE=shape,
        num_warps=max(1, min(8, shape.block_page * shape.block_d // _KEYS_PER_WARP)),
    )  # fmt: skip


@triton.jit
def _as_stored(token, pages, h):
    """New keys or values of head `h` as numbers of the cache they go to."""
    dtype: tl.constexpr = pages.base.dtype.element_ty
    if token.dtype != dtype:
        token = token.to(tl.float32)
        if pages.scale is not None:
            token = tl.div_rn(token, tl.load(pages.scale + h * pages.scale_head))  # rounded, as in PyTorch
        token = round_to(token, dtype)
    return token


@triton.jit
def _write(new, row, pages, page, offset, h, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write the channels of one new token to their place in the cache.

    Returns:
        What was written, `[BLOCK]`.
    """
    channel = tl.arange(0, BLOCK)
    token = tl.load(new.base + row * new.row + h * new.head + channel, mask=channel < DIM, other=0.0)
    token = _as_stored(token, pages, h)
    to = pages.base + page * pages.page + offset * pages.token + h * pages.head
    tl.store(to + channel, token, mask=channel < DIM)
    return token


@triton.jit
def _take(keys, metadata, page, h, is_fresh, before, FORM: tl.constexpr, SHAPE: tl.constexpr):
    """Take the fresh among some keys into the metadata of their page and head."""
    channel = tl.arange(0, SHAPE.block_d)
    at = metadata.base + page * metadata.page + h * metadata.head + channel
    take_form(at, metadata.side, widen(keys, tl.float32), is_fresh, before, channel < SHAPE.head_dim, FORM)


@triton.jit(do_not_specialize=["table_stride", "num_kv_heads"])
def _append_kernel(
    new_keys, new_values, keys, values, metadata, page_table, table_stride, seq_lens, num_kv_heads,
    FORM: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    h = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    position = tl.load(seq_lens + b).to(tl.int32) - 1
    if position >= 0:
        offset = position % SHAPE.page_size
        page = tl.load(page_table + b * table_stride + position // SHAPE.page_size).to(tl.int64)
        key = _write(new_keys, b, keys, page, offset, h, SHAPE.head_dim, SHAPE.block_d)
        _write(new_values, b, values, page, offset, h, SHAPE.value_dim, SHAPE.block_dv)
        if FORM is not None:
            _take(key, metadata, page, h, None, offset, FORM, SHAPE)


@triton.jit(do_not_specialize=["num_tokens", "num_kv_heads"])
def _slot_kernel(
    new_keys, new_values, keys, values, metadata, slots, num_tokens, num_kv_heads,
    FORM: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    # Keys and values are None where another writes them; metadata and its form where it is not taken token by token.
    token = tl.program_id(0) // num_kv_heads
    h = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        page, offset = slot // SHAPE.page_size, slot % SHAPE.page_size
        if new_values is not None:
            row = token.to(tl.int64)
            _write(new_keys, row, keys, page, offset, h, SHAPE.head_dim, SHAPE.block_d)
            _write(new_values, row, values, page, offset, h, SHAPE.value_dim, SHAPE.block_dv)
        if FORM is not None:
            following = tl.load(slots + token + 1, mask=token + 1 < num_tokens, other=-1).to(tl.int64)
            # The page's last token answers for all of them.
            if (following < 0) | (following // SHAPE.page_size != page):
                back = tl.arange(0, SHAPE.block_page)
                at = token - back
                is_known = (at >= 0) & (back <= offset)
                is_here = is_known & (tl.load(slots + at, mask=is_known, other=-1).to(tl.int64) == slot - back)
                channel = tl.arange(0, SHAPE.block_d)
                fresh = new_keys.base + h * new_keys.head + at[:, None].to(tl.int64) * new_keys.row + channel[None, :]
                key = tl.load(fresh, mask=is_here[:, None] & (channel < SHAPE.head_dim)[None, :], other=0.0)
                if new_values is not None:
                    key = _as_stored(key, keys, h)
                starts_anew = tl.max((is_here & (back == offset)).to(tl.int32), 0) > 0
                before = tl.where(starts_anew, 0, offset.to(tl.int32) + 1 - tl.sum(is_here.to(tl.int32), 0))
                _take(key, metadata, page, h, is_here, before, FORM, SHAPE)


@triton.jit(do_not_specialize=["lengths", "num_new_tokens", "table_stride", "num_kv_heads", "programs_per_head"])
def _update_kernel(
    keys, metadata, page_table, table_stride, lengths, num_new_tokens, num_kv_heads, programs_per_head,
    FORM: tl.constexpr, SHAPE: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    part = program % programs_per_head
    row = program // programs_per_head
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = length_of(lengths, b)
    fresh = length_of(num_new_tokens, b)
    start = tl.maximum(end - fresh, 0)
    token = tl.arange(0, SHAPE.block_page)
    channel = tl.arange(0, SHAPE.block_d)
    for step in tl.static_range(PAGES):
        page = start // SHAPE.page_size + part * PAGES + step
        first = page * SHAPE.page_size
        if (first < end) & (fresh > 0):
            physical = tl.load(page_table + b * table_stride + page).to(tl.int64)
            position = first + token
            is_fresh = (token < SHAPE.page_size) & (position >= start) & (position < end)
            at = keys.base + physical * keys.page + h * keys.head
            at = at + token[:, None].to(tl.int64) * keys.token + channel[None, :]
            key = tl.load(at, mask=is_fresh[:, None] & (channel < SHAPE.head_dim)[None, :], other=0.0)
            _take(key, metadata, physical, h, is_fresh, tl.maximum(start - first, 0), FORM, SHAPE)

"""Kernels: take new tokens into the bounds of their pages, after a prefill or as they are written."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quest_attention.forms import MetadataForm
from quest_attention.ops.triton.launch import check_kernel_dtype, launch, lengths_argument, side_by_side
from quest_attention.pages import FP8_METADATA, PagedKV, num_pages

__all__ = ["append_slots", "append_token", "update_page_metadata", "update_slot_metadata"]

_KEYS_PER_WARP = 2048
"""Numbers of a page's keys that a warp holds at once: 64 registers a thread in float32."""
_PAGES_PER_PROGRAM = 4
"""Pages one program takes after a prefill: enough bytes in flight per program, and a grid that still fills the GPU."""


def update_page_metadata(kv: PagedKV, seq_lens: Tensor | int, num_new_tokens: Tensor | int) -> None:
    """See `ops.update_page_metadata`. Reads no length on the host; the grid covers what the pages can hold."""
    check_kernel_dtype(kv.keys)
    table = side_by_side(kv.page_table)
    if isinstance(num_new_tokens, int):
        if num_new_tokens == 0:
            return
        touched = min(kv.max_pages, num_pages(num_new_tokens - 1, kv.page_size) + 1)
    else:
        touched = kv.max_pages
    pages = 1 if touched <= 2 else _PAGES_PER_PROGRAM
    lengths, length = lengths_argument(seq_lens, table)
    fresh, num_fresh = lengths_argument(num_new_tokens, table)
    launch(
        _update_kernel,
        (triton.cdiv(touched, pages) * kv.num_kv_heads * kv.batch_size,),
        kv.keys,
        kv.metadata,
        table,
        lengths,
        length,
        fresh,
        num_fresh,
        *kv.keys.stride()[:3],
        *kv.metadata.stride()[:3],
        table.stride(0),
        kv.max_pages,
        kv.num_kv_heads,
        triton.cdiv(touched, pages),
        RAGGED=isinstance(seq_lens, Tensor),
        RAGGED_FRESH=isinstance(num_new_tokens, Tensor),
        PAGE_SIZE=kv.page_size,
        BLOCK_T=triton.next_power_of_2(kv.page_size),
        HEAD_DIM=kv.head_dim,
        BLOCK_D=triton.next_power_of_2(kv.head_dim),
        PAGES=pages,
        NARROW=kv.metadata.dtype == FP8_METADATA,
        num_warps=4,
    )


def append_token(kv: PagedKV, keys: Tensor, values: Tensor, seq_lens: Tensor) -> None:
    """See `ops.append_token`. One launch."""
    check_kernel_dtype(kv.keys)
    table = side_by_side(kv.page_table)
    launch(
        _append_kernel,
        (kv.batch_size * kv.num_kv_heads,),
        keys,
        values,
        kv.keys,
        kv.values,
        kv.metadata,
        table,
        side_by_side(seq_lens),
        *keys.stride()[:2],
        *values.stride()[:2],
        *kv.keys.stride()[:3],
        *kv.values.stride()[:3],
        *kv.metadata.stride()[:3],
        table.stride(0),
        kv.num_kv_heads,
        PAGE_SIZE=kv.page_size,
        HEAD_DIM=kv.head_dim,
        BLOCK_D=triton.next_power_of_2(kv.head_dim),
        VALUE_DIM=kv.values.shape[-1],
        BLOCK_DV=triton.next_power_of_2(kv.values.shape[-1]),
        NARROW=kv.metadata.dtype == FP8_METADATA,
        num_warps=1,
    )


def append_slots(kv: PagedKV, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """See `ops.append_slots`. One launch."""
    _launch_slots(kv.metadata, keys, slots, kv.page_size, kv, values)


def update_slot_metadata(metadata: Tensor, keys: Tensor, slots: Tensor, page_size: int, form: MetadataForm) -> None:
    """See `ops.update_slot_metadata`. One launch."""
    _launch_slots(metadata, keys, slots, page_size)


def _launch_slots(
    metadata: Tensor,
    keys: Tensor,
    slots: Tensor,
    page_size: int,
    kv: PagedKV | None = None,
    values: Tensor | None = None,
) -> None:
    """One program for each token and KV head; K and V are written where a cache is given."""
    check_kernel_dtype(keys)
    heads, dim = keys.shape[1:]
    # What is not written needs a pointer of some kind.
    stored_keys, stored_values = (keys[:, None], keys[:, None]) if kv is None else (kv.keys, kv.values)
    values = keys if values is None else values
    launch(
        _slot_kernel,
        (slots.shape[0] * heads,),
        keys,
        values,
        stored_keys,
        stored_values,
        metadata,
        side_by_side(slots),
        slots.shape[0],
        *keys.stride()[:2],
        *values.stride()[:2],
        *stored_keys.stride()[:3],
        *stored_values.stride()[:3],
        *metadata.stride()[:3],
        heads,
        WRITES=kv is not None,
        PAGE_SIZE=page_size,
        BLOCK_T=triton.next_power_of_2(page_size),
        HEAD_DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        VALUE_DIM=values.shape[-1],
        BLOCK_DV=triton.next_power_of_2(values.shape[-1]),
        NARROW=metadata.dtype == FP8_METADATA,
        num_warps=max(1, min(8, triton.next_power_of_2(page_size) * triton.next_power_of_2(dim) // _KEYS_PER_WARP)),
    )


@triton.jit
def _larger(left, right):
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(left, right):
    return tl.minimum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round_up(bounds):
    """Bits of the smallest float8_e4m3fn that is at least each bound; NaN where there is none. See `ops.rounding`."""
    size = tl.abs(bounds)
    bits = size.to(tl.int32, bitcast=True)
    is_up = bounds > 0  # a positive bound grows in size, a negative one shrinks
    normal = (bits >> 20) - (120 << 3) + (is_up & ((bits & 0xFFFFF) != 0)).to(tl.int32)  # 3 of 23 bits, bias 7 not 127
    units = size * 512.0  # below 2 ** -6 numbers are multiples of 2 ** -9
    whole = units.to(tl.int32)
    code = tl.where(size < 0.015625, whole + (is_up & (units > whole.to(tl.float32))).to(tl.int32), normal)
    code = tl.minimum(code, tl.where(is_up, 0x7F, 0x7E)) | tl.where(bounds < 0, 0x80, 0)
    return tl.where(bounds != bounds, 0x7F, code).to(tl.uint8)


@triton.jit
def _store_bounds(bounds, side_stride, key_max, key_min, inside, NARROW: tl.constexpr):
    """Write both bounds of a page in the dtype of the metadata."""
    dtype = bounds.dtype.element_ty
    if NARROW:
        tl.store(bounds, _round_up(key_max).to(dtype, bitcast=True), mask=inside)
        tl.store(bounds + side_stride, (_round_up(-key_min) ^ 0x80).to(dtype, bitcast=True), mask=inside)
    else:
        tl.store(bounds, key_max.to(dtype), mask=inside)
        tl.store(bounds + side_stride, key_min.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["table_stride", "num_kv_heads"])
def _append_kernel(
    new_keys,
    new_values,
    keys,
    values,
    metadata,
    page_table,
    seq_lens,
    new_key_batch_stride,
    new_key_head_stride,
    new_value_batch_stride,
    new_value_head_stride,
    key_page_stride,
    key_token_stride,
    key_head_stride,
    value_page_stride,
    value_token_stride,
    value_head_stride,
    meta_page_stride,
    meta_head_stride,
    meta_side_stride,
    table_stride,
    num_kv_heads,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NARROW: tl.constexpr,
):
    b = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    h = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    position = tl.load(seq_lens + b).to(tl.int32) - 1
    if position >= 0:
        offset = position % PAGE_SIZE
        physical = tl.load(page_table + b * table_stride + position // PAGE_SIZE).to(tl.int64)
        channel = tl.arange(0, BLOCK_D)
        inside = channel < HEAD_DIM
        key = tl.load(new_keys + b * new_key_batch_stride + h * new_key_head_stride + channel, mask=inside, other=0.0)
        to = keys + physical * key_page_stride + offset * key_token_stride + h * key_head_stride
        tl.store(to + channel, key, mask=inside)
        value_channel = tl.arange(0, BLOCK_DV)
        is_value = value_channel < VALUE_DIM
        source = new_values + b * new_value_batch_stride + h * new_value_head_stride
        value = tl.load(source + value_channel, mask=is_value, other=0.0)
        to = values + physical * value_page_stride + offset * value_token_stride + h * value_head_stride
        tl.store(to + value_channel, value, mask=is_value)
        bounds = metadata + physical * meta_page_stride + h * meta_head_stride + channel
        goes_on = inside & (offset + channel * 0 > 0)  # otherwise the page starts anew, whoever used it before
        key = key.to(tl.float32)
        old_max = tl.load(bounds, mask=goes_on, other=0.0).to(tl.float32)
        old_min = tl.load(bounds + meta_side_stride, mask=goes_on, other=0.0).to(tl.float32)
        key_max = tl.where(goes_on, _larger(key, old_max), key)
        key_min = tl.where(goes_on, _smaller(key, old_min), key)
        _store_bounds(bounds, meta_side_stride, key_max, key_min, inside, NARROW)


@triton.jit
def _copy_row(source, target, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the channels of one token and head."""
    channel = tl.arange(0, BLOCK)
    tl.store(target + channel, tl.load(source + channel, mask=channel < DIM, other=0.0), mask=channel < DIM)


@triton.jit(do_not_specialize=["num_tokens", "num_kv_heads"])
def _slot_kernel(
    new_keys,
    new_values,
    keys,
    values,
    metadata,
    slots,
    num_tokens,
    new_key_token_stride,
    new_key_head_stride,
    new_value_token_stride,
    new_value_head_stride,
    key_page_stride,
    key_token_stride,
    key_head_stride,
    value_page_stride,
    value_token_stride,
    value_head_stride,
    meta_page_stride,
    meta_head_stride,
    meta_side_stride,
    num_kv_heads,
    WRITES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NARROW: tl.constexpr,
):
    token = tl.program_id(0) // num_kv_heads
    h = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
        from_keys = new_keys + h * new_key_head_stride
        if WRITES:
            row = token.to(tl.int64)
            to = keys + page * key_page_stride + offset * key_token_stride + h * key_head_stride
            _copy_row(from_keys + row * new_key_token_stride, to, HEAD_DIM, BLOCK_D)
            to = values + page * value_page_stride + offset * value_token_stride + h * value_head_stride
            source = new_values + row * new_value_token_stride + h * new_value_head_stride
            _copy_row(source, to, VALUE_DIM, BLOCK_DV)
        following = tl.load(slots + token + 1, mask=token + 1 < num_tokens, other=-1).to(tl.int64)
        if (following < 0) | (following // PAGE_SIZE != page):  # the last token of its page answers for all of them
            back = tl.arange(0, BLOCK_T)
            at = token - back
            is_known = (at >= 0) & (back <= offset)
            is_here = is_known & (tl.load(slots + at, mask=is_known, other=-1).to(tl.int64) == slot - back)
            channel = tl.arange(0, BLOCK_D)
            inside = channel < HEAD_DIM
            fresh = from_keys + at[:, None].to(tl.int64) * new_key_token_stride + channel[None, :]
            key = tl.load(fresh, mask=is_here[:, None] & inside[None, :], other=0.0).to(tl.float32)
            key_max = tl.reduce(tl.where(is_here[:, None], key, float("-inf")), 0, _larger)
            key_min = tl.reduce(tl.where(is_here[:, None], key, float("inf")), 0, _smaller)
            bounds = metadata + page * meta_page_stride + h * meta_head_stride + channel
            starts_anew = tl.max((is_here & (back == offset)).to(tl.int32), 0) > 0  # whoever used the page before
            if not starts_anew:
                key_max = _larger(key_max, tl.load(bounds, mask=inside, other=0.0).to(tl.float32))
                key_min = _smaller(key_min, tl.load(bounds + meta_side_stride, mask=inside, other=0.0).to(tl.float32))
            _store_bounds(bounds, meta_side_stride, key_max, key_min, inside, NARROW)


@triton.jit(do_not_specialize=["length", "num_fresh", "max_pages", "programs_per_head"])
def _update_kernel(
    keys,
    metadata,
    page_table,
    seq_lens,
    length,
    num_new_tokens,
    num_fresh,
    key_page_stride,
    key_token_stride,
    key_head_stride,
    meta_page_stride,
    meta_head_stride,
    meta_side_stride,
    table_stride,
    max_pages,
    num_kv_heads,
    programs_per_head,
    RAGGED: tl.constexpr,
    RAGGED_FRESH: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGES: tl.constexpr,
    NARROW: tl.constexpr,
):
    program = tl.program_id(0)
    part = program % programs_per_head
    row = program // programs_per_head
    b = row // num_kv_heads
    h = row % num_kv_heads
    end = length
    if RAGGED:
        end = tl.load(seq_lens + b).to(tl.int32)
    fresh = num_fresh
    if RAGGED_FRESH:
        fresh = tl.load(num_new_tokens + b).to(tl.int32)
    start = tl.maximum(end - fresh, 0)
    token = tl.arange(0, BLOCK_T)
    channel = tl.arange(0, BLOCK_D)
    inside = channel < HEAD_DIM
    for step in tl.static_range(PAGES):
        page = start // PAGE_SIZE + part * PAGES + step
        first = page * PAGE_SIZE
        if (first < end) & (fresh > 0):
            physical = tl.load(page_table + b.to(tl.int64) * table_stride + page).to(tl.int64)
            position = first + token
            is_fresh = (token < PAGE_SIZE) & (position >= start) & (position < end)
            at = keys + physical * key_page_stride + h.to(tl.int64) * key_head_stride
            at = at + token[:, None].to(tl.int64) * key_token_stride + channel[None, :]
            key = tl.load(at, mask=is_fresh[:, None] & inside[None, :], other=0.0).to(tl.float32)
            key_max = tl.reduce(tl.where(is_fresh[:, None], key, float("-inf")), 0, _larger)
            key_min = tl.reduce(tl.where(is_fresh[:, None], key, float("inf")), 0, _smaller)
            bounds = metadata + physical * meta_page_stride + h.to(tl.int64) * meta_head_stride + channel
            if first < start:  # the page goes on; otherwise it starts anew, whoever used it before
                key_max = _larger(key_max, tl.load(bounds, mask=inside, other=0.0).to(tl.float32))
                key_min = _smaller(key_min, tl.load(bounds + meta_side_stride, mask=inside, other=0.0).to(tl.float32))
            _store_bounds(bounds, meta_side_stride, key_max, key_min, inside, NARROW)

"""Device functions of the form `Bounds`: the largest and the smallest key per channel.

The split query `[relu(q), min(q, 0)]` meets the bounds `[max ; min]` in two matrix products, so that one read of a
page's bounds serves the whole GQA group; a single head takes the equation as it stands.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quest_attention.ops.triton.arithmetic import dot, widen

__all__ = ["score_bounds", "take_bounds"]


@triton.jit
def score_bounds(q, metadata, h, physical, is_live, SHAPE: tl.constexpr):
    """The largest logit that the keys of each page can give to each query head.

    Of `q`, `[BLOCK_G, BLOCK_D]`, and `physical`, of which those count that are live, `[BLOCK_P]` both. Where a key is
    not finite the product with the other part of the query, zero, is NaN.
    """
    channel = tl.arange(0, SHAPE.block_d)
    at = metadata.base + h * metadata.head + physical.to(tl.int64)[:, None] * metadata.page + channel[None, :]
    inside = is_live[:, None] & (channel < SHAPE.head_dim)[None, :]
    key_max = tl.load(at, mask=inside, other=0.0)
    key_min = tl.load(at + metadata.side, mask=inside, other=0.0)
    positive, negative = tl.maximum(q.to(tl.float32), 0.0), tl.minimum(q.to(tl.float32), 0.0)
    if SHAPE.block_g == 1:
        logit = tl.sum(positive * widen(key_max, tl.float32) + negative * widen(key_min, tl.float32), 1)
    else:
        BLOCK_G: tl.constexpr = SHAPE.block_g
        logit = tl.zeros([BLOCK_G, physical.shape[0]], tl.float32)
        logit = dot(positive.to(q.dtype), tl.trans(widen(key_max, q.dtype)), logit)
        logit = dot(negative.to(q.dtype), tl.trans(widen(key_min, q.dtype)), logit)
    return logit


@triton.jit
def take_bounds(
    at,  # [BLOCK_D], where the page's first row of metadata lies
    side,  # stride from there to the second
    key,  # [BLOCK_T, BLOCK_D] float32, or [BLOCK_D]: a single fresh key
    is_fresh,  # [BLOCK_T]; None where there is a single key
    before,  # tokens that the page held before these
    inside,  # [BLOCK_D]
):
    """Widen the bounds of a page by its fresh keys, or begin them where it held none, whoever used it before."""
    goes_on = inside.to(tl.int32) * before > 0  # the interpreter joins no mask with a single condition
    # Asked for before the keys are used, so that both are waited for together.
    old_max = widen(tl.load(at, mask=goes_on, other=0.0), tl.float32)
    old_min = widen(tl.load(at + side, mask=goes_on, other=0.0), tl.float32)
    key_max, key_min = key, key
    if len(key.shape) == 2:
        key_max = tl.reduce(tl.where(is_fresh[:, None], key, float("-inf")), 0, _larger)
        key_min = tl.reduce(tl.where(is_fresh[:, None], key, float("inf")), 0, _smaller)
    key_max = tl.where(goes_on, _larger(key_max, old_max), key_max)
    key_min = tl.where(goes_on, _smaller(key_min, old_min), key_min)
    dtype: tl.constexpr = at.dtype.element_ty
    if dtype == tl.float8e4nv:
        tl.store(at, _round_up(key_max).to(dtype, bitcast=True), mask=inside)
        tl.store(at + side, (_round_up(-key_min) ^ 0x80).to(dtype, bitcast=True), mask=inside)
    else:
        tl.store(at, key_max.to(dtype), mask=inside)
        tl.store(at + side, key_min.to(dtype), mask=inside)


@triton.jit
def _larger(left, right):
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(left, right):
    return tl.minimum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round_up(bounds):
    """Bits of the smallest float8_e4m3fn that is at least each bound; NaN where there is none. See `forms.rounding`."""
    size = tl.abs(bounds)
    bits = size.to(tl.int32, bitcast=True)
    is_up = bounds > 0  # a positive bound grows in size, a negative one shrinks
    normal = (bits >> 20) - (120 << 3) + (is_up & ((bits & 0xFFFFF) != 0)).to(tl.int32)  # 3 of 23 bits, bias 7 not 127
    units = size * 512.0  # below 2 ** -6 numbers are multiples of 2 ** -9
    whole = units.to(tl.int32)
    code = tl.where(size < 0.015625, whole + (is_up & (units > whole.to(tl.float32))).to(tl.int32), normal)
    code = tl.minimum(code, tl.where(is_up, 0x7F, 0x7E)) | tl.where(bounds < 0, 0x80, 0)
    return tl.where(bounds != bounds, 0x7F, code).to(tl.uint8)

"""Device functions of the form `Moments`: mean and standard deviation of the keys per channel."""

from __future__ import annotations

import triton
import triton.language as tl

from quest_attention.ops.triton.arithmetic import dot, round_to, widen

__all__ = ["score_moments", "take_moments"]


@triton.jit
def score_moments(q, metadata, h, physical, is_live, COEFFICIENT: tl.constexpr, SHAPE: tl.constexpr):
    """`q . mean + COEFFICIENT * |q| . deviation` of each page for each query head; see `score_bounds`."""
    channel = tl.arange(0, SHAPE.block_d)
    at = metadata.base + h * metadata.head + physical.to(tl.int64)[:, None] * metadata.page + channel[None, :]
    inside = is_live[:, None] & (channel < SHAPE.head_dim)[None, :]
    mean = widen(tl.load(at, mask=inside, other=0.0), q.dtype)
    deviation = widen(tl.load(at + metadata.side, mask=inside, other=0.0), q.dtype)
    if SHAPE.block_g == 1:
        wide = q.to(tl.float32)
        return tl.sum(wide * mean.to(tl.float32) + COEFFICIENT * tl.abs(wide) * deviation.to(tl.float32), 1)
    else:  # noqa: RET505 - Triton takes a constant condition's branches for one only so
        BLOCK_G: tl.constexpr = SHAPE.block_g
        middle = dot(q, tl.trans(mean), tl.zeros([BLOCK_G, physical.shape[0]], tl.float32))
        spread = dot(tl.abs(q), tl.trans(deviation), tl.zeros([BLOCK_G, physical.shape[0]], tl.float32))
        return middle + COEFFICIENT * spread


@triton.jit
def take_moments(at, side, key, is_fresh, before, inside):
    """Merge the moments of the fresh keys with the page's own, as Chan, Golub and LeVeque do (1983); see `take_bounds`.

    A key that is not finite makes the deviation NaN, and so does all that is merged with it.
    """
    goes_on = inside.to(tl.int32) * before > 0  # the interpreter joins no mask with a single condition
    old_mean = widen(tl.load(at, mask=goes_on, other=0.0), tl.float32)
    old_deviation = widen(tl.load(at + side, mask=goes_on, other=0.0), tl.float32)
    count = 1.0
    mean = key
    squares = key - mean
    if len(key.shape) == 2:
        count = tl.sum(is_fresh.to(tl.float32), 0)
        mean = tl.sum(tl.where(is_fresh[:, None], key, 0.0), 0) / count
        away = tl.where(is_fresh[:, None], key - mean[None, :], 0.0)
        squares = tl.sum(away * away, 0)
    held = before.to(tl.float32)
    total = held + count
    delta = mean - old_mean
    squares += held * old_deviation * old_deviation + delta * (delta * (held * count / total))
    dtype: tl.constexpr = at.dtype.element_ty
    tl.store(at, round_to(old_mean + delta * (count / total), dtype), mask=inside)
    tl.store(at + side, round_to(tl.sqrt(squares / total), dtype), mask=inside)

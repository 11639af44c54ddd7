"""Device functions of numbers: products, tanh, conversions between dtypes; in the interpreter as on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from quest_attention.ops.triton.launch import is_interpreted

__all__ = ["LOG2_E", "cap", "dot", "round_to", "tanh", "widen"]

LOG2_E = tl.constexpr(1.4426950408889634)
"""Kernels work with powers of two, which the hardware has."""
_INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def dot(a, b, acc):
    """`a @ b + acc`, products exact, sums in float32."""
    if _INTERPRETED:  # Triton's interpreter takes bfloat16 operands for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Float32 rounded to the nearest number of another dtype, what is past the ends of float8_e4m3fn to those."""
    if _INTERPRETED and dtype == tl.float8e4nv:  # Triton's interpreter cuts bits off instead
        rounded = _e4m3_bits(x).to(dtype, bitcast=True)
    else:
        if _INTERPRETED and dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
            x = tl.where(tl.abs(x) < float("inf"), nearest, x)
        rounded = x.to(dtype)
    return rounded


@triton.jit
def widen(x, dtype: tl.constexpr):
    """Numbers in a dtype that holds all of them."""
    wide = x.to(dtype)
    if _INTERPRETED and x.dtype == tl.float8e4nv:  # Triton's interpreter knows no NaN of 8 bits
        wide = tl.where((x.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F, float("nan"), wide.to(tl.float32)).to(dtype)
    return wide


@triton.jit
def _e4m3_bits(x):
    """Bits of the float8_e4m3fn nearest to float32 numbers, the even one of two."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # 3 of 23 bits, bias 7 not 127
    small = ((size * 512.0 + 8388608.0) - 8388608.0).to(tl.int32)  # below 2 ** -6 numbers are multiples of 2 ** -9
    code = tl.minimum(tl.where(size < 0.015625, small, normal), 0x7E)
    return (tl.where(x != x, 0x7F, code) | tl.where(x.to(tl.int32, bitcast=True) < 0, 0x80, 0)).to(tl.uint8)


@triton.jit
def cap(logit, softcap):
    """Scaled logits, capped if asked: both in base 2, or both in base e."""
    if softcap is not None:
        logit = softcap * tanh(logit / softcap)
    return logit


@triton.jit
def tanh(x):
    """From the exponential, which Triton's interpreter has too: off by a few float32 roundings of 1."""
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -magnitude, magnitude)

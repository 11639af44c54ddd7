"""What the kernels share: a launch on the right device, a dtype check, the product, rounding."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.errors import QuestValueError

__all__ = [
    "FUSED_ARITHMETIC",
    "KERNEL_DTYPES",
    "LOG2_E",
    "check_kernel_dtype",
    "dot",
    "is_interpreted",
    "launch",
    "narrow",
]

FUSED_ARITHMETIC = {"enable_fp_fusion": True}
"""Multiply and add in one rounding: said here, because Triton's default changes after 3.9, which warns of it."""
LOG2_E = tl.constexpr(1.4426950408889634)
"""Kernels work with powers of two, which the hardware has."""
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of keys that the kernels compute in."""


def check_kernel_dtype(keys: Tensor) -> None:
    """Refuse what the kernels do not compute in: in float32 a bound of float64 keys may not bound.

    Raises:
        QuestValueError: The keys are float64.
    """
    if keys.dtype not in KERNEL_DTYPES:
        raise QuestValueError("keys.dtype", keys.dtype, "bfloat16, float16 or float32 for the Triton kernels")


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, in NumPy on a CPU: TRITON_INTERPRET=1 when Triton was imported."""
    return bool(_INTERPRETED.value)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a kernel on the device of its first tensor; nothing to do where the grid is empty."""
    if grid[0] == 0:
        return
    options |= FUSED_ARITHMETIC
    first = arguments[0]
    device = (first if isinstance(first, Tensor) else first.base).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


@triton.jit
def dot(a, b, acc):
    """`a @ b + acc`, products exact, sums in float32."""
    if _INTERPRETED:  # Triton's interpreter takes bfloat16 operands for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Float32 rounded to the nearest number of another dtype."""
    if _INTERPRETED and dtype == tl.bfloat16:  # Triton's interpreter cuts bits off instead
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), nearest, x)
    return x.to(dtype)

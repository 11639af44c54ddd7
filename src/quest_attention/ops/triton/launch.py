"""What every launch goes through: a check of the dtype, and a start on the right device."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from quest_attention.errors import QuestValueError

__all__ = ["FUSED_ARITHMETIC", "KERNEL_DTYPES", "check_kernel_dtype", "is_interpreted", "launch"]

FUSED_ARITHMETIC = {"enable_fp_fusion": True}
"""Multiply and add in one rounding: said here, because Triton's default changes after 3.9, which warns of it."""
_INTERPRETED = bool(triton.knobs.runtime.interpret)
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
    return _INTERPRETED


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

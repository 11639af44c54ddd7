"""What every launch goes through: a check of the dtype, and a start on the right device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.errors import QuestValueError

__all__ = [
    "FUSED_ARITHMETIC",
    "KERNEL_DTYPES",
    "check_kernel_dtype",
    "compute_major",
    "is_interpreted",
    "launch",
    "launching_in_turn",
    "let_next_start",
    "starts_early",
    "wait_for_launch",
]

FUSED_ARITHMETIC = {"enable_fp_fusion": True}
"""Multiply and add in one rounding: said here, because Triton's default changes after 3.9, which warns of it."""
_EARLY_LAUNCHES = 9
"""First number of the compute capability from which a launch may start before the one ahead of it is done: Hopper."""
_INTERPRETED = bool(triton.knobs.runtime.interpret)
_in_turn = False
"""Whether launches wait for the ones ahead of them on every GPU: see `launching_in_turn`."""
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
"""Dtypes of keys that the kernels take: those they compute in, and one that they widen to the query's."""


def check_kernel_dtype(keys: Tensor) -> None:
    """Refuse what the kernels do not compute in: in float32 a bound of float64 keys may not bound.

    Raises:
        QuestValueError: The keys are float64.
    """
    if keys.dtype not in KERNEL_DTYPES:
        raise QuestValueError(
            "keys.dtype", keys.dtype, "bfloat16, float16, float32 or float8_e4m3fn for the Triton kernels"
        )


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


@cache  # a step asks several times
def compute_major(device: torch.device) -> int:
    """The first number of a GPU's compute capability; 0 of what is no NVIDIA GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def starts_early(tensor: Tensor) -> dict[str, bool]:
    """Options of a launch that follows another of the same step, whose kernel calls `wait_for_launch`.

    A GPU since Hopper then starts it before the other is done. The first launch of a step has none of these options:
    it waits for whatever was before. `fetch_units` by itself has only launches with them, and loads nothing before it
    waits.
    """
    early = not _in_turn and compute_major(tensor.device) >= _EARLY_LAUNCHES
    return {"FOLLOWS": early, **({"launch_pdl": True} if early else {})}


@contextmanager
def launching_in_turn() -> Iterator[None]:
    """Start no launch early meanwhile, so that a profile shows what each takes alone, without its wait."""
    global _in_turn  # noqa: PLW0603 - a profile is of a whole process
    before, _in_turn = _in_turn, True
    try:
        yield
    finally:
        _in_turn = before


@triton.jit
def wait_for_launch(FOLLOWS: tl.constexpr):
    """Wait until the launch before this one is done and what it wrote is there; then let the next one start."""
    if FOLLOWS:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def let_next_start(FOLLOWS: tl.constexpr):
    """Let the next launch start, in the first one of a step."""
    if FOLLOWS:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )

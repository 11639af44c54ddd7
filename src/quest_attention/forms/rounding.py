"""Rounding to 8 bits: to the nearest number, or outward, since a bound in fewer bits must still bound."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_attention.forms.form import FP8

__all__ = ["round_down", "round_near", "round_up"]

_LARGEST = torch.finfo(FP8).max


def round_near(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of `dtype`; in 8 bits the largest of them for what is beyond, as vLLM stores it.

    >>> round_near(torch.tensor([0.3, -1000.0]), torch.float8_e4m3fn).tolist()
    [0.3125, -448.0]
    """
    if dtype == FP8 and numbers.dtype != FP8:  # in which PyTorch compares no numbers
        numbers = numbers.clamp(-_LARGEST, _LARGEST)
    return numbers.to(dtype)


def round_up(bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest numbers of `dtype` that are at least `bounds`; NaN where 8 bits have none.

    A page with NaN for a bound scores +inf, so what is beyond the range is read, not lost.

    >>> round_up(torch.tensor([0.3, -0.3, 1000.0]), torch.float8_e4m3fn).tolist()
    [0.3125, -0.28125, nan]
    """
    if dtype != FP8:
        return bounds.to(dtype)
    wide = bounds if bounds.dtype == torch.float64 else bounds.float()  # float32 may lie on the wrong side of it
    nearest = wide.clamp(-_LARGEST, _LARGEST).to(dtype)
    # Neighbours of one sign have neighbouring bit patterns, whose magnitude grows; after the largest comes NaN.
    step = torch.where(wide > 0, 1, -1).to(torch.uint8)
    bits = nearest.view(torch.uint8) + torch.where(nearest.to(wide.dtype) < wide, step, 0)
    return bits.view(dtype)


def round_down(bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest numbers of `dtype` that are at most `bounds`; see `round_up`."""
    if dtype != FP8:
        return bounds.to(dtype)
    return (round_up(-bounds, dtype).view(torch.uint8) ^ 0x80).view(dtype)

"""`Bounds`: the largest and the smallest key of a page, per channel. Section 3.2 of the paper, arXiv:2406.10774."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quest_attention.forms.form import FP8, TwoVectors, as_numbers
from quest_attention.forms.rounding import round_down, round_up

__all__ = ["KEY_MAX", "KEY_MIN", "Bounds"]

KEY_MAX = 0
"""Row of the largest key per channel."""
KEY_MIN = 1
"""Row of the smallest key per channel."""


@dataclass(frozen=True)
class Bounds(TwoVectors):
    """The paper's form: `U(page) = sum_d max(q_d * min_d, q_d * max_d)` bounds every logit of the page.

    In 8 bits each bound is rounded outward, so that it still bounds; NaN stands for what is beyond their range. After a
    rollback bounds may be wider than the page's keys: still bounds.
    """

    name = "bounds"
    is_bound = True
    coefficient = 0.0

    def dtypes(self, keys: torch.dtype) -> tuple[torch.dtype, ...]:
        """See `MetadataForm.dtypes`."""
        return (FP8,) if keys == FP8 else (keys, FP8)

    def take(self, into: Tensor, keys: Tensor, before: Tensor | int, written: Tensor | None = None) -> None:
        """See `MetadataForm.take`."""
        keys = as_numbers(keys)
        if written is not None:
            outside = ~written[..., None]
            largest, smallest = (
                keys.masked_fill(outside, -math.inf).amax(-2),
                keys.masked_fill(outside, math.inf).amin(-2),
            )
        elif keys.shape[-2] == 1:  # the append of a decode step, spared two reductions
            largest = smallest = keys[..., 0, :]
        else:
            largest, smallest = keys.amax(-2), keys.amin(-2)
        key_max, key_min = into[..., KEY_MAX, :], into[..., KEY_MIN, :]
        if isinstance(before, Tensor):
            goes_on = (before > 0)[..., None]
            largest = torch.where(goes_on, torch.maximum(largest, key_max.to(keys.dtype)), largest)
            smallest = torch.where(goes_on, torch.minimum(smallest, key_min.to(keys.dtype)), smallest)
        elif before:
            largest = torch.maximum(largest, key_max.to(keys.dtype))
            smallest = torch.minimum(smallest, key_min.to(keys.dtype))
        key_max.copy_(round_up(largest, into.dtype))
        key_min.copy_(round_down(smallest, into.dtype))

    def take_by_hand(self, kept: Tensor, keys: Tensor, before: int) -> Tensor:
        """See `MetadataForm.take_by_hand`."""
        key_max, key_min = kept.double()
        for offset, key in enumerate(keys.double(), start=before):
            key_max = key if offset == 0 else torch.maximum(key_max, key)
            key_min = key if offset == 0 else torch.minimum(key_min, key)
        bounds = [_outward(key_max, kept.dtype, upward=True), _outward(key_min, kept.dtype, upward=False)]
        return torch.stack(bounds)

    def see(self, query: Tensor) -> Tensor:
        """See `MetadataForm.see`: `U = relu(q) . max + min(q, 0) . min`, one product."""
        return torch.cat([query.clamp(min=0), query.clamp(max=0)], dim=-1)

    def score_by_hand(self, query: Tensor, kept: Tensor) -> Tensor:
        """See `MetadataForm.score_by_hand`: equation 2 of the paper."""
        key_max, key_min = kept.double()
        return torch.maximum(query.double() * key_min, query.double() * key_max).sum()


def _outward(bounds: Tensor, dtype: torch.dtype, *, upward: bool) -> Tensor:
    """The nearest number of the metadata's dtype that still bounds; NaN where there is none, which ranks first."""
    if dtype != FP8:
        return bounds.to(dtype)  # bounds are keys: nothing is rounded
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    stored = torch.full_like(bounds, math.nan, dtype=torch.float64)
    for channel, bound in enumerate(bounds.tolist()):
        fits = every[every >= bound] if upward else every[every <= bound]
        if len(fits):
            stored[channel] = fits.min() if upward else fits.max()
    return stored.to(dtype)

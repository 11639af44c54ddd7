"""`Moments`: mean and standard deviation of a page's keys, per channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quest_attention.config import check_coefficient
from quest_attention.forms.form import FP8, TwoVectors, as_numbers

__all__ = ["DEVIATION", "MEAN", "Moments"]

MEAN = 0
"""Row of the mean key per channel."""
DEVIATION = 1
"""Row of the standard deviation of the keys per channel, of the page's keys as a whole."""


@dataclass(frozen=True)
class Moments(TwoVectors):
    """`q . mean + coefficient * |q| . deviation`: a page's likely largest logit, and no bound (arXiv 2605.27740).

    As many bytes as bounds. One key far from the others widens bounds in full and moments by its share, so pages of
    ordinary keys rank higher; the first page of a text, with its attention sink, ranks too low and is to be read
    always.
    Tokens taken back by a rollback are in the moments of the last page until it starts anew or is taken anew.

    Attributes:
        coefficient: How many standard deviations above its mean a page's best key is taken to lie.
    """

    coefficient: float

    def __post_init__(self) -> None:
        check_coefficient("coefficient", self.coefficient)

    name = "moments"
    is_bound = False

    def dtypes(self, keys: torch.dtype) -> tuple[torch.dtype, ...]:
        """See `MetadataForm.dtypes`. Three bits would not hold a mean to which tokens are added one by one."""
        return (torch.bfloat16,) if keys == FP8 else (keys,)

    def take(self, into: Tensor, keys: Tensor, before: Tensor | int, written: Tensor | None = None) -> None:
        """See `MetadataForm.take`: Chan's merge of what is kept and the new keys, calculated in float32."""
        keys = as_numbers(keys)
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        if written is None:
            new: Tensor | int = keys.shape[-2]
            deviation, mean = torch.std_mean(keys, -2, correction=0)
            spread = deviation.square() * new  # sum of squared distances from the mean
        else:
            inside = written[..., None]
            new = written.sum(-1)[..., None]
            mean = keys.masked_fill(~inside, 0).sum(-2) / new
            spread = (keys - mean[..., None, :]).masked_fill(~inside, 0).square().sum(-2)
        if isinstance(before, Tensor) or before:
            old = before[..., None] if isinstance(before, Tensor) else before
            kept = into.to(keys.dtype)
            if isinstance(old, Tensor):  # what a page held that starts anew may be anything
                kept = kept.masked_fill((old == 0)[..., None], 0)
            total, apart = old + new, mean - kept[..., MEAN, :]
            spread = spread + kept[..., DEVIATION, :].square() * old + apart.square() * (old * new / total)
            mean = kept[..., MEAN, :] + apart * (new / total)
            new = total
        into[..., MEAN, :] = mean.to(into.dtype)
        into[..., DEVIATION, :] = (spread / new).sqrt().to(into.dtype)

    def take_by_hand(self, kept: Tensor, keys: Tensor, before: int) -> Tensor:
        """See `MetadataForm.take_by_hand`: Welford's update, a token at a time."""
        mean, spread = kept[MEAN].double(), kept[DEVIATION].double().square() * before
        for count, key in enumerate(keys.double(), start=before + 1):
            if count == 1:
                mean, spread = key, key - key  # NaN where the key is not finite
                continue
            apart = key - mean
            mean = mean + apart / count
            spread = spread + apart * (key - mean)
        return torch.stack([mean, (spread / (before + len(keys))).sqrt()]).to(kept.dtype)

    def see(self, query: Tensor) -> Tensor:
        """See `MetadataForm.see`."""
        return torch.cat([query, self.coefficient * query.abs()], dim=-1)

    def score_by_hand(self, query: Tensor, kept: Tensor) -> Tensor:
        """See `MetadataForm.score_by_hand`."""
        mean, deviation = kept.double()
        logit: Tensor = (query.double() * mean).sum() + self.coefficient * (query.double().abs() * deviation).sum()
        return logit

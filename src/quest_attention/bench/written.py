"""What the tokens of a `generate()` take, each by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from quest_attention.hf import cache_argument

__all__ = ["time_written"]


class _Clock:
    """A logits processor that notes when it is called, and may say what comes next."""

    def __init__(self, device: torch.device, clock: Callable[[], float], follow: Sequence[int] | None) -> None:
        self._device = device
        self._clock = clock
        self._follow = follow
        self.times: list[float] = []

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        """Note the time when the scores are there."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.times.append(self._clock())
        if self._follow is not None:
            scores = torch.full_like(scores, float("-inf"))
            scores[:, self._follow[len(self.times) - 1]] = 0.0
        return scores


def time_written(
    model: Any, cache: Cache, batch: int, length: int, tokens: int, warmup: int,
    clock: Callable[[], float] = time.perf_counter, follow: Sequence[int] | None = None,
) -> list[float]:  # fmt: skip
    """Milliseconds of each counted token that `generate()` writes after a cache of `length` tokens.

    Args:
        model: A transformers model.
        cache: Filled.
        batch: Sequences.
        length: Tokens in the cache [tokens].
        tokens: To count [tokens].
        warmup: Written before, which are not counted [tokens].
        clock: What times are read from [s].
        follow: Tokens to write, at least `warmup + tokens`, whatever the model says; the model's own if left out.
    """
    found = _Clock(model.device, clock, follow)
    ids = torch.ones(batch, length + 1, dtype=torch.long, device=model.device)
    count = warmup + tokens
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, **cache_argument(cache), logits_processor=[found], **options)
    between = [(later - sooner) * 1e3 for sooner, later in zip(found.times, found.times[1:], strict=False)]
    return between[warmup - 1 :]

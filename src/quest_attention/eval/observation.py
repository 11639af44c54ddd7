"""`Observation`: what the tokens of a context attended to, for methods that keep what was attended to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["WINDOW", "Observation", "attention_weights"]

WINDOW = 32
"""Last queries whose attention is kept row by row: SnapKV's observation window [tokens]."""
_BLOCK_BYTES = 1 << 28
"""Float32 weights held at a time [bytes]: queries of a prefill are taken in blocks."""


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    first_position: int | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Weights of full attention, in float32.

    Args:
        query: `[B, HQ, t, D]`.
        key: `[B, HKV, T, D]`.
        first_position: Where the first query stands among the keys; each sees keys up to its own. None: all see all.
        scaling: Of the logits; `D ** -0.5` by default.
        softcap: Logits are capped to it.
        s_aux: `[HQ]`, logits of attention sinks.

    Returns:
        `[B, HKV, G, t, T]`.
    """
    batch, count, dim = query.shape[0], query.shape[2], query.shape[3]
    scale = dim**-0.5 if scaling is None else scaling
    rows = query.float().reshape(batch, key.shape[1], -1, dim) * scale  # the heads of a group as rows of one product
    logits = (rows @ key.float().transpose(-1, -2)).view(batch, key.shape[1], -1, count, key.shape[2])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if first_position is not None:
        own = torch.arange(count, device=query.device)
        later = torch.arange(key.shape[2] - first_position, device=query.device) > own[:, None]
        logits[..., first_position:].masked_fill_(later, float("-inf"))  # all see what comes before the first of them
    if s_aux is None:
        return logits.softmax(-1)
    sinks = s_aux.float().view(1, key.shape[1], -1, 1, 1).expand(*logits.shape[:-1], 1)
    return torch.cat((logits, sinks), -1).softmax(-1)[..., :-1]


class Observation:
    """Statistics of the attention of one layer over the passes it has seen.

    Attributes:
        received: `[B, HKV, T]` float32: attention each token received, summed over queries and their heads.
        window: `[B, HKV, w, T]` float32: what the last queries, at most `WINDOW`, gave each token, mean over the heads
            of a group.
    """

    def __init__(self) -> None:
        self.received: Tensor | None = None
        self.window: Tensor | None = None

    def observe(self, query: Tensor, key: Tensor, **kwargs: Any) -> None:
        """Take the attention of one pass: `query` `[B, HQ, t, D]` are the last of the tokens of `key` `[B, HKV, T, D]`.

        Further arguments are those of `attention_weights`, and whatever else a model gives to its attention.
        """
        each = [
            _observe_sequence(query[b : b + 1], key[b : b + 1], **kwargs) for b in range(query.shape[0])
        ]  # one by one, so that a block holds many queries and the keys are read few times
        received, rows = (torch.cat(parts) for parts in zip(*each, strict=True))
        self._add(received, rows)

    def _add(self, received: Tensor, rows: Tensor) -> None:
        if self.received is not None and self.window is not None:
            new = received.shape[2] - self.received.shape[2]
            received[:, :, : self.received.shape[2]] += self.received
            rows = torch.cat((torch.nn.functional.pad(self.window, (0, new)), rows), 2)[:, :, -WINDOW:]
        self.received, self.window = received, rows


def _observe_sequence(query: Tensor, key: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What `received` `[1, HKV, T]` and `window` `[1, HKV, w, T]` would be after this pass alone."""
    count, length = query.shape[2], key.shape[2]
    block = max(1, _BLOCK_BYTES // (4 * query.shape[1] * length))
    received = torch.zeros(1, key.shape[1], length, device=key.device)
    window = received.new_empty(1, key.shape[1], 0, length)
    for start in range(0, count, block):
        some, first = query[:, :, start : start + block], length - count + start
        seen = first + some.shape[2]  # tokens that the last of these queries sees
        weights = attention_weights(some, key[:, :, :seen], first_position=first, **kwargs)
        received[:, :, :seen] += weights.sum((2, 3))
        rows = torch.nn.functional.pad(weights[..., -WINDOW:, :].mean(2), (0, length - seen))
        window = torch.cat((window, rows), 2)[:, :, -WINDOW:]
    return received, window

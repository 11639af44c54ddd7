"""`Observation`: what the tokens of a context attended to, for methods that keep what was attended to."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["WINDOW", "Observation", "attention_weights"]

WINDOW = 32
"""Last queries whose attention is kept row by row: SnapKV's observation window [tokens]."""
_BLOCK_BYTES = 1 << 28
"""Float32 weights held at a time [bytes]: queries of a prefill are taken in blocks."""
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
"""What a kernel multiplies exactly on tensor cores."""


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
    """What the passes of one layer attended to: sums, and the keys and last queries, from which rows can be made.

    Attributes:
        received: `[B, HKV, T]` float32: attention each token received, summed over queries and their heads.
    """

    def __init__(self) -> None:
        self.received: Tensor | None = None
        self._keys: Tensor | None = None
        self._last_queries: Tensor | None = None  # [B, HQ, w, D]
        self._options: dict[str, Any] = {}

    def copy(self) -> Observation:
        """Another one of the same passes, which may see further ones."""
        return copy.copy(self)  # nothing that it holds is ever written to

    @property
    def window(self) -> Tensor:
        """What the last queries, at most `WINDOW`, gave each token, mean over the heads of a group.

        Returns:
            `[B, HKV, w, T]` float32, made anew each time: most passes are not the last one.
        """
        assert self._keys is not None and self._last_queries is not None, "a context was read"
        first = self._keys.shape[2] - self._last_queries.shape[2]
        each = [
            attention_weights(queries[None], keys[None], first_position=first, **self._options).mean(2)
            for queries, keys in zip(self._last_queries, self._keys, strict=True)
        ]  # one by one, since all weights together are far more than their mean
        return torch.cat(each)

    def observe(self, query: Tensor, key: Tensor, **kwargs: Any) -> None:
        """Take the attention of one pass: `query` `[B, HQ, t, D]` are the last of the tokens of `key` `[B, HKV, T, D]`.

        Further arguments are those of `attention_weights`, and whatever else a model gives to its attention.
        """
        options: dict[str, Any] = {name: kwargs[name] for name in ("scaling", "softcap", "s_aux") if name in kwargs}
        received = _received(query, key, **options)
        if self.received is not None:
            received[:, :, : self.received.shape[2]] += self.received
        self.received = received
        before = [] if self._last_queries is None else [self._last_queries]
        self._last_queries = torch.cat((*before, query[:, :, -WINDOW:]), 2)[:, :, -WINDOW:]
        self._keys = key[:, :]  # without what a layer hangs on its keys to be found by
        self._options = options


def _received(query: Tensor, key: Tensor, **kwargs: Any) -> Tensor:
    """Attention each token received in a pass, `[B, HKV, T]` float32."""
    has_plain_logits = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
    # Both ways sum the same products in float32; the other one takes what the kernels do not.
    if query.is_cuda and query.dtype in _KERNEL_DTYPES and has_plain_logits and find_spec("triton") is not None:
        from quest_attention.ops.triton.received import received_attention  # noqa: PLC0415 - needs triton

        scaling = kwargs.get("scaling")
        return received_attention(query, key, query.shape[3] ** -0.5 if scaling is None else scaling)
    each = [
        _received_by_sequence(query[b : b + 1], key[b : b + 1], **kwargs) for b in range(query.shape[0])
    ]  # one by one, so that a block holds many queries and the keys are read few times
    return torch.cat(each)


def _received_by_sequence(query: Tensor, key: Tensor, **kwargs: Any) -> Tensor:
    """The same of one sequence, its weights held in blocks of queries."""
    count, length = query.shape[2], key.shape[2]
    block = max(1, _BLOCK_BYTES // (4 * query.shape[1] * length))
    received = torch.zeros(1, key.shape[1], length, device=key.device)
    for start in range(0, count, block):
        some, first = query[:, :, start : start + block], length - count + start
        seen = first + some.shape[2]  # tokens that the last of these queries sees
        weights = attention_weights(some, key[:, :, :seen], first_position=first, **kwargs)
        received[:, :, :seen] += weights.sum((2, 3))
    return received

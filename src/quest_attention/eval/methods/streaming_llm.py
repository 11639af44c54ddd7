"""`StreamingLLM` and `SlidingWindow`: the last tokens, with or without the first ones."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quest_attention.eval.methods.evicting import Evicting, Policy, last_indices

__all__ = ["SlidingWindow", "StreamingLLM"]

_NUM_SINKS = 4
"""First tokens that stay, as in the paper [tokens]."""


class StreamingLLM(Evicting):
    """The first four tokens, attention sinks, and the last ones.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024, arXiv:2309.17453.
    Deviations: the context is read with full attention and cut at the first decode step, as for every method here, and
    tokens keep the positions they were written with, where the paper numbers those in the cache anew.
    """

    name = "streaming_llm"
    summary = "reads the first and the last tokens"
    num_sinks: ClassVar[int] = _NUM_SINKS
    least_budget = _NUM_SINKS + 2

    def policy(self) -> Policy:
        """See `Evicting.policy`."""
        return _FirstAndLast(self.num_sinks)


class SlidingWindow(StreamingLLM):
    """The last tokens and nothing else.

    Source: the window of Beltagy et al., "Longformer", arXiv:2004.05150, section 3.1, sliding from the first decode
    step on.
    """

    name = "sliding window"
    summary = "reads the last tokens"
    num_sinks = 0
    least_budget = 2


class _FirstAndLast(Policy):
    observes = False

    def __init__(self, num_sinks: int) -> None:
        self._num_sinks = num_sinks

    def keep(self, scores: Tensor, room: int) -> Tensor:
        sinks = torch.arange(self._num_sinks, device=scores.device).expand(*scores.shape[:2], -1)
        return torch.cat((sinks, last_indices(scores, room - self._num_sinks)), -1)

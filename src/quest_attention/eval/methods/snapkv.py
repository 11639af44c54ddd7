"""`SnapKV`: the tokens that the end of the prompt attended to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quest_attention.eval.methods.evicting import Evicting, Policy, last_indices, top_indices
from quest_attention.eval.observation import WINDOW, Observation

__all__ = ["SnapKV"]

_KERNEL = 5
"""Neighbouring tokens over which votes are averaged, so that what is kept is not cut into pieces [tokens]."""


class SnapKV(Evicting):
    """The end of the prompt votes for what stays of it.

    Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024, arXiv:2404.14469:
    the last 32 queries of the prompt vote with their attention, votes are averaged over 5 neighbours, each KV head
    keeps its own tokens, and the window itself stays. Deviations: the window is at most half of the budget; the last
    tokens are the window also later, and further decode steps displace the tokens with the fewest votes, where the
    paper lets the cache grow: a step here reads no more than the budget. The question is decoded, not part of the
    prompt that votes.
    """

    name = "snapkv"
    summary = "reads what the end of the context attended to, and the last tokens"
    least_budget = 4

    def policy(self) -> Policy:
        """See `Evicting.policy`."""
        return _Votes(min(WINDOW, self.token_budget // 2))


class _Votes(Policy):
    def __init__(self, window: int) -> None:
        self._window = window

    def start(self, observation: Observation) -> Tensor:
        votes = observation.window[:, :, -self._window :].sum(2)  # [B, HKV, n]
        return F.avg_pool1d(votes, _KERNEL, stride=1, padding=_KERNEL // 2, count_include_pad=False)

    def step(self, scores: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002
        return scores  # decode steps have no vote

    def keep(self, scores: Tensor, room: int) -> Tensor:
        recent = min(self._window, room)
        voted = top_indices(scores[:, :, : scores.shape[2] - recent], room - recent)
        return torch.cat((voted, last_indices(scores, recent)), -1)

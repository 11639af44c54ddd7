"""`H2O`: the tokens that received most attention so far, and the last ones."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_attention.eval.methods.evicting import Evicting, Policy, last_indices, top_indices
from quest_attention.eval.observation import Observation

__all__ = ["H2O"]


class H2O(Evicting):
    """Half of the budget for the heavy hitters, half for the last tokens.

    Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    NeurIPS 2023, arXiv:2306.14048: a token's score is the attention it received from all queries so far, the context's
    included. Deviations: scores are summed over the query heads that share a KV head, since these share what is kept,
    and the context is cut once, when it has been read, where the paper cuts after each of its tokens.
    """

    name = "h2o"
    summary = "reads what received most attention, and the last tokens"
    least_budget = 4

    def policy(self) -> Policy:
        """See `Evicting.policy`."""
        return _HeavyHitters()


class _HeavyHitters(Policy):
    def start(self, observation: Observation) -> Tensor:
        assert observation.received is not None, "a context was read"
        return observation.received

    def step(self, scores: Tensor, weights: Tensor) -> Tensor:
        return scores + weights.sum(2)

    def keep(self, scores: Tensor, room: int) -> Tensor:
        recent = room // 2
        heavy = top_indices(scores[:, :, : scores.shape[2] - recent], room - recent)
        return torch.cat((heavy, last_indices(scores, recent)), -1)

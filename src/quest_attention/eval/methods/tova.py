"""`TOVA`: the tokens that the last query attended to most."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_attention.eval.methods.evicting import Evicting, Policy, last_indices, top_indices
from quest_attention.eval.observation import Observation

__all__ = ["TOVA"]


class TOVA(Evicting):
    """What the last query weighs most stays, the same tokens for all heads of a layer.

    Source: Oren et al., "Transformers are Multi-State RNNs", EMNLP 2024, arXiv:2401.06104. Deviation: the context is
    cut once, by the attention of its last token, where the paper drops a token after each of its tokens. The newest
    token always stays.
    """

    name = "tova"
    summary = "reads what the query before attended to most"
    least_budget = 3

    def policy(self) -> Policy:
        """See `Evicting.policy`."""
        return _LastQuery()


class _LastQuery(Policy):
    def start(self, observation: Observation) -> Tensor:
        rows = observation.window[:, :, -1]  # [B, HKV, n]
        return rows.mean(1, keepdim=True).expand_as(rows)

    def step(self, scores: Tensor, weights: Tensor) -> Tensor:
        return weights.mean((1, 2))[:, None].expand_as(scores)

    def keep(self, scores: Tensor, room: int) -> Tensor:
        return torch.cat((top_indices(scores[:, :, :-1], room - 1), last_indices(scores, 1)), -1)

"""`TokenCeiling`: the tokens that weigh most, one by one, found by looking at every key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quest_attention.config import QuestConfig
from quest_attention.eval.methods.method import Method, Session
from quest_attention.eval.methods.reading import ReadingLayer, ReadingSession, refuse_mask
from quest_attention.eval.observation import attention_weights
from quest_attention.hf import enable_quest
from quest_attention.hf.attention import AttentionForward
from quest_attention.hf.reading import Reading
from quest_attention.hf.reporting import OnRead
from quest_attention.ops import Selection

__all__ = ["TokenCeiling", "heaviest_tokens"]


class TokenCeiling(Method):
    """The tokens with the largest mean weight over the query heads of a group: what a better choice could read.

    It reads every key to choose, so it is no method to serve with; commands and results call it an oracle, as they do
    `PageCeiling`. A weight is that of full attention, so each query head's logits are normalised before heads are
    compared; the token being written is always read.

    Args:
        token_budget: Tokens a step reads, its own included [tokens].
        num_dense_layers: Leading full-attention layers that read everything [layers].
    """

    name = "token_oracle"
    summary = "reads the tokens that weigh most, one by one"
    unit = 1
    token_budget: int
    num_dense_layers: int

    def __init__(self, token_budget: int, num_dense_layers: int) -> None:
        self.token_budget = token_budget
        self.num_dense_layers = num_dense_layers

    @contextmanager
    def session(self, model: PreTrainedModel, max_length: int | None = None) -> Iterator[Session]:
        """See `Method.session`. Raises what `enable_quest` raises, whose place in the model this takes."""
        del max_length  # transformers' storage has no room ahead
        config = QuestConfig.paper(self.token_budget, page_size=1, num_dense_layers=self.num_dense_layers)
        with enable_quest(model, config, cuda_graphs=False) as handle:
            yield ReadingSession(handle, lambda index: _CeilingLayer(index, self.token_budget))


def heaviest_tokens(weights: Tensor, count: int) -> Tensor:
    """The tokens with the largest mean weight over a group's query heads, the last always among them.

    Args:
        weights: `[B, HKV, G, T]` float32, of full attention.
        count: At most T [tokens].

    Returns:
        `[B, HKV, count]` int64, ascending.
    """
    mass = weights.mean(2)
    mass[..., -1] = float("inf")
    return mass.topk(count, -1).indices.sort(-1).values


class _CeilingLayer(ReadingLayer):
    def __init__(self, index: int, token_budget: int) -> None:
        super().__init__(index, token_budget)
        self.on_read: OnRead | None = None

    def attend(
        self,
        dense: AttentionForward,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See `hf.attention.AttentionForward`.

        Raises:
            UnsupportedModelError: A decode step has a mask: its sequences are padded.
        """
        if self.reading is Reading.SEVERAL_TOKENS:
            return dense(query, key, value, attention_mask, **kwargs)
        self.tokens_read += min(self.token_budget, key.shape[2])
        if self.reading is not Reading.SPARSE:
            return dense(query, key, value, attention_mask, **kwargs)
        refuse_mask(attention_mask)
        weights = attention_weights(query, key, **kwargs)[:, :, :, 0]  # [B, HKV, G, T]
        tokens = heaviest_tokens(weights, self.token_budget)
        read_keys, read_values = (
            all_of.gather(2, tokens[..., None].expand(-1, -1, -1, all_of.shape[3])) for all_of in (key, value)
        )
        if self.on_read is not None:
            counts = torch.full(tokens.shape[:2], self.token_budget, dtype=torch.int32, device=key.device)
            self.on_read(self.index, Selection(tokens.int(), counts, unit_size=1), query, key, **kwargs)
        read = attention_weights(query, read_keys, **kwargs)[:, :, :, 0]  # [B, HKV, G, K]
        output = read @ read_values.float()  # [B, HKV, G, DV]
        return output.to(query.dtype).flatten(1, 2)[:, None], None

"""`PageCeiling`: the pages that hold the largest logits, found by looking at every key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quest_attention.eval.methods.quest import Quest, QuestSession
from quest_attention.eval.methods.reading import refuse_mask
from quest_attention.hf import QuestHandle, QuestLayer
from quest_attention.hf.attention import AttentionForward
from quest_attention.hf.reading import Reading
from quest_attention.ops import Step, run_step
from quest_attention.pages import num_pages

__all__ = ["PageCeiling", "true_scores"]


class PageCeiling(Quest):
    """Quest with the true largest logit of each page in place of its bound: the ceiling for any way to score pages.

    It reads every key to choose, so it is no method to serve with; forced pages, budget and attention are Quest's.
    Commands and results call it an oracle, which in the code is `ops/reference.py`: the one that says what is right.
    """

    name = "oracle"
    summary = "reads the pages that hold the largest logits"

    def open(self, handle: QuestHandle, max_length: int | None) -> QuestSession:
        """See `Quest.open`."""
        session = QuestSession(handle, max_length)
        for index, layer in enumerate(session.cache.layers):
            if isinstance(layer, QuestLayer) and not layer.is_dense:
                session.cache.layers[index] = _CeilingLayer(
                    layer.config,
                    layer.counter,
                    is_dense=False,
                    workspaces=layer.workspaces,
                    max_length=max_length,
                    on_select=layer.on_select,
                )
        return session


def true_scores(query: Tensor, keys: Tensor, page_size: int) -> Tensor:
    """The largest logit of each page over its tokens and the query heads of the group, unscaled.

    Args:
        query: `[B, HQ, D]`.
        keys: `[B, HKV, T, D]`.
        page_size: Tokens per page [tokens].

    Returns:
        `[B, HKV, P]` float32.
    """
    batch, heads, length, dim = keys.shape
    logits = query.float().view(batch, heads, -1, dim) @ keys.float().transpose(-1, -2)  # [B, HKV, G, T]
    pages = num_pages(length, page_size)
    padded = torch.nn.functional.pad(logits.amax(2), (0, pages * page_size - length), value=float("-inf"))
    return padded.view(batch, heads, pages, page_size).amax(-1)


class _CeilingLayer(QuestLayer):
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
        batch, config = query.shape[0], self.config
        self.count_attention(batch)
        if self.reading is not Reading.SPARSE:
            return dense(query, key, value, attention_mask, **kwargs)
        refuse_mask(attention_mask)
        step = Step(
            query=query[:, :, 0],
            kv=self.paged,
            seq_lens=key.shape[2],
            config=config,
            sm_scale=kwargs.get("scaling"),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
        )
        output, selected = run_step(step, score=lambda step: true_scores(step.query, key, config.page_size))
        self.counter.count_sparse(batch * config.unit_budget * config.unit_size, batch * self.tokens_held)
        self.report(selected, query, key, **kwargs)
        return output[:, None], None

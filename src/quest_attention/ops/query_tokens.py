"""`QueryTokens`: several query tokens of each sequence in one decode step, as a check of drafted tokens has them.

They choose together: to scores and selection the query heads of all of them are one group, so that what one of them
looks at is read for all, once. Each attends to what was chosen and lies before them all, in one pass of a backend's own
attention, and to those of the step's tokens that are no later than itself. The two parts are merged by log-sum-exp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestValueError
from quest_attention.ops.checks import check_lengths, check_one_table
from quest_attention.ops.gathering import gather_keys, gather_values
from quest_attention.ops.selection import Selection
from quest_attention.ops.step import Step
from quest_attention.pages import PagedKV, check_like

if TYPE_CHECKING:
    from quest_attention.ops.dispatch import Verbs

__all__ = ["MOST_CHOOSING_HEADS", "MOST_QUERY_TOKENS", "QueryTokens", "with_pages_of"]

MOST_CHOOSING_HEADS = 64
"""Query heads of a KV head, of all tokens of a row, for which a GPU's kernels choose single tokens without an estimate
of each in memory."""

MOST_QUERY_TOKENS = 16
"""Of a sequence in a step."""


def with_pages_of(config: QuestConfig, query_tokens: int) -> QuestConfig:
    """The config that forces every page in which so many last tokens of a sequence may lie.

    Raises:
        QuestValueError: The budget cannot hold them.

    >>> with_pages_of(QuestConfig(token_budget=64), 4).num_recent_pages
    2
    """
    pages = 1 + -(-(query_tokens - 1) // config.page_size)
    return replace(config, num_recent_pages=max(config.num_recent_pages, pages))


@dataclass(frozen=True, slots=True, eq=False)
class QueryTokens:
    """The last tokens of each sequence, whose queries are one step. T is how many a sequence has at most.

    What a `Step` checks is left to that of the folded queries.

    Attributes:
        query: `[B, T, HQ, D]`.
        lens: `[B]` int32/int64, how many of them each sequence has, the first ones of its row; None where all have T.
        kv: The cache, in which their keys and values are.
        seq_lens: As of a step, these tokens included; 0 of a row that only pads a batch [tokens].

    Raises:
        QuestValueError: A shape, dtype, device or number is wrong.
    """

    query: Tensor
    lens: Tensor | None
    kv: PagedKV
    seq_lens: Tensor | int

    def __post_init__(self) -> None:
        shape, kv = self.query.shape, self.kv
        check_one_table(kv)
        if shape[::3] != (kv.batch_size, kv.head_dim) or not 0 < shape[1] <= MOST_QUERY_TOKENS:
            expected = f"[{kv.batch_size}, T, HQ, {kv.head_dim}] with 1 to {MOST_QUERY_TOKENS} tokens T"
            raise QuestValueError("query.shape", list(shape), expected)
        if shape[2] == 0 or shape[2] % kv.num_kv_heads:
            raise QuestValueError("query.shape[2]", shape[2], f"a multiple of the {kv.num_kv_heads} KV heads")
        check_lengths("seq_lens", self.seq_lens, kv.batch_size, kv.max_pages * kv.page_size, kv.keys.device)
        least: Tensor | int = shape[1]
        if self.lens is not None:
            least = self._check_lens(self.lens)
        on_host = not isinstance(self.seq_lens, Tensor) or self.seq_lens.device.type == "cpu"
        if on_host and kv.batch_size:
            lengths = torch.as_tensor(self.seq_lens)
            if bool(torch.any((lengths < torch.as_tensor(least)) & (lengths > 0))):
                raise QuestValueError("seq_lens", int(lengths.min()), "at least the query tokens, or none at all")

    def _check_lens(self, lens: Tensor) -> Tensor | int:
        """How many tokens each sequence has at least; 0 where the host does not know."""
        batch, most = self.query.shape[:2]
        if not isinstance(lens, Tensor):
            raise QuestValueError("query_lens", lens, f"a tensor [{batch}] or None")
        if lens.shape != (batch,) or lens.dtype not in (torch.int32, torch.int64) or lens.device != self.query.device:
            got = f"{list(lens.shape)} {lens.dtype} on {lens.device}"
            raise QuestValueError("query_lens", got, f"[{batch}] int32 or int64 on {self.query.device}")
        if lens.device.type != "cpu":
            return 0
        if batch and not 1 <= int(lens.min()) <= int(lens.max()) <= most:
            raise QuestValueError("query_lens", lens.tolist(), f"1 to {most}: the query has no more tokens")
        return lens

    @property
    def count(self) -> int:
        """Tokens of a sequence at most: T."""
        return self.query.shape[1]

    def folded(self) -> Tensor:
        """The queries as heads of a single token, those of a KV head side by side: `[B, HKV * T * G, D]`.

        A token that a sequence does not have is its last one again: it changes no largest score.
        """
        query = self.query
        if self.lens is not None:
            nth = torch.arange(self.count, device=query.device)
            last = torch.minimum(nth, self.lens[:, None] - 1).clamp(min=0)  # [B, T]
            query = query.gather(1, last[:, :, None, None].expand_as(query))
        grouped = query.unflatten(2, (self.kv.num_kv_heads, -1))  # [B, T, HKV, G, D]
        folded: Tensor = grouped.transpose(1, 2).flatten(1, 3)
        return folded

    def folded_sinks(self, sinks: Tensor | None) -> Tensor | None:
        """Sinks `[HQ]` of the folded heads.

        Raises:
            QuestValueError: They are of other heads.
        """
        if sinks is None:
            return None
        check_like("sinks", sinks, self.query.shape[2:3], self.query, "the query", check_dtype=False)
        folded: Tensor = sinks.unflatten(0, (self.kv.num_kv_heads, -1))[:, None].expand(-1, self.count, -1).flatten()
        return folded

    def config(self, config: QuestConfig) -> QuestConfig:
        """The config that forces the pages of all of these tokens too.

        Raises:
            QuestValueError: The budget cannot hold them.
        """
        return with_pages_of(config, self.count)

    def attend(self, step: Step, selected: Selection, verbs: Verbs) -> Tensor:
        """Attention of each token: `[B, T, HQ, DV]`, zero for tokens that a sequence does not have.

        Args:
            step: Of the folded queries.
            selected: What they chose.
            verbs: Of the backend.
        """
        begin = self.seq_lens - (self.count if self.lens is None else self.lens)
        begin = begin.clamp(min=0) if isinstance(begin, Tensor) else max(0, begin)  # of rows that only pad
        before = replace(step, seq_lens=begin, workspace=None, out=None)
        grouped = self.attend_folded(step, before, selected, verbs).unflatten(1, (self.kv.num_kv_heads, self.count, -1))
        back: Tensor = grouped.transpose(1, 2).flatten(2, 3)  # [B, T, HQ, DV]
        return back

    def _missing(self) -> Tensor | None:
        """`[B, T]` or `[B, 1]` bool, which tokens sequences do not have; None where they have all."""
        missing = None
        if isinstance(self.seq_lens, Tensor):
            missing = self.seq_lens[:, None] == 0
        if self.lens is not None:
            behind = torch.arange(self.count, device=self.lens.device) >= self.lens[:, None]
            missing = behind if missing is None else missing | behind
        return missing

    def attend_folded(self, step: Step, before: Step, selected: Selection, verbs: Verbs) -> Tensor:
        """Attention of the folded queries: `[B, HKV * T * G, DV]`, zero for tokens that a sequence does not have.

        Args:
            step: Of the folded queries.
            before: The same over what lies before the tokens of the step.
            selected: What they chose.
            verbs: Of the backend.
        """
        output, lse = verbs.sparse_decode_attention(before, selected, return_lse=True)
        assert lse is not None, "as asked"
        own, own_lse = self._attend_own(step, before.seq_lens)
        total = torch.logaddexp(lse, own_lse)
        precise = own.dtype
        merged = output.to(precise) * (lse - total).exp()[..., None] + own * (own_lse - total).exp()[..., None]
        missing = self._missing()
        if missing is not None:
            of_tokens = merged.unflatten(1, (self.kv.num_kv_heads, self.count, -1))  # [B, HKV, T, G, DV]
            merged = of_tokens.masked_fill(missing[:, None, :, None, None], 0).flatten(1, 3)
        return merged.to(output.dtype)

    def _attend_own(self, step: Step, begin: Tensor | int) -> tuple[Tensor, Tensor]:
        """Of the folded queries over the tokens of the step, each to those up to its own, without sinks.

        Returns:
            `[B, HKV * T * G, DV]` in float32 or wider, and log-sum-exps `[B, HKV * T * G]`.
        """
        kv, count, query = self.kv, self.count, step.query
        nth = torch.arange(count, device=query.device)
        lens = torch.full_like(kv.page_table[:, 0], count) if self.lens is None else self.lens
        has = nth < lens[:, None]  # [B, T]
        first = begin if isinstance(begin, Tensor) else torch.full_like(lens, begin)
        position = (first[:, None] + torch.minimum(nth, lens[:, None] - 1)).long().clamp(min=0)
        units = position[:, None].expand(-1, kv.num_kv_heads, -1)
        # The page table of a row that only pads a batch may hold anything.
        is_unit = (self.seq_lens > 0)[:, None, None].expand_as(units) if isinstance(self.seq_lens, Tensor) else None
        precise = torch.promote_types(query.dtype, torch.float32)
        keys, values = (gather(kv, units, 1, is_unit).to(precise) for gather in (gather_keys, gather_values))
        grouped = query.to(precise).unflatten(1, (kv.num_kv_heads, -1))  # [B, HKV, T * G, D], keys [B, HKV, T, D]
        logits = grouped @ keys.transpose(2, 3) * step.scale
        if step.softcap is not None:
            logits = step.softcap * torch.tanh(logits / step.softcap)
        sees = has[:, None] & (nth <= nth[:, None])  # [B, T, T]
        sees = sees.repeat_interleave(grouped.shape[2] // count, 1)[:, None]  # [B, 1, T * G, T]
        logits = logits.masked_fill(~sees, -math.inf)
        lse = torch.logsumexp(logits, -1)
        return (torch.softmax(logits, -1) @ values).flatten(1, 2), lse.flatten(1, 2)

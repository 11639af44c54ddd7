"""`Emission`: tokens of rows that run ahead of each other, given out column by column as `generate()` does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Emission"]


class Emission:
    """Hands tokens to stopping criteria and a streamer, each column once, when every row that goes on has a token.

    So criteria see what they would see without drafts: the whole batch, longer by a token at each call. A row that runs
    ahead waits to be looked at; what it wrote past its end is dropped.

    Args:
        ids: `[B, T]` int64, the prompt.
        criteria: transformers' `StoppingCriteriaList`.
        streamer: What is given each column, or None.
        pad: Token that follows the end of a row; None where rows go on until all of them have ended.
        keeps: Which records to keep of every token: `"scores"`, `"logits"`.
        room: Places to have behind a row's tokens [tokens].

    Attributes:
        tokens: `[B, width]` int64, each row's tokens so far, drafts and anything else behind them.
        lengths: Tokens of each row, B of them, those of the prompt included [tokens].
        first: Columns of the prompt [tokens].
        length: Columns given out, those included [tokens].
        ends: Tokens of the rows that have ended while others go on, their end included, by row [tokens].
        most: Columns at most; None without a limit [tokens].
        records: What was kept, `[B, V]` for each column.
        has_ended: Whether every row has ended.
    """

    def __init__(
        self, ids: Tensor, criteria: Any, streamer: Any, pad: Tensor | None, *, keeps: tuple[str, ...], room: int
    ) -> None:
        batch, self.length = ids.shape
        self.first = self.length
        self._criteria = criteria
        self._streamer = streamer
        self._pad = pad
        self._room = room  # behind the tokens, for drafts
        self.most: int | None = criteria.max_length
        self.tokens = ids
        self.lengths = [self.length] * batch
        self._unfinished = torch.ones(batch, dtype=torch.long, device=ids.device)
        self._is_finished = [False] * batch
        self.ends: dict[int, int] = {}
        self.has_ended = False
        self._pending: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(batch)] for name in keeps}
        self.records: dict[str, tuple[Tensor, ...]] = dict.fromkeys(keeps, ())
        self.make_room()

    def make_room(self) -> None:
        """Let every row have room for the tokens of a check."""
        needed = max(self.lengths) + self._room
        batch, width = self.tokens.shape
        if width < needed:
            more = self.tokens.new_zeros(batch, max(needed, 2 * width) - width)
            self.tokens = torch.cat([self.tokens, more], dim=1)

    def room_of(self, row: int) -> int:
        """Tokens that a row may still write; 0 once it has ended [tokens]."""
        if self.has_ended or (self._pad is not None and self._is_finished[row]):
            return 0
        return self._room if self.most is None else max(0, self.most - self.lengths[row])

    def take(self, row: int, count: int, records: dict[str, Tensor]) -> None:
        """The next `count` tokens of a row are right, and what was recorded of each, `[T, V]`, T at least `count`."""
        self.lengths[row] += count
        for name, pending in self._pending.items():
            pending[row].extend(records[name][:count].clone().unbind(0))

    def emit(self) -> None:
        """Give out the columns of which all rows have a token."""
        batch = len(self.lengths)
        while not self.has_ended:
            going = [not (self._pad is not None and finished) for finished in self._is_finished]
            if self.length >= min(length for length, goes in zip(self.lengths, going, strict=True) if goes):
                return
            column = self.tokens[:, self.length]
            if self._pad is not None:
                column = column * self._unfinished + self._pad * (1 - self._unfinished)
                self.tokens[:, self.length] = column
            self.length += 1
            for row in range(batch):
                self.lengths[row] = max(self.lengths[row], self.length)
            for name, pending in self._pending.items():
                self.records[name] += (_stack(pending),)
            ended = self._criteria(self.tokens[:, : self.length].contiguous(), self.records.get("scores"))
            self._unfinished = self._unfinished & ~ended
            if self._streamer is not None:
                self._streamer.put(column.cpu())
            self._is_finished = [not left for left in self._unfinished.tolist()]
            self.has_ended = all(self._is_finished)
            for row, is_finished in enumerate(self._is_finished):
                if is_finished and self._pad is not None and row not in self.ends:
                    self.ends[row] = self.length
                    for pending in self._pending.values():
                        pending[row].clear()


def _stack(pending: list[list[Tensor]]) -> Tensor:
    """The next record of each row, `[B, V]`; zeros for rows that have ended."""
    like = next(row[0] for row in pending if row)  # the column is given out because a row goes on
    return torch.stack([row.pop(0) if row else torch.zeros_like(like) for row in pending])

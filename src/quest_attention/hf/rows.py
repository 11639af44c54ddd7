"""`RowLengths`: how many tokens each sequence of a cache has, while drafted tokens are taken back row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quest_attention.hf.reading import Reading
from quest_attention.hf.storage import KEPT_TOKENS

__all__ = ["RowLengths"]


class RowLengths:
    """What the layers of a lossless cache share: they read everything unless a token is drafted, and where rows end.

    A batch accepts different numbers of drafted tokens, so its rows are of different lengths from then on, and each
    pass writes the tokens of a row behind those of that row. Outside of a pass that `begin` opened, rows are alike and
    transformers' own lengths hold.

    Attributes:
        lengths: Tokens of each sequence before the pass, B of them [tokens]; None outside.
        is_drafting: Whether the tokens of the pass are drafts, and Quest may choose what it reads.
        drafts_since: Drafts since the one that is to choose for this one; 0 where the pass chooses itself [tokens].
        ends: Tokens of each sequence with those of the pass, `[B]` int32 on the device [tokens]; None where all are
            alike, which `lengths` then says.
        padding: `[B, T]` bool, False where the prompt has padding; None where nothing is padded.
    """

    def __init__(self) -> None:
        self.lengths: tuple[int, ...] | None = None
        self.is_drafting = False
        self.drafts_since = 0
        self.ends: Tensor | None = None
        self.padding: Tensor | None = None

    def begin(self, lengths: Sequence[int], ends: Tensor, *, is_drafting: bool, nth: int = 0) -> None:
        """The next pass takes rows from `lengths` to `ends`, the former for the host, the latter `[B]` [tokens].

        A draft, the `nth` of its round from 0 on, chooses what it reads or reads what one shortly before it chose.
        """
        self.lengths = tuple(lengths)
        self.is_drafting = is_drafting
        self.drafts_since = nth % (KEPT_TOKENS + 1) if is_drafting else 0
        self.ends = None if len(set(self.lengths)) == 1 else ends.to(torch.int32)

    def end(self) -> None:
        """No pass is open: rows are alike again, or soon will be."""
        self.lengths, self.ends, self.padding, self.is_drafting, self.drafts_since = None, None, None, False, 0

    def reading_of(self, new: int, length: int, token_budget: int, *, is_dense: bool = False) -> Reading:
        """As `Reading.of`, but whole unless tokens are drafted."""
        plain = Reading.of(new, length, token_budget, is_dense=is_dense)
        if self.is_drafting or plain is Reading.WITHIN_BUDGET:
            return plain
        if plain is Reading.SEVERAL_TOKENS and self.lengths is None:
            return plain  # a prompt
        return Reading.CHECK

"""`StepReporter`: what a cache layer says of its decode steps, to its counter and to those who asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from quest_attention.errors import QuestWarning
from quest_attention.hf.counters import LayerCounter
from quest_attention.ops import Selection

__all__ = ["OnRead", "OnSelect", "StepReporter"]

OnSelect = Callable[[int, Selection, int], None]
"""Called after each sparse decode step of a layer with its index, the selection and the number of pages it held."""
OnRead = Callable[..., None]
"""Called after it as `on_read(layer, selection, query, keys, **kwargs)`, for those who compare with what was not read:
`query` `[B, HQ, 1, D]`, `keys` `[B, HKV, T, D]` and what else the model gives to its attention."""


class StepReporter:
    """The part of a layer that counts its decode steps and tells which pages they read.

    Args:
        counter: Where steps are counted.
        on_select: Called after each sparse step.

    Attributes:
        on_read: Like `on_select`, with the query and the keys.
        was_attended: Whether Quest's attention function has seen the keys of the last decode step.
    """

    def __init__(self, counter: LayerCounter, on_select: OnSelect | None) -> None:
        self.counter = counter
        self.on_select = on_select
        self.on_read: OnRead | None = None
        self.was_attended = True

    @property
    def num_pages(self) -> int:
        """Pages that hold a token [pages]."""
        raise NotImplementedError

    @property
    def has_listeners(self) -> bool:
        """Whether somebody asked to be called at every sparse step."""
        return self.on_select is not None or self.on_read is not None

    def report(self, selected: Selection, query: Tensor, keys: Tensor, **kwargs: Any) -> None:
        """Tell those who asked which pages a sparse step read."""
        if self.on_select is not None:
            self.on_select(self.counter.layer, selected, self.num_pages)
        if self.on_read is not None:
            self.on_read(self.counter.layer, selected, query, keys, **kwargs)

    def _expect_attention(self, *, is_sparse: bool) -> None:
        """Warn when the keys of the step before were never handed to Quest's attention function.

        Args:
            is_sparse: Whether the function would have chosen pages.
        """
        if is_sparse and not self.was_attended:
            warnings.warn(
                "a QuestCache is in use but its keys do not reach Quest's attention, so every step reads all of it: "
                "call enable_quest(model) first",
                QuestWarning,
                stacklevel=3,
            )
        self.was_attended = False

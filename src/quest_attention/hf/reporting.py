"""`StepReporter`: what a cache layer says of its decode steps, to its counter and to those who asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from quest_attention.errors import QuestWarning
from quest_attention.hf.counters import LayerCounter
from quest_attention.hf.reading import Reading
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
        reading: What the attention of the pass reads whose tokens came last; None before the first.
        was_attended: Whether Quest's attention function has seen the keys of the last decode step.
        is_attended: Whether it has seen any of the layer's keys, or an enabled model was given the cache.
    """

    def __init__(self, counter: LayerCounter, on_select: OnSelect | None) -> None:
        self.counter = counter
        self.on_select = on_select
        self.on_read: OnRead | None = None
        self.reading: Reading | None = None
        self.was_attended = True
        self.is_attended = False

    @property
    def num_pages(self) -> int:
        """Pages that hold a token [pages]."""
        raise NotImplementedError

    @property
    def tokens_held(self) -> int:
        """Tokens of a sequence, in whole units of what is selected [tokens]."""
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

    def count_attention(self, batch: int) -> None:
        """The attention function sees the keys of a decode step of `batch` sequences. One that reads all is counted."""
        assert self.reading is not None and self.reading.is_step, "said when its token was written"
        self.was_attended = True
        if self.reading is not Reading.SPARSE:
            self.counter.count_dense(self.reading, batch * self.tokens_held)

    def _begin(self, reading: Reading, new: int) -> None:
        """Say what a pass of `new` tokens reads, and warn when attention never saw the keys of the step before."""
        self.reading = reading
        self.counter.count_update(reading, new)
        if not reading.is_step:
            return
        if reading is Reading.SPARSE and not self.was_attended:
            warnings.warn(
                "a QuestCache is in use but its keys do not reach Quest's attention, so every step reads all of it: "
                "call enable_quest(model) first",
                QuestWarning,
                stacklevel=3,
            )
        self.was_attended = False

"""`PageReads`: how much of each page Quest read, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from quest_attention.ops import Selection

__all__ = ["PageReads"]


class PageReads:
    """Collects the units of each sparse decode step of one sequence. `record` is an `on_select` of `enable_quest`.

    Where steps select single tokens, or runs of a few, a page is seldom read whole: its share is that of its tokens.

    Args:
        page_size: Of the cache [tokens].

    >>> import torch
    >>> reads = PageReads(page_size=16)
    >>> reads.record(2, Selection(torch.tensor([[[0, 3], [1, 3]]]), torch.tensor([[2, 2]]), 16), 4)
    >>> reads.shares([2])
    [0.5, 0.5, 0.0, 1.0]
    >>> reads.steps_reading(range(20, 24))
    1
    >>> tokens = PageReads(page_size=4)
    >>> tokens.record(2, Selection(torch.tensor([[[0, 4, 5, 6, 7]]]), torch.tensor([[5]]), 1), 2)
    >>> tokens.shares([2]), tokens.steps_reading(range(1, 4))
    ([0.25, 1.0], 0)
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._steps: list[tuple[int, Tensor]] = []  # of layers, with their units [HKV, K]
        self._unit_size = page_size
        self.num_pages = 0

    def record(self, layer: int, selected: Selection, num_pages: int) -> None:
        """Take one sparse step of one layer, of the first sequence of the batch."""
        # A copy: the units may lie in memory that the next step uses again.
        self._steps.append((layer, selected.units[0].clone()))
        self._unit_size = selected.unit_size
        self.num_pages = max(self.num_pages, num_pages)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._steps.clear()
        self.num_pages = 0

    @property
    def layers(self) -> list[int]:
        """Layers that took a sparse step."""
        return sorted({layer for layer, _ in self._steps})

    def shares(self, layers: Iterable[int]) -> list[float]:
        """How much of each page was read in these layers, 0 to 1, one per page: the mean over steps and KV heads.

        Of pages that are read whole that is how often a page was read. What the page being written has no token for
        yet counts as not read, where less than pages is selected.
        """
        per_page = self._page_size // self._unit_size
        counts = torch.zeros(self.num_pages, dtype=torch.int64)
        chances = 0
        wanted = set(layers)
        for layer, units in self._steps:
            if layer not in wanted:
                continue
            chances += units.shape[0]
            read = units[units >= 0].long().cpu()  # unused slots hold -1
            counts += torch.bincount(read // per_page, minlength=self.num_pages)
        shares: list[float] = (counts / max(1, chances * per_page)).tolist()
        return shares

    @property
    def num_steps(self) -> int:
        """Decode steps recorded [steps]."""
        return sum(layer == self._steps[0][0] for layer, _ in self._steps)

    def steps_reading(self, tokens: Collection[int]) -> int:
        """Decode steps in which some KV head of some layer read one of these tokens [steps]."""
        wanted = {token // self._unit_size for token in tokens}
        steps: list[bool] = []
        for layer, units in self._steps:
            if layer == self._steps[0][0]:  # the first sparse layer: a new step
                steps.append(False)
            steps[-1] = steps[-1] or not wanted.isdisjoint(units.flatten().tolist())
        return sum(steps)

    def to_dict(self) -> dict[str, Any]:
        """How much of each page was read, by layer, ready for JSON."""
        return {
            "num_pages": self.num_pages,
            "num_steps": self.num_steps,
            "unit_size": self._unit_size,
            "layers": {str(layer): self.shares([layer]) for layer in self.layers},
        }

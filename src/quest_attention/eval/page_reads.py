"""`PageReads`: which pages Quest read, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor

from quest_attention.ops import Selection

__all__ = ["PageReads"]


class PageReads:
    """Collects the pages of each sparse decode step of one sequence. `record` is an `on_select` of `enable_quest`.

    Where steps select less than pages, a page was read of which a token was.

    Args:
        page_size: Of the cache; None where steps select pages [tokens].

    >>> import torch
    >>> reads = PageReads()
    >>> reads.record(2, Selection(torch.tensor([[[0, 3], [1, 3]]]), torch.tensor([[2, 2]]), 16), 4)
    >>> reads.shares([2])
    [0.5, 0.5, 0.0, 1.0]
    """

    def __init__(self, page_size: int | None = None) -> None:
        self._page_size = page_size
        self._steps: list[tuple[int, Tensor]] = []  # of layers, with their pages [HKV, K]
        self.num_pages = 0

    def record(self, layer: int, selected: Selection, num_pages: int) -> None:
        """Take one sparse step of one layer, of the first sequence of the batch."""
        # A copy: the pages may lie in memory that the next step uses again.
        pages = selected.units[0].clone()
        per_page = 1 if self._page_size is None else self._page_size // selected.unit_size
        if per_page > 1:
            pages = pages.div_(per_page, rounding_mode="floor").sort(-1).values
            pages[:, 1:].masked_fill_(pages[:, 1:] == pages[:, :-1], -1)
        self._steps.append((layer, pages))
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
        """How often each page was read in these layers: share of (step, KV head) pairs, 0 to 1, one per page."""
        counts = [0] * self.num_pages
        chances = 0
        wanted = set(layers)
        for layer, pages in self._steps:
            if layer not in wanted:
                continue
            chances += pages.shape[0]
            for page in pages.flatten().tolist():
                if page >= 0:  # unused slots hold -1
                    counts[page] += 1
        return [count / max(1, chances) for count in counts]

    @property
    def num_steps(self) -> int:
        """Decode steps recorded [steps]."""
        return sum(layer == self._steps[0][0] for layer, _ in self._steps)

    def steps_reading(self, wanted: Collection[int]) -> int:
        """Decode steps in which some KV head of some layer read one of these pages [steps]."""
        steps: list[bool] = []
        for layer, pages in self._steps:
            if layer == self._steps[0][0]:  # the first sparse layer: a new step
                steps.append(False)
            steps[-1] = steps[-1] or any(page in wanted for page in pages.flatten().tolist())
        return sum(steps)

    def to_dict(self) -> dict[str, Any]:
        """The share of reads of each page, by layer, ready for JSON."""
        return {
            "num_pages": self.num_pages,
            "num_steps": self.num_steps,
            "layers": {str(layer): self.shares([layer]) for layer in self.layers},
        }

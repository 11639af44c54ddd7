"""`StepCounters`: what a worker's decode rows read, counted where it was read, under graph replay too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.ops import Selection, count_reads
from quest_attention.pages import num_pages

__all__ = ["StepCounters"]

_NAMES = ("sparse_rows", "dense_rows", "units_read", "units_held")
"""What the device counts, in the order of `count_reads`."""
_VERIFIED, _EAGER = "verified_rows", "eager_steps"


class StepCounters:
    """Decode rows of a worker and what they read, counted in the first layer that is not dense and true for all those.

    A row is one sequence in one engine step. What is read is counted per KV head, in whole units: pages, or fewer
    tokens, as the config selects them. Rows of a batch that ran Quest are counted by the device from the selection it
    read; by the host those of a batch that the engine's stock backend read whole, and rows that check speculated
    tokens. Steps that replay a graph run nothing on the host, so `eager_steps` does not count them.

    Args:
        config: The config of the server.
        device: Of the cache.
        label: Names the worker in the log.
        log_interval: Seconds between lines; 0 for none [s].
        log: Takes a line.
        publish: Takes what is new since the last line, by the names of `snapshot`; None where nobody asks.
    """

    def __init__(
        self, config: QuestConfig, device: torch.device, label: str, log_interval: float, log: Callable[[str], Any],
        publish: Callable[[dict[str, int]], Any] | None = None,
    ) -> None:  # fmt: skip
        self._config = config
        self._label, self._interval, self._log, self._publish = label, log_interval, log, publish
        self._device = device
        self._made: Tensor | None = None
        self._on_host = dict.fromkeys((*_NAMES, _VERIFIED, _EAGER), 0)
        self._next = 0.0
        self._planned = 0
        self._logged = dict(self._on_host)

    def _on_device(self) -> Tensor:
        """Made at its first use, when a step is planned: of what was made before, an engine may drop the contents."""
        if self._made is None:
            with torch.inference_mode(False):  # a step runs in it, and what asks for the numbers does not
                self._made = torch.zeros(len(_NAMES), dtype=torch.int64, device=self._device)
        return self._made

    def count_quest(self, selected: Selection, seq_lens: Tensor, token_budget: int | None = None) -> None:
        """Rows that ran Quest; on a GPU one small launch, which a graph can hold.

        Args:
            selected: Units that were read.
            seq_lens: `[R]`, 0 in rows that only pad [tokens].
            token_budget: Of these rows; None is that of the config [tokens].
        """
        budget = self._config.token_budget if token_budget is None else token_budget
        count_reads(selected, seq_lens, self._on_device(), token_budget=budget, backend=self._config.backend)

    def count_stock(self, lengths: Iterable[int]) -> None:
        """Decode rows that the stock backend read whole, by their lengths [tokens]."""
        self._count_whole("dense_rows", lengths)

    def count_step(self) -> None:
        """A step with decode rows, whoever runs them; where a graph is captured it is none."""
        if not (self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._on_host[_EAGER] += 1

    def count_verified(self, lengths: Iterable[int]) -> None:
        """Rows of several tokens, speculated ones, which the stock backend read whole, by their lengths [tokens]."""
        lengths = list(lengths)
        self._count_whole(_VERIFIED, lengths)
        self._planned += len(lengths)  # a line is due of them too, where no row decodes

    def _count_whole(self, kind: str, lengths: Iterable[int]) -> None:
        units = [num_pages(length, self._config.unit_size) for length in lengths if length]
        for name, number in ((kind, len(units)), ("units_read", sum(units)), ("units_held", sum(units))):
            self._on_host[name] += number

    def reset(self) -> None:
        """Forget everything."""
        self._on_device().zero_()
        self._on_host = dict.fromkeys(self._on_host, 0)
        self._logged = dict(self._on_host)

    def snapshot(self) -> dict[str, int]:
        """Everything counted so far. Waits for the device.

        Returns:
            `sparse_rows`, `dense_rows`, `verified_rows`, `tokens_read`, `tokens_held`, both in whole units, and
            `eager_steps`; before the tokens `pages_read` and `pages_held`, where pages are selected.
        """
        return self._named(self._counted())

    def _named(self, counted: dict[str, int]) -> dict[str, int]:
        """See `snapshot`."""
        read, held = counted["units_read"], counted["units_held"]
        pages = {"pages_read": read, "pages_held": held} if self._config.selection_unit == "page" else {}
        size = self._config.unit_size
        tokens = {"tokens_read": read * size, "tokens_held": held * size}
        rows = {name: counted[name] for name in ("sparse_rows", "dense_rows", _VERIFIED)}
        return {**rows, **pages, **tokens, _EAGER: counted[_EAGER]}

    def _counted(self) -> dict[str, int]:
        """By host and device together."""
        counted = dict(zip(_NAMES, self._on_device().tolist(), strict=True))
        return {name: number + counted.get(name, 0) for name, number in self._on_host.items()}

    def plan(self, rows: int) -> None:
        """A step of so many decode rows is about to run. Says what earlier ones read, where a line is due."""
        self._on_device()  # a graph that is captured must find it
        now = time.monotonic()
        if self._interval and self._planned and now >= self._next:
            self._planned = 0
            self._next = now + self._interval
            self._write_line()
        self._planned += rows

    def _write_line(self) -> None:
        """What was read since the last line. Waits for the device, so seldom."""
        counted = self._counted()
        new = {name: number - self._logged[name] for name, number in counted.items()}
        self._logged = counted
        if self._publish is not None:
            self._publish(self._named(new))
        rows = new["sparse_rows"] + new["dense_rows"]
        what, size = ("pages", 1) if self._config.selection_unit == "page" else ("tokens", self._config.unit_size)
        read, held = new["units_read"] * size, new["units_held"] * size
        verified = f" and {new[_VERIFIED]} rows of speculated tokens" if new[_VERIFIED] else ""
        self._log(
            f"Quest, {self._label}: {new['sparse_rows']} of {rows} decode rows sparse{verified}, "
            f"{read} of {held} {what} read ({100 * read / max(1, held):.1f} %); "
            f"since the start {counted['sparse_rows']} rows sparse, {counted['dense_rows']} dense"
        )

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

_UNITS = ("units_read", "units_held")
_SPARSE_CHECKS, _CHECKS, _EAGER = "verified_sparse_rows", "verified_rows", "eager_steps"
_NAMES = (("sparse_rows", "dense_rows", *_UNITS), (_SPARSE_CHECKS, _CHECKS, *_UNITS))
"""What the device counts, in the order of `count_reads`: of rows of one token, and of those that check tokens."""
_ROWS = ("sparse_rows", "dense_rows", _CHECKS, _SPARSE_CHECKS)


class StepCounters:
    """Decode rows of a worker and what they read, counted in the first layer that is not dense and true for all those.

    A row is one sequence in one engine step. One of several tokens checks speculated ones and is no decode row; it is
    counted apart. What is read is counted per KV head, in whole units: pages, or fewer tokens, as the config selects
    them. Rows of a batch that ran Quest are counted by the device from the selection it read; by the host those that
    the engine's stock backend read whole. Steps that replay a graph run nothing on the host, so `eager_steps` does not
    count them.

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
        self._on_host = dict.fromkeys((*_ROWS, *_UNITS, _EAGER), 0)
        self._next = 0.0
        self._planned = 0
        self._logged = dict(self._on_host)

    def _on_device(self) -> Tensor:
        """Made at its first use, when a step is planned: of what was made before, an engine may drop the contents."""
        if self._made is None:
            with torch.inference_mode(False):  # a step runs in it, and what asks for the numbers does not
                self._made = torch.zeros(len(_NAMES), len(_NAMES[0]), dtype=torch.int64, device=self._device)
        return self._made

    def count_quest(
        self, selected: Selection, seq_lens: Tensor, token_budget: int | None = None, query_tokens: int = 1,
        is_single: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Rows that ran Quest; on a GPU one small launch, which a graph can hold, or a few where rows differ.

        Args:
            selected: Units that were read.
            seq_lens: `[R]`, 0 in rows that only pad [tokens].
            token_budget: Of these rows; None is that of the config [tokens].
            query_tokens: Of a row at most [tokens].
            is_single: `[R]` bool, where rows differ, which have one token.
        """
        budget = self._config.token_budget if token_budget is None else token_budget
        decoding, checking = self._on_device()
        kinds = [(decoding if query_tokens == 1 else checking, selected, seq_lens)]
        if is_single is not None:  # a row of no tokens that reads nothing counts nowhere
            kinds = [
                (counters, selected._replace(counts=selected.counts * mask[:, None]), seq_lens * mask)
                for counters, mask in ((decoding, is_single), (checking, ~is_single))
            ]
        for counters, read, lengths in kinds:
            count_reads(read, lengths, counters, token_budget=budget, backend=self._config.backend)

    def count_stock(self, lengths: Iterable[int]) -> None:
        """Decode rows that the stock backend read whole, by their lengths [tokens]."""
        self._count_whole("dense_rows", lengths)

    def count_step(self) -> None:
        """A step with decode rows, whoever runs them; where a graph is captured it is none."""
        if not (self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._on_host[_EAGER] += 1

    def count_verified(self, lengths: Iterable[int]) -> None:
        """Rows that check speculated tokens and that the stock backend read whole, by their lengths [tokens]."""
        lengths = list(lengths)
        self._count_whole(_CHECKS, lengths)
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
            `sparse_rows` and `dense_rows`, which chose and which read everything; of rows that check speculated tokens
            `verified_sparse_rows` and `verified_rows` in the same way; `tokens_read`, `tokens_held`, both in whole
            units, and `eager_steps`; before the tokens `pages_read` and `pages_held`, where pages are selected.
        """
        return self._named(self._counted())

    def _named(self, counted: dict[str, int]) -> dict[str, int]:
        """See `snapshot`."""
        read, held = counted["units_read"], counted["units_held"]
        pages = {"pages_read": read, "pages_held": held} if self._config.selection_unit == "page" else {}
        size = self._config.unit_size
        tokens = {"tokens_read": read * size, "tokens_held": held * size}
        rows = {name: counted[name] for name in _ROWS}
        return {**rows, **pages, **tokens, _EAGER: counted[_EAGER]}

    def _counted(self) -> dict[str, int]:
        """By host and device together."""
        counted = dict(self._on_host)
        for names, numbers in zip(_NAMES, self._on_device().tolist(), strict=True):
            for name, number in zip(names, numbers, strict=True):
                counted[name] += number
        return counted

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
        checks = new[_SPARSE_CHECKS] + new[_CHECKS]
        verified = f" and {new[_SPARSE_CHECKS]} of {checks} rows of speculated tokens" if checks else ""
        self._log(
            f"Quest, {self._label}: {new['sparse_rows']} of {rows} decode rows sparse{verified}, "
            f"{read} of {held} {what} read ({100 * read / max(1, held):.1f} %); "
            f"since the start {counted['sparse_rows']} rows sparse, {counted['dense_rows']} dense"
        )

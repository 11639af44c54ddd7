"""`RowPlanner`: which decode rows of a batch run Quest, and `read_lengths`: how many tokens they read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.forms import form_of
from quest_attention.ops import resolve_backend
from quest_attention.pages import num_pages
from quest_attention.serving.counters import StepCounters
from quest_attention.serving.options import advice_on_budget

__all__ = ["DECODE_TOKENS", "RowPlanner", "read_lengths"]

DECODE_TOKENS = 1
"""Tokens of a decode row, which alone may choose unless a server asks that rows that check speculated tokens do too."""


class RowPlanner:
    """Whether the decode rows of a worker's next step run Quest. When made, it logs what the worker will read.

    Args:
        config: Of the server, with the engine's page size.
        device: Of the cache.
        label: Names the worker in the log.
        sparse_layers: Names of the layers that choose what they read, in the order of the model.
        num_layers: Full-attention layers that are planned for, dense ones included.
        num_elsewhere: Layers of the worker that choose and have a planner of their own: where this one has none, it
            leaves it to them to log something.
        max_length: Of the longest sequence [tokens].
        log_interval: Seconds between lines of counters; 0 for none [s].
        logger: Of the engine.
        publish: See `StepCounters`.

    Attributes:
        counters: Of this worker, or None where no layer is sparse or the budget covers the longest sequence.
        counted_layer: Name of the layer that counts for all, where there are counters.
        is_capturing: Whether a graph is being captured.

    Raises:
        BackendError: The verbs cannot run on this device as asked.
    """

    counters: StepCounters | None = None
    counted_layer: str

    def __init__(
        self, config: QuestConfig, device: torch.device, label: str, sparse_layers: Sequence[str], num_layers: int,
        max_length: int, log_interval: float, logger: logging.Logger, num_elsewhere: int = 0,
        publish: Callable[[dict[str, int]], Any] | None = None,
    ) -> None:  # fmt: skip
        self.is_capturing = self._has_captured = False
        self._budget = budget = config.token_budget
        if num_elsewhere and not sparse_layers:
            return
        if not sparse_layers or budget >= max_length:
            found = f"{budget} of {max_length} positions, {config.num_dense_layers} dense layers of {num_layers}"
            logger.warning("Quest reads everything: token_budget %s.", found)
            return
        self.counted_layer = sparse_layers[0]
        self.counters = StepCounters(config, device, label, log_interval, logger.info, publish)
        read = f"{config.unit_budget * config.unit_size} of up to {max_length} tokens"
        if config.selection_unit == "page":
            most = num_pages(max_length, config.page_size)
            read = f"{config.page_budget} of up to {most} pages of {config.page_size} tokens"
        read += f" in {len(sparse_layers)} of {num_layers} layers"
        read += f", chosen by {form_of(config)}"
        if tokens := min(config.candidate_tokens, max_length):
            read += f" and the keys of {tokens} candidates"
        elif config.units_per_page > 1:
            read += ", estimates alone"
        read += "" if config.auto_device is None else f', which metadata "auto" is on {config.auto_device}'
        chosen = resolve_backend(config.backend, device)
        backend = f"backend {chosen.name}, {chosen.reason}"
        logger.info("Quest, %s: decode rows past %d tokens read %s; %s.", label, budget, read, backend)
        if advice := advice_on_budget(config, max_length):
            logger.warning("Quest: %s.", advice)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """While a graph is captured. What an engine runs for that is not counted."""
        self.is_capturing = self._has_captured = True
        try:
            yield
        finally:
            self.is_capturing = False

    def runs_quest(self, lengths: Sequence[int], budgets: Sequence[int | None] | None = None) -> bool:
        """Whether the decode rows of the step that begins run Quest: all of them as soon as one is past its budget.

        In a graph they always do: its lengths will be the device's. Called once a step, for the counters' sake.

        Args:
            lengths: Of the decode rows, never too short [tokens].
            budgets: Of each row, where one has a budget of its own: None for one that is read whole [tokens].
        """
        if self.counters is None:
            return False
        if self.is_capturing:
            return True
        if self._has_captured:
            self.counters.reset()
            self._has_captured = False
        self.counters.plan(len(lengths))
        if budgets is None:
            return max(lengths, default=0) > self._budget
        return any(budget is not None and length > budget for length, budget in zip(lengths, budgets, strict=True))


def read_lengths(seq_lens: Tensor, config: QuestConfig) -> Tensor:
    """Tokens that each row reads where pages are selected, `[R]` [tokens]: of these the last is the part-filled one.

    >>> read_lengths(torch.tensor([5, 32, 37, 48]), QuestConfig(token_budget=32)).tolist()
    [5, 32, 21, 32]
    """
    partial = (config.page_budget - 1) * config.page_size + (seq_lens - 1) % config.page_size + 1
    return torch.where(seq_lens > config.token_budget, partial, seq_lens)

"""`Prefixes`: logits processors, each called with the tokens that come before the logits it changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from quest_attention.errors import QuestValueError

__all__ = ["Prefixes"]

_BLIND = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
        "EpsilonLogitsWarper", "EtaLogitsWarper", "LogitNormalization", "InfNanRemoveLogitsProcessor",
        "SuppressTokensLogitsProcessor",
    )
)  # fmt: skip
"""Those of transformers that look at the logits alone: all places of a check at once."""
_STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")
"""Those that expect each token once and in order: drafts would be in their states."""


class Prefixes:
    """Calls logits processors for places behind each row's own number of tokens.

    A processor gets the whole batch, as without drafts: some look at a row's number. Of a row that is shorter or longer
    than the others it gets as many tokens, and what it says of that row is left out.

    Args:
        processors: From `generate()`.

    Raises:
        QuestValueError: One keeps a state from token to token.
    """

    def __init__(self, processors: LogitsProcessorList) -> None:
        for processor in processors:
            if type(processor).__name__ in _STATEFUL:
                expected = "processors of tokens and logits alone with lossless=True: drafts would be in its state"
                raise QuestValueError("logits_processor", type(processor).__name__, expected)
        self._processors = processors
        self._is_blind = all(type(processor) in _BLIND for processor in processors)

    def process(self, tokens: Tensor, logits: Tensor, lengths: Sequence[int | None]) -> Tensor:
        """Scores of the tokens at several places of each row.

        Args:
            tokens: `[B, width]` int64; each row's own come first, drafts behind them.
            logits: `[B, T, V]` float32, of the T places that follow a row's first tokens.
            lengths: Tokens before the first of them, B of them [tokens]; None for rows of which nobody asks.

        Returns:
            `[B, T, V]`.
        """
        if not self._processors:
            return logits
        batch, count, _ = logits.shape
        if self._is_blind:
            flat = logits.flatten(0, 1)
            return self._call(tokens[:, :1].repeat_interleave(count, 0), flat).view_as(logits)
        places: dict[int, list[tuple[int, int]]] = {}  # by tokens before: which rows, and which place of each
        for row, length in enumerate(lengths):
            if length is None:
                continue
            for place in range(count):
                places.setdefault(length + place, []).append((row, place))
        scores = logits.clone()
        for before, asked in sorted(places.items()):
            of_row = [0] * batch
            for row, place in asked:
                of_row[row] = place
            rows = torch.arange(batch, device=logits.device)
            given = logits[rows, torch.tensor(of_row, device=logits.device)]
            made = self._call(tokens[:, :before], given)
            if len(asked) == batch and len(set(of_row)) == 1:
                scores[:, of_row[0]] = made
                continue
            for row, place in asked:
                scores[row, place] = made[row]
        return scores

    def _call(self, tokens: Tensor, logits: Tensor) -> Tensor:
        process: Any = self._processors  # annotated with classes of tensors that nobody makes
        scores: Tensor = process(tokens, logits.clone())
        return scores

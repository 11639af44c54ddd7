"""Recall: how much of the true attention the selected pages or tokens hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quest_attention.errors import QuestStateError, QuestValueError
from quest_attention.eval.context import Context
from quest_attention.eval.methods import Method
from quest_attention.eval.observation import attention_weights
from quest_attention.hf import cache_argument
from quest_attention.ops import Selection

__all__ = ["TOP_TOKENS", "Recall", "measure_recall"]

TOP_TOKENS = 10
"""Tokens with the largest weights that are looked for, as in Figure 4 of the Quest paper [tokens]."""


@dataclass(frozen=True)
class Recall:
    """Means over decode steps, and over the query heads of a group.

    Attributes:
        layers: Layers that took sparse steps.
        mass: Share of the attention mass on selected pages, 0 to 1, for each layer and KV head.
        top: Share of the tokens with the largest weights, likewise.
        steps: Decode steps they are means of [steps].
    """

    layers: list[int]
    mass: list[list[float]]
    top: list[list[float]]
    steps: int


class _Sums:
    """Sums over the steps of each layer.

    Args:
        unit: Tokens of what a selection's numbers stand for: of a page, or one [tokens].
    """

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self.mass: dict[int, Tensor] = {}
        self.top: dict[int, Tensor] = {}
        self.steps: dict[int, int] = {}

    def add(self, layer: int, selected: Selection, query: Tensor, keys: Tensor, **kwargs: Any) -> None:
        """An `on_read` of a layer."""
        weights = attention_weights(query, keys, **kwargs)[:, :, :, 0]  # [B, HKV, G, T]
        unit = torch.arange(keys.shape[2], device=keys.device) // self._unit  # of each token
        units = selected.units.long()
        is_read = torch.zeros(*units.shape[:2], int(unit[-1]) + 2, dtype=torch.bool, device=keys.device)
        is_read.scatter_(2, units.masked_fill(units < 0, is_read.shape[2] - 1), value=True)  # unused slots hold -1
        read = is_read[:, :, unit][:, :, None].expand_as(weights)
        top = weights.topk(TOP_TOKENS, -1).indices
        mass = (weights * read).sum(-1).mean(2)  # [B, HKV]
        hits = read.gather(-1, top).float().mean((2, 3))
        self.mass[layer] = self.mass.get(layer, torch.zeros_like(mass)) + mass
        self.top[layer] = self.top.get(layer, torch.zeros_like(hits)) + hits
        self.steps[layer] = self.steps.get(layer, 0) + 1


def measure_recall(model: PreTrainedModel, method: Method, context: Context, following: Tensor) -> list[Recall]:
    """Decode the tokens that follow a context, and compare what each step read with what full attention would weigh.

    Args:
        model: In evaluation mode.
        method: Quest or an oracle; the true weights are those of the queries that it makes.
        context: From `read_context`, of `B` sequences longer than the budget.
        following: `[B, t]` int64, fed one by one.

    Returns:
        What was found, for each sequence.

    Raises:
        QuestValueError: The method selects neither pages nor tokens.
        QuestStateError: It took no sparse step.
    """
    if method.unit is None:
        raise QuestValueError("method", method.name, "quest or an oracle: recall is of what a step selects")
    sums = _Sums(method.unit)
    length = context.cache.get_seq_length() + following.shape[1]
    with torch.inference_mode(), method.session(model, length) as session:
        for layer in session.cache.layers:
            if hasattr(layer, "on_read"):
                layer.on_read = sums.add
        session.load(context)
        for index in range(following.shape[1]):
            model(following[:, index : index + 1].to(model.device), **cache_argument(session.cache), use_cache=True)
    layers = sorted(sums.steps)
    if not layers:
        raise QuestStateError(f"{method.name} took no sparse step: the context is within the budget")
    mass, top = (
        torch.stack([each[layer] / sums.steps[layer] for layer in layers], 1).tolist() for each in (sums.mass, sums.top)
    )  # of each sequence, layer and KV head
    return [Recall(layers, *found, sums.steps[layers[0]]) for found in zip(mass, top, strict=True)]

"""Random weights with which a model attends as one does: to some tokens more than to others."""

from __future__ import annotations

from torch import nn

__all__ = ["spread_weights"]

_DUMMY_DEVIATION = 1e-3 / 3**0.5
"""Of vLLM's dummy weights, which lie evenly between -1e-3 and 1e-3."""
_DEVIATION = 0.02
"""Of a Llama's weights before it is trained: `initializer_range` in transformers."""


def spread_weights(model: nn.Module) -> None:
    """Give vLLM's dummy weights the spread of a model before it is trained, and norms 1, in place.

    vLLM's own are so small that every token weighs the same: then no choice among them is one. What is quantized keeps
    its numbers and gets another scale.
    """
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.data.fill_(1)
        elif name.endswith("weight_scale") or (weight.dim() > 1 and weight.element_size() > 1):
            weight.data.mul_(_DEVIATION / _DUMMY_DEVIATION)

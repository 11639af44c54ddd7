"""What transformers calls the cache."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin

__all__ = ["CACHE", "CACHE_NAMES", "cache_argument"]

CACHE_NAMES = ("cache", "past_key_values")
"""Since transformers 5.24, which still takes the older name but warns, and before."""
CACHE = CACHE_NAMES["cache" not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters]
"""The name in the installed release: of an argument of models and `generate()`, and of what their outputs hold."""


def cache_argument(cache: Any) -> dict[str, Any]:
    """The cache as an argument: `model(ids, **cache_argument(cache))` in every supported transformers."""
    return {CACHE: cache}

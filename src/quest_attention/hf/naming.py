"""What transformers calls the cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import GenerationMixin
from transformers.cache_utils import Cache

from quest_attention.errors import QuestValueError

__all__ = ["CACHE", "CACHE_NAMES", "cache_argument", "given_cache"]

_OLDER, _NEWER = "past_key_values", "cache"
CACHE_NAMES = (
    (_NEWER, _OLDER)
    if _NEWER in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else (_OLDER,)
)
"""What the installed release takes: since 5.24 the newer name, and the older one with a warning."""
CACHE = CACHE_NAMES[0]
"""The name of an argument of models and `generate()`, and of what their outputs hold."""


def cache_argument(cache: Cache) -> dict[str, Any]:
    """The cache as an argument of a model or of `generate()`, by the name that the installed transformers has for it.

    A model takes any name, and leaves a cache by the wrong one unused without a word.

    Args:
        cache: A `QuestCache`, or another of transformers' caches.

    Raises:
        QuestValueError: It is no cache.

    >>> from transformers.cache_utils import DynamicCache
    >>> list(cache_argument(DynamicCache())) == [CACHE]  # so: model(ids, **cache_argument(cache))
    True
    """
    if not isinstance(cache, Cache):
        raise QuestValueError("cache", type(cache).__name__, "a Cache of transformers")
    return {CACHE: cache}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward pass, or None; the first name given counts, as in transformers.

    >>> given_cache({"input_ids": 1, CACHE: 2})
    2
    """
    return next((arguments[name] for name in CACHE_NAMES if name in arguments), None)

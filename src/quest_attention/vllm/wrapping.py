"""`wrap_method`: put a method of ours around one of vLLM's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["wrap_method"]

_WRAPPED = "quest_attention_wrapped"


def wrap_method(owner: Any, name: str, around: Callable[[Any], Any]) -> None:
    """Put a method in another's place, once.

    Args:
        owner: The class.
        name: Of the method.
        around: Makes the new one from the old.
    """
    original = getattr(owner, name)
    if not getattr(original, _WRAPPED, False):
        made = around(original)
        setattr(made, _WRAPPED, True)
        setattr(owner, name, made)

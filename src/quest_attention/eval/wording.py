"""Numbers with their nouns, for messages and pages."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "page"), counted(8192, "token")
    ('1 page', '8,192 tokens')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

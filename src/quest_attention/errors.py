"""Every error this package raises on purpose, in one tree.

QuestError
├── QuestValueError        a wrong argument: which one, what it was, what it should be (also a ValueError)
├── BackendError           a backend asked for by name cannot run here (also a RuntimeError)
├── UnsupportedModelError  a model, cache or generation mode that Quest cannot serve (also a TypeError)
└── QuestStateError        a call at the wrong time, such as enabling Quest twice (also a RuntimeError)

QuestWarning               Quest runs, but less of it than the caller may think (a UserWarning)
"""

from __future__ import annotations

__all__ = ["BackendError", "QuestError", "QuestStateError", "QuestValueError", "QuestWarning", "UnsupportedModelError"]


class QuestError(Exception):
    """Base of every error raised on purpose by this package."""


class QuestValueError(QuestError, ValueError):
    """A wrong argument.

    Args:
        argument: Name of the argument, as the caller spells it.
        got: What was passed (its value, shape or dtype).
        expected: What would have been accepted, as a phrase.

    >>> raise QuestValueError("page_size", 0, "a positive integer")
    Traceback (most recent call last):
    quest_attention.errors.QuestValueError: page_size: got 0, expected a positive integer
    """

    def __init__(self, argument: str, got: object, expected: str) -> None:
        self.argument = argument
        self.got = got
        self.expected = expected
        super().__init__(f"{argument}: got {got!r}, expected {expected}")

    def __reduce__(self) -> tuple[type[QuestValueError], tuple[str, object, str]]:
        # Exceptions pickle their `args`; ours is one message, the constructor takes three.
        return type(self), (self.argument, self.got, self.expected)


class BackendError(QuestError, RuntimeError):
    """A backend asked for by name cannot run here. Nothing else is tried in its place."""


class UnsupportedModelError(QuestError, TypeError):
    """A model, cache or generation mode that Quest cannot serve. The message says why and what to do."""


class QuestStateError(QuestError, RuntimeError):
    """A call at the wrong time, such as enabling Quest on a model where it is enabled."""


class QuestWarning(UserWarning):
    """Quest is enabled but some layers will read their whole cache; the message says which and why."""

"""Numbers with their nouns, for messages and pages."""

from __future__ import annotations

from quest_attention.config import QuestConfig

__all__ = ["chosen_by", "counted"]


def counted(number: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "page"), counted(8192, "token")
    ('1 page', '8,192 tokens')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def chosen_by(config: QuestConfig) -> str:
    """What a config with a form chooses by, and that nobody named it, where nobody did.

    >>> chosen_by(QuestConfig.paper()), chosen_by(QuestConfig(metadata="auto").resolved("cpu"))
    ('bounds', 'moments (auto on cpu)')
    """
    device = config.auto_device
    return config.metadata if device is None else f"{config.metadata} (auto on {device})"

"""`config_asked`: how a request that asks for a budget of its own is read."""

from __future__ import annotations

from typing import Any

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestValueError
from quest_attention.ops.query_tokens import with_pages_of
from quest_attention.serving.options import QuestOptions

__all__ = ["ASKED", "EVERYTHING", "config_asked"]

ASKED = "quest_token_budget"
"""Under what name a request asks."""
EVERYTHING = "none"
"""What it says to be read whole."""


def config_asked(asked: Any, options: QuestOptions, page_size: int, max_length: int) -> QuestConfig | None:
    """How the rows of a request are read, or None where it asks that they are read whole.

    All but the budget is the server's. No more candidates are ranked than by the server's own budget: a step's scratch
    memory is made for those.

    Args:
        asked: What the request says under `ASKED`: `EVERYTHING`, or a budget of at most the server's [tokens].
        options: Of the server.
        page_size: Of the engine [tokens].
        max_length: Of the longest sequence [tokens].

    Raises:
        QuestValueError: It says something else, or less than the pages that are always read; or the server reads
            everything.

    >>> config_asked(256, QuestOptions({"token_budget": 1024}, device="cuda"), 16, 8192).token_budget
    256
    >>> config_asked(2048, QuestOptions({"token_budget": 1024}, device="cuda"), 16, 8192)
    Traceback (most recent call last):
    quest_attention.errors.QuestValueError: quest_token_budget: got 2048, expected 'none' or 32 to 1024 tokens
    """
    if isinstance(asked, str) and asked == EVERYTHING:
        return None
    server = options.config(page_size)
    most = server.token_budget
    if most >= max_length:
        raise QuestValueError(ASKED, asked, f"{EVERYTHING!r}: this server reads everything")
    recent = with_pages_of(server, options.query_tokens).num_recent_pages
    least = (server.num_sink_pages + max(1, recent)) * page_size
    if type(asked) is not int or not least <= asked <= most:
        least_to_most = f"{least} tokens" if least == most else f"{least} to {most} tokens"
        raise QuestValueError(ASKED, asked, f"{EVERYTHING!r} or {least_to_most}")
    config = options.config(page_size, token_budget=asked)
    if config.candidate_budget > server.candidate_budget:  # what a small budget wants, but no more work than others
        least = 1 if server.candidate_factor else 0
        factor = max(least, server.candidate_budget // config.unit_budget)
        config = options.config(page_size, token_budget=asked, candidate_factor=factor)
    return config

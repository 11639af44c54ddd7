"""`QuestOptions`: what stands under "quest" in vLLM's `--additional-config`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

from quest_attention.config import Backend, QuestConfig
from quest_attention.errors import QuestValueError

__all__ = ["KEY", "QuestOptions", "advice_on_budget", "read_options"]

KEY = "quest"
"""Where the options stand in `--additional-config`."""
_LOG_INTERVAL = 10.0
"""Seconds between lines of counters in the log, as between vLLM's own [s]."""
_MOST_TIMES = 16
"""Budgets into which the longest sequence may go before the log warns: with fewer tokens the small public models that
docs/results.md measures lost facts."""
_PAGE_SIZE = "page_size"
_OF_SERVING = ("log_interval",)
_OURS_ALONE = tuple(one.name for one in fields(QuestConfig) if one.name not in ("backend", _PAGE_SIZE))
"""Options that nobody else has: beside "quest" they would be without effect."""


@dataclass(frozen=True)
class QuestOptions:
    """How a server reads its KV cache. Validated when made, but for what depends on vLLM's block size.

    Args:
        reading: Options of `QuestConfig`, all but the page size, which is vLLM's block size.
        log_interval: Seconds between lines of counters in a worker's log; 0 for none [s].

    Raises:
        QuestValueError: A value is out of range.
    """

    reading: Mapping[str, Any] = field(default_factory=dict)
    log_interval: float = _LOG_INTERVAL

    def __post_init__(self) -> None:
        number: object = self.log_interval
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number < float("inf"):
            raise QuestValueError(f"{KEY}.log_interval", number, "seconds, 0 for no such lines")
        self.config(1)  # checks everything but whether the budget holds blocks of the real size

    @property
    def num_dense_layers(self) -> int:
        """Leading full-attention layers that read everything [layers]."""
        return int(self.reading.get("num_dense_layers", QuestConfig().num_dense_layers))

    @property
    def backend(self) -> Backend:
        """Which implementation of the verbs runs."""
        return cast("Backend", self.reading.get("backend", "auto"))

    @property
    def is_narrow(self) -> bool:
        """Whether the bounds have 8 bits."""
        return bool(self.reading.get("metadata_dtype", "kv") != "kv")

    def config(self, block_size: int) -> QuestConfig:
        """The config for pages of vLLM's block size [tokens].

        Raises:
            QuestValueError: The budget cannot hold the forced pages, or a value is wrong.
        """
        try:
            return QuestConfig.from_dict({**self.reading, _PAGE_SIZE: block_size})
        except QuestValueError as error:
            block = " (a page is a block of vLLM: --block-size)" if "forced page" in error.expected else ""
            raise QuestValueError(f"{KEY}.{error.argument}", error.got, error.expected + block) from None

    @classmethod
    def from_mapping(cls, given: object) -> QuestOptions:
        """Read options as they come from JSON.

        Raises:
            QuestValueError: Something is unknown or wrong.

        >>> QuestOptions.from_mapping({"token_budget": 1024}).config(16).page_budget
        64
        >>> QuestOptions.from_mapping({"token_buget": 1024})
        Traceback (most recent call last):
        quest_attention.errors.QuestValueError: quest.token_buget: got 1024, expected a known option: did you mean token_budget?
        """  # noqa: E501 (a message)
        if not isinstance(given, Mapping):
            raise QuestValueError(KEY, given, 'an object such as {"token_budget": 2048}')
        known = [one.name for one in fields(QuestConfig) if one.name != _PAGE_SIZE] + list(_OF_SERVING)
        for name, value in given.items():
            if name == _PAGE_SIZE:
                raise QuestValueError(f"{KEY}.{name}", value, "nothing: a page is vLLM's block, set by --block-size")
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
                raise QuestValueError(f"{KEY}.{name}", value, f"a known option: {hint}")
        reading = {name: value for name, value in given.items() if name not in _OF_SERVING}
        return cls(reading, **{name: given[name] for name in _OF_SERVING if name in given})


def read_options(vllm_config: Any) -> QuestOptions | None:
    """The options of a server, or None where it does not ask for Quest.

    Args:
        vllm_config: A `VllmConfig`.

    Raises:
        QuestValueError: Something under "quest" is unknown or wrong, "quest" is spelt otherwise, or an option of Quest
            stands beside it.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, Mapping):
        return None
    for name in additional:
        if name != KEY and str(name).strip().casefold() == KEY:
            raise QuestValueError("additional_config", name, f"{KEY!r}, in small letters")
    if KEY not in additional:
        return None
    for name in _OURS_ALONE:
        if name in additional:
            raise QuestValueError(f"additional_config.{name}", additional[name], f"it under {KEY!r}: {KEY}.{name}")
    return QuestOptions.from_mapping(additional[KEY])


def advice_on_budget(token_budget: int, max_model_len: int) -> str | None:
    """What an operator should know of a budget that is small for the longest sequence, or None.

    Args:
        token_budget: Most tokens that a decode row reads [tokens].
        max_model_len: Of the longest sequence [tokens].

    >>> advice_on_budget(2048, 32768) is None
    True
    """
    if token_budget * _MOST_TIMES >= max_model_len:
        return None
    return (
        f"token_budget {token_budget} is less than 1/{_MOST_TIMES} of {max_model_len} positions: over sequences that "
        "long, small models lost facts with such a budget (docs/vllm.md, Which budget for which context). Measure yours"
    )

"""`QuestOptions`: what stands under "quest" in a server's JSON."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

from quest_attention.config import Backend, QuestConfig
from quest_attention.errors import QuestValueError
from quest_attention.ops.query_tokens import with_pages_of

__all__ = ["KEY", "KNOWN", "READING", "VERIFY", "QuestOptions", "advice_on_budget"]

KEY = "quest"
"""Where the options stand in what an engine takes as JSON."""
_LOG_INTERVAL = 10.0
"""Seconds between lines of counters in the log, as between vLLM's own lines [s]."""
_MOST_TIMES = 16
"""Budgets into which the longest sequence may go before the log warns: with fewer tokens the small public models that
docs/results.md measures lost facts."""
_WORTH_OF_TOKENS = 4
"""Of single tokens by sketches in pages by bounds, with which these were measured: docs/choosing.md."""
_PAGE_SIZE = "page_size"
VERIFY = ("dense", "sparse")
"""What rows that check speculated tokens read: everything, so that their answers are those without speculation, or what
they choose, as decode rows do."""
_OF_SERVING = ("log_interval", "verify")
READING = tuple(one.name for one in fields(QuestConfig) if one.name != _PAGE_SIZE)
"""Options of `QuestConfig` that a server takes."""
KNOWN = (*READING, *_OF_SERVING)
"""All of a server's options."""


@dataclass(frozen=True)
class QuestOptions:
    """How a server reads its KV cache. Validated when made, but for what depends on the engine's page size.

    Args:
        reading: Options of `QuestConfig`, all but the page size, which is the engine's.
        device: Type of the device that the server runs on, which says what metadata "auto" is.
        log_interval: Seconds between lines of counters in a worker's log; 0 for none [s].
        verify: One of `VERIFY`.
        query_tokens: Of a row that chooses at most, which is the engine's to say: 1 plus those it speculates where they
            are checked sparse [tokens].

    Raises:
        QuestValueError: A value is out of range.
    """

    # What a page is, in the words of an engine, which derives a class: for who gives a `page_size`, and, in brackets,
    # for who has a budget of too few pages.
    page_size_rule: ClassVar[str] = "a page is the engine's"
    page_size_hint: ClassVar[str] = ""
    reading: Mapping[str, Any] = field(default_factory=dict)
    device: str = field(kw_only=True)
    log_interval: float = _LOG_INTERVAL
    verify: str = VERIFY[0]
    query_tokens: int = 1

    def __post_init__(self) -> None:
        number: object = self.log_interval
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number < float("inf"):
            raise QuestValueError(f"{KEY}.log_interval", number, "seconds, 0 for no such lines")
        if self.verify not in VERIFY:
            raise QuestValueError(f"{KEY}.verify", self.verify, " or ".join(map(repr, VERIFY)))
        self.least_config()  # checks everything but whether the budget holds pages of the real size

    @property
    def num_dense_layers(self) -> int:
        """Leading full-attention layers that read everything [layers]."""
        return int(self.reading.get("num_dense_layers", QuestConfig().num_dense_layers))

    @property
    def backend(self) -> Backend:
        """Which implementation of the verbs runs."""
        return cast("Backend", self.reading.get("backend", "auto"))

    def least_config(self) -> QuestConfig:
        """The config for the smallest pages: what it says of anything but pages is true whatever their size."""
        unit = self.reading.get("selection_unit")
        return self.config(unit if type(unit) is int and unit > 0 else 1)  # units are cut out of pages

    @property
    def fp8_metadata(self) -> bool:
        """Whether the bounds have 8 bits."""
        return bool(self.reading.get("metadata_dtype", "kv") != "kv")

    def config(self, page_size: int, **instead: Any) -> QuestConfig:
        """The config for pages of the engine's size [tokens], with a form of metadata.

        Args:
            page_size: Of the engine [tokens].
            instead: Options in place of the server's.

        Raises:
            QuestValueError: The budget cannot hold the forced pages, or a value is wrong.
        """
        try:
            config = QuestConfig.from_dict({**self.reading, **instead, _PAGE_SIZE: page_size}, self.device)
            with_pages_of(config, self.query_tokens)
        except QuestValueError as error:
            hint = self.page_size_hint if "forced page" in error.expected else ""
            raise QuestValueError(f"{KEY}.{error.argument}", error.got, error.expected + hint) from None
        if not config.scores_tokens and config.selection_unit != "page":
            expected = f"page for {config.metadata}, which scores pages: in a server tokens are chosen by sketch"
            raise config.mistake(f"{KEY}.selection_unit", config.selection_unit, expected)
        return config

    @classmethod
    def from_mapping(cls, given: object, device: str) -> QuestOptions:
        """Read options as they come from JSON.

        Args:
            given: The options by name.
            device: Type of the device that the server runs on.

        Raises:
            QuestValueError: Something is unknown or wrong.

        >>> QuestOptions.from_mapping({"token_budget": 1024}, "cuda").config(16).page_budget
        64
        >>> QuestOptions.from_mapping({"token_buget": 1024}, "cuda")
        Traceback (most recent call last):
        quest_attention.errors.QuestValueError: quest.token_buget: got 1024, expected a known option: did you mean token_budget?
        """  # noqa: E501 (a message)
        if not isinstance(given, Mapping):
            raise QuestValueError(KEY, given, 'an object such as {"token_budget": 2048}')
        for name, value in given.items():
            if name == _PAGE_SIZE:
                raise QuestValueError(f"{KEY}.{name}", value, f"nothing: {cls.page_size_rule}")
            if name not in KNOWN:
                close = difflib.get_close_matches(str(name), KNOWN, n=1)
                hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(KNOWN)}"
                raise QuestValueError(f"{KEY}.{name}", value, f"a known option: {hint}")
        reading = {name: value for name, value in given.items() if name not in _OF_SERVING}
        return cls(reading, device=device, **{name: given[name] for name in _OF_SERVING if name in given})


def advice_on_budget(config: QuestConfig, max_model_len: int) -> str | None:
    """What an operator should know of a budget that is small, for its pages or for the longest sequence, or None.

    Args:
        config: Of the server.
        max_model_len: Of the longest sequence [tokens].

    >>> advice_on_budget(QuestConfig.paper(2048), 32768) is None
    True
    >>> advice_on_budget(QuestConfig(256, page_size=128, metadata="moments"), 2048)
    'token_budget 256 holds no more than the pages that are always read, 2 of 128 tokens: nothing is chosen'
    """
    if config.unit_budget <= config.num_forced_pages * config.units_per_page:
        return (
            f"token_budget {config.token_budget} holds no more than the pages that are always read, "
            f"{config.num_forced_pages} of {config.page_size} tokens: nothing is chosen"
        )
    by_tokens = config.scores_tokens and config.unit_size == 1 and config.candidate_factor > 0
    most = _MOST_TIMES * (_WORTH_OF_TOKENS if by_tokens else 1)
    if config.token_budget * most >= max_model_len:
        return None
    return (
        f"token_budget {config.token_budget} is less than 1/{most} of {max_model_len} positions: over sequences that "
        "long, small models lost facts with such a budget (docs/vllm.md, Which budget for which context). Measure yours"
    )

"""`QuestConfig`: how much a decode step may read, and which layers it concerns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

from quest_attention.errors import QuestValueError

__all__ = [
    "Backend",
    "GroupReduction",
    "Metadata",
    "MetadataDtype",
    "QuestConfig",
    "check_coefficient",
    "check_integer",
]

GroupReduction = Literal["max", "mean"]
Metadata = Literal["bounds", "moments"]
MetadataDtype = Literal["kv", "fp8"]
Backend = Literal["auto", "torch", "triton", "reference"]
_MOST_DEVIATIONS = 100
"""Of `moments_coefficient`: a page of 16 keys has none more than four from their mean."""
_SINK_PAGES: dict[Metadata, int] = {"bounds": 0, "moments": 1}
"""First pages that a form wants read always: moments rank the one with the attention sink too low."""


@dataclass(frozen=True)
class QuestConfig:
    """How Quest reads the KV cache. Immutable and validated when made.

    Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024,
    arXiv:2406.10774, section 3; the paper's setting is pages of 16 tokens and two dense layers.

    Args:
        token_budget: Most tokens one decode step may read per sequence and KV head, forced pages included [tokens].
            A sequence of at most this many tokens is read whole.
        page_size: Tokens per page [tokens].
        num_dense_layers: Leading full-attention layers that always read the whole cache, counted by their rank among
            such layers: those with a window or a state are not counted [layers].
        num_sink_pages: First pages of a sequence that are always read; None is what the metadata wants, 1 for moments
            and 0 for bounds, and is replaced by it when the config is made: `replace` then keeps that [pages].
        num_recent_pages: Last pages of a sequence that are always read, the page being written included [pages].
            The page being written is read even when this is 0.
        group_reduction: How the scores of the query heads that share a KV head become one score: `"max"` or `"mean"`.
        backend: `"auto"` picks by device; a backend named here works or raises.
        metadata: What is kept of a page's keys and how a query scores it: `"bounds"`, the paper's, or `"moments"`, mean
            and standard deviation; see `quest_attention.forms`.
        metadata_dtype: How page metadata is stored: `"kv"` in the dtype of the keys, `"fp8"`, for bounds alone, in 8
            bits (e4m3), each rounded outward, so that it still bounds: half the bytes to score, a looser ranking.
        moments_coefficient: How many standard deviations above its mean a page's best key is taken to lie.

    Raises:
        QuestValueError: A value is out of range, or the budget cannot hold the pages that are always read.

    >>> config = QuestConfig(token_budget=1024)
    >>> config.page_budget
    64
    >>> QuestConfig(token_budget=32, num_sink_pages=2)
    Traceback (most recent call last):
    quest_attention.errors.QuestValueError: token_budget: got 32, expected at least 48: 3 forced pages of 16 tokens
    """

    token_budget: int = 2048
    page_size: int = 16
    num_dense_layers: int = 2
    num_sink_pages: int = cast("int", None)  # of a config that is made, always a number
    num_recent_pages: int = 1
    group_reduction: GroupReduction = "max"
    backend: Backend = "auto"
    metadata_dtype: MetadataDtype = "kv"
    metadata: Metadata = "bounds"
    moments_coefficient: float = 1.0

    def __post_init__(self) -> None:
        _check_choice("metadata", self.metadata, get_args(Metadata))
        sinks: object = self.num_sink_pages
        if sinks is None:
            object.__setattr__(self, "num_sink_pages", _SINK_PAGES[self.metadata])
        for name in ("token_budget", "page_size"):
            check_integer(name, getattr(self, name), minimum=1)
        for name in ("num_dense_layers", "num_sink_pages", "num_recent_pages"):
            check_integer(name, getattr(self, name), minimum=0)
        _check_choice("group_reduction", self.group_reduction, get_args(GroupReduction))
        _check_choice("metadata_dtype", self.metadata_dtype, get_args(MetadataDtype))
        if self.metadata != "bounds" and self.metadata_dtype != "kv":
            raise QuestValueError("metadata_dtype", self.metadata_dtype, f"kv for {self.metadata}: fp8 is for bounds")
        check_coefficient("moments_coefficient", self.moments_coefficient)
        _check_choice("backend", self.backend, get_args(Backend))
        if self.page_budget < self.num_forced_pages:
            needed = self.num_forced_pages * self.page_size
            pages = "1 forced page" if self.num_forced_pages == 1 else f"{self.num_forced_pages} forced pages"
            raise QuestValueError(
                "token_budget", self.token_budget, f"at least {needed}: {pages} of {self.page_size} tokens"
            )

    @property
    def page_budget(self) -> int:
        """Whole pages that fit the token budget [pages]."""
        return self.token_budget // self.page_size

    @property
    def page_slots(self) -> int:
        """Slots per row of `selected_pages` [pages]: room for every page of a sequence that just fits the budget."""
        return -(-self.token_budget // self.page_size)

    @property
    def num_forced_pages(self) -> int:
        """Pages read whatever their score [pages]: sink pages, and recent pages or the one being written."""
        return self.num_sink_pages + max(1, self.num_recent_pages)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> QuestConfig:
        """Make a config from a mapping, as read from JSON.

        Raises:
            QuestValueError: It is no mapping, an option is unknown or its value is wrong.

        >>> QuestConfig.from_dict({"page_sise": 16})
        Traceback (most recent call last):
        quest_attention.errors.QuestValueError: page_sise: got 16, expected a known option: did you mean page_size?
        """
        if not isinstance(options, Mapping):
            raise QuestValueError("options", options, "a mapping of names to values")
        known = [field.name for field in fields(cls)]
        for name, value in options.items():
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
                raise QuestValueError(str(name), value, f"a known option: {hint}")
        return cls(**options)


def check_integer(name: str, value: object, minimum: int) -> None:
    """Refuse what is no whole number of at least `minimum`, 0 or 1; True and False are none.

    Raises:
        QuestValueError: It is not.

    >>> check_integer("max_length", "8192", minimum=1)
    Traceback (most recent call last):
    quest_attention.errors.QuestValueError: max_length: got '8192', expected a positive integer
    """
    kind = "a positive integer" if minimum == 1 else "a non-negative integer"
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise QuestValueError(name, value, kind)


def check_coefficient(name: str, value: object) -> None:
    """Refuse what is no number of standard deviations that keeps scores finite.

    Raises:
        QuestValueError: It is not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MOST_DEVIATIONS:
        raise QuestValueError(name, value, f"a number from 0 to {_MOST_DEVIATIONS}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise QuestValueError(name, value, f"one of {', '.join(choices)}")

"""`QuestConfig`: how much a decode step may read, and which layers it concerns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, cast, get_args

from quest_attention.errors import QuestValueError

__all__ = [
    "Backend",
    "GroupReduction",
    "Metadata",
    "MetadataDtype",
    "QuestConfig",
    "SelectionUnit",
    "check_coefficient",
    "check_integer",
]

GroupReduction = Literal["max", "mean", "mass"]
SelectionUnit = Literal["page", "token", 4]
Metadata = Literal["bounds", "moments", "sketch"]
MetadataDtype = Literal["kv", "fp8"]
Backend = Literal["auto", "torch", "triton", "reference"]
_MOST_DEVIATIONS = 100
"""Of `moments_coefficient`: a page of 16 keys has none more than four from their mean."""
_AS_WANTED = cast("GroupReduction", None)
"""Replaced when a config is made."""
_CANDIDATES = 4
"""Of `candidate_factor`: a quarter of those that pass the rough estimate are read."""


class _Wants(NamedTuple):
    """What a form of metadata wants and allows.

    Attributes:
        units: What may be selected by its scores.
        reductions: What may become of the scores of a group's heads, what it wants first.
        sink_pages: First pages that it wants read always.
        candidate_factor: Times the budget's units that pass its rough estimate; 0 for metadata that has none.
    """

    units: tuple[SelectionUnit, ...]
    reductions: tuple[GroupReduction, ...]
    sink_pages: int
    candidate_factor: int


_WANTS: dict[Metadata, _Wants] = {
    "bounds": _Wants(("page",), ("max", "mean"), sink_pages=0, candidate_factor=0),
    # They rank the page with the attention sink too low.
    "moments": _Wants(("page",), ("max", "mean"), sink_pages=1, candidate_factor=0),
    # It scores tokens, so it can choose among them. What heads agree on are weights and not logits: their mean is mass.
    "sketch": _Wants(("page", "token", 4), ("max", "mass"), sink_pages=1, candidate_factor=_CANDIDATES),
}


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
            and sketch and 0 for bounds, and is replaced by it when the config is made: `replace` then keeps that
            [pages].
        num_recent_pages: Last pages of a sequence that are always read, the page being written included [pages].
            The page being written is read even when this is 0.
        group_reduction: How the scores of the query heads that share a KV head become one score: `"max"`, `"mean"` or,
            for metadata that scores tokens, `"mass"`, their mean share of the attention. None is what the metadata
            wants, max for all so far, and is replaced as for `num_sink_pages`.
        backend: `"auto"` picks by device; a backend named here works or raises.
        metadata: What is kept of a page's keys and how a query scores it: `"bounds"`, the paper's, `"moments"`, mean
            and standard deviation, or `"sketch"`, two bits of every channel of every key, by which tokens are scored;
            see `quest_attention.forms`.
        metadata_dtype: How page metadata is stored: `"kv"` in the dtype of the keys, `"fp8"`, for bounds alone, in 8
            bits (e4m3), each rounded outward, so that it still bounds: half the bytes to score, a looser ranking.
        moments_coefficient: How many standard deviations above its mean a page's best key is taken to lie.
        selection_unit: What is selected: `"page"`, or, by metadata that scores tokens, `"token"` or groups of 4 tokens.
            Forced pages stay pages: all of their units are read.
        candidate_factor: Of metadata that scores tokens in two stages, as sketch does: the best of all units by a rough
            estimate, this many times those of the budget, are ranked by the full one. 0 ranks all by the full one. None
            is what the metadata wants, 4 for sketch and 0, the only one allowed, for bounds and moments, and is
            replaced as for `num_sink_pages`.

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
    group_reduction: GroupReduction = _AS_WANTED  # likewise
    backend: Backend = "auto"
    metadata_dtype: MetadataDtype = "kv"
    metadata: Metadata = "bounds"
    moments_coefficient: float = 1.0
    selection_unit: SelectionUnit = "page"
    candidate_factor: int = cast("int", None)  # likewise

    def __post_init__(self) -> None:
        _check_choice("metadata", self.metadata, get_args(Metadata))
        wants = _WANTS[self.metadata]
        for name, wanted in (
            ("num_sink_pages", wants.sink_pages),
            ("group_reduction", wants.reductions[0]),
            ("candidate_factor", wants.candidate_factor),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, wanted)
        for name in ("token_budget", "page_size"):
            check_integer(name, getattr(self, name), minimum=1)
        for name in ("num_dense_layers", "num_sink_pages", "num_recent_pages", "candidate_factor"):
            check_integer(name, getattr(self, name), minimum=0)
        self._check_selection(wants)
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

    def _check_selection(self, wants: _Wants) -> None:
        """What is selected and how heads agree on it, as far as the metadata allows it."""
        reduction, unit = self.group_reduction, self.selection_unit
        _check_choice("group_reduction", reduction, get_args(GroupReduction))
        if reduction not in wants.reductions:
            why = ": mass is of tokens' estimates: for metadata that scores tokens" if reduction == "mass" else ""
            expected = f"{' or '.join(wants.reductions)} for {self.metadata}{why}"
            raise QuestValueError("group_reduction", reduction, expected)
        units = get_args(SelectionUnit)
        if type(unit) not in (str, int) or unit not in units:
            raise QuestValueError("selection_unit", unit, f"one of {', '.join(map(str, units))}")
        if unit not in wants.units:
            expected = f"{' or '.join(map(str, wants.units))} for {self.metadata}, which scores pages"
            raise QuestValueError("selection_unit", unit, expected)
        if self.candidate_factor and not wants.candidate_factor:
            expected = f"0 for {self.metadata}, which has no rough estimates"
            raise QuestValueError("candidate_factor", self.candidate_factor, expected)
        if self.page_size % self.unit_size:
            raise QuestValueError("selection_unit", unit, f"page or token: {unit} does not divide {self.page_size}")

    @property
    def unit_size(self) -> int:
        """Tokens of what is selected: of a page, 1 or 4 [tokens]."""
        unit = self.selection_unit
        return self.page_size if unit == "page" else 1 if unit == "token" else unit

    @property
    def units_per_page(self) -> int:
        """Units in a page [units]."""
        return self.page_size // self.unit_size

    @property
    def unit_budget(self) -> int:
        """Whole units that fit the token budget [units]."""
        return self.token_budget // self.unit_size

    @property
    def unit_slots(self) -> int:
        """Slots per row of a selection [units]: room for every unit of a sequence that just fits the budget."""
        return -(-self.token_budget // self.unit_size)

    @property
    def candidate_budget(self) -> int:
        """Units that pass the rough estimate, 0 where there is none [units]."""
        return self.candidate_factor * self.unit_budget

    @property
    def page_budget(self) -> int:
        """Whole pages that fit the token budget [pages]."""
        return self.token_budget // self.page_size

    @property
    def page_slots(self) -> int:
        """Pages of a sequence that just fits the token budget [pages]."""
        return -(-self.token_budget // self.page_size)

    @property
    def num_forced_pages(self) -> int:
        """Pages read whatever their score [pages]: sink pages, and recent pages or the one being written."""
        return self.num_sink_pages + max(1, self.num_recent_pages)

    @classmethod
    def paper(cls, token_budget: int = 2048, **others: Any) -> QuestConfig:
        """The setting of the paper, whatever the defaults become.

        Bounds in the dtype of the keys, pages of 16 tokens, the largest score of a group's heads, two dense layers, and
        no page read always but the one being written.

        Args:
            token_budget: See `QuestConfig` [tokens].
            **others: Options of `QuestConfig` in place of the paper's.

        Raises:
            QuestValueError: An option is unknown or its value is wrong.

        >>> config = QuestConfig.paper(1024)
        >>> config.metadata, config.page_size, config.group_reduction, config.num_sink_pages
        ('bounds', 16, 'max', 0)
        """
        paper = {
            "page_size": 16, "num_dense_layers": 2, "num_sink_pages": 0, "num_recent_pages": 1,
            "group_reduction": "max", "metadata": "bounds", "metadata_dtype": "kv", "selection_unit": "page",
        }  # fmt: skip
        return cls.from_dict({"token_budget": token_budget, **paper, **others})

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


# Longer than 250 lines: every option is documented, checked and derived from in one place.

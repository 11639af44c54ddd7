"""`QuestConfig`: how much a decode step may read, and which layers it concerns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias, cast, get_args

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
    "refuse_auto",
]

GroupReduction = Literal["max", "mean", "mass"]
SelectionUnit = Literal["page", "token", 4]
Metadata = Literal["bounds", "moments", "sketch", "auto"]
MetadataDtype = Literal["kv", "fp8"]
Backend = Literal["auto", "torch", "triton", "reference"]
_MOST_DEVIATIONS = 100
"""Of `moments_coefficient`: a page of 16 keys has none more than four from their mean."""
_COEFFICIENT = 1.0
_CANDIDATES = 4
"""Of `candidate_factor`: a quarter of those that pass the first estimate are read."""


# What nobody gave is the default or what the metadata wants, of one of these types. So it is known again where
# `dataclasses.replace` passes it on, and gives way to what other metadata wants. Nobody else need look at the type.
class _WantedInteger(int): ...


class _WantedNumber(float): ...


class _WantedName(str):
    __slots__ = ()


_Wanted: TypeAlias = _WantedInteger | _WantedNumber | _WantedName


class _Wants(NamedTuple):
    """What a form of metadata wants and does.

    Attributes:
        scores_tokens: Whether tokens have scores of it. Otherwise pages have, and exact keys rank the tokens of the
            best of them where less than a page is selected.
        sink_pages: First pages that it wants read always.
    """

    scores_tokens: bool
    sink_pages: int


_WANTS: dict[Metadata, _Wants] = {
    "bounds": _Wants(scores_tokens=False, sink_pages=0),
    # They rank the page with the attention sink too low.
    "moments": _Wants(scores_tokens=False, sink_pages=1),
    "sketch": _Wants(scores_tokens=True, sink_pages=1),
}
_LEFT_TO_METADATA = (
    "num_sink_pages", "group_reduction", "moments_coefficient", "selection_unit", "candidate_factor",
)  # fmt: skip
"""Options of which None is what the metadata wants."""
_OF_PAGES: tuple[GroupReduction, ...] = ("max", "mean")
"""What may become of the scores of a group's heads where pages are selected, what is wanted first."""
_OF_TOKENS: tuple[GroupReduction, ...] = ("max", "mass")
"""The same where tokens are ranked: heads agree on weights and not on logits, and the mean of weights is mass."""
_NOT_GIVEN = cast("Any", None)
_AUTO: dict[str, dict[str, Any]] = {
    # In plain PyTorch ranking tokens by exact keys takes what reading fewer values spares.
    "cpu": {"metadata": "moments", "selection_unit": "page"},
    "cuda": {"metadata": "sketch", "selection_unit": "token"},
}
"""What metadata "auto" is by the type of the device; all else is what that metadata wants."""


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
            and sketch and 0 for bounds, and is replaced by it when the config is made. `dataclasses.replace` keeps what
            was given, and replaces what was not anew [pages].
        num_recent_pages: Last pages of a sequence that are always read, the page being written included [pages].
            The page being written is read even when this is 0.
        group_reduction: How the scores of the query heads that share a KV head become one score: `"max"`, `"mean"` or,
            where tokens are ranked, `"mass"`, their mean share of the attention; pages that are only to pass are then
            ranked by max. None is what the metadata wants, max for all so far, and is replaced as for
            `num_sink_pages`.
        backend: `"auto"` picks by device; a backend named here works or raises.
        metadata: What is kept of a page's keys and how a query scores it: `"bounds"`, the paper's, `"moments"`, mean
            and standard deviation, or `"sketch"`, one bit of every channel of every key and the mean of its page, by
            which tokens are scored; see `quest_attention.forms`. `"auto"` leaves it to the device, with what else is
            not given: see `resolved`.
        metadata_dtype: How page metadata is stored: `"kv"` in the dtype of the keys, `"fp8"`, for bounds alone, in 8
            bits (e4m3), each rounded outward, so that it still bounds: half the bytes to score, a looser ranking.
        moments_coefficient: Of moments, how many standard deviations above its mean a page's best key is taken to lie;
            None is 1, and is replaced as for `num_sink_pages`; other metadata has none.
        selection_unit: What is selected: `"page"`, `"token"` or groups of 4 tokens. Forced pages stay pages: all of
            their units are read. None is pages, and is replaced as for `num_sink_pages`.
        candidate_factor: Where units are ranked in two stages: the best of all by a first estimate, this many times
            those of the budget, are ranked once more, by their exact keys, which are read beside the tokens of the
            budget. Sketch estimates the logit of every token, and its candidates are units; 0 ranks by the estimates
            alone. Bounds and moments score pages, and where less than a page is selected, as many pages are the
            candidates. None is what the metadata wants, 4, or 0, the only one allowed, for whole pages by bounds or
            moments; it is replaced as for `num_sink_pages`.

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
    # Those that are None here never are of a config that is made, but for one whose metadata is "auto".
    num_sink_pages: int = _NOT_GIVEN
    num_recent_pages: int = 1
    group_reduction: GroupReduction = _NOT_GIVEN
    backend: Backend = "auto"
    metadata_dtype: MetadataDtype = "kv"
    metadata: Metadata = "bounds"
    moments_coefficient: float | None = None
    selection_unit: SelectionUnit = _NOT_GIVEN
    candidate_factor: int = _NOT_GIVEN

    def __post_init__(self) -> None:
        _check_choice("metadata", self.metadata, get_args(Metadata))
        for name in _LEFT_TO_METADATA:
            if isinstance(getattr(self, name), _Wanted):
                object.__setattr__(self, name, None)
        for name in ("token_budget", "page_size"):
            check_integer(name, getattr(self, name), minimum=1)
        for name in ("num_dense_layers", "num_recent_pages"):
            check_integer(name, getattr(self, name), minimum=0)
        _check_choice("metadata_dtype", self.metadata_dtype, get_args(MetadataDtype))
        _check_choice("backend", self.backend, get_args(Backend))
        if self.metadata == "auto":
            self._check_auto()
            return
        self._want("num_sink_pages", _WantedInteger(_WANTS[self.metadata].sink_pages))
        check_integer("num_sink_pages", self.num_sink_pages, minimum=0)
        self._check_coefficient()
        self._check_selection()
        if self.metadata != "bounds" and self.metadata_dtype != "kv":
            raise QuestValueError("metadata_dtype", self.metadata_dtype, f"kv for {self.metadata}: fp8 is for bounds")
        if self.page_budget < self.num_forced_pages:
            needed = self.num_forced_pages * self.page_size
            pages = "1 forced page" if self.num_forced_pages == 1 else f"{self.num_forced_pages} forced pages"
            raise QuestValueError(
                "token_budget", self.token_budget, f"at least {needed}: {pages} of {self.page_size} tokens"
            )

    def _want(self, name: str, wanted: _Wanted) -> None:
        """Take what is wanted where nothing was given."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, wanted)

    def _check_auto(self) -> None:
        """Refuse options with which no device has a form."""
        mistakes = [mistake for device in _AUTO if (mistake := self._mistake_on(device)) is not None]
        if len(mistakes) == len(_AUTO):
            raise mistakes[0]

    def _mistake_on(self, device: str) -> QuestValueError | None:
        """What is wrong with the form of a device, if anything."""
        try:
            self.resolved(device)
        except QuestValueError as mistake:
            return mistake
        return None

    def _check_coefficient(self) -> None:
        """Whether there is one only where it has an effect."""
        if self.moments_coefficient is not None:
            check_coefficient("moments_coefficient", self.moments_coefficient)
        if self.metadata == "moments":
            self._want("moments_coefficient", _WantedNumber(_COEFFICIENT))
        elif self.moments_coefficient is not None:  # what was not given has been forgotten
            expected = f"none for {self.metadata}: it is for moments"
            raise QuestValueError("moments_coefficient", self.moments_coefficient, expected)

    def _check_selection(self) -> None:
        """What is selected and how heads agree on it, as far as the metadata allows it."""
        wants, metadata = _WANTS[self.metadata], self.metadata
        self._want("selection_unit", _WantedName("page"))
        unit, units = self.selection_unit, get_args(SelectionUnit)
        if not isinstance(cast("object", unit), str | int) or unit not in units:
            raise QuestValueError("selection_unit", unit, f"one of {', '.join(map(str, units))}")
        if self.page_size % self.unit_size:
            raise QuestValueError("selection_unit", unit, f"page or token: {unit} does not divide {self.page_size}")

        ranks_tokens = wants.scores_tokens or self.unit_size < self.page_size
        reductions = _OF_TOKENS if ranks_tokens else _OF_PAGES
        self._want("group_reduction", _WantedName(reductions[0]))
        reduction = self.group_reduction
        _check_choice("group_reduction", reduction, get_args(GroupReduction))
        if reduction not in reductions:
            what = metadata if wants.scores_tokens else f"{'tokens' if ranks_tokens else 'pages'} by {metadata}"
            raise QuestValueError("group_reduction", reduction, f"{' or '.join(reductions)} for {what}")

        self._want("candidate_factor", _WantedInteger(_CANDIDATES if ranks_tokens else 0))
        factor = self.candidate_factor
        check_integer("candidate_factor", factor, minimum=0)
        if factor and not ranks_tokens:
            raise QuestValueError("candidate_factor", factor, f"0 for whole pages by {metadata}: they are ranked once")
        if not factor and ranks_tokens and not wants.scores_tokens:
            expected = f"at least 1 for {metadata}, which scores pages: some are to be chosen, whose keys rank tokens"
            raise QuestValueError("candidate_factor", factor, expected)

    def resolved(self, device: str) -> QuestConfig:
        """The config with a form where `metadata` is `"auto"`, else itself: what loses least at equal milliseconds.

        What was given is kept. `enable_quest` and `quest_decode` do this for the device they run on.

        Args:
            device: Type of the device that keys are on, such as `"cpu"`.

        Raises:
            QuestValueError: What was given does not go with the form of that device.

        >>> config = QuestConfig(metadata="auto").resolved("cpu")
        >>> config.metadata, config.selection_unit, config.candidate_factor
        ('moments', 'page', 0)
        """
        if self.metadata != "auto":
            return self
        # A device of which nothing is known runs plain PyTorch, as a CPU does.
        chosen = _AUTO.get(device, _AUTO["cpu"])
        open_ones = {name: value for name, value in chosen.items() if getattr(self, name) in (None, "auto")}
        return replace(self, **open_ones)

    @property
    def unit_size(self) -> int:
        """Tokens of what is selected: of a page, 1 or 4 [tokens].

        Raises:
            QuestValueError: No device has been asked yet; so do those below.
        """
        unit = self.selection_unit
        if self.metadata == "auto":
            refuse_auto()
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
        """Units that pass the first estimate, 0 where there is none [units]."""
        return self.candidate_factor * self.unit_budget

    @property
    def scores_tokens(self) -> bool:
        """Whether tokens have scores of the metadata, and not pages alone."""
        if self.metadata == "auto":
            refuse_auto()
        return _WANTS[self.metadata].scores_tokens

    @property
    def candidate_pages(self) -> int:
        """Pages that are candidates, whose keys rank tokens; 0 where units are, or nothing is [pages].

        One more than hold the candidates, since the page being written is among them and may hold one token.
        """
        if self.scores_tokens or not self.candidate_factor:
            return 0
        return -(-self.candidate_budget * self.unit_size // self.page_size) + 1

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
        if self.metadata == "auto":
            refuse_auto()
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


def refuse_auto() -> NoReturn:
    """Refuse metadata "auto" where no device is known.

    Raises:
        QuestValueError: Always.
    """
    expected = "a form by name, or config.resolved(device): what auto is depends on the device"
    raise QuestValueError("metadata", "auto", expected)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise QuestValueError(name, value, f"one of {', '.join(choices)}")


# Longer than 250 lines: every option is documented, checked and derived from in one place.

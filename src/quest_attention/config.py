"""`QuestConfig`: how much a decode step may read, and which layers it concerns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeAlias, TypeVar, cast, get_args

from quest_attention.errors import QuestValueError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Backend",
    "GroupReduction",
    "Metadata",
    "MetadataDtype",
    "QuestConfig",
    "SelectionUnit",
    "as_given",
    "check_coefficient",
    "check_integer",
    "check_unit_size",
    "device_type",
    "enough_candidates",
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
_Option = TypeVar("_Option")


class _ChosenName(str):
    """A form that "auto" became, likewise: it is chosen anew, for the same device, from what a replacement gives."""

    __slots__ = ("device",)
    device: str

    @classmethod
    def on(cls, device: str, name: str) -> _ChosenName:
        chosen = cls(name)
        chosen.device = device
        return chosen


class _Wants(NamedTuple):
    """What a form of metadata wants and does.

    Attributes:
        scores_tokens: Whether tokens have scores of it. Otherwise pages have, and exact keys rank the tokens of the
            best of them where less than a page is selected.
        sink_pages: First pages that it wants read always.
        budget: Tokens that a step may read, where units are pages and where they are less [tokens].
        candidates: Tokens whose exact keys it wants to rank at least, however small the budget is [tokens].
        alone: The least budget with which scores alone choose single tokens; None where keys always rank them
            [tokens].
    """

    scores_tokens: bool
    sink_pages: int
    budget: tuple[int, int] = (2048, 2048)
    candidates: int = 0
    alone: int | None = None


_WANTS: dict[Metadata, _Wants] = {
    "bounds": _Wants(scores_tokens=False, sink_pages=0),
    # They rank the page with the attention sink too low.
    "moments": _Wants(scores_tokens=False, sink_pages=1),
    # By estimates alone 2,048 tokens lose no more than 512 whose keys were ranked, in less time; smaller budgets lose
    # more. Among fewer candidates those miss what they are for, and that many are ranked in the time of a launch.
    "sketch": _Wants(scores_tokens=True, sink_pages=1, budget=(2048, 512), candidates=2048, alone=2048),
}
_BUDGET = "token_budget"
_LEFT_TO_METADATA = (
    _BUDGET, "num_sink_pages", "group_reduction", "moments_coefficient", "selection_unit", "candidate_factor",
)  # fmt: skip
"""Options of which None is what the metadata wants."""
_OF_PAGES: tuple[GroupReduction, ...] = ("max", "mean")
"""What may become of the scores of a group's heads where pages are selected, what is wanted first."""
_OF_TOKENS: tuple[GroupReduction, ...] = ("max", "mass")
"""The same where tokens are ranked: heads agree on weights and not on logits, and the mean of weights is mass."""
_NOT_GIVEN = cast("Any", None)
_AUTO: dict[str, tuple[tuple[Metadata, SelectionUnit], ...]] = {
    # In plain PyTorch ranking tokens by exact keys takes what reading fewer values spares.
    "cpu": (("moments", "page"), ("bounds", "page"), ("sketch", "token")),
    "cuda": (("sketch", "token"), ("bounds", "page"), ("moments", "page")),
}
"""What metadata "auto" may be by the type of the device, what loses least first; all else is what that form wants."""


@dataclass(frozen=True)
class QuestConfig:
    """How Quest reads the KV cache. Immutable and validated when made.

    Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024,
    arXiv:2406.10774, section 3; the paper's setting is pages of 16 tokens and two dense layers.

    Args:
        token_budget: Most tokens one decode step may read per sequence and KV head, forced pages included [tokens].
            A sequence of at most this many tokens is read whole. None is what the metadata wants, 512 for groups by
            sketch, and for single ones whose candidates' keys rank them, and else 2,048, and is replaced as for
            `num_sink_pages`.
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
            which tokens are scored; see `quest_attention.forms`. `"auto"`, the default, leaves it to the device, with
            what else is not given: see `resolved`.
        metadata_dtype: How page metadata is stored: `"kv"` in the dtype of the keys, `"fp8"`, for bounds alone, in 8
            bits (e4m3), each rounded outward, so that it still bounds: half the bytes to score, a looser ranking.
        moments_coefficient: Of moments, how many standard deviations above its mean a page's best key is taken to lie;
            None is 1, and is replaced as for `num_sink_pages`; other metadata has none.
        selection_unit: What is selected: `"page"`, `"token"` or groups of 4 tokens. Forced pages stay pages: all of
            their units are read. None is pages, and is replaced as for `num_sink_pages`.
        candidate_factor: Where units are ranked in two stages: the best of all by a first estimate, this many times
            those of the budget, are ranked once more, by their exact keys, which are read beside the tokens of the
            budget. Sketch estimates the logit of every token, and its candidates are units; 0 ranks by the estimates
            alone, and on a GPU single tokens are then as many as a sample of estimates lets pass: about four fifths of
            the budget, never more than it. Bounds and moments score pages, and where less than a page is selected, as
            many pages are the candidates. None is what the metadata wants: 0 for single tokens by sketch where the
            budget is at least 2,048 and heads agree by max; else 4, by sketch as much as makes 2,048 candidates where
            the budget is less than 512; and 0, the only one allowed, for whole pages by bounds or moments. It is
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

    token_budget: int = _NOT_GIVEN
    page_size: int = 16
    num_dense_layers: int = 2
    # Those that are None here never are of a config that is made, but for one whose metadata is "auto".
    num_sink_pages: int = _NOT_GIVEN
    num_recent_pages: int = 1
    group_reduction: GroupReduction = _NOT_GIVEN
    backend: Backend = "auto"
    metadata_dtype: MetadataDtype = "kv"
    metadata: Metadata = "auto"
    moments_coefficient: float | None = None
    selection_unit: SelectionUnit = _NOT_GIVEN
    candidate_factor: int = _NOT_GIVEN

    def __post_init__(self) -> None:
        _check_choice("metadata", self.metadata, get_args(Metadata))
        for name in _LEFT_TO_METADATA:
            if isinstance(getattr(self, name), _Wanted):
                object.__setattr__(self, name, None)
        self._check_values()
        device = self.auto_device
        if device is not None:
            object.__setattr__(self, "metadata", "auto")
            self._take_over(_resolve(self, device))
        elif self.metadata == "auto":
            self._check_auto()
        else:
            self._take_form()

    def _check_values(self) -> None:
        """What is right or wrong whatever the metadata is."""
        if self.token_budget is not None:
            check_integer(_BUDGET, self.token_budget, minimum=1)
        check_integer("page_size", self.page_size, minimum=1)
        for name in ("num_dense_layers", "num_recent_pages"):
            check_integer(name, getattr(self, name), minimum=0)
        for name in ("num_sink_pages", "candidate_factor"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum=0)
        for name, choices in (("metadata_dtype", MetadataDtype), ("backend", Backend)):
            _check_choice(name, getattr(self, name), get_args(choices))
        if self.group_reduction is not None:
            _check_choice("group_reduction", self.group_reduction, get_args(GroupReduction))
        if self.moments_coefficient is not None:
            check_coefficient("moments_coefficient", self.moments_coefficient)
        self._check_unit()
        if None not in (self.num_sink_pages, self.token_budget):
            self._check_budget()

    def _check_unit(self) -> None:
        """Whether there is such a unit, and a page is made of it."""
        unit, units = cast("object", self.selection_unit), get_args(SelectionUnit)
        if unit is None:
            return
        if not isinstance(unit, str | int) or unit not in units:
            raise QuestValueError("selection_unit", unit, f"one of {', '.join(map(str, units))}")
        if isinstance(unit, int) and self.page_size % unit:
            raise QuestValueError("selection_unit", unit, f"page or token: {unit} does not divide {self.page_size}")

    def _take_form(self) -> None:
        """Put what the metadata wants in place of what was not given, and see whether it takes what was."""
        self._want("num_sink_pages", _WantedInteger(_WANTS[self.metadata].sink_pages))
        self._check_coefficient()
        self._check_selection()
        if self.metadata != "bounds" and self.metadata_dtype != "kv":
            raise QuestValueError("metadata_dtype", self.metadata_dtype, f"kv for {self.metadata}: fp8 is for bounds")
        self._check_budget()

    def _check_budget(self) -> None:
        """Whether it holds the pages that are read always, whose number is known."""
        forced = self.num_sink_pages + max(1, self.num_recent_pages)
        if self.page_budget < forced:
            pages = "1 forced page" if forced == 1 else f"{forced} forced pages"
            expected = f"at least {forced * self.page_size}: {pages} of {self.page_size} tokens"
            raise QuestValueError(_BUDGET, self.token_budget, expected)

    def _take_over(self, other: QuestConfig) -> None:
        """Become another config."""
        for field in fields(self):
            object.__setattr__(self, field.name, getattr(other, field.name))

    def _want(self, name: str, wanted: _Wanted) -> None:
        """Take what is wanted where nothing was given."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, wanted)

    def _check_auto(self) -> None:
        """Refuse options with which no device has a form."""
        refusals = []
        for device in _AUTO:
            chosen = _choose(self, device)
            if isinstance(chosen, QuestConfig):
                return
            refusals.append(chosen)
        raise _mistake_of(refusals)

    def _check_coefficient(self) -> None:
        """Whether there is one only where it has an effect."""
        if self.metadata == "moments":
            self._want("moments_coefficient", _WantedNumber(_COEFFICIENT))
        elif self.moments_coefficient is not None:  # what was not given has been forgotten
            expected = f"none for {self.metadata}: it is for moments"
            raise QuestValueError("moments_coefficient", self.moments_coefficient, expected)

    def _check_selection(self) -> None:
        """What is selected and how heads agree on it, as far as the metadata allows it."""
        wants, metadata = _WANTS[self.metadata], self.metadata
        self._want("selection_unit", _WantedName("page"))
        is_part = self.unit_size < self.page_size
        may_choose_alone = self.selection_unit == "token" and self.group_reduction in (None, "max")
        least = wants.alone if may_choose_alone and not self.candidate_factor else None
        self._want(_BUDGET, _WantedInteger(wants.budget[is_part] if least is None else least))
        ranks_tokens = wants.scores_tokens or is_part
        reductions = _OF_TOKENS if ranks_tokens else _OF_PAGES
        self._want("group_reduction", _WantedName(reductions[0]))
        reduction = self.group_reduction
        if reduction not in reductions:
            what = metadata if wants.scores_tokens else f"{'tokens' if ranks_tokens else 'pages'} by {metadata}"
            raise QuestValueError("group_reduction", reduction, f"{' or '.join(reductions)} for {what}")

        are_ranked = ranks_tokens and (least is None or self.token_budget < least)
        enough = enough_candidates(metadata, self.token_budget) if are_ranked else 0
        self._want("candidate_factor", _WantedInteger(enough))
        factor = self.candidate_factor
        if factor and not ranks_tokens:
            raise QuestValueError("candidate_factor", factor, f"0 for whole pages by {metadata}: they are ranked once")
        if not factor and ranks_tokens and not wants.scores_tokens:
            expected = f"at least 1 for {metadata}, which scores pages: some are to be chosen, whose keys rank tokens"
            raise QuestValueError("candidate_factor", factor, expected)

    def resolved(self, device: str | torch.device, form: str | None = None) -> QuestConfig:
        """The config with a form where `metadata` is `"auto"`, else itself: what loses least at equal milliseconds.

        Auto takes the first form of its device's list that takes what else was given: on an NVIDIA GPU sketches of
        single tokens, then bounds, then moments of pages; elsewhere moments, then bounds of pages, then sketches of
        single tokens. So bounds in 8 bits are bounds, and `moments_coefficient` leads to moments, on every device. A
        budget that is too small for the pages which that form reads always is an error and leads to no other.

        What was given is kept. `enable_quest` and `quest_decode` do this for the device they run on. What
        `dataclasses.replace` then gives beside the metadata has auto choose anew, for the same device.

        Args:
            device: The device that keys are on, or its type: `"cpu"`, `"cuda:1"`, `model.device`.
            form: Name of the form that a cache has already, where there is a cache: auto is then that one.

        Raises:
            QuestValueError: Metadata is auto, and there is no such device, no form takes all that was given, or the
                budget is too small for the one that does.

        >>> config = QuestConfig(metadata="auto").resolved("cpu")
        >>> config.metadata, config.selection_unit, config.candidate_factor
        ('moments', 'page', 0)
        >>> QuestConfig(metadata="auto", metadata_dtype="fp8").resolved("cuda").metadata
        'bounds'
        """
        return self if self.metadata != "auto" else _resolve_once(self, device_type(device), form)

    @property
    def auto_device(self) -> str | None:
        """Type of the device for which metadata `"auto"` became this form; None where a form was given, or none yet.

        >>> QuestConfig(metadata="auto").resolved("cpu").auto_device, QuestConfig(metadata="moments").auto_device
        ('cpu', None)
        """
        metadata = cast("object", self.metadata)
        return metadata.device if isinstance(metadata, _ChosenName) else None

    def mistake(self, argument: str, got: object, expected: str) -> QuestValueError:
        """An error that is due to the form, which says what auto is where nobody gave it."""
        device = self.auto_device
        return QuestValueError(argument, got, expected + ("" if device is None else _auto_is((self.metadata, device))))

    @property
    def unit_size(self) -> int:
        """Tokens of what is selected: of a page, 1 or 4 [tokens].

        Raises:
            QuestValueError: No device has been asked yet; so do those below that depend on the form.
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
        size = self.unit_size  # refuses auto, of which the budget may not be known
        return -(-self.token_budget // size)

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
    def candidate_tokens(self) -> int:
        """Tokens whose keys are to rank them, 0 where scores of the metadata alone choose [tokens].

        Of a longer sequence: on a GPU a sample sets the threshold, so that some more or fewer are read.

        >>> alone = QuestConfig(2048, metadata="sketch", selection_unit="token")
        >>> QuestConfig(512, metadata="sketch", selection_unit="token").candidate_tokens, alone.candidate_tokens
        (2048, 0)
        """
        return self.candidate_pages * self.page_size or self.candidate_budget * self.unit_size

    @property
    def page_budget(self) -> int:
        """Whole pages that fit the token budget [pages]."""
        if cast("object", self.token_budget) is None:
            refuse_auto()
        return self.token_budget // self.page_size

    @property
    def page_slots(self) -> int:
        """Pages of a sequence that just fits the token budget [pages]."""
        if cast("object", self.token_budget) is None:
            refuse_auto()
        return -(-self.token_budget // self.page_size)

    @property
    def num_forced_pages(self) -> int:
        """Pages read whatever their score [pages]: sink pages, and recent pages or the one being written."""
        if self.metadata == "auto":
            refuse_auto()
        return self.num_sink_pages + max(1, self.num_recent_pages)

    @classmethod
    def paper(cls, /, token_budget: int = 2048, **others: Any) -> QuestConfig:
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
    def from_dict(cls, options: Mapping[str, Any], device: str | torch.device | None = None) -> QuestConfig:
        """Make a config from a mapping, as read from JSON.

        What is in the mapping counts as given. So a config that was saved whole, with `dataclasses.asdict`, does not
        adapt when its budget is edited: save what you chose alone, and the rest follows.

        Args:
            options: Values by the names of arguments.
            device: The device for which metadata `"auto"` is resolved at once, where it is known: see `resolved`.

        Raises:
            QuestValueError: It is no mapping, an option is unknown, or its value or the device is wrong.

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
        if device is not None:
            kind = device_type(device)
            if options.get("metadata", cls.metadata) == "auto":
                return cls(**{**options, "metadata": cast("Metadata", _ChosenName.on(kind, "auto"))})
        return cls(**options)


def device_type(device: object) -> str:
    """The type of a device of PyTorch, or of the name of one.

    Raises:
        QuestValueError: It is neither.

    >>> device_type("cuda:1")
    'cuda'
    """
    import torch  # noqa: PLC0415 (a config alone does without, and begins faster)

    if isinstance(device, str | torch.device):
        try:
            return torch.device(device).type
        except RuntimeError:  # PyTorch knows no such kind
            pass
    raise QuestValueError("device", device, "a torch.device, or the name of one, as cpu or cuda:0")


class _Refusal(NamedTuple):
    """Why auto has no form for a config on a device, and which form on which device that is said of."""

    mistake: QuestValueError
    of: tuple[str, str]


def _choose(config: QuestConfig, device: str, form: str | None = None) -> QuestConfig | _Refusal:
    """The first form of a device's list that takes what a config with metadata "auto" gives.

    Where a cache has a form it is the only one; one of the user's own is none of the list and changes nothing.
    """
    given: SelectionUnit | None = config.selection_unit
    first: _Refusal | None = None
    every = _AUTO.get(device, _AUTO["cpu"])  # a device unknown here runs plain PyTorch too
    for metadata, unit in [one for one in every if one[0] == form] or every:
        try:
            found = replace(config, metadata=metadata, selection_unit=unit if given is None else given)
        except QuestValueError as error:
            refusal = _Refusal(error, (metadata, device))
            if error.argument == _BUDGET:  # looked at last: the form takes all else
                return refusal
            first = refusal if first is None else first
            continue
        object.__setattr__(found, "metadata", _ChosenName.on(device, metadata))
        if given is None:
            object.__setattr__(found, "selection_unit", _WantedName(unit))
        return found
    assert first is not None, "there are forms"
    return first


def _mistake_of(refusals: list[_Refusal]) -> QuestValueError:
    """The first mistake, and what "auto" is where it is one: nobody gave that form."""
    mistake = refusals[0].mistake
    alike = [refusal.of for refusal in refusals if str(refusal.mistake) == str(mistake)]
    return QuestValueError(mistake.argument, mistake.got, mistake.expected + _auto_is(*alike))


def _auto_is(*forms: tuple[str, str]) -> str:
    """What follows on what was expected where nobody gave the form: which one it is on a device, or on several."""
    return '; metadata "auto" is ' + ", ".join(f"{form} on {device}" for form, device in forms)


def _resolve(config: QuestConfig, device: str, form: str | None = None) -> QuestConfig:
    chosen = _choose(config, device, form)
    if isinstance(chosen, _Refusal):
        raise _mistake_of([chosen])
    return chosen


_resolve_once = lru_cache(_resolve)
"""For who leaves it to `quest_decode`, which asks at every step."""


def as_given(value: _Option) -> _Option:
    """An option as somebody gave it: one taken from a config, who gave it or not, gives way to nothing any more.

    >>> none = QuestConfig(metadata="bounds").num_sink_pages
    >>> [QuestConfig(metadata="sketch", num_sink_pages=pages).num_sink_pages for pages in (none, as_given(none))]
    [1, 0]
    """
    for mark, plain in ((_WantedInteger, int), (_WantedNumber, float), (_WantedName, str)):
        if isinstance(value, mark):
            return cast("_Option", plain(value))
    return value


def enough_candidates(metadata: Metadata, token_budget: int) -> int:
    """Times a budget that is ranked by keys where keys rank tokens and nobody says how many: a `candidate_factor`.

    Args:
        metadata: Name of a form; "auto" is none.
        token_budget: Most tokens that a step may read [tokens].

    >>> [enough_candidates("sketch", tokens) for tokens in (128, 512, 4096)]
    [16, 4, 4]
    """
    return max(_CANDIDATES, -(-_WANTS[metadata].candidates // token_budget))


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


def check_unit_size(name: str, size: int, page_size: int) -> None:
    """Refuse tokens of a unit that do not divide those of a page.

    Raises:
        QuestValueError: They do not, or are no positive integer.
    """
    check_integer(name, size, minimum=1)
    if page_size % size:
        raise QuestValueError(name, size, f"tokens that divide a page of {page_size}: units lie within pages")


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

"""Methods under comparison: how decode steps read the KV cache. Each runs the code that serves.

    with make_method("quest", token_budget=64, num_dense_layers=2).session(model) as session:
        session.load(context)              # or prefill with session.cache
        model.generate(ids, **cache_argument(session.cache))
        session.reads()

All methods leave the same leading layers dense and read at most the same number of tokens in the others, so that a
table compares what they read, not how much.
"""

from __future__ import annotations

import contextlib
from typing import Any

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestValueError
from quest_attention.eval.methods.evicting import Evicting
from quest_attention.eval.methods.full import Full
from quest_attention.eval.methods.h2o import H2O
from quest_attention.eval.methods.method import LayerReads, Method, Session
from quest_attention.eval.methods.page_ceiling import PageCeiling
from quest_attention.eval.methods.quest import Quest
from quest_attention.eval.methods.snapkv import SnapKV
from quest_attention.eval.methods.streaming_llm import SlidingWindow, StreamingLLM
from quest_attention.eval.methods.token_ceiling import TokenCeiling
from quest_attention.eval.methods.tova import TOVA

__all__ = [
    "H2O",
    "METHODS",
    "TOVA",
    "Full",
    "LayerReads",
    "Method",
    "PageCeiling",
    "Quest",
    "Session",
    "SlidingWindow",
    "SnapKV",
    "StreamingLLM",
    "TokenCeiling",
    "make_method",
    "spell_out",
]

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Full, Quest, PageCeiling, TokenCeiling, StreamingLLM, H2O, TOVA, SnapKV)
}
"""Every method of a table by name."""
_ENOUGH = 1 << 40
"""A budget that holds whatever pages are read always [tokens]: the real one is checked with the method."""


def make_method(
    spec: str, *, token_budget: int, num_dense_layers: int, page_size: int = 16, backend: str = "auto"
) -> Method:
    """A method from its name, with options of `QuestConfig` behind a colon for those that take pages.

    `"quest"` is the paper's method, whatever the defaults of `QuestConfig` become.

    Args:
        spec: `"quest"`, `"h2o"`, ..., `"quest:page_size=32,num_sink_pages=1"`.
        token_budget: Most tokens a step reads in a layer that may choose [tokens].
        num_dense_layers: Leading full-attention layers that read everything [layers].
        page_size: Tokens per page, where the spec says nothing else [tokens].
        backend: Of Quest's verbs, likewise.

    Raises:
        QuestValueError: The method or an option is unknown, or a value is out of range. What the spec brings in is
            laid to `method`; what comes with the other arguments, to those.

    >>> make_method("quest:num_dense_layers=0", token_budget=64, num_dense_layers=2).config.num_dense_layers
    0
    """
    name, colon, given = spec.partition(":")
    if name not in METHODS:
        raise QuestValueError("method", name, f"one of {', '.join(METHODS)}")
    kind = METHODS[name]
    if issubclass(kind, Quest):
        options = {
            "token_budget": token_budget,
            "num_dense_layers": num_dense_layers,
            "page_size": page_size,
            "backend": backend,
        }
        config = _config(spec, options, _parse(spec, given) if colon else {})
        if kind is PageCeiling and config.selection_unit != "page":
            expected = "selection_unit=page: it reads whole pages, and token_oracle tokens"
            raise QuestValueError("method", spec, expected)
        return kind(config)
    if colon:
        raise QuestValueError("method", spec, f"{name} without options: quest and oracle alone take them")
    return kind(token_budget, num_dense_layers) if issubclass(kind, Evicting | TokenCeiling) else kind()


def spell_out(spec: str, device: str, page_size: int = 16) -> str:
    """A method whose options say what metadata "auto" is on a device, so that a table says what was read.

    Args:
        spec: See `make_method`.
        device: Type of the device that the model runs on.
        page_size: Tokens per page, where the spec says nothing else [tokens].

    Raises:
        QuestValueError: The options are wrong, also for the form of that device.

    >>> spell_out("quest:metadata=auto,num_recent_pages=2", "cpu")
    'quest:metadata=moments,num_recent_pages=2,selection_unit=page'
    """
    name, _, given = spec.partition(":")
    own = _parse(spec, given) if given else {}
    if own.get("metadata") != "auto" or not issubclass(METHODS.get(name, Full), Quest):
        return spec
    config = _config(spec, {"page_size": page_size, "token_budget": _ENOUGH}, own, device)
    parts = [f"metadata={config.metadata}" if part == "metadata=auto" else part for part in given.split(",")]
    unit = [] if "selection_unit" in own else [f"selection_unit={config.selection_unit}"]
    return f"{name}:{','.join(parts + unit)}"


def _config(spec: str, options: dict[str, Any], own: dict[str, Any], device: str | None = None) -> QuestConfig:
    """The config of a method: the options of all, and on top of them its own."""
    try:
        if "metadata" not in own:  # the paper's method, whatever the defaults become
            return QuestConfig.paper(**{**options, **own})
        return QuestConfig.from_dict({**options, **own}, device)
    except QuestValueError as error:
        if own:
            QuestConfig.paper(**options)  # where they are wrong without its own too, they are to blame
            expected = f"another {error.argument}: {error.expected}, not {error.got!r}"
            raise QuestValueError("method", spec, expected) from None
        raise


def _parse(spec: str, given: str) -> dict[str, Any]:
    """Options written as `name=value`, parted by commas."""
    options: dict[str, Any] = {}
    for part in given.split(","):
        name, equals, value = part.partition("=")
        if not equals or name == "token_budget" or name in options:
            expected = "option=value behind the colon, each option once; the budget has an option of its own"
            raise QuestValueError("method", spec, expected)
        options[name] = _value(value)
    return options


def _value(text: str) -> int | float | str:
    """A number where it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text

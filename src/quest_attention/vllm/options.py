"""`read_options`: what stands under "quest" in vLLM's `--additional-config`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quest_attention.errors import QuestValueError
from quest_attention.serving.options import KEY, KNOWN, READING, QuestOptions

__all__ = ["BACKEND_NAME", "VLLMOptions", "near_misses", "read_options"]

BACKEND_NAME = "CUSTOM"
"""vLLM's name for an attention backend from outside: of `--attention-backend`."""
_OURS_ALONE = tuple(name for name in READING if name != "backend")
"""Options that nobody else has: beside "quest" they would be without effect."""
_NEAR = 0.75
"""How like "quest" a name must be to be meant for it, by `difflib`: "qest" is, and so is "request"."""
_NEAR_OPTION = 0.85
"""How like an option of Quest a name must be."""
_PAGE_SIZE = "page_size"


class VLLMOptions(QuestOptions):
    """Options of a server of vLLM, where a page is a block."""

    page_size_rule = "a page is vLLM's block, set by --block-size"
    page_size_hint = " (a page is a block of vLLM: --block-size)"


def read_options(vllm_config: Any, device: str) -> QuestOptions | None:
    """The options of a server, or None where it does not ask for Quest.

    Args:
        vllm_config: A `VllmConfig`.
        device: vLLM's type of the device, which is known in every process before a block is laid out.

    Raises:
        QuestValueError: Something under "quest" is unknown or wrong, "quest" is spelt otherwise, or an option of Quest
            stands beside it.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, Mapping):
        return None
    for name, value in additional.items():
        if name != KEY and str(name).strip().casefold() == KEY:
            raise QuestValueError("additional_config", name, f"{KEY!r}, in small letters")
        if name != KEY and _is_meant(str(name), value):
            raise QuestValueError("additional_config", name, f"{KEY!r}, whose options it has")
    if KEY not in additional:
        return None
    for name in _OURS_ALONE:
        if name in additional:
            raise QuestValueError(f"additional_config.{name}", additional[name], f"it under {KEY!r}: {KEY}.{name}")
    options = VLLMOptions.from_mapping(additional[KEY], device)
    speculation = getattr(vllm_config, "speculative_config", None)
    if options.verify == "dense" or speculation is None:
        return options
    return replace(options, query_tokens=1 + speculation.num_speculative_tokens)


def near_misses(additional: object) -> list[str]:
    """What stands in `--additional-config` that may be meant for Quest and is not read, in words.

    It belongs to other plugins too, so these are no errors.

    >>> near_misses({"quest": {}, "backend": "torch"})
    ["backend stands beside 'quest' in --additional-config, where Quest does not read it: quest.backend would be"]
    >>> near_misses({"token_budget": 512})
    ["token_budget stands in --additional-config without 'quest': Quest is off, and does not read it"]
    """
    if not isinstance(additional, Mapping):
        return []
    names = {str(name): _option_meant(str(name)) for name in additional if name != KEY}
    if KEY not in additional:
        return [
            f"{name} stands in --additional-config without {KEY!r}: Quest is off, and does not read it"
            for name, meant in names.items()
            if meant in _OURS_ALONE
        ]
    return [
        f"{name} stands beside {KEY!r} in --additional-config, where Quest does not read it"
        + ("; a page is vLLM's block, set by --block-size" if meant == _PAGE_SIZE else f": {KEY}.{meant} would be")
        for name, meant in names.items()
        if meant is not None
    ]


def _option_meant(name: str) -> str | None:
    """The option of Quest that a name is, or is like; None for another plugin's.

    >>> _option_meant("tokenbudget"), _option_meant("quest_token_budget"), _option_meant("kv_budget")
    ('token_budget', 'token_budget', None)
    """
    plain = name.removeprefix(f"{KEY}_")
    if plain in (*KNOWN, _PAGE_SIZE):
        return plain
    return next(iter(difflib.get_close_matches(plain, _OURS_ALONE, n=1, cutoff=_NEAR_OPTION)), None)


def _is_meant(name: str, value: object) -> bool:
    """Whether a name is like Quest's, and has options of it and nothing else under it."""
    is_like = difflib.SequenceMatcher(None, name.casefold(), KEY).ratio() >= _NEAR
    return is_like and isinstance(value, Mapping) and bool(value) and all(one in KNOWN for one in value)

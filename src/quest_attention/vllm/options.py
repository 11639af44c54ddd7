"""`read_options`: what stands under "quest" in vLLM's `--additional-config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quest_attention.errors import QuestValueError
from quest_attention.serving.options import KEY, READING, QuestOptions
from quest_attention.vllm.kinds import other_layers

__all__ = ["VLLMOptions", "read_options"]

_OURS_ALONE = tuple(name for name in READING if name != "backend")
"""Options that nobody else has: beside "quest" they would be without effect."""


class VLLMOptions(QuestOptions):
    """Options of a server of vLLM, where a page is a block."""

    page_size_rule = "a page is vLLM's block, set by --block-size"
    page_size_hint = " (a page is a block of vLLM: --block-size)"


def read_options(vllm_config: Any, device: str) -> QuestOptions | None:
    """The options of a server, or None where it does not ask for Quest.

    Unless metadata is among the options, it is "auto" for a model that has other layers beside those with full
    attention: few then see what is far away, and with bounds they lose more facts (docs/vllm.md, Models).

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
    for name in additional:
        if name != KEY and str(name).strip().casefold() == KEY:
            raise QuestValueError("additional_config", name, f"{KEY!r}, in small letters")
    if KEY not in additional:
        return None
    for name in _OURS_ALONE:
        if name in additional:
            raise QuestValueError(f"additional_config.{name}", additional[name], f"it under {KEY!r}: {KEY}.{name}")
    given, model = additional[KEY], getattr(vllm_config, "model_config", None)
    if isinstance(given, Mapping) and model is not None and other_layers(model) is not None:
        given = {"metadata": "auto", **given}
    return VLLMOptions.from_mapping(given, device)

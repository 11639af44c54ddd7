"""Forms of page metadata, a file each: what is stored of a page's keys, and how a query scores it.

A form is found by its name in `QuestConfig`. CONTRIBUTING.md says how one is added.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import torch

from quest_attention.config import QuestConfig, refuse_auto
from quest_attention.forms.bounds import KEY_MAX, KEY_MIN, Bounds
from quest_attention.forms.form import FP8, MetadataForm, Scored, TwoVectors, as_bits
from quest_attention.forms.moments import DEVIATION, MEAN, Moments
from quest_attention.forms.rounding import round_near
from quest_attention.forms.sketch import Sketch, SketchLayout

__all__ = [
    "DEVIATION",
    "FP8",
    "KEY_MAX",
    "KEY_MIN",
    "MEAN",
    "Bounds",
    "MetadataForm",
    "Moments",
    "Scored",
    "Sketch",
    "SketchLayout",
    "TwoVectors",
    "as_bits",
    "form_of",
    "metadata_dtype",
    "round_near",
]

_FORMS: dict[str, Callable[[QuestConfig], MetadataForm]] = {
    Bounds.name: lambda _: Bounds(),
    Moments.name: lambda config: Moments(cast("float", config.moments_coefficient)),
    Sketch.name: lambda config: Sketch(config.page_size),
    "auto": lambda _: refuse_auto(),
}


@cache  # asked at every step
def form_of(config: QuestConfig) -> MetadataForm:
    """The form that a config asks for.

    Raises:
        QuestValueError: It asks for "auto", and no device has said what that is: see `QuestConfig.resolved`.

    >>> form_of(QuestConfig(metadata="moments"))
    Moments(coefficient=1.0)
    """
    return _FORMS[config.metadata](config)


def metadata_dtype(config: QuestConfig, keys: torch.dtype) -> torch.dtype:
    """In which a config stores metadata beside keys of a dtype.

    >>> metadata_dtype(QuestConfig(metadata_dtype="fp8"), torch.bfloat16)
    torch.float8_e4m3fn
    """
    return FP8 if config.metadata_dtype == "fp8" else form_of(config).dtypes(keys)[0]

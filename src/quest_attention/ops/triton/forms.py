"""The form of the metadata in a kernel: which device functions score pages and take tokens, chosen when it is compiled.

A form is a constant of the kernels by its name and not by its functions: hooks that Triton calls when it compiles, as
vLLM sets one, want constants that JSON can hold.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl

from quest_attention.errors import QuestValueError
from quest_attention.forms import Bounds, MetadataForm, Moments
from quest_attention.ops.triton.bounds import score_bounds, take_bounds
from quest_attention.ops.triton.moments import score_moments, take_moments

__all__ = ["KernelForm", "kernel_form", "score_form", "take_form"]


class KernelForm(NamedTuple):
    """A form as a constant of the kernels.

    Attributes:
        name: As in `QuestConfig.metadata`.
        coefficient: Of the score; what it means is the form's.
    """

    name: str
    coefficient: float


@cache
def kernel_form(form: MetadataForm) -> KernelForm:
    """The constant that says a form.

    Raises:
        QuestValueError: `score_form` and `take_form` have no branch for it.
    """
    if form.name not in (Bounds.name, Moments.name):
        raise QuestValueError("form", form.name, f"{Bounds.name} or {Moments.name} for the Triton kernels")
    return KernelForm(form.name, float(form.coefficient))


@triton.jit
def score_form(q, metadata, h, physical, is_live, FORM: tl.constexpr, SHAPE: tl.constexpr):
    """The unscaled logit of pages `physical`, `[BLOCK_P]`, of head `h` for each query head, float32.

    Returns:
        `[BLOCK_P]` for a single head, else `[BLOCK_G, BLOCK_P]`; not finite where a key of the page is not.
    """
    if FORM.name == "moments":
        score = score_moments(q, metadata, h, physical, is_live, FORM.coefficient, SHAPE)
    else:
        score = score_bounds(q, metadata, h, physical, is_live, SHAPE)
    return score


@triton.jit
def take_form(at, side, key, is_fresh, before, inside, FORM: tl.constexpr):
    """Merge the fresh keys of a page with what is stored of it, and store that; see `take_bounds`."""
    if FORM.name == "moments":
        take_moments(at, side, key, is_fresh, before, inside)
    else:
        take_bounds(at, side, key, is_fresh, before, inside)

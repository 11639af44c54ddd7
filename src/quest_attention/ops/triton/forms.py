"""`FormKernels`: how a kernel gets what is stored per page, and how a query scores it."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from quest_attention.forms import Bounds, MetadataForm, Moments
from quest_attention.ops.triton.bounds import score_bounds, take_bounds
from quest_attention.ops.triton.moments import score_moments, take_moments

__all__ = ["FormKernels", "kernels_of"]


class FormKernels(NamedTuple):
    """A form of page metadata, a constant of the kernels; `bounds.py` shows what the functions take.

    Attributes:
        score: Device function: the unscaled logit of each page for each query head, float32, `[BLOCK_P]` for a single
            head, else `[BLOCK_G, BLOCK_P]`; not finite where a key of the page is not.
        take: Device function: merge the fresh keys of a page with what is stored of it, and store that.
        coefficient: Of the score; what it means is the form's.
    """

    score: Any
    take: Any
    coefficient: float

    @property
    def cache_key(self) -> str:
        """What Triton asks a constant for: by its name alone it would keep a kernel on disk when a function changes."""
        return f"{self.score.cache_key}-{self.take.cache_key}-{self.coefficient}"


_KERNELS = {Bounds.name: (score_bounds, take_bounds), Moments.name: (score_moments, take_moments)}


@cache
def kernels_of(form: MetadataForm) -> FormKernels:
    """The device functions of a form."""
    return FormKernels(*_KERNELS[form.name], float(form.coefficient))

"""What is kept of pages, held to their keys: for the oracles inside vLLM, on a CPU and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_attention.forms import KEY_MAX, KEY_MIN, MetadataForm

__all__ = ["is_right"]


def is_right(form: MetadataForm, kept: Tensor, keys: Tensor, length: int) -> Tensor:
    """Whether what is kept of the pages of one sequence is what the form promises, `[P]`.

    Bounds have every key within them. Moments are off by a rounding to their dtype, of the page's largest key, for each
    time that the page was written to, which is once a token at most (as in tests/ops/test_forms.py).

    Args:
        form: Of what is kept.
        kept: `[P, H, 2, D]`.
        keys: `[P, N, H, D]`; NaN where nobody wrote, which is never right in a page's tokens.
        length: Of the sequence, whose last page may be part-filled [tokens].
    """
    pages, page_size = keys.shape[:2]
    eps = torch.finfo(kept.dtype).eps
    kept, keys = kept.double(), keys.double()
    token = torch.arange(pages * page_size, device=keys.device).view(pages, page_size)
    beyond = (token >= length)[:, :, None, None]
    if form.is_bound:
        bounded = (keys <= kept[:, None, :, KEY_MAX]) & (keys >= kept[:, None, :, KEY_MIN])
        return (bounded | beyond).flatten(1).all(1)
    assert form.name == "moments", f"say here what {form.name} promises"
    keys = keys.masked_fill(beyond, 0)
    count = (token < length).sum(1)[:, None, None]
    mean = keys.sum(1) / count  # [P, H, D]
    spread = (keys - mean[:, None]).masked_fill(beyond, 0).square().sum(1)
    off = (kept - torch.stack([mean, (spread / count).sqrt()], 2)).abs().flatten(1).amax(1)
    return off <= count.flatten() * eps * keys.abs().flatten(1).amax(1)

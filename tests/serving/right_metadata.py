"""What is kept of pages, held to their keys: for the oracles inside vLLM, on a CPU and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_attention.forms import KEY_MAX, KEY_MIN, MetadataForm, SketchLayout

__all__ = ["is_right"]

_BITS_OF_A_TOKEN = 1 / 8
"""Of the bits of a token's channel signs, how many of a page's may differ: those of numbers near zero fall either way
where sums are of another order, while half of those of a token that is not the page's do."""


def is_right(form: MetadataForm, kept: Tensor, keys: Tensor, length: int) -> Tensor:
    """Whether what is kept of the pages of one sequence is what the form promises, `[P]`.

    Bounds have every key within them. Moments are off by a rounding to their dtype, of the page's largest key, for each
    time that the page was written to, which is once a token at most (as in tests/ops/test_forms.py). A sketch is that
    which a complete page's keys give; of the page being written there is none.

    Args:
        form: Of what is kept.
        kept: `[P, H, *form.shape]`.
        keys: `[P, N, H, D]`; NaN where nobody wrote, which is never right in a page's tokens.
        length: Of the sequence, whose last page may be part-filled [tokens].
    """
    pages, page_size = keys.shape[:2]
    if form.name == "sketch":
        return _is_sketch(form, kept, keys, length)
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


def _is_sketch(form: MetadataForm, kept: Tensor, keys: Tensor, length: int) -> Tensor:
    """Whether sketches `[P, H, 1, bytes]` are those of the complete pages of `keys`, `[P]`."""
    (pages, page_size), dim = keys.shape[:2], keys.shape[3]
    fresh = torch.zeros_like(kept)
    form.take(fresh, keys.transpose(1, 2), 0)
    at = SketchLayout.of(page_size, dim)
    ours, theirs = (part[:, :, 0].clone() for part in (kept, fresh))
    scales, expected = (
        part[..., at.scales : at.scales + 8].contiguous().view(torch.float32) for part in (ours, theirs)
    )
    for part in (ours, theirs):
        part[..., at.scales : at.scales + 8] = 0
    differ = ours ^ theirs
    count = sum((differ >> bit & 1).sum(2, dtype=torch.int32) for bit in range(8))  # [P, H]
    is_like = (count <= dim * _BITS_OF_A_TOKEN) & ((scales - expected).abs() <= expected.abs() / 64).all(2)
    is_whole = (torch.arange(pages, device=keys.device) + 1) * page_size <= length
    return is_like.all(1) | ~is_whole

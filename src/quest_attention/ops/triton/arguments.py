"""What kernels take: a tensor with its strides as one argument, and the sizes of a problem as one constant.

Triton specialises the integers in a tuple, and `do_not_specialize` does not reach them: so a tuple holds strides, and
what varies from call to call is an argument of its own. What may be missing is None, which to a kernel is a constant.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from quest_attention.pages import PagedKV

__all__ = [
    "ByHead",
    "Metadata",
    "Pages",
    "Shape",
    "by_head",
    "keys_argument",
    "length_of",
    "lengths_argument",
    "load_query",
    "metadata_argument",
    "scored_metadata_argument",
    "shape_of",
    "side_by_side",
    "values_argument",
]

_SMALLEST_DOT = 16
"""Fewest rows of a matrix product on a tensor core."""
_MERGED_HEADS = 4
"""Query heads whose partial results one program merges side by side."""


class ByHead(NamedTuple):
    """A tensor `[rows, heads, ...]`, what a head has side by side: queries, new tokens, scores, lists of pages."""

    base: Any
    row: Any
    head: Any


class Pages(NamedTuple):
    """Keys or values `[N, page_size, HKV, D]`.

    What is stored is multiplied by a `scale`, one of all heads or one of each, `scale_head` apart; None where there is
    none. Triton 3.6 returns no None from a device function, so these take `h` where the head of a row is meant.
    """

    base: Any
    page: Any
    token: Any
    head: Any
    scale: Any
    scale_head: Any


class Metadata(NamedTuple):
    """Page metadata `[N, HKV, 2, D]` of keys as they are stored, with the scale of those, as in `Pages`."""

    base: Any
    page: Any
    head: Any
    side: Any
    scale: Any
    scale_head: Any


class Shape(NamedTuple):
    """Sizes of a problem, each with the power of two that holds it: a constant of the kernel.

    Attributes:
        page_size: Tokens per page [tokens].
        block_page: The same.
        unit: Tokens of what is selected, which divide a page [tokens].
        group: Query heads per KV head.
        block_g: Rows a GQA group has in a matrix product; 1 where a single head does without one.
        merged: Query heads whose partial results are merged side by side.
        head_dim: Channels of keys and queries.
        block_d: The same.
        value_dim: Channels of values.
        block_dv: The same.
    """

    page_size: int
    block_page: int
    unit: int
    group: int
    block_g: int
    merged: int
    head_dim: int
    block_d: int
    value_dim: int
    block_dv: int


@cache
def shape_of(
    page_size: int, group: int, head_dim: int, value_dim: int, *, unit: int | None = None, multiplies: bool = False
) -> Shape:
    """The sizes of a problem; units are pages by default; a single head is in a matrix product if it `multiplies`."""
    rows = triton.next_power_of_2(group)
    return Shape(
        page_size=page_size,
        block_page=triton.next_power_of_2(page_size),
        unit=page_size if unit is None else unit,
        group=group,
        block_g=1 if group == 1 and not multiplies else max(_SMALLEST_DOT, rows),
        merged=min(_MERGED_HEADS, rows),
        head_dim=head_dim,
        block_d=max(_SMALLEST_DOT, triton.next_power_of_2(head_dim)),
        value_dim=value_dim,
        block_dv=max(_SMALLEST_DOT, triton.next_power_of_2(value_dim)),
    )


def side_by_side(tensor: Tensor) -> Tensor:
    """A small tensor as kernels read it, whose last stride is 1: itself, or a copy, which a graph captures too."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def by_head(tensor: Tensor) -> ByHead:
    """A tensor `[rows, heads, ...]` as an argument."""
    row, head, *_ = tensor.stride()
    return ByHead(tensor, row, head)


def keys_argument(kv: PagedKV) -> Pages:
    """The keys of a cache as an argument."""
    return _pages(kv.keys, kv.key_scale)


def values_argument(kv: PagedKV) -> Pages:
    """The values of a cache as an argument."""
    return _pages(kv.values, kv.value_scale)


def scored_metadata_argument(kv: PagedKV) -> Metadata:
    """The page metadata of a cache as an argument, with the scale that scoring needs."""
    return metadata_argument(kv.metadata, kv.key_scale)


def _pages(tensor: Tensor, scale: Tensor | None) -> Pages:
    page, token, head, _ = tensor.stride()
    return Pages(tensor, page, token, head, scale, _scale_stride(scale))


def metadata_argument(tensor: Tensor, scale: Tensor | None = None) -> Metadata:
    """Page metadata as an argument."""
    page, head, side, _ = tensor.stride()
    return Metadata(tensor, page, head, side, scale, _scale_stride(scale))


def _scale_stride(scale: Tensor | None) -> int | None:
    """From a head's scale to the next one's, 0 where all have one."""
    if scale is None:
        return None
    return 0 if scale.shape[0] == 1 else scale.stride(0)


def lengths_argument(value: Tensor | int) -> Tensor | int:
    """Lengths on the device, or one known to the host, as an argument that is not specialised: see `length_of`."""
    return value if isinstance(value, int) else side_by_side(value)


@triton.jit
def length_of(lengths, b):
    """The length of sequence `b`, whoever knows it."""
    if lengths.dtype.is_ptr():
        return tl.load(lengths + b).to(tl.int32)
    else:  # noqa: RET505 - Triton takes a constant condition's branches for one only so
        return lengths


@triton.jit
def load_query(query, b, h, SHAPE: tl.constexpr):
    """The queries of a group, `[BLOCK_G, BLOCK_D]`."""
    head = tl.arange(0, SHAPE.block_g)
    channel = tl.arange(0, SHAPE.block_d)
    inside = (head < SHAPE.group)[:, None] & (channel < SHAPE.head_dim)[None, :]
    at = query.base + b * query.row + h * SHAPE.group * query.head
    return tl.load(at + head[:, None] * query.head + channel[None, :], mask=inside, other=0.0)

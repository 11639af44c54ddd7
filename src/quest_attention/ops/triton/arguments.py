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

__all__ = [
    "ByHead",
    "Metadata",
    "Pages",
    "Shape",
    "by_head",
    "length_of",
    "lengths_argument",
    "load_query",
    "metadata_argument",
    "metadata_of_head",
    "pages_argument",
    "pages_of_head",
    "shape_of",
    "side_by_side",
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
    """Keys or values `[N, page_size, HKV, D]`, or those of one head."""

    base: Any
    page: Any
    token: Any
    head: Any


class Metadata(NamedTuple):
    """Page metadata `[N, HKV, 2, D]`, or that of one head."""

    base: Any
    page: Any
    head: Any
    side: Any


class Shape(NamedTuple):
    """Sizes of a problem, each with the power of two that holds it: a constant of the kernel.

    Attributes:
        page_size: Tokens per page [tokens].
        block_page: The same.
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
    group: int
    block_g: int
    merged: int
    head_dim: int
    block_d: int
    value_dim: int
    block_dv: int


@cache
def shape_of(page_size: int, group: int, head_dim: int, value_dim: int, *, multiplies: bool = False) -> Shape:
    """The sizes of a problem; a single head takes part in a matrix product if it `multiplies`."""
    rows = triton.next_power_of_2(group)
    return Shape(
        page_size=page_size,
        block_page=triton.next_power_of_2(page_size),
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


def pages_argument(tensor: Tensor) -> Pages:
    """Keys or values of a cache as an argument."""
    page, token, head, _ = tensor.stride()
    return Pages(tensor, page, token, head)


def metadata_argument(tensor: Tensor) -> Metadata:
    """Page metadata as an argument."""
    page, head, side, _ = tensor.stride()
    return Metadata(tensor, page, head, side)


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
def pages_of_head(pages, h):
    """Keys or values of one head."""
    return Pages(pages.base + h * pages.head, pages.page, pages.token, pages.head)


@triton.jit
def metadata_of_head(metadata, h):
    """Metadata of one head."""
    return Metadata(metadata.base + h * metadata.head, metadata.page, metadata.head, metadata.side)


@triton.jit
def load_query(query, b, h, SHAPE: tl.constexpr):
    """The queries of a group, `[BLOCK_G, BLOCK_D]`."""
    head = tl.arange(0, SHAPE.block_g)
    channel = tl.arange(0, SHAPE.block_d)
    inside = (head < SHAPE.group)[:, None] & (channel < SHAPE.head_dim)[None, :]
    at = query.base + b * query.row + h * SHAPE.group * query.head
    return tl.load(at + head[:, None] * query.head + channel[None, :], mask=inside, other=0.0)

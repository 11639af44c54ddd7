"""Kernels: several query tokens of a sequence in one step, their heads side by side as those of one group.

To what lies before them all they attend as `attention` does, its keys and values read once. A program for each row then
attends to the tokens of the step, each to those that are no later, and writes that as one split more, which is merged
with the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.ops.query_tokens import QueryTokens
from quest_attention.ops.selection import Selection
from quest_attention.ops.step import Step
from quest_attention.ops.triton.arguments import (
    by_head,
    keys_argument,
    length_of,
    lengths_argument,
    load_query,
    side_by_side,
    values_argument,
)
from quest_attention.ops.triton.arithmetic import LOG2_E, cap, dot, round_to, widen
from quest_attention.ops.triton.attention import attend_splits, merge_found
from quest_attention.ops.triton.launch import launch
from quest_attention.ops.triton.merge import LOWEST, store_partial

if TYPE_CHECKING:
    from quest_attention.ops.dispatch import Verbs

__all__ = ["TritonQueryTokens"]

_SMALLEST_DOT = 16
"""Fewest tokens of a matrix product on a tensor core."""
_ALONE = tl.constexpr(1e30)
"""Stands for the largest logit of a token that a sequence does not have: nothing else then has any weight."""


class TritonQueryTokens(QueryTokens):
    """Several query tokens, folded and attended to in launches of their own."""

    __slots__ = ()

    def folded(self) -> Tensor:
        """See `QueryTokens`."""
        query, heads = side_by_side(self.query), self.kv.num_kv_heads
        batch, count, num_heads, dim = query.shape
        folded = torch.empty(batch, count * num_heads, dim, dtype=query.dtype, device=query.device)
        sequence, token, head, _ = query.stride()
        launch(
            _fold_kernel, (batch * heads * count,),
            query, sequence, token, head, None if self.lens is None else side_by_side(self.lens), folded, heads, count,
            GROUP=num_heads // heads, BLOCK_G=triton.next_power_of_2(num_heads // heads), DIM=dim,
            BLOCK_D=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
        return folded

    def attend_folded(self, step: Step, before: Step, selected: Selection, verbs: Verbs) -> Tensor:  # noqa: ARG002
        """See `QueryTokens`; the verbs are those of this package."""
        kv, heads = step.kv, step.kv.num_kv_heads
        found, shape = attend_splits(before, selected, room=1)
        query, table = side_by_side(step.query), side_by_side(kv.page_table)
        splits = found.partial.shape[1]
        launch(
            _own_kernel, (kv.batch_size * heads,),
            by_head(query), keys_argument(kv), values_argument(kv), table, table.stride(0),
            lengths_argument(step.seq_lens), None if self.lens is None else side_by_side(self.lens), found,
            float(step.scale), None if step.softcap is None else float(step.softcap), heads, splits,
            SHAPE=shape, TOKENS=self.count, BLOCK_T=max(_SMALLEST_DOT, triton.next_power_of_2(self.count)), num_warps=4,
        )  # fmt: skip
        return merge_found(step, found, shape)[0]


@triton.jit(do_not_specialize=["num_kv_heads", "tokens"])
def _fold_kernel(
    query, sequence_stride, token_stride, head_stride, lens, folded, num_kv_heads, tokens,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The heads of a group and token, to where they stand in the folded queries."""
    at = tl.program_id(0).to(tl.int64)
    t = at % tokens
    h = at // tokens % num_kv_heads
    b = at // tokens // num_kv_heads
    from_token = t
    if lens is not None:
        from_token = tl.maximum(tl.minimum(t, tl.load(lens + b).to(tl.int64) - 1), 0)
    head = tl.arange(0, BLOCK_G)
    channel = tl.arange(0, BLOCK_D)
    inside = (head < GROUP)[:, None] & (channel < DIM)[None, :]
    source = query + b * sequence_stride + from_token * token_stride + (h * GROUP + head)[:, None] * head_stride
    found = tl.load(source + channel[None, :], mask=inside)
    tl.store(folded + (at * GROUP + head)[:, None] * DIM + channel[None, :], found, mask=inside)


@triton.jit(do_not_specialize=["lengths", "num_kv_heads", "splits"])
def _own_kernel(
    query, keys, values, page_table, table_stride, lengths, lens, found, scale, softcap, num_kv_heads, splits,
    SHAPE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Attention of a row's query tokens to one another: the last of its splits."""
    row = tl.program_id(0)
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = length_of(lengths, b)
    have = end * 0 + TOKENS
    if lens is not None:
        have = tl.load(lens + b).to(tl.int32)
    have = tl.minimum(have, end)  # a row that only pads a batch has none
    q = load_query(query, b, h, SHAPE)
    BLOCK_DV: tl.constexpr = SHAPE.block_dv
    channel = tl.arange(0, SHAPE.block_d)
    value_channel = tl.arange(0, BLOCK_DV)
    nth = tl.arange(0, BLOCK_T)
    is_token = nth < have
    position = end - have + nth
    page = tl.load(page_table + b * table_stride + position // SHAPE.page_size, mask=is_token, other=0).to(tl.int64)
    offset = (position % SHAPE.page_size).to(tl.int64)
    key_at = keys.base + h * keys.head + (page * keys.page + offset * keys.token)[:, None] + channel[None, :]
    k = tl.load(key_at, mask=is_token[:, None] & (channel < SHAPE.head_dim)[None, :], other=0.0)
    value_at = values.base + h * values.head + (page * values.page + offset * values.token)[:, None]
    value_at = value_at + value_channel[None, :]
    v = tl.load(value_at, mask=is_token[:, None] & (value_channel < SHAPE.value_dim)[None, :], other=0.0)
    if keys.scale is not None:
        scale = scale * tl.load(keys.scale + h * keys.scale_head)
    HEADS: tl.constexpr = SHAPE.group // TOKENS
    BLOCK_G: tl.constexpr = SHAPE.block_g
    of_token = tl.arange(0, BLOCK_G) // HEADS  # whose the heads are
    sees = is_token[None, :] & (nth[None, :] <= of_token[:, None])
    logit = dot(q, tl.trans(widen(k, q.dtype)), tl.zeros([BLOCK_G, BLOCK_T], tl.float32))
    logit = tl.where(sees, cap(logit * scale, softcap) * LOG2_E, LOWEST)
    largest = tl.max(logit, 1)
    weight = tl.where(sees, tl.exp2(logit - largest[:, None]), 0.0)
    v = widen(v, q.dtype)
    rounded = round_to(weight, v.dtype)
    total = tl.sum(rounded.to(tl.float32), 1)
    gathered = dot(rounded, v, tl.zeros([BLOCK_G, BLOCK_DV], tl.float32))
    if values.scale is not None:
        gathered = gathered * tl.load(values.scale + h * values.scale_head)
    is_there = of_token < have
    largest = tl.where(is_there, largest, _ALONE)
    total = tl.where(is_there, total, 1.0)
    gathered = tl.where(is_there[:, None], gathered, 0.0)
    store_partial(found, row, splits - 1, splits, largest, total, gathered, SHAPE)

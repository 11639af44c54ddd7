"""Kernel: bound the largest logit each page can give to the query.

The split query `[relu(q), min(q, 0)]` meets the bounds `[max ; min]` in two matrix products, so that one read of a
page's bounds serves the whole GQA group; a single head takes the equation as it stands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.ops.step import Step
from quest_attention.ops.triton.launch import check_kernel_dtype, dot, launch, lengths_argument, side_by_side
from quest_attention.ops.triton.tuning import scored_block, scoring_programs

__all__ = ["dot_block", "group_block", "load_query", "score_pages", "score_row"]

_SMALLEST_DOT = 16
"""Fewest rows of a matrix product on a tensor core."""


def dot_block(group: int) -> int:
    """Rows a kernel gives a GQA group in a matrix product."""
    rows: int = triton.next_power_of_2(group)
    return max(_SMALLEST_DOT, rows)


def group_block(group: int) -> int:
    """The same where a single head does without a matrix product."""
    return 1 if group == 1 else dot_block(group)


def score_pages(step: Step, out: Tensor | None = None) -> Tensor:
    """See `ops.score_pages`."""
    kv, seq_lens, token_mask = step.kv, step.seq_lens, step.token_mask
    check_kernel_dtype(kv.keys)
    query, table = side_by_side(step.query), side_by_side(kv.page_table)
    batch, heads, group = kv.batch_size, kv.num_kv_heads, query.shape[1] // kv.num_kv_heads
    shape = (batch, heads, kv.max_pages)
    scores = torch.empty(shape, dtype=torch.float32, device=query.device) if out is None else out
    lengths, length = lengths_argument(seq_lens, table)
    mask = query if token_mask is None else side_by_side(token_mask)
    block, stages = scored_block(kv, group)
    splits = scoring_programs(kv.max_pages, block, batch * heads, query.device)
    launch(
        _score_kernel,
        (batch * heads * splits,),
        query,
        kv.metadata,
        table,
        lengths,
        length,
        mask,
        0 if token_mask is None else token_mask.shape[1],
        scores,
        *query.stride()[:2],
        *kv.metadata.stride()[:3],
        table.stride(0),
        0 if token_mask is None else mask.stride(0),
        *scores.stride()[:2],
        kv.max_pages,
        heads,
        splits,
        RAGGED=isinstance(seq_lens, Tensor),
        MASKED=token_mask is not None,
        IS_MAX=step.config.group_reduction == "max",
        PAGE_SIZE=kv.page_size,
        BLOCK_T=triton.next_power_of_2(kv.page_size),
        GROUP=group,
        BLOCK_G=group_block(group),
        HEAD_DIM=kv.head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(kv.head_dim)),
        BLOCK_P=block,
        STAGES=stages,
        num_warps=4,
    )
    return scores


@triton.jit
def load_query(
    query, stride, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The queries of a group, `[BLOCK_G, BLOCK_D]`."""
    head = tl.arange(0, BLOCK_G)
    channel = tl.arange(0, BLOCK_D)
    inside = (head < GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(query + head[:, None] * stride + channel[None, :], mask=inside, other=0.0)


@triton.jit
def score_row(
    q,  # [BLOCK_G, BLOCK_D]
    metadata,  # of the row's head
    physical,  # [BLOCK_P] pages; what stands where nothing is live is not used
    is_live,
    page_stride,
    side_stride,
    IS_MAX: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores `[BLOCK_P]` of some pages of one row; what is not live gives nothing to rely on."""
    channel = tl.arange(0, BLOCK_D)
    at = metadata + physical.to(tl.int64)[:, None] * page_stride + channel[None, :]
    inside = is_live[:, None] & (channel < HEAD_DIM)[None, :]
    key_max = tl.load(at, mask=inside, other=0.0)
    key_min = tl.load(at + side_stride, mask=inside, other=0.0)
    positive, negative = tl.maximum(q.to(tl.float32), 0.0), tl.minimum(q.to(tl.float32), 0.0)
    # Where a key is not finite the product with the other part of the query, zero, is NaN: such a page ranks first,
    # so that it is read and shows as in dense attention.
    if BLOCK_G == 1:
        score = tl.sum(positive * key_max.to(tl.float32) + negative * key_min.to(tl.float32), 1)
        score = tl.where(tl.abs(score) < float("inf"), score, float("inf"))
    else:
        bounds = tl.zeros([BLOCK_G, physical.shape[0]], tl.float32)
        bounds = dot(positive.to(q.dtype), tl.trans(key_max.to(q.dtype)), bounds)
        bounds = dot(negative.to(q.dtype), tl.trans(key_min.to(q.dtype)), bounds)
        bounds = tl.where(tl.abs(bounds) < float("inf"), bounds, float("inf"))
        is_head = (tl.arange(0, BLOCK_G) < GROUP)[:, None]
        if IS_MAX:
            score = tl.max(tl.where(is_head, bounds, float("-inf")), 0)
        else:
            score = tl.sum(tl.where(is_head, bounds, 0.0), 0) / GROUP
    return score


@triton.jit(do_not_specialize=["length", "max_pages", "mask_width", "splits"])
def _score_kernel(
    query,
    metadata,
    page_table,
    seq_lens,
    length,
    token_mask,
    mask_width,
    scores,
    query_batch_stride,
    query_head_stride,
    meta_page_stride,
    meta_head_stride,
    meta_side_stride,
    table_stride,
    mask_stride,
    score_batch_stride,
    score_head_stride,
    max_pages,
    num_kv_heads,
    splits,
    RAGGED: tl.constexpr,
    MASKED: tl.constexpr,
    IS_MAX: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    split = program % splits
    row = program // splits
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = length
    if RAGGED:
        end = tl.load(seq_lens + b).to(tl.int32)
    row_table = page_table + b * table_stride
    out = scores + b * score_batch_stride + h * score_head_stride
    q = load_query(
        query + b * query_batch_stride + h * GROUP * query_head_stride,
        query_head_stride,
        GROUP,
        BLOCK_G,
        HEAD_DIM,
        BLOCK_D,
    )
    for first in tl.range(split * BLOCK_P, max_pages, splits * BLOCK_P, num_stages=STAGES):
        page = first + tl.arange(0, BLOCK_P)
        is_live = page * PAGE_SIZE < end
        score = score_row(
            q,
            metadata + h * meta_head_stride,
            tl.load(row_table + page, mask=is_live, other=0),
            is_live,
            meta_page_stride,
            meta_side_stride,
            IS_MAX,
            GROUP,
            BLOCK_G,
            HEAD_DIM,
            BLOCK_D,
        )
        if MASKED:
            token = tl.arange(0, BLOCK_T)
            position = page[:, None] * PAGE_SIZE + token[None, :]
            known = (token < PAGE_SIZE)[None, :] & (position < end) & (position < mask_width)
            seen = tl.load(token_mask + b * mask_stride + position, mask=known, other=0)
            is_live = is_live & (tl.max(seen.to(tl.int32), 1) > 0)
        tl.store(out + page, tl.where(is_live, score, float("-inf")), mask=page < max_pages)

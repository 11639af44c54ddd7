"""Kernel: score each page by the logit it may give to the query, as the form of the metadata says."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.ops.masses import score_masses
from quest_attention.ops.step import Step
from quest_attention.ops.triton.arguments import (
    by_head,
    length_of,
    lengths_argument,
    load_query,
    scored_metadata_argument,
    shape_of,
    side_by_side,
)
from quest_attention.ops.triton.fetch import fetch_units
from quest_attention.ops.triton.forms import kernel_form, score_form
from quest_attention.ops.triton.launch import check_kernel_dtype, launch
from quest_attention.ops.triton.masks import load_seen
from quest_attention.ops.triton.sketch import SketchEstimates
from quest_attention.ops.triton.tuning import scored_block, scoring_programs

__all__ = ["score_pages", "score_row"]


def score_pages(step: Step, out: Tensor | None = None) -> Tensor:
    """See `ops.score_pages`. Of tokens, kernels make the estimates, and PyTorch weighs them."""
    kv, token_mask = step.kv, step.token_mask
    check_kernel_dtype(kv.keys)
    if kv.form.scores == "token":
        return score_masses(step, out, SketchEstimates(step), fetch=fetch_units)
    query, table = side_by_side(step.query), side_by_side(kv.page_table)
    batch, heads, group = kv.batch_size, kv.num_kv_heads, query.shape[1] // kv.num_kv_heads
    shape = (batch, heads, kv.max_pages)
    scores = torch.empty(shape, dtype=torch.float32, device=query.device) if out is None else out
    mask = None if token_mask is None else side_by_side(token_mask)
    block, stages = scored_block(kv, group)
    splits = scoring_programs(kv.max_pages, block, batch * heads, query.device)
    launch(
        _score_kernel, (batch * heads * splits,),
        by_head(query), scored_metadata_argument(kv), table, table.stride(0), lengths_argument(step.seq_lens),
        mask, 0 if mask is None else mask.stride(0), 0 if mask is None else mask.shape[1], by_head(scores),
        kv.max_pages, heads, splits,
        FORM=kernel_form(kv.form), IS_MAX=step.config.group_reduction == "max",
        SHAPE=shape_of(kv.page_size, group, kv.head_dim, kv.values.shape[-1]), BLOCK_P=block, STAGES=stages,
        num_warps=4,
    )  # fmt: skip
    return scores


@triton.jit
def score_row(
    q, metadata, h, physical, is_live, FORM: tl.constexpr, IS_MAX: tl.constexpr, SHAPE: tl.constexpr
):  # fmt: skip
    """Scores `[BLOCK_P]` of some pages of one row; where none is live, what stands there is not to be relied on."""
    score = score_form(q, metadata, h, physical, is_live, FORM, SHAPE)
    if metadata.scale is not None:
        score = score * tl.load(metadata.scale + h * metadata.scale_head)
    # A page with a key that is not finite ranks first, so that it is read and shows as in dense attention.
    score = tl.where(tl.abs(score) < float("inf"), score, float("inf"))
    if SHAPE.block_g > 1:
        is_head = (tl.arange(0, SHAPE.block_g) < SHAPE.group)[:, None]
        if IS_MAX:
            score = tl.max(tl.where(is_head, score, float("-inf")), 0)
        else:
            score = tl.sum(tl.where(is_head, score, 0.0), 0) / SHAPE.group
    return score


@triton.jit(do_not_specialize=["lengths", "max_pages", "mask_width", "splits"])
def _score_kernel(
    query, metadata, page_table, table_stride, lengths, token_mask, mask_stride, mask_width, scores, max_pages,
    num_kv_heads, splits,
    FORM: tl.constexpr, IS_MAX: tl.constexpr, SHAPE: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = program % splits
    row = program // splits
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = length_of(lengths, b)
    row_table = page_table + b * table_stride
    out = scores.base + b * scores.row + h * scores.head
    q = load_query(query, b, h, SHAPE)
    for first in tl.range(split * BLOCK_P, max_pages, splits * BLOCK_P, num_stages=STAGES):
        page = first + tl.arange(0, BLOCK_P)
        is_live = page * SHAPE.page_size < end
        physical = tl.load(row_table + page, mask=is_live, other=0)
        score = score_row(q, metadata, h, physical, is_live, FORM, IS_MAX, SHAPE)
        if token_mask is not None:
            seen = load_seen(token_mask + b * mask_stride, mask_width, page, end, SHAPE.page_size, SHAPE.block_page)
            is_live = is_live & (tl.max(seen.to(tl.int32), 1) > 0)
        tl.store(out + page, tl.where(is_live, score, float("-inf")), mask=page < max_pages)

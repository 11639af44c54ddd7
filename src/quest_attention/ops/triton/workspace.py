"""`FusedWorkspace`: scratch memory of the fused kernel, and where its programs count."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.ops.triton.token_workspace import TokenWorkspace, make_token_workspace
from quest_attention.ops.triton.tuning import Tuning, tune
from quest_attention.pages import PagedKV

__all__ = ["ATTENDED", "CHOSEN", "READY", "SCORED", "FusedWorkspace", "make_workspace"]

READY = tl.constexpr(0)
"""Counter of a row: its pages are chosen."""
ATTENDED = tl.constexpr(1)
"""Counter of a row: programs that have attended."""
CHOSEN = tl.constexpr(2)
"""Counter of a row: sections that have chosen their best pages."""
SCORED = tl.constexpr(32)
"""Counters of a row from here on, one a section: programs that have scored. A cache line after the others [int32]."""


class FusedWorkspace(NamedTuple):
    """Scratch memory of `quest_decode`; a launch leaves the counters at zero, as it found them.

    Kernels count rows from the beginning of each tensor, so that memory for many rows serves fewer as well.

    Attributes:
        scores: `[B * HKV, P]` float32.
        best_ranks: `[B * HKV, sections * K]` float32.
        best_pages: `[B * HKV, sections * K]` int32.
        physical: `[B * HKV, K]` int32.
        partial: `[B * HKV, splits, G, DV]` float32.
        partial_lse: `[B * HKV, splits, G]` float32.
        counters: `[B * HKV, 32 + sections]` int32, zero between launches.
    """

    scores: Tensor
    best_ranks: Tensor
    best_pages: Tensor
    physical: Tensor
    partial: Tensor
    partial_lse: Tensor
    counters: Tensor

    def fits(self, kv: PagedKV, num_query_heads: int, config: QuestConfig) -> bool:
        """Whether a step of this shape can use the workspace."""
        tuning = tune(kv, num_query_heads, config)
        if tuning is None or self.scores.device != kv.keys.device:
            return False
        needed = _shapes(kv, num_query_heads, config, tuning)
        return all(tensor.numel() >= math.prod(shape) for tensor, shape in zip(self, needed, strict=True))


def make_workspace(
    kv: PagedKV, num_query_heads: int, config: QuestConfig, batch_sizes: Iterable[int] | None = None,
    tuning: Tuning | None = None,
) -> FusedWorkspace | TokenWorkspace | None:  # fmt: skip
    """Memory for steps of this shape; None where the fused kernel cannot hold one."""
    if kv.form.scores == "token":
        return make_token_workspace(kv, num_query_heads, config, batch_sizes)
    kvs = [kv] if batch_sizes is None else [_with_batch(kv, size) for size in batch_sizes]
    tunings = [tuning or tune(one, num_query_heads, config) for one in kvs]
    needed = [
        _shapes(one, num_query_heads, config, shape)
        for one, shape in zip(kvs, tunings, strict=True)
        if shape is not None
    ]
    if len(needed) < len(kvs) or not needed:
        return None
    largest = [max(shapes, key=math.prod) for shapes in zip(*needed, strict=True)]
    floats = {0, 1, 4, 5}
    workspace = FusedWorkspace(
        *(
            torch.empty(shape, dtype=torch.float32 if index in floats else torch.int32, device=kv.keys.device)
            for index, shape in enumerate(largest)
        )
    )
    workspace.counters.zero_()
    return workspace


def _shapes(kv: PagedKV, num_query_heads: int, config: QuestConfig, tuning: Tuning) -> tuple[tuple[int, ...], ...]:
    """Of the tensors of a workspace, in order."""
    rows, group = kv.batch_size * kv.num_kv_heads, num_query_heads // kv.num_kv_heads
    slots = min(kv.max_pages, config.page_slots)
    sections = triton.cdiv(kv.max_pages, min(tuning.section_pages, kv.max_pages))
    return (
        (rows, kv.max_pages),
        (rows, sections * slots),
        (rows, sections * slots),
        (rows, slots),
        (rows, tuning.splits, group, kv.values.shape[-1]),
        (rows, tuning.splits, group),
        (rows, SCORED.value + sections),
    )


def _with_batch(kv: PagedKV, batch_size: int) -> PagedKV:
    """The cache with a page table of so many rows, whatever they hold."""
    table = kv.page_table.new_zeros(1, kv.max_pages).expand(batch_size, -1)
    return replace(kv, page_table=table, contiguous=None)

"""`FusedWorkspace`: scratch memory of the fused kernel, and where its programs count."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.config import QuestConfig
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
        tuning, rows = tune(kv, num_query_heads, config), kv.batch_size * kv.num_kv_heads
        return (
            tuning is not None
            and self.scores.shape == (rows, kv.max_pages)
            and self.physical.shape == (rows, min(kv.max_pages, config.page_slots))
            and self.partial.shape[1:3] == (tuning.splits, num_query_heads // kv.num_kv_heads)
            and self.partial.shape[3] == kv.values.shape[-1]
            and self.scores.device == kv.keys.device
        )


def make_workspace(
    kv: PagedKV, num_query_heads: int, config: QuestConfig, tuning: Tuning | None = None
) -> FusedWorkspace | None:
    """Memory for steps of this shape; None where the fused kernel cannot hold it."""
    tuning = tuning or tune(kv, num_query_heads, config)
    if tuning is None:
        return None
    rows, device = kv.batch_size * kv.num_kv_heads, kv.keys.device
    group, slots = num_query_heads // kv.num_kv_heads, min(kv.max_pages, config.page_slots)
    sections = triton.cdiv(kv.max_pages, tuning.section_pages)

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    return FusedWorkspace(
        torch.empty(rows, kv.max_pages, dtype=torch.float32, device=device),
        torch.empty(rows, sections * slots, dtype=torch.float32, device=device),
        integers(rows, sections * slots),
        integers(rows, slots),
        torch.empty(rows, tuning.splits, group, kv.values.shape[-1], dtype=torch.float32, device=device),
        torch.empty(rows, tuning.splits, group, dtype=torch.float32, device=device),
        integers(rows, SCORED.value + sections).zero_(),
    )

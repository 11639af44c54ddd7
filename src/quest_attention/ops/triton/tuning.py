"""`Tuning`: the shape of the fused kernel's launch, chosen for a problem from what was measured."""

from __future__ import annotations

from typing import NamedTuple

import triton

from quest_attention.config import QuestConfig
from quest_attention.pages import PagedKV

__all__ = ["Tuning", "tune"]

_SECTION_PAGES = 2048
"""Pages whose best are chosen by one program: 16 keys a thread, which leaves registers to those that score."""
_LONG_SECTION_PAGES = 4096
_MOST_CANDIDATES = 4096
"""Pages from all sections among which one program chooses."""


class Tuning(NamedTuple):
    """Shape of a launch.

    Attributes:
        block_p: Pages scored at a time.
        section_pages: Pages of a section of a row.
        score_splits: Programs that score a section.
        block_t: Tokens attended to at a time.
        splits: Programs that attend to a row.
        num_warps: Warps per program.
        score_stages: Blocks of pages in flight per program.
        attend_stages: Blocks of tokens in flight per program.
        max_registers: Registers a thread may have; None leaves it to the compiler.
    """

    block_p: int
    section_pages: int
    score_splits: int
    block_t: int
    splits: int
    num_warps: int = 4
    score_stages: int = 1
    attend_stages: int = 1
    max_registers: int | None = None


# Measured on an H200 at head_dim 128 in bfloat16; section_pages and the splits follow from the problem.
_SINGLE_HEAD = Tuning(32, 0, 0, 32, 0, num_warps=4, max_registers=96)
_GROUP = Tuning(32, 0, 0, 32, 0, num_warps=4, score_stages=3, attend_stages=3)
_SMALL_GROUP = Tuning(64, 0, 0, 64, 0, num_warps=8, max_registers=80)
_TUNED_BYTES = 256
"""Bytes of a token's key for which the shapes above were measured."""
_SMALL_PAGES = 32768
"""Pages of a batch below which latency counts, not bandwidth: more warps, one block a program."""
_SCORING_PROGRAMS = 528
_ATTENDING_PROGRAMS = 512
"""Programs that fill an H200: four on each of its 132 multiprocessors."""


def tune(kv: PagedKV, num_query_heads: int, config: QuestConfig) -> Tuning | None:
    """Launch shape for a problem; None where the fused kernel cannot hold it: no rows, or long ones, large budgets."""
    rows, max_pages = kv.batch_size * kv.num_kv_heads, kv.max_pages
    if rows == 0 or max_pages == 0:
        return None
    group, slots = num_query_heads // kv.num_kv_heads, min(max_pages, config.page_slots)
    section_pages = _SECTION_PAGES
    if triton.cdiv(max_pages, section_pages) * slots > _MOST_CANDIDATES:
        section_pages = _LONG_SECTION_PAGES
    sections = triton.cdiv(max_pages, section_pages)
    if sections > 1 and sections * slots > _MOST_CANDIDATES:
        return None
    is_small = rows * max_pages <= _SMALL_PAGES
    if group == 1:
        shape = _SINGLE_HEAD
    elif is_small:
        shape = _SMALL_GROUP
    else:
        shape = _GROUP
    tiles = triton.cdiv(min(max_pages, section_pages), shape.block_p)
    programs = _SCORING_PROGRAMS * (2 if group == 1 else 1)
    score_splits = tiles if is_small else min(tiles, max(8, triton.cdiv(programs, rows * sections)))
    splits = min(slots, 32, max(8, triton.cdiv(_ATTENDING_PROGRAMS, rows)))
    shape = shape._replace(section_pages=section_pages, score_splits=score_splits, splits=splits)
    widening = triton.next_power_of_2(kv.head_dim * kv.keys.element_size()) // _TUNED_BYTES
    if widening > 1:  # larger heads fill the registers with fewer tokens
        shape = shape._replace(block_t=max(16, shape.block_t // widening), max_registers=None)
    return shape

"""`Tuning`: the shapes of the launches, chosen for a problem and a GPU from what was measured on H100 and H200.

How many programs there are follows the GPU's multiprocessors; what a program loads at once was measured on those cards
and is the same on all.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton

from quest_attention.config import QuestConfig
from quest_attention.pages import PagedKV

__all__ = [
    "ATTEND_STAGES",
    "MEASURED_MULTIPROCESSORS",
    "MEASURED_ON",
    "Tuning",
    "attended_block",
    "attending_programs",
    "filling_programs",
    "scored_block",
    "scoring_programs",
    "tune",
]

ATTEND_STAGES = 5
"""Depth of the pipeline that loads a page's number, then its keys and values, twice ahead of their use."""
_SCORE_STAGES = 3
"""The same for a page's number and its bounds, where a matrix product scores them."""

_SECTION_PAGES = 2048
"""Pages whose best are chosen by one program: 16 keys a thread, which leaves registers to those that score."""
_LONG_SECTION_PAGES = 4096
_MOST_CANDIDATES = 4096
"""Pages from all sections among which one program chooses."""

_BLOCK_BYTES = 32768
"""Keys and values, or bounds, that a program loads at once [bytes]."""
MEASURED_ON = ("H100", "H200")
"""Cards for which the shapes here were measured."""
MEASURED_MULTIPROCESSORS = 132
"""Multiprocessors of each of them; taken too where there is no GPU, as in Triton's interpreter."""
_PROGRAMS_PER_MULTIPROCESSOR = 4
"""Programs that fill one."""
_LEAST_TOKENS = 64
"""Fewest tokens worth a program."""


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


# Measured on an H200 at head_dim 128 in bfloat16, each alone; section_pages and the splits follow from the problem.
# Shapes of up to 16 rows in sections, and how many programs score many rows, were chosen among a layer's matrix
# products with bounds as keys, as `benchmarks/layers_gpu.py` times them: there fewer instructions beat what is fastest
# alone, as if code were fetched anew for each layer.
_SINGLE_HEAD = Tuning(32, 0, 0, 32, 0, num_warps=4, max_registers=96)
_SHORT_ROWS = Tuning(64, 0, 0, 64, 0, num_warps=8, max_registers=80)
_FEW_ROWS = Tuning(64, 0, 0, 64, 0, num_warps=8, score_stages=3, max_registers=64)
_FEW_LONG_ROWS = _FEW_ROWS._replace(max_registers=80)
_MANY_ROWS = Tuning(64, 0, 0, 64, 0, num_warps=4, score_stages=3, attend_stages=3)
_MANY_ROWS_IN_8_BITS = Tuning(32, 0, 0, 32, 0, num_warps=4, score_stages=5, attend_stages=5, max_registers=80)
"""Long rows with bounds in 8 bits: less to wait for, more to convert."""
_LEAST_SHARES = 8
"""Programs among which a row is shared at least, so that it is done soon."""
_LEAST_SCORERS = 4
"""The same for the scores of a section where the rows alone fill the GPU."""
_TUNED_BYTES = 256
"""Bytes of a token's key for which the shapes above were measured."""
_FEW = 32
"""Rows up to which a row's programs wait for one another more than for memory."""
_FEWER = 16
"""Rows up to which those in sections leave registers unused."""
_SMALL_PAGES = 32768
"""Pages of all rows up to which the same holds for a program's loads."""


@cache  # to ask the driver at each step would take longer than the rest of `tune`
def filling_programs(device: torch.device) -> int:
    """Programs that fill a GPU: 528 on an H100 or H200, and where there is none."""
    multiprocessors = MEASURED_MULTIPROCESSORS
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors


def _block(most: int, item_bytes: int) -> int:
    """How many items a program loads at once: a power of two from 16 to `most`."""
    fits: int = triton.next_power_of_2(_BLOCK_BYTES // item_bytes)
    return max(16, min(most, fits))


def _computed_bytes(kv: PagedKV) -> int:
    """Bytes of a number of the cache in registers: those stored in 8 bits are widened to 16 [bytes]."""
    return max(2, kv.keys.element_size())


def attended_block(kv: PagedKV) -> int:
    """Tokens attended to at a time."""
    return _block(32, 2 * (kv.head_dim + kv.values.shape[-1]) * _computed_bytes(kv))  # and as much ahead


def attending_programs(slots: int, page_size: int, rows: int, device: torch.device) -> int:
    """Programs that attend to a row of so many pages, one of so many rows.

    Never more than run in whole turns: one program more than that, and all wait for a turn that is nearly empty. Many
    rows have twice as many, since what does not divide by the rows is a smaller part of those.
    """
    programs = filling_programs(device) * (1 if rows <= _FEWER else 2)
    return max(1, min(-(-slots * page_size // _LEAST_TOKENS), programs // max(1, rows)))


def scored_block(kv: PagedKV, group: int) -> tuple[int, int]:
    """Pages scored at a time, and the depth of the pipeline: a single head has no matrix product to wait for."""
    page_bytes = 2 * kv.head_dim * kv.metadata.element_size()
    return (_block(32, page_bytes), 1) if group == 1 else (_block(64, page_bytes), _SCORE_STAGES)


def scoring_programs(pages: int, block: int, rows: int, device: torch.device) -> int:
    """Programs that score so many pages of a row, one of so many rows."""
    return max(1, min(-(-pages // block), -(-2 * filling_programs(device) // max(1, rows))))


def tune(kv: PagedKV, num_query_heads: int, config: QuestConfig) -> Tuning | None:
    """Launch shape for a problem; None where the fused kernel cannot hold it.

    That is no rows, or long ones with large budgets; metadata that scores tokens; or units smaller than a page.
    """
    rows, max_pages = kv.batch_size * kv.num_kv_heads, kv.max_pages
    if rows == 0 or max_pages == 0 or kv.form.scores != "page" or config.unit_size != kv.page_size:
        return None
    group, slots = num_query_heads // kv.num_kv_heads, min(max_pages, config.page_slots)
    section_pages = _SECTION_PAGES
    if triton.cdiv(max_pages, section_pages) * slots > _MOST_CANDIDATES:
        section_pages = _LONG_SECTION_PAGES
    sections = triton.cdiv(max_pages, section_pages)
    if sections > 1 and sections * slots > _MOST_CANDIDATES:
        return None
    programs = filling_programs(kv.keys.device)
    shape = _shape(group, rows, max_pages, sections, kv.metadata.element_size() == 1)
    busy = 2 * programs * (2 if rows <= _FEW and sections > 1 else 1)
    # In sections the next block loads while one is scored, and shorter rows leave fewer programs without work.
    blocks = min(2, shape.score_stages) if sections > 1 else 1
    tiles = triton.cdiv(min(max_pages, section_pages), blocks * shape.block_p)
    least = _LEAST_SHARES if group == 1 else min(_LEAST_SHARES, max(_LEAST_SCORERS, triton.cdiv(programs, rows)))
    wanted = programs * (1 if group == 1 else 2)
    shape = shape._replace(
        section_pages=section_pages,
        score_splits=min(tiles, max(least, busy // (rows * sections))),
        splits=max(1, min(slots * kv.page_size // _LEAST_TOKENS, max(_LEAST_SHARES, wanted // rows))),
    )
    widening = triton.next_power_of_2(kv.head_dim * _computed_bytes(kv)) // _TUNED_BYTES
    if widening > 1:  # larger heads fill the registers with fewer tokens
        shape = shape._replace(block_t=max(16, shape.block_t // widening), max_registers=None)
    return shape


def _shape(group: int, rows: int, max_pages: int, sections: int, in_8_bits: bool) -> Tuning:
    """What a program loads at once and how deep, for a problem of a kind."""
    if group == 1:
        return _SINGLE_HEAD
    if sections > 1 and rows <= _FEWER:
        return _FEW_LONG_ROWS
    if rows * max_pages <= _SMALL_PAGES:
        return _SHORT_ROWS
    if rows <= _FEW:
        return _FEW_ROWS
    return _MANY_ROWS_IN_8_BITS if in_8_bits and sections > 1 else _MANY_ROWS

"""Kernels: choose the units with the largest scores.

The largest number that at least `k` scores reach is found by cutting the range of the scores in three, again and again,
with the scores in registers; it ends early, as a rule, when exactly `k` reach it. A row of more units than one program
holds is cut into sections: each chooses its own best `k`, and the row's best are among those. Sections of more
candidates than one program holds are merged some at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.errors import BackendError
from quest_attention.ops.selection import Selection
from quest_attention.ops.step import Rows
from quest_attention.ops.triton.arguments import by_head, length_of, lengths_argument, side_by_side
from quest_attention.ops.triton.launch import launch
from quest_attention.ops.triton.masks import count_live_tokens

__all__ = [
    "DEAD",
    "FORCED",
    "LARGEST",
    "choose_pages",
    "load_best",
    "rank_scores",
    "select_pages",
    "store_best",
    "store_chosen",
]

_SECTION_UNITS = 8192
"""Units a program holds in registers: 32 to 64 a thread."""
_MOST_CANDIDATES = 65536
"""Candidates a program merges: 64 a thread."""

DEAD = tl.constexpr(float("-inf"))
"""Rank of what is not a page."""
FORCED = tl.constexpr(float("inf"))
"""Rank of a page that is read whatever its score."""
LARGEST = tl.constexpr(3.4028234663852886e38)
"""Rank of a page that scores +inf: above all others, below the forced ones."""


class _Best(NamedTuple):
    """The best of each section of a row; a workspace of the fused kernel has the same under the same names.

    Attributes:
        best_ranks: `[B * HKV, sections * K]` float32.
        best_pages: `[B * HKV, sections * K]` int32, units.
    """

    best_ranks: Tensor
    best_pages: Tensor

    @classmethod
    def allocate(cls, rows: int, candidates: int, device: torch.device) -> _Best:
        """Room for so many candidates a row."""
        best = torch.empty(rows, candidates, dtype=torch.int32, device=device)
        return cls(torch.empty_like(best, dtype=torch.float32), best)


def select_pages(rows: Rows, scores: Tensor) -> Selection:
    """See `ops.select_pages`.

    Raises:
        BackendError: The row and the budget are so large that one program cannot merge the candidates of two others.
    """
    seq_lens, token_mask, config = rows.seq_lens, rows.token_mask, rows.config
    batch, heads, max_units = scores.shape
    size, per_page = config.unit_size, config.units_per_page
    scores = side_by_side(scores)
    slots = rows.slots(max_units)
    units = torch.empty(batch, heads, slots, dtype=torch.int32, device=scores.device)
    counts = torch.empty(batch, heads, dtype=torch.int32, device=scores.device)
    if slots == 0:
        return Selection(units, counts.zero_(), size)
    sections = triton.cdiv(max_units, _SECTION_UNITS)
    section_units = _SECTION_UNITS if sections > 1 else max_units
    width = min(slots, section_units)
    if sections * width > _MOST_CANDIDATES < 2 * slots:
        raise BackendError(
            f"backend: got 'triton' for {slots} units of {max_units}, expected at most {_MOST_CANDIDATES // 2}: "
            "backend 'torch' can"
        )
    live_tokens = page_ranks = best = None
    if token_mask is not None:
        mask = side_by_side(token_mask)
        live_tokens = count_live_tokens(mask, seq_lens, size, max_units)
        if per_page > 1:  # how many pages with a token to attend to there are up to each page
            pages = triton.cdiv(max_units, per_page)
            held = count_live_tokens(mask, seq_lens, config.page_size, pages)
            page_ranks = (held > 0).cumsum(1, dtype=torch.int32)
    if sections > 1:
        best = _Best.allocate(batch * heads, sections * width, scores.device)
    launch(
        _select_kernel, (batch * heads * sections,),
        by_head(scores), best, units, counts, lengths_argument(seq_lens), live_tokens, page_ranks, max_units, heads,
        size, per_page, config.token_budget, config.num_sink_pages, max(1, config.num_recent_pages), slots, sections,
        width,
        SECTION_UNITS=section_units, BLOCK_U=max(16, triton.next_power_of_2(section_units)),
        BLOCK_K=triton.next_power_of_2(width), num_warps=_warps(section_units),
    )  # fmt: skip
    while best is not None:
        together = min(sections, _MOST_CANDIDATES // width)
        groups, merged = triton.cdiv(sections, together), min(slots, together * width)
        following = _Best.allocate(batch * heads, groups * merged, scores.device) if groups > 1 else None
        launch(
            _merge_sections_kernel, (batch * heads * groups,),
            counts, best, following, units, slots, sections * width, together * width, groups, merged,
            BLOCK_C=triton.next_power_of_2(together * width), BLOCK_K=triton.next_power_of_2(merged),
            num_warps=_warps(together * width),
        )  # fmt: skip
        best, sections, width = following, groups, merged
    return Selection(units, counts, size)


def _warps(elements: int) -> int:
    """Warps for a program that holds so many keys: 32 a thread, as far as that goes."""
    return min(32, max(4, int(triton.next_power_of_2(elements)) // 1024))


@triton.jit
def rank_scores(score, is_live, is_forced):
    """Numbers that rank pages: finite for scores, plus and minus infinity for the forced and the dead."""
    rank = tl.minimum(score, LARGEST)
    return tl.where(is_live, tl.where(is_forced, FORCED, rank), DEAD)


@triton.jit
def choose_pages(ranks, num_live, count):
    """Which `count` of the ranks `[N]` are the largest, the earlier first among equals; at most `num_live`.

    Returns:
        Whether each is chosen, `[N]` bool, and how many before it are, its slot if it is, `[N]` int32.
    """
    low = tl.where(count > 0, tl.min(tl.where(ranks == DEAD, FORCED, ranks)), float("nan"))  # nothing reaches NaN
    highest = tl.max(tl.where(ranks == FORCED, DEAD, ranks))
    high = tl.full([], FORCED, tl.float32)
    # Ranks that are at least `low`; fewer than `count` are at least `high`, once it is finite.
    reached = tl.where(count > 0, num_live, 0)
    lower = 0.5 * low + 0.5 * highest
    upper = highest
    going = reached != count
    while going:
        # Two counts in one sum, since it is the sum across warps that takes time.
        if ranks.shape[0] < 32768:
            both = tl.sum((ranks >= lower).to(tl.int32) + (ranks >= upper).to(tl.int32) * 65536)
            at_lower, at_upper = both & 0xFFFF, both >> 16
        else:
            at_lower, at_upper = tl.sum((ranks >= lower).to(tl.int32)), tl.sum((ranks >= upper).to(tl.int32))
        is_above, is_between = at_upper >= count, at_lower >= count
        high = tl.where(is_above, high, tl.where(is_between, upper, lower))
        low = tl.where(is_above, upper, tl.where(is_between, lower, low))
        reached = tl.where(is_above, at_upper, tl.where(is_between, at_lower, reached))
        third = high * 0.33333334 - low * 0.33333334
        lower = low + third
        upper = high - third
        # Both lie strictly between, so that each turn moves a limit; false for an infinite `high`.
        going = (reached != count) & (lower > low) & (lower < high) & (upper > low) & (upper < high)
    cut, room = float("nan"), 0  # rank of which only the first `room` are chosen; nothing equals NaN
    if reached != count:  # several have the rank at which the cut falls
        if tl.sum((ranks == FORCED).to(tl.int32)) >= count:  # the forced pages fill the budget
            low = FORCED
        else:
            cut = tl.max(tl.where(ranks < high, ranks, DEAD))
            while tl.sum((ranks >= cut).to(tl.int32)) < count:  # not so far, unless rounding ended the search early
                cut = tl.max(tl.where(ranks < cut, ranks, DEAD))
            room = count - tl.sum((ranks > cut).to(tl.int32))
            low = cut
    is_kept, is_level = ranks >= low, ranks == cut
    # Those above the cut and those at it are counted in one scan: scans are long, and the length of the fused kernel
    # seems to cost time where other kernels run between its launches.
    if ranks.shape[0] < 32768:
        both = tl.cumsum(is_kept.to(tl.int32) + is_level.to(tl.int32) * 65535)
        num_level = both >> 16
        num_kept = both & 0xFFFF
    else:
        num_level = tl.cumsum(is_level.to(tl.int32))
        num_kept = tl.cumsum(is_kept.to(tl.int32)) - num_level
    chosen = is_kept & (~is_level | (num_level <= room))
    return chosen, num_kept + tl.minimum(num_level, room) - chosen.to(tl.int32)


@triton.jit
def store_chosen(out, values, chosen, slot, count, slots, BLOCK_K: tl.constexpr):
    """Write the chosen values side by side, each to its slot, and -1 to the slots that stay unused."""
    tl.store(out + slot, values, mask=chosen)
    unused = tl.arange(0, BLOCK_K)
    tl.store(out + unused, -1, mask=(unused >= count) & (unused < slots))


@triton.jit
def store_best(best, at, ranks, page, chosen, slot, count, slots, BLOCK_K: tl.constexpr):
    """Write the chosen pages of a section with their ranks, and the rank of no page to the slots that stay unused."""
    tl.store(best.best_ranks + at + slot, ranks, mask=chosen)
    tl.store(best.best_pages + at + slot, page, mask=chosen)
    unused = tl.arange(0, BLOCK_K)
    tl.store(best.best_ranks + at + unused, DEAD, mask=(unused >= count) & (unused < slots))


@triton.jit
def load_best(best, at, candidates, BLOCK_C: tl.constexpr):
    """The ranks and pages that the sections of a row have written, `[BLOCK_C]` each."""
    candidate = tl.arange(0, BLOCK_C)
    # Another multiprocessor may have written them in this very launch: past the L1 cache.
    ranks = tl.load(best.best_ranks + at + candidate, mask=candidate < candidates, other=DEAD, cache_modifier=".cg")
    page = tl.load(best.best_pages + at + candidate, mask=ranks != DEAD, other=0, cache_modifier=".cg")
    return ranks, page


@triton.jit(do_not_specialize=[
    "lengths", "max_units", "per_page", "token_budget", "num_sink_pages", "num_recent_pages", "slots", "width",
])  # fmt: skip
def _select_kernel(
    scores, best, units, counts, lengths, live_tokens, page_ranks, max_units, num_kv_heads, unit_size, per_page,
    token_budget, num_sink_pages, num_recent_pages, slots, sections, width,
    SECTION_UNITS: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One section of a row. `best` is None where the row is one; the rest as `select_pages` makes it."""
    program = tl.program_id(0)
    section = program % sections
    row = program // sections
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = length_of(lengths, b)
    here = tl.arange(0, BLOCK_U)
    unit = section * SECTION_UNITS + here
    total = tl.cdiv(end, unit_size)
    row_scores = scores.base + b * scores.row + h * scores.head
    score = tl.load(row_scores + unit, mask=(here < SECTION_UNITS) & (unit < total), other=float("-inf"))
    if live_tokens is not None:
        row_tokens = live_tokens + b * max_units
        held = tl.load(row_tokens + unit, mask=(here < SECTION_UNITS) & (unit < total), other=0)
        is_live = held > 0
        rank = tl.cumsum(is_live.to(tl.int32))
        num_live = tl.sum(is_live.to(tl.int32))
        tokens = tl.sum(held)
        if best is not None:
            before, tokens_before = _count_live(row_tokens, 0, section * SECTION_UNITS)
            after, tokens_after = _count_live(row_tokens, (section + 1) * SECTION_UNITS, total)
            rank += before
            total = before + num_live + after
            tokens += tokens_before + tokens_after
        else:
            total = num_live
        last_rank = total
        if page_ranks is not None:  # sink and recent pages are counted among those that hold a token to attend to
            pages = tl.cdiv(max_units, per_page)
            row_ranks = page_ranks + b * pages
            rank = tl.load(row_ranks + unit // per_page, mask=is_live, other=0)
            last_rank = tl.load(row_ranks + pages - 1)
    else:
        is_live = (here < SECTION_UNITS) & (unit < total)
        rank = unit // per_page + 1
        last_rank = tl.cdiv(end, unit_size * per_page)
        num_live = tl.minimum(tl.maximum(total - section * SECTION_UNITS, 0), SECTION_UNITS)
        tokens = end
    count = tl.minimum(tl.where(tokens <= token_budget, total, tl.minimum(total, token_budget // unit_size)), slots)
    is_forced = (rank <= num_sink_pages) | (rank > last_rank - num_recent_pages)
    # Scores of the caller's own may be -inf, which here is the rank of what is no unit.
    ranks = rank_scores(tl.where(score < -LARGEST, -LARGEST, score), is_live, is_forced)
    if best is not None:
        count_here = tl.minimum(count, num_live)
        chosen, slot = choose_pages(ranks, num_live, count_here)
        at = (row.to(tl.int64) * sections + section) * width
        store_best(best, at, ranks, unit, chosen, slot, count_here, width, BLOCK_K)
    else:
        chosen, slot = choose_pages(ranks, num_live, count)
        store_chosen(units + row.to(tl.int64) * slots, unit, chosen, slot, count, slots, BLOCK_K)
    if section == 0:
        tl.store(counts + row, count)


@triton.jit
def _count_live(row_tokens, start, stop):
    """How many pages from `start` to `stop` hold a token to attend to, and how many such tokens they hold."""
    found = 0
    tokens = 0
    for first in range(start, stop, 1024):
        page = first + tl.arange(0, 1024)
        held = tl.load(row_tokens + page, mask=page < stop, other=0)
        found += tl.sum((held > 0).to(tl.int32))
        tokens += tl.sum(held)
    return found, tokens


@triton.jit(do_not_specialize=["slots", "candidates", "together", "groups", "width"])
def _merge_sections_kernel(
    counts, best, following, units, slots, candidates, together, groups, width,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some sections of a row, `together` candidates of its `candidates`: all of it where `following` is None."""
    row = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    count = tl.load(counts + row)
    here = tl.minimum(candidates - group * together, together)
    ranks, unit = load_best(best, row.to(tl.int64) * candidates + group * together, here, BLOCK_C)
    num_live = tl.sum((ranks != DEAD).to(tl.int32))
    if following is not None:
        count = tl.minimum(count, num_live)
    chosen, slot = choose_pages(ranks, num_live, count)
    if following is not None:
        at = (row.to(tl.int64) * groups + group) * width
        store_best(following, at, ranks, unit, chosen, slot, count, width, BLOCK_K)
    else:
        store_chosen(units + row.to(tl.int64) * slots, unit, chosen, slot, count, slots, BLOCK_K)


# Longer than 250 lines: the search for the cut, which the fused kernel shares, is a third of it.

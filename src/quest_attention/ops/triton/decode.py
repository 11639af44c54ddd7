"""Kernel: one decode step of one layer in one launch.

The programs are of two kinds, all in one grid. The first score the pages of a row; the last of them to finish chooses
the row's pages and raises a flag. The others wait for their row's flag, attend to their share of its pages, and the
last of them to finish merges the shares. So a row is attended to while others are still being scored. A program only
ever waits for programs with a lower index: the hardware starts programs in the order of their index (single-pass scans
rest on the same), so whoever is waited for is running or done.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.errors import QuestValueError
from quest_attention.ops.selection import Selection
from quest_attention.ops.step import Step
from quest_attention.ops.triton.arguments import (
    by_head,
    keys_argument,
    length_of,
    lengths_argument,
    load_query,
    scored_metadata_argument,
    shape_of,
    side_by_side,
    values_argument,
)
from quest_attention.ops.triton.attention import attend_slots
from quest_attention.ops.triton.choice import DEAD, choose_pages, load_best, rank_scores, store_best, store_chosen
from quest_attention.ops.triton.forms import kernel_form
from quest_attention.ops.triton.launch import check_kernel_dtype, launch
from quest_attention.ops.triton.merge import merge_splits, store_partial
from quest_attention.ops.triton.scores import score_row
from quest_attention.ops.triton.token_decode import decode_tokens
from quest_attention.ops.triton.tuning import tune
from quest_attention.ops.triton.workspace import ATTENDED, CHOSEN, READY, SCORED, FusedWorkspace, make_workspace

__all__ = ["quest_decode"]


def quest_decode(step: Step) -> tuple[Tensor, Selection] | None:
    """See `ops.quest_decode`. None where the fused kernel cannot hold the problem; the single verbs can."""
    query, kv, config, workspace = step.query, step.kv, step.config, step.workspace
    softcap, sinks, output = step.softcap, step.sinks, step.out
    if kv.form.scores == "token":
        return decode_tokens(step)
    check_kernel_dtype(kv.keys)
    # Pages are fetched between the choice and the attention of a step, which one launch does not part.
    tuning = None if step.token_mask is not None or step.hot is not None else tune(kv, query.shape[1], config)
    if tuning is None:
        return None
    batch, heads, device = kv.batch_size, kv.num_kv_heads, query.device
    group, width, rows = query.shape[1] // heads, kv.values.shape[-1], batch * heads
    slots = min(kv.max_pages, config.page_slots)
    if workspace is None:
        workspace = make_workspace(kv, query.shape[1], config, tuning=tuning)
    if not isinstance(workspace, FusedWorkspace):
        raise QuestValueError("workspace", type(workspace).__name__, "what make_workspace gives for this backend")
    if output is None:
        output = torch.empty(batch, query.shape[1], width, dtype=query.dtype, device=device)
    pages = torch.empty(batch, heads, slots, dtype=torch.int32, device=device)
    counts = torch.empty(batch, heads, dtype=torch.int32, device=device)
    query, table = side_by_side(query), side_by_side(kv.page_table)
    section_pages = min(tuning.section_pages, kv.max_pages)
    sections = triton.cdiv(kv.max_pages, section_pages)
    launch(
        _decode_kernel, (rows * (sections * tuning.score_splits + tuning.splits),),
        by_head(query), keys_argument(kv), values_argument(kv), scored_metadata_argument(kv), table, table.stride(0),
        lengths_argument(step.seq_lens), None if sinks is None else side_by_side(sinks), workspace, pages, counts,
        output, float(step.scale), None if softcap is None else float(softcap), kv.max_pages, heads, rows, slots,
        config.token_budget, config.num_sink_pages, max(1, config.num_recent_pages),
        sections, tuning.score_splits, tuning.splits, triton.cdiv(slots, tuning.splits),
        FORM=kernel_form(kv.form), IS_MAX=config.group_reduction == "max",
        SHAPE=shape_of(kv.page_size, group, kv.head_dim, width),
        BLOCKS=_Blocks(
            scored=tuning.block_p, attended=tuning.block_t, section_pages=section_pages, is_sectioned=sections > 1,
            section=max(16, triton.next_power_of_2(section_pages)), slots=triton.next_power_of_2(slots),
            candidates=triton.next_power_of_2(sections * slots), splits=max(64, triton.next_power_of_2(tuning.splits)),
            score_stages=tuning.score_stages, attend_stages=tuning.attend_stages,
        ),
        num_warps=tuning.num_warps, **({} if tuning.max_registers is None else {"maxnreg": tuning.max_registers}),
    )  # fmt: skip
    return output, Selection(pages, counts, kv.page_size)


class _Blocks(NamedTuple):
    """What the programs load at once: constants of the kernel.

    Attributes:
        scored: Pages scored at a time.
        attended: Tokens attended to at a time.
        section_pages: Pages of a section.
        is_sectioned: Whether a row may have several sections.
        section: Room for the pages of one.
        candidates: Room for the best pages of all of them.
        slots: Room for the pages of a row.
        splits: Room for the programs that attend to a row.
        score_stages: Blocks of pages in flight.
        attend_stages: Blocks of tokens in flight.
    """

    scored: int
    attended: int
    section_pages: int
    is_sectioned: bool
    section: int
    candidates: int
    slots: int
    splits: int
    score_stages: int
    attend_stages: int


class _Row(NamedTuple):
    """What the programs of a row know of it.

    Attributes:
        index: Its number, int32.
        end: Tokens of its sequence [tokens].
        total: Their pages [pages].
        count: Pages to choose [pages].
        table: Its pages in the page table.
        physical: Room for the physical numbers of the chosen ones.
        counters: Where its programs count.
    """

    index: Any
    end: Any
    total: Any
    count: Any
    table: Any
    physical: Any
    counters: Any


class _Chosen(NamedTuple):
    """What the caller is told: chosen pages `[B, HKV, K]`, how many `[B, HKV]`, and K."""

    pages: Any
    counts: Any
    slots: Any


@triton.jit
def _publish(row, out, page, physical, chosen, slot, BLOCK_K: tl.constexpr):
    """Write the chosen pages of a row, physical ones for those that attend, and let those go on that wait for them."""
    store_chosen(out.pages + row.index.to(tl.int64) * out.slots, page, chosen, slot, row.count, out.slots, BLOCK_K)
    tl.store(row.physical + slot, physical, mask=chosen)
    tl.store(out.counts + row.index, row.count)
    tl.debug_barrier()
    tl.atomic_xchg(row.counters + READY, 1, sem="release", scope="gpu")


@triton.jit
def _read_whole(row, out, BLOCK_K: tl.constexpr):
    """All pages of a row that is short enough."""
    every = tl.arange(0, BLOCK_K)
    physical = tl.load(row.table + every, mask=every < row.total, other=0)
    _publish(row, out, every, physical, every < row.total, every, BLOCK_K)


@triton.jit
def _score_share(
    q, row, metadata, h, scores, ahead, first, last, step, max_pages,
    FORM: tl.constexpr, IS_MAX: tl.constexpr, SHAPE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Score blocks of pages from `first` to `last`, `step` apart; `ahead` are the physical pages of the first one."""
    for start in tl.range(first, last, step, num_stages=BLOCKS.score_stages):
        page = start + tl.arange(0, BLOCKS.scored)
        here = ahead
        if BLOCKS.score_stages > 1:
            here = tl.load(row.table + page, mask=page < max_pages, other=0)
        score = score_row(q, metadata, h, here, page < last, FORM, IS_MAX, SHAPE)
        tl.store(scores + page, score, mask=page < last)
        if BLOCKS.score_stages == 1:  # else the compiler reads ahead
            ahead = tl.load(row.table + page + step, mask=page + step < max_pages, other=0)


@triton.jit
def _choose_section(
    row, out, scores, best, section, sections, first, last, num_sink_pages, num_recent_pages, BLOCKS: tl.constexpr
):
    """The best pages of a section whose scores are all there: the row's, if it has no other section."""
    among = first + tl.arange(0, BLOCKS.section)
    is_live = among < last
    score = tl.load(scores + among, mask=is_live, other=0.0, cache_modifier=".cg")
    where = among
    if not BLOCKS.is_sectioned:  # beside the scores; a row in sections has no registers to keep it in
        where = tl.load(row.table + among, mask=is_live, other=0)
    is_forced = (among < num_sink_pages) | (among >= row.total - num_recent_pages)
    ranks = rank_scores(score, is_live, is_forced)
    count = tl.minimum(row.count, last - first)
    chosen, slot = choose_pages(ranks, last - first, count)
    if BLOCKS.is_sectioned and row.total > BLOCKS.section_pages:
        row_best = row.index.to(tl.int64) * sections * out.slots
        store_best(best, row_best + section * out.slots, ranks, among, chosen, slot, count, out.slots, BLOCKS.slots)
        tl.debug_barrier()
        live_sections = tl.cdiv(row.total, BLOCKS.section_pages)
        arrived = tl.atomic_add(row.counters + CHOSEN, 1, sem="acq_rel", scope="gpu")
        if arrived == live_sections - 1:
            _merge_sections(row, out, best, row_best, live_sections, BLOCKS)
    else:
        if BLOCKS.is_sectioned:
            where = tl.load(row.table + among, mask=is_live, other=0)
        _publish(row, out, among, where, chosen, slot, BLOCKS.slots)


@triton.jit
def _merge_sections(row, out, best, row_best, live_sections, BLOCKS: tl.constexpr):
    """The best pages of a row among the best of its sections."""
    ranks, page = load_best(best, row_best, live_sections * out.slots, BLOCKS.candidates)
    is_known = ranks != DEAD
    where = tl.load(row.table + page, mask=is_known, other=0)
    chosen, slot = choose_pages(ranks, tl.sum(is_known.to(tl.int32)), row.count)
    _publish(row, out, page, where, chosen, slot, BLOCKS.slots)


@triton.jit
def _wait(row):
    """Until the row's pages are chosen."""
    ready = tl.atomic_add(row.counters + READY, 0, sem="acquire", scope="gpu")
    while ready == 0:
        ready = tl.atomic_add(row.counters + READY, 0, sem="acquire", scope="gpu")


@triton.jit
def _attend_share(
    q, row, keys, values, h, found, part, splits, pages_per_split, scale, softcap,
    SHAPE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Attend to some of a row's pages. They ascend, so the part-filled one is last and the tokens end as it does."""
    first = part * pages_per_split
    tokens = (row.count - 1) * SHAPE.page_size + (row.end - 1) % SHAPE.page_size + 1
    last_token = tl.minimum((first + pages_per_split) * SHAPE.page_size, tokens)
    largest, weight, gathered = attend_slots(
        q, keys, values, h, row.physical, None, first * SHAPE.page_size, last_token, None, 0, scale, softcap,
        SHAPE, BLOCKS.attended, BLOCKS.attend_stages,
    )  # fmt: skip
    store_partial(found, row.index, part, splits, largest, weight, gathered, SHAPE)


@triton.jit
def _merge_and_reset(row, found, sinks, output, h, splits, sections, SHAPE: tl.constexpr, BLOCKS: tl.constexpr):
    """Write the output of a row to which all its programs have attended, and zero its counters."""
    row_sinks = sinks
    if sinks is not None:
        row_sinks = sinks + h * SHAPE.group
    to = output + row.index.to(tl.int64) * SHAPE.group * SHAPE.value_dim
    GROUP: tl.constexpr = SHAPE.group  # Triton 3.6 takes a range's limits and a block's sizes only by such names
    HEADS: tl.constexpr = SHAPE.merged
    for head in tl.static_range(0, GROUP, HEADS):
        merge_splits(found, row_sinks, to, SHAPE.value_dim, None, row.index, splits, head, SHAPE, BLOCKS.splits)
    # Everybody has passed: the next launch finds the counters as this one did.
    tl.store(row.counters + READY, 0)
    tl.store(row.counters + ATTENDED, 0)
    tl.store(row.counters + CHOSEN, 0)
    for section in range(sections):
        tl.store(row.counters + SCORED + section, 0)


@triton.jit(do_not_specialize=[
    "table_stride", "lengths", "max_pages", "num_kv_heads", "rows", "slots", "token_budget", "num_sink_pages",
    "num_recent_pages", "sections", "score_splits", "splits", "pages_per_split",
])  # fmt: skip
def _decode_kernel(
    query, keys, values, metadata, page_table, table_stride, lengths, sinks, workspace, pages, counts, output,
    scale, softcap, max_pages, num_kv_heads, rows, slots, token_budget, num_sink_pages, num_recent_pages, sections,
    score_splits, splits, pages_per_split,
    FORM: tl.constexpr, IS_MAX: tl.constexpr, SHAPE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    scorers = sections * score_splits  # programs that score a row
    is_scoring = program < rows * scorers
    # Of either kind; a division is some 30 instructions.
    of_kind = tl.where(is_scoring, program, program - rows * scorers)
    sharing = tl.where(is_scoring, scorers, splits)
    index = of_kind // sharing
    part = of_kind - index * sharing
    sequence = index // num_kv_heads
    b = sequence.to(tl.int64)
    h = (index - sequence * num_kv_heads).to(tl.int64)
    end = length_of(lengths, b)
    total = tl.cdiv(end, SHAPE.page_size)
    is_sparse = end > token_budget
    count = tl.where(is_sparse, token_budget // SHAPE.page_size, total)
    table = page_table + b * table_stride
    physical = workspace.physical + index.to(tl.int64) * slots
    row = _Row(index, end, total, count, table, physical, workspace.counters + index * (SCORED + sections))
    if is_scoring:
        out = _Chosen(pages, counts, slots)
        section = part // score_splits
        first = section * BLOCKS.section_pages
        last = tl.minimum(first + BLOCKS.section_pages, total)
        split = part - section * score_splits
        # Asked for before the length is known, so that the two wait together.
        q = load_query(query, b, h, SHAPE)
        page = first + split * BLOCKS.scored + tl.arange(0, BLOCKS.scored)
        ahead = tl.load(table + page, mask=page < max_pages, other=0)
        if (not is_sparse) & (section == 0) & (split == 0):
            _read_whole(row, out, BLOCKS.slots)
        if is_sparse & (first < total):
            scores = workspace.scores + index.to(tl.int64) * max_pages
            start, step = first + split * BLOCKS.scored, score_splits * BLOCKS.scored
            _score_share(q, row, metadata, h, scores, ahead, start, last, step, max_pages, FORM, IS_MAX, SHAPE, BLOCKS)
            tl.debug_barrier()  # every thread's scores are written before the program says so
            arrived = tl.atomic_add(row.counters + SCORED + section, 1, sem="acq_rel", scope="gpu")
            if arrived == score_splits - 1:
                _choose_section(
                    row, out, scores, workspace, section, sections, first, last,
                    num_sink_pages, num_recent_pages, BLOCKS,
                )  # fmt: skip
    else:
        q = load_query(query, b, h, SHAPE)
        _wait(row)
        _attend_share(
            q, row, keys, values, h, workspace, part, splits, pages_per_split, scale, softcap, SHAPE, BLOCKS
        )  # fmt: skip
        tl.debug_barrier()
        arrived = tl.atomic_add(row.counters + ATTENDED, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            _merge_and_reset(row, workspace, sinks, output, h, splits, sections, SHAPE, BLOCKS)


# Longer than 250 lines: the phases of one launch wait for one another, and are read together.

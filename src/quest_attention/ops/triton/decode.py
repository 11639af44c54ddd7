"""Kernel: one decode step of one layer in one launch.

The programs are of two kinds, all in one grid. The first score the pages of a row; the last of them to finish chooses
the row's pages and raises a flag. The others wait for their row's flag, attend to their share of its pages, and the
last of them to finish merges the shares. So a row is attended to while others are still being scored. A program only
ever waits for programs with a lower index: the hardware starts programs in the order of their index (single-pass scans
rest on the same), so whoever is waited for is running or done.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.errors import QuestValueError
from quest_attention.ops.selection import Selection
from quest_attention.ops.step import Step
from quest_attention.ops.triton.attention import attend_slots
from quest_attention.ops.triton.launch import check_kernel_dtype, launch, lengths_argument, side_by_side
from quest_attention.ops.triton.merge import heads_merged_at_once, merge_splits, store_partial
from quest_attention.ops.triton.scores import group_block, load_query, score_row
from quest_attention.ops.triton.selection import DEAD, choose_pages, rank_scores, store_chosen
from quest_attention.ops.triton.tuning import tune
from quest_attention.ops.triton.workspace import ATTENDED, CHOSEN, READY, SCORED, FusedWorkspace, make_workspace

__all__ = ["quest_decode"]


def quest_decode(step: Step) -> tuple[Tensor, Selection] | None:
    """See `ops.quest_decode`. None where the fused kernel cannot hold the problem; the single verbs can."""
    query, kv, seq_lens, config, workspace = step.query, step.kv, step.seq_lens, step.config, step.workspace
    softcap, sinks, output = step.softcap, step.sinks, step.out
    check_kernel_dtype(kv.keys)
    tuning = None if step.token_mask is not None else tune(kv, query.shape[1], config)
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
    lengths, length = lengths_argument(seq_lens, table)
    section_pages = min(tuning.section_pages, kv.max_pages)
    sections = triton.cdiv(kv.max_pages, section_pages)
    launch(
        _decode_kernel,
        (rows * (sections * tuning.score_splits + tuning.splits),),
        query,
        kv.keys,
        kv.values,
        kv.metadata,
        table,
        lengths,
        length,
        query if sinks is None else side_by_side(sinks),
        *workspace,
        pages,
        counts,
        output,
        float(step.scale),
        float(softcap or 0.0),
        *query.stride()[:2],
        *kv.keys.stride()[:3],
        *kv.values.stride()[:3],
        *kv.metadata.stride()[:3],
        table.stride(0),
        kv.max_pages,
        heads,
        rows,
        slots,
        config.token_budget,
        config.num_sink_pages,
        max(1, config.num_recent_pages),
        sections,
        tuning.score_splits,
        tuning.splits,
        triton.cdiv(slots, tuning.splits),
        RAGGED=isinstance(seq_lens, Tensor),
        SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        IS_MAX=config.group_reduction == "max",
        PAGE_SIZE=kv.page_size,
        GROUP=group,
        BLOCK_G=group_block(group),
        HEAD_DIM=kv.head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(kv.head_dim)),
        VALUE_DIM=width,
        BLOCK_DV=max(16, triton.next_power_of_2(width)),
        BLOCK_P=tuning.block_p,
        BLOCK_T=tuning.block_t,
        HEADS=heads_merged_at_once(group),
        SECTION_PAGES=section_pages,
        SECTIONED=sections > 1,
        BLOCK_A=max(16, triton.next_power_of_2(section_pages)),
        BLOCK_C=triton.next_power_of_2(sections * slots),
        BLOCK_K=triton.next_power_of_2(slots),
        BLOCK_S=max(64, triton.next_power_of_2(tuning.splits)),
        SCORE_STAGES=tuning.score_stages,
        ATTEND_STAGES=tuning.attend_stages,
        num_warps=tuning.num_warps,
        **({} if tuning.max_registers is None else {"maxnreg": tuning.max_registers}),
    )
    return output, Selection(pages, counts)


@triton.jit
def _publish(row_pages, row_physical, page, physical, chosen, slot, count, slots, BLOCK_K: tl.constexpr):
    """Write the chosen pages of a row: logical ones for the caller, physical ones for those that attend."""
    store_chosen(row_pages, page, chosen, slot, count, slots, BLOCK_K)
    tl.store(row_physical + slot, physical, mask=chosen)


@triton.jit
def _raise_flag(row_counters, counts, row, count):
    """Let those go on that wait for the row's pages."""
    tl.store(counts + row, count)
    tl.debug_barrier()
    tl.atomic_xchg(row_counters + READY, 1, sem="release", scope="gpu")


@triton.jit(
    do_not_specialize=[
        "length",
        "table_stride",
        "max_pages",
        "num_kv_heads",
        "rows",
        "slots",
        "token_budget",
        "num_sink_pages",
        "num_recent_pages",
        "sections",
        "score_splits",
        "splits",
        "pages_per_split",
    ]
)
def _decode_kernel(
    query,
    keys,
    values,
    metadata,
    page_table,
    seq_lens,
    length,
    sinks,
    scores,
    best_ranks,
    best_pages,
    physical,
    partial,
    partial_lse,
    counters,
    pages,
    counts,
    output,
    scale,
    softcap,
    query_batch_stride,
    query_head_stride,
    key_page_stride,
    key_token_stride,
    key_head_stride,
    value_page_stride,
    value_token_stride,
    value_head_stride,
    meta_page_stride,
    meta_head_stride,
    meta_side_stride,
    table_stride,
    max_pages,
    num_kv_heads,
    rows,
    slots,
    token_budget,
    num_sink_pages,
    num_recent_pages,
    sections,
    score_splits,
    splits,
    pages_per_split,
    RAGGED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_MAX: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr,
    SECTION_PAGES: tl.constexpr,
    SECTIONED: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SCORE_STAGES: tl.constexpr,
    ATTEND_STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    scorers = sections * score_splits  # programs that score a row
    is_scoring = program < rows * scorers
    # Of either kind; a division is some 30 instructions.
    index = tl.where(is_scoring, program, program - rows * scorers)
    sharing = tl.where(is_scoring, scorers, splits)
    row = index // sharing
    part = index - row * sharing
    sequence = row // num_kv_heads
    b = sequence.to(tl.int64)
    h = (row - sequence * num_kv_heads).to(tl.int64)
    end = length
    if RAGGED:
        end = tl.load(seq_lens + b).to(tl.int32)
    total = tl.cdiv(end, PAGE_SIZE)
    is_sparse = end > token_budget
    count = tl.where(is_sparse, token_budget // PAGE_SIZE, total)
    row_query = query + b * query_batch_stride + h * GROUP * query_head_stride
    row_table = page_table + b * table_stride
    row_physical = physical + row.to(tl.int64) * slots
    row_counters = counters + row * (SCORED + sections)
    if is_scoring:
        section = part // score_splits
        first = section * SECTION_PAGES
        last = tl.minimum(first + SECTION_PAGES, total)
        split = part - section * score_splits
        row_pages = pages + row.to(tl.int64) * slots
        step = score_splits * BLOCK_P
        # Asked for before the length is known, so that the two wait together.
        q = load_query(row_query, query_head_stride, GROUP, BLOCK_G, HEAD_DIM, BLOCK_D)
        page = first + split * BLOCK_P + tl.arange(0, BLOCK_P)
        ahead = tl.load(row_table + page, mask=page < max_pages, other=0)
        if (not is_sparse) & (section == 0) & (split == 0):  # short enough to be read whole
            every = tl.arange(0, BLOCK_K)
            all_physical = tl.load(row_table + every, mask=every < total, other=0)
            _publish(row_pages, row_physical, every, all_physical, every < total, every, count, slots, BLOCK_K)
            _raise_flag(row_counters, counts, row, count)
        if is_sparse & (first < total):
            row_scores = scores + row.to(tl.int64) * max_pages
            for start in tl.range(first + split * BLOCK_P, last, step, num_stages=SCORE_STAGES):
                page = start + tl.arange(0, BLOCK_P)
                here = tl.load(row_table + page, mask=page < max_pages, other=0) if SCORE_STAGES > 1 else ahead
                score = score_row(
                    q,
                    metadata + h * meta_head_stride,
                    here,
                    page < last,
                    meta_page_stride,
                    meta_side_stride,
                    IS_MAX,
                    GROUP,
                    BLOCK_G,
                    HEAD_DIM,
                    BLOCK_D,
                )
                tl.store(row_scores + page, score, mask=page < last)
                if SCORE_STAGES == 1:  # else the compiler reads ahead
                    ahead = tl.load(row_table + page + step, mask=page + step < max_pages, other=0)
            tl.debug_barrier()  # every thread's scores are written before the program says so
            arrived = tl.atomic_add(row_counters + SCORED + section, 1, sem="acq_rel", scope="gpu")
            if arrived == score_splits - 1:
                among = first + tl.arange(0, BLOCK_A)
                is_live = among < last
                score = tl.load(row_scores + among, mask=is_live, other=0.0, cache_modifier=".cg")
                where = among
                if not SECTIONED:  # beside the scores; a row in sections has no registers to keep it in
                    where = tl.load(row_table + among, mask=is_live, other=0)
                is_forced = (among < num_sink_pages) | (among >= total - num_recent_pages)
                ranks = rank_scores(score, is_live, is_forced)
                num_here = tl.minimum(count, last - first)
                chosen, slot = choose_pages(ranks, last - first, num_here)
                if SECTIONED and total > SECTION_PAGES:
                    best = row.to(tl.int64) * sections * slots
                    at = best + section * slots
                    tl.store(best_ranks + at + slot, ranks, mask=chosen)
                    tl.store(best_pages + at + slot, among, mask=chosen)
                    unused = tl.arange(0, BLOCK_K)
                    tl.store(best_ranks + at + unused, DEAD, mask=(unused >= num_here) & (unused < slots))
                    tl.debug_barrier()
                    live_sections = tl.cdiv(total, SECTION_PAGES)
                    arrived = tl.atomic_add(row_counters + CHOSEN, 1, sem="acq_rel", scope="gpu")
                    if arrived == live_sections - 1:
                        candidate = tl.arange(0, BLOCK_C)
                        is_known = candidate < live_sections * slots
                        ranks_best = tl.load(
                            best_ranks + best + candidate, mask=is_known, other=DEAD, cache_modifier=".cg"
                        )
                        is_known = ranks_best != DEAD
                        pages_best = tl.load(
                            best_pages + best + candidate, mask=is_known, other=0, cache_modifier=".cg"
                        )
                        where_best = tl.load(row_table + pages_best, mask=is_known, other=0)
                        chosen_best, slot_best = choose_pages(ranks_best, tl.sum(is_known.to(tl.int32)), count)
                        _publish(
                            row_pages,
                            row_physical,
                            pages_best,
                            where_best,
                            chosen_best,
                            slot_best,
                            count,
                            slots,
                            BLOCK_K,
                        )
                        _raise_flag(row_counters, counts, row, count)
                else:
                    if SECTIONED:
                        where = tl.load(row_table + among, mask=is_live, other=0)
                    _publish(row_pages, row_physical, among, where, chosen, slot, count, slots, BLOCK_K)
                    _raise_flag(row_counters, counts, row, count)
    else:
        q = load_query(row_query, query_head_stride, GROUP, BLOCK_G, HEAD_DIM, BLOCK_D)
        ready = tl.atomic_add(row_counters + READY, 0, sem="acquire", scope="gpu")
        while ready == 0:
            ready = tl.atomic_add(row_counters + READY, 0, sem="acquire", scope="gpu")
        first_slot = part * pages_per_split
        # Pages ascend, so the part-filled one is last and the tokens of the list end where the sequence does.
        tokens = (count - 1) * PAGE_SIZE + (end - 1) % PAGE_SIZE + 1
        largest, weight, gathered = attend_slots(
            q,
            keys + h * key_head_stride,
            values + h * value_head_stride,
            row_physical,
            row_physical,
            first_slot * PAGE_SIZE,
            tl.minimum((first_slot + pages_per_split) * PAGE_SIZE, tokens),
            row_table,
            0,
            scale,
            softcap,
            key_page_stride,
            key_token_stride,
            value_page_stride,
            value_token_stride,
            False,
            SOFTCAP,
            PAGE_SIZE,
            BLOCK_G,
            HEAD_DIM,
            BLOCK_D,
            VALUE_DIM,
            BLOCK_DV,
            BLOCK_T,
            ATTEND_STAGES,
        )
        at = (row.to(tl.int64) * splits + part) * GROUP + tl.arange(0, BLOCK_G)
        store_partial(partial, partial_lse, at, largest, weight, gathered, GROUP, BLOCK_G, VALUE_DIM, BLOCK_DV)
        tl.debug_barrier()
        arrived = tl.atomic_add(row_counters + ATTENDED, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            for first_head in tl.static_range(0, GROUP, HEADS):
                merge_splits(
                    partial,
                    partial_lse,
                    sinks + h * GROUP,
                    output + row.to(tl.int64) * GROUP * VALUE_DIM,
                    partial_lse,
                    VALUE_DIM,
                    row,
                    splits,
                    first_head,
                    HAS_SINKS,
                    False,
                    GROUP,
                    HEADS,
                    VALUE_DIM,
                    BLOCK_DV,
                    BLOCK_S,
                )
            # Everybody has passed: the next launch finds the counters as this one did.
            tl.store(row_counters + READY, 0)
            tl.store(row_counters + ATTENDED, 0)
            tl.store(row_counters + CHOSEN, 0)
            for section in range(sections):
                tl.store(row_counters + SCORED + section, 0)

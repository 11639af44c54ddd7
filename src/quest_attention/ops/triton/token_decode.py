"""Kernels: one decode step of one layer over single tokens that sketches choose, in four launches or six.

    prepare     queries turned, and as bits; the log-sum-exp of each head from the keys of a sample of tokens
    sample      the ranks of some pages' tokens, by the signs of their sketches: `scan` where it fits, else `ranks`
    scan        which of all tokens reach the threshold that the sample gives: the candidates
    pick        these, to a list, and rank them by their keys
    choose      among the candidates of a row
    attend      to the chosen, as `attention` does; the last program of a row merges

Where estimates alone choose (`candidate_factor=0`) one launch comes after `scan` in place of three:

    passing     list all that reach the threshold, and attend to it; the last program of a row merges

Beside a pool of hot tokens, and with several query tokens, it lists alone, and who attends comes after it.

With a mask a seventh comes before these (`masks`): which tokens are live, and where the forced pages end.

Beside a pool of hot tokens `fetch` comes after `prepare`, so that the next step finds its sample there, after `pick`,
which lists alone, and after `choose`; what is listed `weigh` ranks.

A launch waits for all programs of the one before: a threshold needs the ranks of a whole row, and so on. It is started
before those are done, and loads meanwhile what it does not have from them. Within `pick` a program waits for how many
candidates those before it in the row have found, as a single-pass scan does: only ever for programs with a lower index,
which the hardware starts first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.errors import QuestValueError
from quest_attention.ops.selection import Selection
from quest_attention.ops.step import Step
from quest_attention.ops.triton.arguments import (
    Shape,
    by_head,
    keys_argument,
    lengths_argument,
    load_query,
    metadata_argument,
    shape_of,
    side_by_side,
    values_argument,
)
from quest_attention.ops.triton.attention import attend_slots
from quest_attention.ops.triton.candidates import choose_kernel, pick_kernel, weigh_kernel
from quest_attention.ops.triton.fetch import place_units, pool_argument
from quest_attention.ops.triton.launch import check_kernel_dtype, launch, starts_early, wait_for_launch
from quest_attention.ops.triton.masks import LiveTokens, mark_live_tokens
from quest_attention.ops.triton.merge import merge_if_last
from quest_attention.ops.triton.passing import attend_passing_kernel, list_passing_kernel
from quest_attention.ops.triton.preparation import prepare_kernel
from quest_attention.ops.triton.ranks import rank_kernel
from quest_attention.ops.triton.scan import SCAN_WARPS, scan_kernel
from quest_attention.ops.triton.sharing import share_of_list
from quest_attention.ops.triton.sketch import packing_of
from quest_attention.ops.triton.token_workspace import (
    DROPPED_KEYS,
    SAMPLE_PARTS,
    SAMPLED_KEYS,
    Plan,
    TokenWorkspace,
    make_token_workspace,
    plan_of,
)
from quest_attention.ops.triton.tuning import ATTEND_STAGES

__all__ = ["choose_tokens", "decode_tokens"]

_WEIGHED = 16384
"""Channels of keys by which a program ranks candidates at a time."""
_HELD = 512
"""Candidates of a warp where is chosen among them."""
_ATTENDED = (2048, 8192)
"""Channels of keys to which a program attends at a time, of one query head and of several, which it multiplies with."""
_ATTENDED_OF_MORE = 4096
"""The same of any number of heads where it reads all that passes, which is more tokens."""
_REGISTERS = 128
"""Of a thread at most, so that four programs share a multiprocessor."""
_STAGES = 3
"""Blocks of these in flight."""
_MANY_TOKENS = 320
"""From so many tokens of a program on there are `ATTEND_STAGES`: on an H200 with fewer they gained nothing."""
_FETCHED_TIMES = 2
"""Times the candidates that are wanted, of which a pool gets as many at most: more are ranked where they are."""


def decode_tokens(step: Step) -> tuple[Tensor, Selection] | None:
    """See `ops.quest_decode`. None where these kernels cannot hold the problem; the single verbs can."""
    planned = _plan(step)
    if planned is None:
        return None
    plan, workspace = planned
    if not plan.ranks_by_keys and step.hot is None:
        return _attend_passing(step, plan, workspace)
    query, kv, sinks = step.query, step.kv, step.sinks
    batch, heads, width = kv.batch_size, kv.num_kv_heads, kv.values.shape[-1]
    group = query.shape[1] // heads
    selected = _choose(step, plan, workspace)
    shape = shape_of(kv.page_size, group, kv.head_dim, width, unit=1)
    if step.hot is not None:  # the same attention, with a page of the pool for each token
        places = place_units(kv, step.hot, selected.units, step.seq_lens, is_again=plan.ranks_by_keys)
        kv, workspace, shape = step.hot.paged, workspace._replace(places=places), shape._replace(page_size=1)
    output = step.out
    if output is None:
        output = torch.empty(batch, query.shape[1], width, dtype=query.dtype, device=query.device)
    launch(
        _attend_kernel, (batch * heads * plan.attend.each,), by_head(side_by_side(query)), keys_argument(kv),
        values_argument(kv), workspace, selected.counts, None if sinks is None else side_by_side(sinks), output,
        float(step.scale), None if step.softcap is None else float(step.softcap), heads, plan.attend.each, plan.slots,
        SHAPE=shape, BLOCK_S=max(2, triton.next_power_of_2(plan.attend.each)), num_warps=4,
        **_attending(shape, _ATTENDED[group > 1], plan), **starts_early(query),
    )  # fmt: skip
    return output, selected


def choose_tokens(step: Step) -> Selection | None:
    """What `decode_tokens` attends to, for those who attend in a way of their own; None where that is None."""
    planned = _plan(step)
    return None if planned is None else _choose(step, *planned)


def _plan(step: Step) -> tuple[Plan, TokenWorkspace] | None:
    """How a step runs, and its scratch memory; None where these kernels cannot hold the problem."""
    check_kernel_dtype(step.kv.keys)
    plan = plan_of(step.kv, step.query.shape[1], step.config)
    if plan is None:
        return None
    workspace = step.workspace
    if workspace is None:
        workspace = make_token_workspace(step.kv, step.query.shape[1], step.config)
    if not isinstance(workspace, TokenWorkspace):
        raise QuestValueError("workspace", type(workspace).__name__, "what make_workspace gives for this backend")
    return plan, workspace


def _attending(shape: Shape, channels: int, plan: Plan) -> dict[str, int]:
    """How a program goes through the tokens to which it attends."""
    stages = ATTEND_STAGES if plan.slots // plan.attend.each >= _MANY_TOKENS else _STAGES
    width = max(shape.block_d, shape.block_dv)
    return {"BLOCK_T": max(16, channels // width), "STAGES": 1 if shape.group == 1 else stages}


def _attend_passing(step: Step, plan: Plan, workspace: TokenWorkspace) -> tuple[Tensor, Selection]:
    """The step where all that passes is read, and attended to in the launch that lists it."""
    query, kv, sinks = step.query, step.kv, step.sinks
    batch, heads, width = kv.batch_size, kv.num_kv_heads, kv.values.shape[-1]
    group = query.shape[1] // heads
    selected = _selection(step, plan)
    live = _rank(step, plan, workspace)
    output = step.out
    if output is None:
        output = torch.empty(batch, query.shape[1], width, dtype=query.dtype, device=query.device)
    shape = shape_of(kv.page_size, group, kv.head_dim, width, unit=1)
    launch(
        attend_passing_kernel, (plan.attend.programs,), *_passing(step, plan, workspace, live, selected),
        by_head(side_by_side(query)), keys_argument(kv), values_argument(kv),
        None if sinks is None else side_by_side(sinks), output, float(step.scale),
        None if step.softcap is None else float(step.softcap),
        SHAPE=shape, PARTS=max(2, triton.next_power_of_2(plan.attend.most)), **_listing(plan), num_warps=4,
        maxnreg=_REGISTERS, **_attending(shape, _ATTENDED_OF_MORE, plan), **starts_early(query),
    )  # fmt: skip
    return output, selected


def _passing(
    step: Step, plan: Plan, workspace: TokenWorkspace, live: LiveTokens | None, selected: Selection
) -> tuple[Any, ...]:
    """What a kernel is given that lists what passes."""
    table, config = side_by_side(step.kv.page_table), step.config
    return (
        table, table.stride(0), lengths_argument(step.seq_lens), live, workspace, selected.units, selected.counts,
        step.kv.num_kv_heads, config.token_budget, config.num_sink_pages, max(1, config.num_recent_pages),
        step.kv.batch_size, plan.attend.each, plan.rank.each, plan.rank.programs, plan.rank.parts, plan.ranked_pages,
        plan.slots, plan.words, plan.most,
    )  # fmt: skip


def _listing(plan: Plan) -> dict[str, int]:
    """How a program lists what passes."""
    return {
        "AT_ONCE": plan.at_once, "MOST_PARTS": plan.attend.parts, "COUNTED": triton.next_power_of_2(plan.rank.most),
        "PICKED": plan.picked,
    }  # fmt: skip


def _selection(step: Step, plan: Plan) -> Selection:
    """Memory for what a step chooses."""
    units = torch.empty(
        step.kv.batch_size, step.kv.num_kv_heads, plan.slots, dtype=torch.int32, device=step.query.device
    )
    return Selection(units, units.new_empty(units.shape[:2]), 1)


def _rank(step: Step, plan: Plan, workspace: TokenWorkspace) -> LiveTokens | None:
    """The launches after which it is known which tokens pass; gives which are live, None without a mask."""
    query, kv, config = step.query, step.kv, step.config
    batch, heads, width = kv.batch_size, kv.num_kv_heads, kv.values.shape[-1]
    group, rows = query.shape[1] // heads, batch * heads
    by_heads, table = by_head(side_by_side(query)), side_by_side(kv.page_table)
    keys, metadata, lengths = keys_argument(kv), metadata_argument(kv.metadata), lengths_argument(step.seq_lens)
    sinks = None if step.sinks is None else side_by_side(step.sinks)
    stride, scale = table.stride(0), float(step.scale)
    softcap = None if step.softcap is None else float(step.softcap)
    shape = shape_of(kv.page_size, group, kv.head_dim, width, unit=1, multiplies=True)
    packing = packing_of(kv.form, kv.page_size, kv.head_dim)
    budget, sink_pages, recent_pages = config.token_budget, config.num_sink_pages, max(1, config.num_recent_pages)
    follows, norms = starts_early(query), _norms(group)
    dropped = 0 if plan.ranks_by_keys or group == 1 else DROPPED_KEYS  # a single head is compared with none
    live = mark_live_tokens(step, workspace.counters, FOLLOWS=follows["FOLLOWS"])
    live_words, live_spans = (None, None) if live is None else live
    launch(
        prepare_kernel, (rows * (norms + plan.scans),), by_heads, keys, pool_argument(step.hot), table, stride, lengths,
        live, sinks, workspace, scale, softcap, heads, budget, plan.most,
        SHAPE=shape, PACKING=packing, SAMPLE=SAMPLED_KEYS, DROPPED=dropped, PARTS=norms,
        HAS_BITS=plan.scans, num_warps=4, **({"FOLLOWS": follows["FOLLOWS"]} if live is None else follows),
    )  # fmt: skip
    if step.hot is not None and _fetched(step, plan) + norms * SAMPLED_KEYS <= step.hot.slots:
        sampled = _listed(workspace.sampled, batch, heads, norms * SAMPLED_KEYS)
        place_units(kv, step.hot, sampled, step.seq_lens, keys_only=True, is_looked_up=False)
    for is_sample in (True, False):
        shares = plan.sample if is_sample else plan.rank
        choice = (
            softcap, heads, batch, shares.each, shares.parts, plan.words, budget, sink_pages, recent_pages,
            plan.wanted, plan.most,
        )  # fmt: skip
        options = {"IS_SAMPLE": is_sample, "COUNTS": not (is_sample or plan.ranks_by_keys), "SAMPLED": plan.sampled}
        options |= {"AT_ONCE": plan.at_once, "FEWEST": plan.fewest, "NORMS": norms, **follows}
        if plan.scans:
            launch(
                scan_kernel, (shares.programs,),
                metadata.base, metadata.page, metadata.head, table, stride, lengths, live_words, live_spans,
                workspace.bits, workspace.factors, workspace.norms, workspace.sample, workspace.passing,
                workspace.passed, *choice,
                GROUP=group, WORDS=kv.head_dim // 32, WARPS=SCAN_WARPS, num_warps=SCAN_WARPS, maxnreg=_REGISTERS,
                **options,
            )  # fmt: skip
        else:
            launch(
                rank_kernel, (shares.programs,), by_heads, keys.scale, keys.scale_head, metadata, table, stride,
                lengths, live, workspace, scale, *choice,
                SHAPE=shape, PACKING=packing, PAGES=plan.ranked_pages, num_warps=4, **options,
            )  # fmt: skip
    return live


def _choose(step: Step, plan: Plan, workspace: TokenWorkspace) -> Selection:
    """All launches but the one that attends."""
    query, kv, config = step.query, step.kv, step.config
    batch, heads = kv.batch_size, kv.num_kv_heads
    group, rows = query.shape[1] // heads, batch * heads
    selected = _selection(step, plan)
    live = _rank(step, plan, workspace)
    if not plan.ranks_by_keys:
        launch(
            list_passing_kernel, (plan.attend.programs,), *_passing(step, plan, workspace, live, selected),
            PAGE=kv.page_size, **_listing(plan), num_warps=4, **starts_early(query),
        )  # fmt: skip
        return selected
    by_heads, table = by_head(side_by_side(query)), side_by_side(kv.page_table)
    keys, lengths = keys_argument(kv), lengths_argument(step.seq_lens)
    stride, scale = table.stride(0), float(step.scale)
    softcap = None if step.softcap is None else float(step.softcap)
    budget, sink_pages, recent_pages = config.token_budget, config.num_sink_pages, max(1, config.num_recent_pages)
    follows, fetched = starts_early(query), _fetched(step, plan)
    shape = shape_of(kv.page_size, group, kv.head_dim, kv.values.shape[-1], unit=1, multiplies=True)
    parts = triton.next_power_of_2(plan.pick_parts)
    weighing = {"SHAPE": shape, "PARTS": parts, "NORMS": _norms(group), "num_warps": 4}
    weighing["RANKED"] = max(16, _WEIGHED // shape.block_d)
    launch(
        pick_kernel, (rows * plan.pick_parts,), by_heads, keys, table, stride, lengths, live,
        workspace, scale, softcap, heads, budget, sink_pages, recent_pages, plan.pick_parts, plan.listed, plan.words,
        plan.most, fetched,
        PICKED=plan.picked, RANKS=step.hot is None, **weighing, **follows,
    )  # fmt: skip
    if step.hot is not None:
        candidates = _listed(workspace.candidates, batch, heads, plan.listed)[..., :fetched]
        place_units(kv, step.hot, candidates, step.seq_lens, keys_only=True)
        launch(
            weigh_kernel, (rows * plan.pick_parts,), by_heads, keys, pool_argument(step.hot), table, stride, lengths,
            live, workspace, scale, softcap, heads, plan.pick_parts, plan.listed, plan.most, **weighing, **follows,
        )  # fmt: skip
    launch(
        choose_kernel, (rows,), table, stride, lengths, live, workspace, selected.units, selected.counts, heads, budget,
        sink_pages, recent_pages, plan.pick_parts, plan.slots, plan.listed, plan.most,
        PAGE=kv.page_size, PARTS=parts, HELD=plan.held, num_warps=min(32, max(4, plan.held // _HELD)), **follows,
    )  # fmt: skip
    return selected


def _norms(group: int) -> int:
    """Parts of the sample: ranks of a single head need no normaliser, but not too large numbers."""
    return 1 if group == 1 else SAMPLE_PARTS


def _fetched(step: Step, plan: Plan) -> int:
    """Candidates of a row that a pool gets at most."""
    return 0 if step.hot is None else min(plan.listed, step.hot.slots, _FETCHED_TIMES * plan.wanted)


def _listed(tokens: Tensor, batch: int, heads: int, count: int) -> Tensor:
    """A list of each row in a workspace, `[B, HKV, count]`."""
    return tokens.flatten()[: batch * heads * count].view(batch, heads, count)


@triton.jit(do_not_specialize=["num_kv_heads", "splits", "slots"])
def _attend_kernel(
    query, keys, values, space, counts, sinks, output, scale, softcap, num_kv_heads, splits,
    slots,
    SHAPE: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr, BLOCK_S: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """Attention over a share of a row's tokens; whoever is last merges the shares."""
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    q = load_query(query, b, h, SHAPE)
    wait_for_launch(FOLLOWS)
    count = tl.load(counts + row)
    first, last = share_of_list(count, split, splits)
    places = space.places + row.to(tl.int64) * slots
    largest, weight, gathered = attend_slots(
        q, keys, values, h, places, None, first, last, None, 0, scale, softcap, SHAPE, BLOCK_T, STAGES
    )  # fmt: skip
    merge_if_last(space, sinks, output, h, row, split, splits, largest, weight, gathered, SHAPE, BLOCK_S)


# Longer than 250 lines: the launches of a step, in their order.

"""Kernels: one decode step of one layer over single tokens that sketches and their keys choose, in five launches.

    prepare     queries turned, and as bits; the log-sum-exp of each head from the keys of a sample of tokens
    rank        all tokens, by the signs of their sketches: `scan` where it fits, else `_rank_kernel`
    pick        candidates, those that pass a threshold found in a sample of the ranks, and rank them by their keys
    choose      among the candidates of a row
    attend      to the chosen, as `attention` does; the last program of a row merges

A launch waits for all programs of the one before: a threshold needs the ranks of a whole row, and so on. It is started
before those are done, and loads meanwhile what it does not have from them. Within `pick` a program waits for how many
candidates those before it in the row have found, as a single-pass scan does: only ever for programs with a lower index,
which the hardware starts first.
"""

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
from quest_attention.errors import QuestValueError
from quest_attention.ops.selection import Selection
from quest_attention.ops.step import Step
from quest_attention.ops.triton.arguments import (
    by_head,
    keys_argument,
    length_of,
    lengths_argument,
    load_query,
    metadata_argument,
    shape_of,
    side_by_side,
    values_argument,
)
from quest_attention.ops.triton.arithmetic import LOG2_E, dot, widen
from quest_attention.ops.triton.attention import attend_slots
from quest_attention.ops.triton.choice import DEAD, choose_pages
from quest_attention.ops.triton.launch import (
    check_kernel_dtype,
    is_interpreted,
    launch,
    let_next_start,
    starts_early,
    wait_for_launch,
)
from quest_attention.ops.triton.merge import merge_splits, store_partial
from quest_attention.ops.triton.scan import SCAN_PAGE_SIZE, SCAN_WARPS, SCANNED_PAGES, scan_kernel
from quest_attention.ops.triton.sketch import estimates, packing_of, turn, turned_queries
from quest_attention.ops.triton.tuning import filling_programs
from quest_attention.pages import PagedKV

__all__ = ["TokenWorkspace", "decode_tokens", "make_token_workspace"]

_HEADS = 16
"""Query heads of a group that a row of the workspace has room for."""
_SAMPLE = 128
"""Tokens by whose keys a program of `prepare` estimates a log-sum-exp."""
_PARTS = 4
"""Such programs of a row."""
_SAMPLED_RANKS = 2048
"""Most ranks in which a row's threshold is looked for."""
_FEWEST = 8
"""Sampled ranks that pass the threshold at least: of fewer none says much about a row."""
_RANKED_PAGES = 16
"""Pages that a program of `_rank_kernel` ranks at a time."""
_PICKED = 128
"""Words of 16 tokens in which a program looks for candidates at a time."""
_LEAST_WORDS = 64
"""Fewest of these worth a program."""
_WEIGHED = 16384
"""Channels of keys by which a program ranks candidates at a time."""
_HELD = 512
"""Candidates of a warp where is chosen among them."""
_ATTENDED = 4096
"""Channels of keys to which a program attends at a time."""
_STAGES = 3
"""Blocks of these in flight."""
_MOST_HELD = 32768
"""Candidates among which a program chooses: 32 a thread."""
_LEAST_TOKENS = 64
"""Fewest tokens worth a program that attends to them."""
_LEAST_SPLITS = 8
"""Programs that attend to a row at least, if there is work for so many."""
_LARGEST = tl.constexpr(3.4028234663852886e38)
"""Rank of a candidate whose logit is not finite: it is read, so that it shows as in dense attention."""


class TokenWorkspace(NamedTuple):
    """Scratch memory of `decode_tokens`; a step leaves the counters at zero, as it found them.

    R is the rows of a step, a KV head of a sequence each. Kernels count rows from the beginning of each tensor, so that
    memory for many rows serves fewer as well.

    Attributes:
        bits: Queries, `[R, tiles * 32]` int32; see `scan`.
        factors: `[R, 3 * 16]` float32; see `scan`.
        norms: Log-sum-exps of the parts of the sample in base 2, `[R, 4, 16]` float32.
        sample: Ranks of the tokens of some pages, `[R, 2048]` float16.
        passing: Which tokens pass, two bits of four for two tokens, 16 tokens a word: `[R, words]` int32.
        candidates: Tokens that passed the threshold, `[R, C]` int32.
        located: Where they lie in the cache, `[R, C]` int32.
        exact: Their ranks by their keys, `[R, C]` float32.
        found: One more than each program of `pick` has found, `[R, parts]` int32, zero between steps.
        places: Chosen tokens in the cache, `[R, K]` int32.
        partial: `[R, splits, G, DV]` float32.
        partial_lse: `[R, splits, G]` float32.
        counters: `[R]` int32, zero between launches.
    """

    bits: Tensor
    factors: Tensor
    norms: Tensor
    sample: Tensor
    passing: Tensor
    candidates: Tensor
    located: Tensor
    exact: Tensor
    found: Tensor
    places: Tensor
    partial: Tensor
    partial_lse: Tensor
    counters: Tensor

    @property
    def scores(self) -> None:
        """None: no score of every token is kept in float32."""
        return None

    def fits(self, kv: PagedKV, num_query_heads: int, config: QuestConfig) -> bool:
        """Whether a step of this shape can use the workspace."""
        plan = _plan(kv, num_query_heads, config)
        if plan is None or self.bits.device != kv.keys.device:
            return False
        return all(tensor.numel() >= math.prod(shape) for tensor, shape in zip(self, plan.shapes, strict=True))


class _Plan(NamedTuple):
    """The shape of the launches of a step.

    Attributes:
        scans: Whether `scan` ranks.
        sample_parts: Programs that rank the sample of a row.
        rank_parts: Programs that rank a row.
        pick_parts: Programs that pick from a row.
        held: Candidates among which is chosen at a time.
        splits: Programs that attend to a row.
        slots: Tokens of a selection at most.
        listed: Candidates of a row that there is room for.
        words: Of a row, in which it is said which tokens pass.
        shapes: Of a workspace.
    """

    scans: bool
    sample_parts: int
    rank_parts: int
    pick_parts: int
    held: int
    splits: int
    slots: int
    listed: int
    words: int
    shapes: tuple[tuple[int, ...], ...]


def _plan(kv: PagedKV, num_query_heads: int, config: QuestConfig) -> _Plan | None:
    """See `_Plan`; None where the kernels cannot hold the problem."""
    rows, group = kv.batch_size * kv.num_kv_heads, num_query_heads // kv.num_kv_heads
    if (
        kv.form.name != "sketch"
        or config.unit_size != 1
        or config.group_reduction != "max"
        or not config.candidate_factor
        or rows == 0
        or kv.max_pages == 0
        or group > _HEADS
        or 2 * config.candidate_budget > _MOST_HELD
    ):
        return None
    programs = filling_programs(kv.keys.device)
    scans = can_scan(kv, group)
    pages = SCANNED_PAGES if scans else _RANKED_PAGES
    tiles = triton.cdiv(kv.max_pages, pages)
    most, words = kv.max_pages * kv.page_size, kv.max_pages * triton.cdiv(kv.page_size, 16)
    slots = min(most, config.token_budget)
    listed = min(most, 8 * config.candidate_budget)
    pick_parts = max(1, min(64, triton.cdiv(words, _LEAST_WORDS), triton.cdiv(2 * programs, rows)))
    held = max(16, min(triton.next_power_of_2(2 * config.candidate_budget), triton.next_power_of_2(listed)))
    splits = max(1, min(slots // _LEAST_TOKENS, max(_LEAST_SPLITS, triton.cdiv(programs // 2, rows))))
    tiles_of_bits = 6 * triton.cdiv(group, 4) * max(1, kv.head_dim // 128)
    shapes = (
        (rows, tiles_of_bits * 32), (rows, 3 * _HEADS), (rows, _PARTS, _HEADS), (rows, _SAMPLED_RANKS), (rows, words),
        (rows, listed), (rows, listed), (rows, listed), (rows, pick_parts), (rows, slots),
        (rows, splits, group, kv.values.shape[-1]), (rows, splits, group), (rows,),
    )  # fmt: skip
    return _Plan(
        scans,
        max(1, min(tiles, triton.cdiv(_SAMPLED_RANKS, pages * kv.page_size), programs // rows)),
        max(1, min(tiles, programs // rows)),
        pick_parts,
        held,
        splits,
        slots,
        listed,
        words,
        shapes,
    )


_DTYPES = (
    torch.int32, torch.float32, torch.float32, torch.float16, torch.int32, torch.int32, torch.int32, torch.float32,
    torch.int32, torch.int32, torch.float32, torch.float32, torch.int32,
)  # fmt: skip
"""Of the tensors of a workspace, in order."""


def can_scan(kv: PagedKV, group: int) -> bool:
    """Whether the binary products of `scan` fit a cache, and the GPU has them."""
    if is_interpreted() or group > 8 or kv.page_size != SCAN_PAGE_SIZE or kv.head_dim not in (64, 128, 256):
        return False
    if kv.keys.device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(kv.keys.device)[0] in (8, 9)


def decode_tokens(step: Step) -> tuple[Tensor, Selection] | None:
    """See `ops.quest_decode`. None where these kernels cannot hold the problem; the single verbs can."""
    query, kv, config, workspace = step.query, step.kv, step.config, step.workspace
    check_kernel_dtype(kv.keys)
    if step.token_mask is not None or step.softcap is not None:
        return None
    plan = _plan(kv, query.shape[1], config)
    if plan is None:
        return None
    batch, heads, device = kv.batch_size, kv.num_kv_heads, query.device
    group, width, rows = query.shape[1] // heads, kv.values.shape[-1], batch * heads
    if workspace is None:
        workspace = make_token_workspace(kv, query.shape[1], config)
    if not isinstance(workspace, TokenWorkspace):
        raise QuestValueError("workspace", type(workspace).__name__, "what make_workspace gives for this backend")
    output = step.out
    if output is None:
        output = torch.empty(batch, query.shape[1], width, dtype=query.dtype, device=device)
    units = torch.empty(batch, heads, plan.slots, dtype=torch.int32, device=device)
    counts = torch.empty(batch, heads, dtype=torch.int32, device=device)
    by_heads, table, lengths = (
        by_head(side_by_side(query)),
        side_by_side(kv.page_table),
        lengths_argument(step.seq_lens),
    )
    keys, metadata, sinks = keys_argument(kv), metadata_argument(kv.metadata), step.sinks
    sinks = None if sinks is None else side_by_side(sinks)
    stride, scale = table.stride(0), float(step.scale)
    multiplied = shape_of(kv.page_size, group, kv.head_dim, width, unit=1, multiplies=True)
    packing = packing_of(kv.form, kv.page_size, kv.head_dim)
    budget, sink_pages, recent_pages = config.token_budget, config.num_sink_pages, max(1, config.num_recent_pages)
    follows = starts_early(query)
    norms = 1 if group == 1 else _PARTS  # ranks of a single head need no normaliser, but not too large numbers
    launch(
        _prepare_kernel, (rows * (norms + plan.scans),), by_heads, keys, table, stride, lengths, sinks, workspace,
        scale, heads, budget, SHAPE=multiplied, PACKING=packing, SAMPLE=_SAMPLE, PARTS=norms, HAS_BITS=plan.scans,
        FOLLOWS=follows["FOLLOWS"], num_warps=8,
    )  # fmt: skip
    for is_sample in (True, False):
        programs = plan.sample_parts if is_sample else plan.rank_parts
        choice = (heads, programs, plan.words, budget, sink_pages, recent_pages, config.candidate_budget)
        options = {"IS_SAMPLE": is_sample, "SAMPLED": _SAMPLED_RANKS, "FEWEST": _FEWEST, "NORMS": norms, **follows}
        if plan.scans:
            launch(
                scan_kernel, (rows * programs,),
                metadata.base, metadata.page, metadata.head, table, stride, lengths, workspace.bits, workspace.factors,
                workspace.norms, workspace.sample, workspace.passing, *choice,
                GROUP=group, WORDS=kv.head_dim // 32, WARPS=SCAN_WARPS, num_warps=SCAN_WARPS, maxnreg=128, **options,
            )  # fmt: skip
        else:
            launch(
                _rank_kernel, (rows * programs,), by_heads, keys.scale, keys.scale_head, metadata, table, stride,
                lengths, workspace, scale, *choice,
                SHAPE=multiplied, PACKING=packing, PAGES=_RANKED_PAGES, num_warps=4, **options,
            )  # fmt: skip
    parts = triton.next_power_of_2(plan.pick_parts)
    launch(
        _pick_kernel, (rows * plan.pick_parts,), by_heads, keys, table, stride, lengths, workspace, scale, heads,
        budget, sink_pages, recent_pages, plan.pick_parts, plan.listed, plan.words,
        SHAPE=multiplied, PARTS=parts, NORMS=norms, PICKED=_PICKED,
        RANKED=max(16, _WEIGHED // multiplied.block_d), num_warps=4, **follows,
    )  # fmt: skip
    launch(
        _choose_kernel, (rows,), table, stride, lengths, workspace, units, counts, heads, budget, sink_pages,
        recent_pages, plan.pick_parts, plan.slots, plan.listed,
        PAGE=kv.page_size, PARTS=parts, HELD=plan.held, num_warps=min(32, max(4, plan.held // _HELD)), **follows,
    )  # fmt: skip
    shape = shape_of(kv.page_size, group, kv.head_dim, width, unit=1)
    launch(
        _attend_kernel, (rows * plan.splits,), by_heads, keys, values_argument(kv), workspace, counts, sinks, output,
        scale, heads, plan.splits, plan.slots,
        SHAPE=shape, BLOCK_T=max(16, _ATTENDED // shape.block_d), STAGES=1 if group == 1 else _STAGES,
        BLOCK_S=max(2, triton.next_power_of_2(plan.splits)), num_warps=4, **follows,
    )  # fmt: skip
    return output, Selection(units, counts, 1)


def make_token_workspace(
    kv: PagedKV, num_query_heads: int, config: QuestConfig, batch_sizes: Iterable[int] | None = None
) -> TokenWorkspace | None:
    """Memory for steps of this shape; None where the kernels cannot hold one."""
    kvs = [kv]
    if batch_sizes is not None:
        kvs = [
            replace(kv, page_table=kv.page_table.new_zeros(1, kv.max_pages).expand(n, -1), contiguous=None)
            for n in batch_sizes
        ]
    plans = [_plan(one, num_query_heads, config) for one in kvs]
    if not plans or None in plans:
        return None
    shapes = zip(*(plan.shapes for plan in plans if plan is not None), strict=True)
    return TokenWorkspace(
        *(
            torch.zeros(max(some, key=math.prod), dtype=dtype, device=kv.keys.device)
            for some, dtype in zip(shapes, _DTYPES, strict=True)
        )
    )


@triton.jit
def _store_bits(turned, bits, factors, row, SHAPE: tl.constexpr, PACKING: tl.constexpr):
    """Turned queries `[16, D]`, scaled as logits in base 2, as rows of bits: what `scan` multiplies with."""
    BYTES: tl.constexpr = PACKING.bytes8
    SETS: tl.constexpr = (SHAPE.group + 3) // 4
    HALVES: tl.constexpr = (SHAPE.head_dim + 127) // 128
    HEADS: tl.constexpr = SHAPE.block_g
    g = tl.arange(0, HEADS)
    top = tl.maximum(tl.max(tl.abs(turned), 1), 1e-30)
    of_mean = top / 127.0
    of_sign = top / 7.0
    fine = tl.floor(turned / of_mean[:, None] + 0.5).to(tl.int32)
    coarse = tl.floor(turned / of_sign[:, None] + 0.5).to(tl.int32)
    to = factors + row * 48 + g
    tl.store(to, of_mean)
    tl.store(to + 16, 2.0 * of_sign)  # a bit is one sign more than none, and two from one to the other
    tl.store(to + 32, of_sign * tl.sum(coarse, 1).to(tl.float32))
    byte = tl.arange(0, BYTES)
    # A tile has eight columns of 16 bytes; two tiles of signs come first, then four of means, for each 128 channels.
    tiles = bits.to(tl.pointer_type(tl.uint8)) + row.to(tl.int64) * (SETS * HALVES * 768) + g // 4 * (HALVES * 768)
    column = tiles[:, None] + (byte // 16 * 768 + byte % 16)[None, :] + (g % 4 * 32)[:, None]
    inside = (g < 4 * SETS)[:, None] & (byte < BYTES)[None, :]
    _store_planes(column, coarse, inside, BYTES)
    _store_planes(column + 256, fine, inside, BYTES)
    _store_planes(column + 512, fine >> 4, inside, BYTES)


@triton.jit
def _store_planes(column, code, inside, BYTES: tl.constexpr):
    """The low four bits of some codes `[HEADS, 8 * BYTES]`, each as rows of bits."""
    spread = ((code & 15) * 0x00204081) & 0x01010101  # each bit in a byte of its own
    spread = tl.reshape(spread, [code.shape[0], 8, BYTES]) << tl.arange(0, 8)[None, :, None]
    planes = tl.sum(spread, 1)
    for bit in tl.static_range(4):
        tl.store(column + (bit // 2 * 128 + bit % 2 * 16), (planes >> (8 * bit)).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["lengths", "num_kv_heads", "table_stride", "token_budget"])
def _prepare_kernel(
    query, keys, page_table, table_stride, lengths, sinks, space, scale, num_kv_heads, token_budget,
    SHAPE: tl.constexpr, PACKING: tl.constexpr, SAMPLE: tl.constexpr, PARTS: tl.constexpr, HAS_BITS: tl.constexpr,
    FOLLOWS: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of a row's heads over a part of a sample of its tokens; and the bits of its queries.

    The sample is the first and the last tokens of the sequence, a page's worth each, and as many of those between as
    there is room for, evenly apart but for a draw in each step; these weigh as what they stand for.
    """
    let_next_start(FOLLOWS)
    PROGRAMS: tl.constexpr = PARTS + HAS_BITS
    row = tl.program_id(0) // PROGRAMS
    part = tl.program_id(0) % PROGRAMS
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = length_of(lengths, b)
    factor = scale * LOG2_E
    if keys.scale is not None:
        factor = factor * tl.load(keys.scale + h * keys.scale_head)
    q = load_query(query, b, h, SHAPE)
    if HAS_BITS:  # a constant: without it what is below does not compile for every shape
        if part == PARTS:
            turned = turn(q, SHAPE.head_dim, SHAPE.block_d, PACKING) * factor
            _store_bits(turned, space.bits, space.factors, row, SHAPE, PACKING)
    if (part < PARTS) & (end > token_budget):
        EDGE: tl.constexpr = SHAPE.page_size
        DRAWN: tl.constexpr = SAMPLE * PARTS - 2 * SHAPE.page_size
        head = tl.arange(0, SHAPE.block_g)
        channel = tl.arange(0, SHAPE.block_d)
        at = part * SAMPLE + tl.arange(0, SAMPLE)
        between = tl.maximum(end - 2 * EDGE, 1)
        nth = at - 2 * EDGE
        draw = ((nth * 40503) & 0xFFFF).to(tl.float32) / 65536.0
        each = between.to(tl.float32) / DRAWN
        drawn = EDGE + tl.minimum(((nth.to(tl.float32) + draw) * each).to(tl.int32), between - 1)
        position = tl.where(at < EDGE, at, tl.where(at < 2 * EDGE, end - 2 * EDGE + at, drawn))
        is_live = (position >= 0) & (position < end)
        physical = tl.load(page_table + b * table_stride + position // EDGE, mask=is_live, other=0).to(tl.int64)
        key_at = keys.base + h * keys.head + physical * keys.page + (position % EDGE).to(tl.int64) * keys.token
        inside = is_live[:, None] & (channel < SHAPE.head_dim)[None, :]
        k = tl.load(key_at[:, None] + channel[None, :], mask=inside, other=0.0)
        HEADS: tl.constexpr = SHAPE.block_g
        logit = dot(q, tl.trans(widen(k, q.dtype)), tl.zeros([HEADS, SAMPLE], tl.float32)) * factor
        logit += tl.where(at < 2 * EDGE, 0.0, tl.log2(each))[None, :]
        is_known = is_live[None, :] & (tl.abs(logit) < float("inf"))
        logit = tl.where(is_known, logit, float("-inf"))
        largest = tl.maximum(tl.max(logit, 1), -1e30)
        total = tl.sum(tl.exp2(logit - largest[:, None]), 1)
        if sinks is not None:
            sink = tl.load(sinks + h * SHAPE.group + head, mask=head < SHAPE.group, other=0.0).to(tl.float32) * LOG2_E
            total += tl.where(part == 0, tl.exp2(sink - largest), 0.0)
        norm = tl.where(total > 0, largest + tl.log2(total), float("-inf"))
        tl.store(space.norms + (row * PARTS + part) * 16 + head, norm, mask=head < 16)


@triton.jit
def _norms_of(norms, row, SHAPE: tl.constexpr, NORMS: tl.constexpr):
    """The normaliser of each head of a row, `[BLOCK_G]`: 0 where nothing had weight, inf where there is no head."""
    head = tl.arange(0, SHAPE.block_g)
    part = tl.arange(0, NORMS)
    lse = tl.load(norms + (row * NORMS + part[:, None]) * 16 + head[None, :])
    largest = tl.maximum(tl.max(lse, 0), -1e30)
    total = tl.sum(tl.exp2(lse - largest[None, :]), 0)
    norm = tl.where(total > 0, largest + tl.log2(total), 0.0)
    return tl.where(head < SHAPE.group, norm, float("inf"))


@triton.jit
def _drawn(whole, PAGE: tl.constexpr, SAMPLED: tl.constexpr):
    """How many of a row's whole pages are drawn, and by how many bits their numbers in the sample are shifted."""
    rare = 0
    for _ in tl.static_range(16):
        rare += ((whole >> rare) * PAGE > SAMPLED).to(tl.int32)
    return whole >> rare, rare


@triton.jit
def _drawn_page(nth, rare):
    """Of every `1 << rare` pages that follow one another, the one that is drawn."""
    return (nth << rare) + ((nth * 40503 >> 4) & ((1 << rare) - 1))


@triton.jit(do_not_specialize=[
    "lengths", "num_kv_heads", "table_stride", "token_budget", "num_sink_pages", "num_recent_pages", "candidate_budget",
    "parts", "capacity",
])  # fmt: skip
def _rank_kernel(
    query, key_scale, scale_head, metadata, page_table, table_stride, lengths, space, scale, num_kv_heads, parts,
    capacity, token_budget, num_sink_pages, num_recent_pages, candidate_budget,
    IS_SAMPLE: tl.constexpr, SHAPE: tl.constexpr, PACKING: tl.constexpr, PAGES: tl.constexpr, SAMPLED: tl.constexpr,
    FEWEST: tl.constexpr, NORMS: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """What `scan` does, for any shape and in the interpreter, with queries that are not rounded."""
    row = tl.program_id(0) // parts
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = length_of(lengths, b)
    PAGE: tl.constexpr = SHAPE.page_size
    BLOCK: tl.constexpr = SHAPE.block_page
    whole = tl.where(end > token_budget, (end - 1) // PAGE, 0)
    drawn, rare = _drawn(whole, PAGE, SAMPLED)
    factor = scale * LOG2_E
    if key_scale is not None:
        factor = factor * tl.load(key_scale + h * scale_head)
    q_top, q_rest = turned_queries(query, b, h, SHAPE, PACKING)
    wait_for_launch(FOLLOWS)
    norm = _norms_of(space.norms, row, SHAPE, NORMS)
    token = tl.arange(0, BLOCK)
    last = drawn if IS_SAMPLE else whole
    low = 0.0
    if not IS_SAMPLE:
        first_page, last_page = _choice_of(end, num_sink_pages, num_recent_pages, PAGE)
        low = _threshold(
            space.sample + row * SAMPLED, drawn, rare, first_page, last_page, candidate_budget, PAGE, SAMPLED, FEWEST
        )
    for start in range(tl.program_id(0) % parts * PAGES, last, parts * PAGES):
        nth = start + tl.arange(0, PAGES)
        page = _drawn_page(nth, rare) if IS_SAMPLE else nth
        physical = tl.load(page_table + b * table_stride + page, mask=nth < last, other=0).to(tl.int64)
        sketch = metadata.base + h * metadata.head + physical * metadata.page
        weight = estimates(sketch, q_top, q_rest, SHAPE, PACKING) * factor - norm[None, None, :]
        is_unknown = tl.sum((weight != weight).to(tl.int32), 2) > 0
        rank = tl.where(is_unknown, float("nan"), tl.max(weight, 2)).to(tl.float16)
        inside = (nth < last)[:, None] & (token < PAGE)[None, :]
        if IS_SAMPLE:
            tl.store(space.sample + row * SAMPLED + nth[:, None] * PAGE + token[None, :], rank, mask=inside)
        else:
            WORDS: tl.constexpr = (PAGE + 15) // 16
            ROOM: tl.constexpr = BLOCK // 16 if BLOCK > 16 else 1
            EACH: tl.constexpr = min(BLOCK, 16)
            passes = (inside & ~(rank.to(tl.float32) < low)).to(tl.int32)  # NaN passes
            bit = tl.arange(0, EACH)
            passes = tl.reshape(passes, [PAGES, ROOM, EACH]) << (bit // 2 * 4 + bit % 2)[None, None, :]
            word = tl.arange(0, ROOM)
            to = space.passing + row.to(tl.int64) * capacity + nth[:, None] * WORDS + word[None, :]
            tl.store(to, tl.sum(passes, 2), mask=(nth < last)[:, None] & (word < WORDS)[None, :])


@triton.jit
def _threshold(
    sample, drawn, rare, first_page, last_page, wanted, PAGE: tl.constexpr, SAMPLED: tl.constexpr, FEWEST: tl.constexpr
):
    """A rank that about `wanted` of the tokens of some pages of a row reach, by what a sample of the ranks says."""
    at = tl.arange(0, SAMPLED)
    page = _drawn_page(at // PAGE, rare)
    inside = (at // PAGE < drawn) & (page >= first_page) & (page < last_page)
    rank = tl.load(sample + at, mask=inside, other=0.0).to(tl.float32)
    rank = tl.where(inside, tl.where(rank == rank, tl.maximum(rank, -65504.0), 65504.0), float("-inf"))
    known = tl.sum(inside.to(tl.int32))
    share = wanted.to(tl.float32) / ((last_page - first_page) * PAGE).to(tl.float32)
    most = tl.maximum((share * known.to(tl.float32)).to(tl.int32), FEWEST)
    high = tl.max(rank)
    low = tl.min(tl.where(inside, rank, 65504.0))
    for _ in range(6):
        third = (high - low) * 0.33333334
        lower, upper = low + third, high - third
        both = tl.sum((rank >= lower).to(tl.int32) + (rank >= upper).to(tl.int32) * 65536)
        is_lower, is_upper = (both & 0xFFFF) >= most, (both >> 16) >= most
        high = tl.where(is_upper, high, tl.where(is_lower, upper, lower))
        low = tl.where(is_upper, upper, tl.where(is_lower, lower, low))
    return tl.where(most < known, low, -65504.0)


@triton.jit
def _choice_of(end, num_sink_pages, num_recent_pages, PAGE: tl.constexpr):
    """First of the pages among whose tokens is chosen, and the one after the last."""
    total = tl.cdiv(end, PAGE)
    first_page = tl.minimum(num_sink_pages, total)
    return first_page, tl.maximum(total - num_recent_pages, first_page)


@triton.jit
def _count_passing(words):
    """How many tokens pass in each word."""
    pairs = (words & 0x11111111) + ((words >> 1) & 0x11111111)
    fours = (pairs & 0x0F0F0F0F) + ((pairs >> 4) & 0x0F0F0F0F)
    return (fours * 0x01010101) >> 24


@triton.jit(do_not_specialize=[
    "lengths", "num_kv_heads", "table_stride", "token_budget", "num_sink_pages", "num_recent_pages", "parts", "listed",
    "capacity",
])  # fmt: skip
def _pick_kernel(
    query, keys, page_table, table_stride, lengths, space, scale, num_kv_heads, token_budget, num_sink_pages,
    num_recent_pages, parts, listed, capacity,
    SHAPE: tl.constexpr, PARTS: tl.constexpr, NORMS: tl.constexpr, PICKED: tl.constexpr, RANKED: tl.constexpr,
    FOLLOWS: tl.constexpr,
):  # fmt: skip
    """The candidates of a part of a row, behind those of the parts before it, with their ranks by their keys."""
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    b = (row // num_kv_heads).to(tl.int64)
    h = (row % num_kv_heads).to(tl.int64)
    end = length_of(lengths, b)
    PAGE: tl.constexpr = SHAPE.page_size
    WORDS: tl.constexpr = (PAGE + 15) // 16
    q = load_query(query, b, h, SHAPE)
    wait_for_launch(FOLLOWS)
    if end > token_budget:
        first_page, last_page = _choice_of(end, num_sink_pages, num_recent_pages, PAGE)
        words = space.passing + row.to(tl.int64) * capacity
        candidates = space.candidates + row.to(tl.int64) * listed
        share = tl.cdiv((last_page - first_page) * WORDS, parts)
        first = first_page * WORDS + part * share
        last = tl.minimum(first + share, last_page * WORDS)
        at = first + tl.arange(0, PICKED)
        passing = tl.load(words + at, mask=at < last, other=0)
        mine = tl.sum(_count_passing(passing))
        for start in range(first + PICKED, last, PICKED):
            more = start + tl.arange(0, PICKED)
            mine += tl.sum(_count_passing(tl.load(words + more, mask=more < last, other=0)))
        tl.atomic_xchg(space.found + row * parts + part, mine + 1, sem="relaxed", scope="gpu")
        norm = _norms_of(space.norms, row, SHAPE, NORMS)
        before = _found_before(space.found + row * parts, part, PARTS)
        kept = _list(candidates, at, passing, before, listed, PAGE)
        for start in range(first + PICKED, last, PICKED):
            more = start + tl.arange(0, PICKED)
            kept = _list(candidates, more, tl.load(words + more, mask=more < last, other=0), kept, listed, PAGE)
        kept = tl.minimum(kept, listed)
        factor = scale * LOG2_E
        if keys.scale is not None:
            factor = factor * tl.load(keys.scale + h * keys.scale_head)
        table = page_table + b * table_stride
        tl.debug_barrier()  # the list is read by other threads than those that wrote it
        for start in range(before, kept, RANKED):
            here = start + tl.arange(0, RANKED)
            is_live = here < kept
            candidate = tl.load(candidates + here, mask=is_live, other=0)
            physical = tl.load(table + candidate // PAGE, mask=is_live, other=0)
            rank = _rank_by_keys(q, keys, physical, candidate, is_live, h, norm, factor, SHAPE)
            tl.store(space.exact + row.to(tl.int64) * listed + here, rank, mask=is_live)
            place = physical * PAGE + candidate % PAGE
            tl.store(space.located + row.to(tl.int64) * listed + here, place, mask=is_live)


@triton.jit
def _list(candidates, at, passing, kept, listed, PAGE: tl.constexpr):
    """Write the tokens that pass behind the `kept` ones before them; gives how many there are then."""
    WORDS: tl.constexpr = (PAGE + 15) // 16
    each = _count_passing(passing)
    slot = kept + tl.cumsum(each) - each
    token = at // WORDS * PAGE + at % WORDS * 16
    for offset in tl.static_range(16):
        passes = (passing >> (offset // 2 * 4 + offset % 2)) & 1
        tl.store(candidates + slot, token + offset, mask=(passes != 0) & (slot < listed))
        slot += passes
    return kept + tl.sum(each)


@triton.jit
def _found_before(found, part, PARTS: tl.constexpr):
    """How many candidates the parts before one have: waits until all have said so."""
    other = tl.arange(0, PARTS)
    counts = tl.load(found + other, mask=other < part, other=1, volatile=True)
    while tl.min(counts) == 0:
        counts = tl.load(found + other, mask=other < part, other=1, volatile=True)
    return tl.sum(counts - 1)


@triton.jit(do_not_specialize=[
    "lengths", "num_kv_heads", "table_stride", "token_budget", "num_sink_pages", "num_recent_pages", "parts", "slots",
    "listed",
])  # fmt: skip
def _choose_kernel(
    page_table, table_stride, lengths, space, units, counts, num_kv_heads, token_budget, num_sink_pages,
    num_recent_pages, parts, slots, listed,
    PAGE: tl.constexpr, PARTS: tl.constexpr, HELD: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """The tokens of a row to attend to, in the order of the sequence, and where they lie."""
    row = tl.program_id(0)
    b = row // num_kv_heads
    end = length_of(lengths, b)
    table = page_table + b.to(tl.int64) * table_stride
    units += row.to(tl.int64) * slots
    places = space.places + row.to(tl.int64) * slots
    if end <= token_budget:
        wait_for_launch(FOLLOWS)
        _store_run(table, units, places, 0, 0, end, PAGE)
        _store_unused(units, end, slots)
        tl.store(counts + row, end)
    else:
        first_page, last_page = _choice_of(end, num_sink_pages, num_recent_pages, PAGE)
        sinks = first_page * PAGE
        recent = end - last_page * PAGE
        # All that is read always, in one go if a run of it is no longer than this.
        RUN: tl.constexpr = 64
        forced = tl.arange(0, 2 * RUN)
        token = tl.where(forced < RUN, forced, last_page * PAGE + forced - RUN)
        is_forced = (forced < sinks) & (forced < RUN) | (forced >= RUN) & (forced - RUN < recent)
        place = tl.load(table + token // PAGE, mask=is_forced, other=0) * PAGE + token % PAGE
        wait_for_launch(FOLLOWS)
        each = tl.arange(0, PARTS)
        found = tl.load(space.found + row * parts + each, mask=each < parts, other=1)
        start = row.to(tl.int64) * listed
        here = tl.arange(0, HELD)
        # Asked for before it is known how many there are, so that the two wait together.
        rank = tl.load(space.exact + start + here, mask=here < listed, other=DEAD, cache_modifier=".cg")
        total = tl.minimum(tl.sum(found - 1), listed)
        want = tl.minimum(token_budget - sinks - recent, total)
        tl.store(counts + row, sinks + want + recent)
        slot = tl.where(forced < RUN, forced, sinks + want + forced - RUN)
        tl.store(units + slot, token, mask=is_forced)
        tl.store(places + slot, place, mask=is_forced)
        if sinks > RUN:
            _store_run(table, units, places, RUN, RUN, sinks - RUN, PAGE)
        if recent > RUN:
            _store_run(table, units, places, last_page * PAGE + RUN, sinks + want + RUN, recent - RUN, PAGE)
        _store_unused(units, sinks + want + recent, slots)
        tl.store(space.found + row * parts + each, 0, mask=each < parts)
        _choose(space, start, rank, units + sinks, places + sinks, total, want, HELD)


@triton.jit
def _rank_by_keys(q, keys, physical, token, is_live, h, norm, factor, SHAPE: tl.constexpr):
    """The largest log weight of a head that each token has by its key, or past all where one is not finite: `[N]`."""
    HEADS: tl.constexpr = SHAPE.block_g
    N: tl.constexpr = token.shape[0]
    channel = tl.arange(0, SHAPE.block_d)
    offset = (token % SHAPE.page_size).to(tl.int64) * keys.token
    at = keys.base + h * keys.head + physical.to(tl.int64) * keys.page + offset
    inside = is_live[:, None] & (channel < SHAPE.head_dim)[None, :]
    k = widen(tl.load(at[:, None] + channel[None, :], mask=inside, other=0.0), q.dtype)
    logit = dot(q, tl.trans(k), tl.zeros([HEADS, N], tl.float32)) * factor
    is_head = (tl.arange(0, HEADS) < SHAPE.group)[:, None]
    is_unknown = tl.sum((is_head & ~(tl.abs(logit) < float("inf"))).to(tl.int32), 0) > 0
    rank = tl.max(tl.where(is_head, logit - norm[:, None], float("-inf")), 0)
    return tl.where(is_unknown, _LARGEST, rank)


@triton.jit
def _store_run(table, units, places, first, slot, count, PAGE: tl.constexpr):
    """Tokens that follow one another from `first` on, which are read whatever their rank."""
    for start in range(0, count, 128):
        token = start + tl.arange(0, 128)
        place = tl.load(table + (first + token) // PAGE, mask=token < count, other=0) * PAGE + (first + token) % PAGE
        tl.store(units + slot + token, first + token, mask=token < count)
        tl.store(places + slot + token, place, mask=token < count)


@triton.jit
def _store_unused(units, count, slots):
    """-1 in the slots that stay unused."""
    for start in range(count, slots, 128):
        unused = start + tl.arange(0, 128)
        tl.store(units + unused, -1, mask=unused < slots)


@triton.jit
def _choose(space, row_start, rank, units, places, total, want, HELD: tl.constexpr):
    """Write the `want` best of a row's candidates, the first of whose ranks are given, in the order of the sequence.

    More than are held at once come in turns: the best so far, and the next of the others.
    """
    exact = space.exact + row_start
    candidates = space.candidates + row_start
    located = space.located + row_start
    here = tl.arange(0, HELD)
    source = here
    kept = tl.minimum(HELD, total)
    at = kept
    rank = tl.where(here < kept, rank, DEAD)
    while at < total:
        chosen, slot = choose_pages(rank, kept, tl.minimum(want, kept))
        token = tl.load(candidates + source, mask=chosen, other=0, cache_modifier=".cg")
        place = tl.load(located + source, mask=chosen, other=0, cache_modifier=".cg")
        tl.debug_barrier()  # everybody has loaded what is written over
        tl.store(exact + slot, rank, mask=chosen)
        tl.store(candidates + slot, token, mask=chosen)
        tl.store(located + slot, place, mask=chosen)
        tl.debug_barrier()
        best = tl.minimum(want, kept)
        fresh = tl.minimum(HELD - best, total - at)
        kept = best + fresh
        source = tl.where(here < best, here, at + here - best)
        rank = tl.load(exact + source, mask=here < kept, other=DEAD, cache_modifier=".cg")
        at += fresh
    chosen, slot = choose_pages(rank, kept, want)
    token = tl.load(candidates + source, mask=chosen, other=0, cache_modifier=".cg")
    place = tl.load(located + source, mask=chosen, other=0, cache_modifier=".cg")
    tl.store(units + slot, token, mask=chosen)
    tl.store(places + slot, place, mask=chosen)


@triton.jit(do_not_specialize=["num_kv_heads", "splits", "slots"])
def _attend_kernel(
    query, keys, values, space, counts, sinks, output, scale, num_kv_heads, splits, slots,
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
    share = tl.cdiv(tl.cdiv(count, splits), 16) * 16
    first = tl.minimum(split * share, count)
    places = space.places + row.to(tl.int64) * slots
    largest, weight, gathered = attend_slots(
        q, keys, values, h, places, None, first, tl.minimum(first + share, count), None, 0, scale, None,
        SHAPE, BLOCK_T, STAGES,
    )  # fmt: skip
    store_partial(space, row, split, splits, largest, weight, gathered, SHAPE)
    tl.debug_barrier()
    arrived = tl.atomic_add(space.counters + row, 1, sem="acq_rel", scope="gpu")
    if arrived == splits - 1:
        row_sinks = sinks
        if sinks is not None:
            row_sinks = sinks + h * SHAPE.group
        to = output + row.to(tl.int64) * SHAPE.group * SHAPE.value_dim
        GROUP: tl.constexpr = SHAPE.group  # Triton 3.6 takes a range's limits only by such names
        HEADS: tl.constexpr = SHAPE.merged
        for head in tl.static_range(0, GROUP, HEADS):
            merge_splits(space, row_sinks, to, SHAPE.value_dim, None, row, splits, head, SHAPE, BLOCK_S)
        tl.store(space.counters + row, 0)

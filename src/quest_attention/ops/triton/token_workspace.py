"""`TokenWorkspace`: scratch memory of `token_decode`, and the shape of its launches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.ops.query_tokens import MOST_CHOOSING_HEADS
from quest_attention.ops.triton.candidates import MISSING
from quest_attention.ops.triton.launch import compute_major, is_interpreted
from quest_attention.ops.triton.scan import SCAN_PAGE_SIZE, SCANNED_PAGES
from quest_attention.ops.triton.sharing import Shares, shares_of
from quest_attention.ops.triton.tuning import filling_programs
from quest_attention.pages import PagedKV

__all__ = [
    "DROPPED_KEYS",
    "SAMPLED_KEYS",
    "SAMPLE_PARTS",
    "Plan",
    "TokenWorkspace",
    "can_scan",
    "make_token_workspace",
    "passing_sample",
    "plan_of",
]

_LEAST_HEADS = 16
"""Query heads that a row has room for at least: those of the smallest matrix product."""
SAMPLE_PARTS = 4
"""Programs that estimate a log-sum-exp for a row, by a sample of its keys."""
SAMPLED_KEYS = 128
"""Tokens by whose keys one of them does."""
DROPPED_KEYS = 4
"""Of these the ones of a head's largest logits that it leaves out where estimates alone choose.

With 2 our model finds as many look-alikes by 410 tokens, and fewer by 128: benchmarks/results/alone_sums.json.
"""
_SAMPLED_RANKS = 2048
"""Most ranks in which a row's threshold is looked for."""
_SAMPLED_TO_READ = (4096, 8192)
"""The same where what passes is read, so that it is nearer to the budget; and for tables of which that says too little.
"""
_RANKED_PAGES = 16
"""Pages that a program of `rank_kernel` ranks at a time, for up to 16 heads."""
_MOST_WORDS = 512
"""Words of 16 tokens in which a program looks for candidates at a time."""
_LEAST_WORDS = 32
"""Fewest of these worth a program."""
_LEAST_SHARE = 64
"""One in so many tokens may be a candidate at least: four times what passes where the fewest sampled ranks do."""
_MOST_HELD = 32768
"""Candidates among which a program chooses: 32 a thread."""
_MOST_PICKING = 64
"""Programs that pick from a row at most."""
_MOST_ATTENDING = 32
"""Programs at most that attend to what passes of a row, whose results one of them merges."""
_FEWEST_RANKS = 8
"""Sampled ranks that pass the threshold at least: of fewer none says much about a row."""
_FEWEST_TO_READ = 4
"""The same where what passes is read: a sample may be half full, and more must not pass for that."""
_LEAST_TIMES = 3
"""Times the budget that are to pass at least: a threshold from a sample lets through now more, now fewer."""
_AIMED_AT = 0.8
"""Share of the budget that is to pass where that is what is read: no more than the budget is."""
_LEAST_TOKENS = 64
"""Fewest tokens worth a program that attends to them."""
_LEAST_SPLITS = 8
"""Programs that attend to a row at least, if there is work for so many."""


class TokenWorkspace(NamedTuple):
    """Scratch memory of `decode_tokens`; a step leaves the counters at zero, as it found them.

    R is the rows of a step, a KV head of a sequence each. Kernels count rows from the beginning of each tensor, so that
    memory for many rows serves fewer as well.

    Attributes:
        bits: Queries, `[R, tiles * 32]` int32; see `scan`.
        factors: `[R, 3 * 16]` float32; see `scan`.
        norms: Log-sum-exps of the parts of the sample in base 2, `[R, 4, H]` float32, H a power of two of the heads.
        sample: Ranks of the tokens of some pages, `[R, S]` float16, S 2,048, 4,096 or 8,192.
        passing: Which tokens pass, as words of 16 (`masks`): `[R, words]` int32.
        passed: How many pass that are not read anyway, as each program that ranked has counted, `[programs]` int32.
        candidates: Tokens that passed the threshold, `[R, C]` int32.
        located: Where they lie in the cache, `[R, C]` int32.
        exact: Their ranks by their keys, `[R, C]` float32.
        found: One more than each program of `pick` has found, `[R, parts]` int32, zero between steps.
        places: Chosen tokens in the cache, `[R, K]` int32.
        sampled: Tokens by whose keys log-sum-exps are estimated, -1 for none, `[R, 512]` int32; only beside a pool.
        partial: `[programs that attend, G, DV]` float32, those of a row side by side.
        partial_lse: `[programs that attend, G]` float32.
        counters: `[R]` int32, zero between launches.
    """

    bits: Tensor
    factors: Tensor
    norms: Tensor
    sample: Tensor
    passing: Tensor
    passed: Tensor
    candidates: Tensor
    located: Tensor
    exact: Tensor
    found: Tensor
    places: Tensor
    sampled: Tensor
    partial: Tensor
    partial_lse: Tensor
    counters: Tensor

    @property
    def scores(self) -> None:
        """None: no score of every token is kept in float32."""
        return None

    def fits(self, kv: PagedKV, num_query_heads: int, config: QuestConfig) -> bool:
        """Whether a step of this shape can use the workspace."""
        plan = plan_of(kv, num_query_heads, config)
        if plan is None or self.bits.device != kv.keys.device:
            return False
        return all(tensor.numel() >= math.prod(shape) for tensor, shape in zip(self, plan.shapes, strict=True))


class Plan(NamedTuple):
    """The shape of the launches of a step.

    Attributes:
        scans: Whether `scan` ranks.
        ranks_by_keys: Whether the tokens that pass are candidates, ranked by their keys; else they are what is read.
        wanted: Tokens that are to pass.
        sampled: Ranks of a sample in which a threshold for that is looked for.
        fewest: Of these that pass at least.
        ranked_pages: Pages that a program ranks at a time.
        at_once: Programs that run at once.
        sample: Programs that rank samples; parts are so many pages.
        rank: Programs that rank everything; parts are so many pages.
        pick_parts: Programs that pick from a row.
        picked: Words of those that one of them looks at at a time, or one that attends to what passes.
        held: Candidates among which is chosen at a time.
        attend: Programs that attend, or list what passes for others; as many for each row where keys rank, with tokens
            or without.
        slots: Tokens of a selection at most.
        listed: Candidates of a row that there is room for.
        words: Of a row, in which it is said which tokens pass.
        most: Tokens that the page table has room for.
        shapes: Of a workspace.
    """

    scans: bool
    ranks_by_keys: bool
    wanted: int
    sampled: int
    fewest: int
    ranked_pages: int
    at_once: int
    sample: Shares
    rank: Shares
    pick_parts: int
    picked: int
    held: int
    attend: Shares
    slots: int
    listed: int
    words: int
    most: int
    shapes: tuple[tuple[int, ...], ...]


def plan_of(kv: PagedKV, num_query_heads: int, config: QuestConfig) -> Plan | None:
    """See `Plan`; None where the kernels cannot hold the problem."""
    rows, group = kv.batch_size * kv.num_kv_heads, num_query_heads // kv.num_kv_heads
    if (
        kv.form.name != "sketch"
        or config.unit_size != 1
        or config.group_reduction != "max"
        or rows == 0
        or kv.max_pages == 0
        or group > MOST_CHOOSING_HEADS
        or 2 * config.candidate_budget > _MOST_HELD
        or kv.max_pages * kv.page_size >= MISSING.value
    ):
        return None
    programs = filling_programs(kv.keys.device)
    scans, heads = can_scan(kv, group), max(_LEAST_HEADS, triton.next_power_of_2(group))
    ranked = _RANKED_PAGES * _LEAST_HEADS // heads  # as many estimates at a time, which are in registers
    pages = SCANNED_PAGES if scans else ranked
    tiles = triton.cdiv(kv.max_pages, pages)
    most, words = kv.max_pages * kv.page_size, kv.max_pages * triton.cdiv(kv.page_size, 16)
    slots = min(most, config.token_budget)
    ranks_by_keys = config.candidate_factor > 0
    fewest = _FEWEST_RANKS if ranks_by_keys else _FEWEST_TO_READ
    sampled = _SAMPLED_RANKS if ranks_by_keys else passing_sample(config.token_budget, most)
    if not sampled:
        return None
    sample_tiles = min(tiles, triton.cdiv(sampled, pages * kv.page_size))
    sample = shares_of(kv.batch_size, kv.num_kv_heads, sample_tiles, programs)
    rank = shares_of(kv.batch_size, kv.num_kv_heads, tiles, programs)
    if ranks_by_keys:
        wanted = max(config.candidate_budget, _LEAST_TIMES * config.token_budget)
        listed = min(most, max(8 * config.candidate_budget, most // _LEAST_SHARE))
        pick_parts = max(1, min(_MOST_PICKING, triton.cdiv(words, _LEAST_WORDS), triton.cdiv(2 * programs, rows)))
        splits = max(1, min(slots // _LEAST_TOKENS, max(_LEAST_SPLITS, triton.cdiv(programs // 2, rows))))
        attend, picked = Shares(splits, rows * splits, splits, splits), triton.cdiv(words, pick_parts)
    else:
        wanted = max(1, int(_AIMED_AT * (config.token_budget - config.num_forced_pages * kv.page_size)))
        listed, pick_parts = 0, 0
        attend = shares_of(kv.batch_size, kv.num_kv_heads, _MOST_ATTENDING, programs)
        picked = triton.cdiv(2 * words, attend.each)  # parts of as many tokens begin and end among what one has ranked
    held = max(16, min(triton.next_power_of_2(2 * config.candidate_budget), triton.next_power_of_2(max(1, listed))))
    tiles_of_bits = 6 * triton.cdiv(group, 4) * max(1, kv.head_dim // 128)
    shapes = (
        (rows, tiles_of_bits * 32), (rows, 3 * _LEAST_HEADS), (rows, SAMPLE_PARTS, heads), (rows, sampled),
        (rows, words), (rank.programs,), (rows, listed), (rows, listed), (rows, listed), (rows, pick_parts),
        (rows, slots), (rows, SAMPLE_PARTS * SAMPLED_KEYS), (attend.programs, group, kv.values.shape[-1]),
        (attend.programs, group), (rows,),
    )  # fmt: skip
    return Plan(
        scans,
        ranks_by_keys,
        wanted,
        sampled,
        fewest,
        pages,
        programs,
        sample,
        rank,
        pick_parts,
        max(16, min(_MOST_WORDS, triton.next_power_of_2(picked))),
        held,
        attend,
        slots,
        listed,
        words,
        most,
        shapes,
    )


def passing_sample(token_budget: int, most: int) -> int:
    """Ranks that say which tokens of a table pass where estimates alone choose; 0 where no sample says enough of it.

    Of forced pages it knows nothing, so that a workspace fits however many query tokens a step forces them for.

    Args:
        token_budget: Tokens that may be read of a row.
        most: Tokens that the table has room for.
    """
    half = _AIMED_AT * token_budget / 2  # a sample may be half full
    return next((ranks for ranks in _SAMPLED_TO_READ if half * ranks >= _FEWEST_TO_READ * most), 0)


_DTYPES = (
    torch.int32, torch.float32, torch.float32, torch.float16, torch.int32, torch.int32, torch.int32, torch.int32,
    torch.float32, torch.int32, torch.int32, torch.int32, torch.float32, torch.float32, torch.int32,
)  # fmt: skip
"""Of the tensors of a workspace, in order."""


def can_scan(kv: PagedKV, group: int) -> bool:
    """Whether the binary products of `scan` fit a cache, and the GPU has them."""
    if is_interpreted() or group > 8 or kv.page_size != SCAN_PAGE_SIZE or kv.head_dim not in (64, 128, 256):
        return False
    return compute_major(kv.keys.device) in (8, 9)


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
    plans = [plan_of(one, num_query_heads, config) for one in kvs]
    if not plans or None in plans:
        return None
    shapes = zip(*(plan.shapes for plan in plans if plan is not None), strict=True)
    return TokenWorkspace(
        *(
            torch.zeros(max(some, key=math.prod), dtype=dtype, device=kv.keys.device)
            for some, dtype in zip(shapes, _DTYPES, strict=True)
        )
    )


# Longer than 250 lines: what a workspace and a plan have, name by name.

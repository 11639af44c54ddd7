"""The oracle: Quest's equations written with loops, to be read beside the paper and never optimised.

Tang et al., arXiv:2406.10774. Section 3.2 gives the metadata (per page and channel, the smallest and largest key) and
the criticality of a page, `U = sum_d max(q_d * min_d, q_d * max_d)`; section 3.3 the selection of the best pages and
attention over them alone. Shapes use the letters of `pages.py`. All arithmetic is in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quest_attention.config import GroupReduction
from quest_attention.pages import KEY_MAX, KEY_MIN, PagedKV, num_pages

__all__ = [
    "append_slots",
    "append_token",
    "count_reads",
    "score_pages",
    "select_pages",
    "sparse_decode_attention",
    "update_page_metadata",
    "update_slot_metadata",
]


def update_page_metadata(kv: PagedKV, seq_lens: list[int], num_new_tokens: list[int]) -> None:
    """Take the tokens written last into the bounds of their pages, one token at a time."""
    for b, length in enumerate(seq_lens):
        for token in range(max(0, length - num_new_tokens[b]), length):
            page, offset = divmod(token, kv.page_size)
            physical = int(kv.page_table[b, page])
            _take_token(kv.metadata[physical], kv.keys[physical, offset], offset)


def append_token(kv: PagedKV, keys: Tensor, values: Tensor, seq_lens: list[int]) -> None:
    """Write the last token of each sequence, and take it into the bounds of its page."""
    for b, length in enumerate(seq_lens):
        if length:
            page, offset = divmod(length - 1, kv.page_size)
            physical = int(kv.page_table[b, page])
            kv.keys[physical, offset] = keys[b]
            kv.values[physical, offset] = values[b]
    update_page_metadata(kv, seq_lens, [min(1, length) for length in seq_lens])


def append_slots(kv: PagedKV, keys: Tensor, values: Tensor, slots: list[int]) -> None:
    """Write tokens to their slots, and take them into the bounds of their pages."""
    for token, slot in enumerate(slots):
        if slot >= 0:
            page, offset = divmod(slot, kv.page_size)
            kv.keys[page, offset] = keys[token]
            kv.values[page, offset] = values[token]
    update_slot_metadata(kv.metadata, keys, slots, kv.page_size)


def update_slot_metadata(metadata: Tensor, keys: Tensor, slots: list[int], page_size: int) -> None:
    """Take tokens into the bounds of the pages that their slots lie in, one at a time."""
    for token, slot in enumerate(slots):
        if slot >= 0:
            page, offset = divmod(slot, page_size)
            _take_token(metadata[page], keys[token], offset)


def _take_token(bounds: Tensor, keys: Tensor, offset: int) -> None:
    """Widen the bounds of a page, `[HKV, 2, D]`, by one token's keys, `[HKV, D]`, in place."""
    for head, key in enumerate(keys):
        key_max = key_min = key
        if offset > 0:  # a page starts anew at its first token, whoever used it before
            key_max = torch.maximum(bounds[head, KEY_MAX].to(key.dtype), key)
            key_min = torch.minimum(bounds[head, KEY_MIN].to(key.dtype), key)
        bounds[head, KEY_MAX] = _outward(key_max, bounds.dtype, upward=True)
        bounds[head, KEY_MIN] = _outward(key_min, bounds.dtype, upward=False)


def score_pages(
    query: Tensor,
    kv: PagedKV,
    seq_lens: list[int],
    token_mask: Tensor | None = None,
    group_reduction: GroupReduction = "max",
) -> Tensor:
    """Upper bound on the unscaled logit each page can give: `[B, HKV, P]` float64, -inf where there is no page."""
    batch, num_query_heads, _ = query.shape
    group = num_query_heads // kv.num_kv_heads
    scores = torch.full((batch, kv.num_kv_heads, kv.max_pages), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for page in _live_pages(b, kv.page_size, seq_lens, token_mask):
            physical = int(kv.page_table[b, page])
            for h in range(kv.num_kv_heads):
                key_max = kv.metadata[physical, h, KEY_MAX].double()
                key_min = kv.metadata[physical, h, KEY_MIN].double()
                bounds = []
                for g in range(group):
                    q = query[b, h * group + g].double()
                    bounds.append(torch.maximum(q * key_min, q * key_max).sum())
                finite = bool(torch.isfinite(key_max).all() and torch.isfinite(key_min).all())
                score = torch.stack(bounds).max() if group_reduction == "max" else torch.stack(bounds).mean()
                # A page with a non-finite key ranks first, so that it is read and shows as it would in dense attention.
                scores[b, h, page] = score if finite and torch.isfinite(score) else math.inf
    return scores


def select_pages(
    scores: Tensor,
    seq_lens: list[int],
    page_size: int,
    token_budget: int,
    num_sink_pages: int = 0,
    num_recent_pages: int = 1,
    token_mask: Tensor | None = None,
) -> list[list[list[int]]]:
    """Logical pages to read, ascending, as `selected[b][h]`: forced ones, then by score; ties go to the lower index.

    Tokens within the budget are all read, as long as they lie in at most one page more than hold the budget, as they do
    where padding is on one side. Holes may spread them wider: without this limit what a step reads, and how much memory
    it needs, would depend on where the holes are, which only the device knows.
    """
    most = num_pages(token_budget, page_size) + 1
    selected = []
    for b in range(scores.shape[0]):
        live = _live_pages(b, page_size, seq_lens, token_mask)
        tokens = _live_tokens(b, seq_lens, token_mask)
        forced = live[:num_sink_pages] + live[-max(1, num_recent_pages) :]
        row = []
        for h in range(scores.shape[1]):
            count = most if len(tokens) <= token_budget else token_budget // page_size
            ranked = sorted(live, key=lambda page: (page not in forced, -float(scores[b, h, page]), page))
            row.append(sorted(ranked[:count]))
        selected.append(row)
    return selected


def sparse_decode_attention(
    query: Tensor,
    kv: PagedKV,
    seq_lens: list[int],
    selected_pages: list[list[list[int]]],
    sm_scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of the selected pages: output `[B, HQ, DV]` and log-sum-exp `[B, HQ]`, float64."""
    batch, num_query_heads, _ = query.shape
    group = num_query_heads // kv.num_kv_heads
    output = torch.zeros(batch, num_query_heads, kv.values.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, num_query_heads), -math.inf, dtype=torch.float64)
    for b in range(batch):
        live = set(_live_tokens(b, seq_lens, token_mask))
        for head in range(num_query_heads):
            h = head // group
            tokens = [
                page * kv.page_size + offset
                for page in selected_pages[b][h]
                for offset in range(kv.page_size)
                if page * kv.page_size + offset in live
            ]
            if not tokens:
                lse[b, head] = -math.inf if sinks is None else sinks[head].double()
                continue
            where = [(int(kv.page_table[b, t // kv.page_size]), t % kv.page_size) for t in tokens]
            keys = torch.stack([kv.keys[page, offset, h] for page, offset in where]).double()
            values = torch.stack([kv.values[page, offset, h] for page, offset in where]).double()
            logits = keys @ query[b, head].double() * sm_scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            # An attention sink is one more logit that takes weight and gives no value.
            everything = logits if sinks is None else torch.cat([logits, sinks[head].double()[None]])
            lse[b, head] = torch.logsumexp(everything, 0)
            output[b, head] = torch.exp(logits - lse[b, head]) @ values
    return output, lse


def count_reads(counts: list[list[int]], seq_lens: list[int], page_size: int, token_budget: int) -> list[int]:
    """Rows past the budget, rows within it, pages read per KV head (the mean, rounded down) and pages held."""
    sparse = sum(length > token_budget for length in seq_lens)
    dense = sum(0 < length <= token_budget for length in seq_lens)
    read = sum(sum(row) for row in counts) // len(counts[0]) if counts else 0
    return [sparse, dense, read, sum(num_pages(length, page_size) for length in seq_lens)]


def _outward(bounds: Tensor, dtype: torch.dtype, *, upward: bool) -> Tensor:
    """The nearest number of the metadata's dtype that still bounds; NaN where there is none, which ranks first."""
    if dtype == bounds.dtype:
        return bounds
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    stored = torch.full_like(bounds, math.nan, dtype=torch.float64)
    for channel, bound in enumerate(bounds.double().tolist()):
        fits = every[every >= bound] if upward else every[every <= bound]
        if len(fits):
            stored[channel] = fits.min() if upward else fits.max()
    return stored.to(dtype)


def _live_tokens(b: int, seq_lens: list[int], token_mask: Tensor | None) -> list[int]:
    """Logical positions of the tokens that sequence `b` may attend to; a mask says no to what lies past its end."""
    if token_mask is None:
        return list(range(seq_lens[b]))
    return [t for t in range(min(seq_lens[b], token_mask.shape[1])) if token_mask[b, t]]


def _live_pages(b: int, page_size: int, seq_lens: list[int], token_mask: Tensor | None) -> list[int]:
    """Logical pages of sequence `b` that hold a token it may attend to."""
    if token_mask is None:
        return list(range(num_pages(seq_lens[b], page_size)))
    return sorted({token // page_size for token in _live_tokens(b, seq_lens, token_mask)})

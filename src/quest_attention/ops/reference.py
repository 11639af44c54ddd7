"""The oracle: Quest's equations written with loops, to be read beside the paper and never optimised.

Tang et al., arXiv:2406.10774. Section 3.2 gives the metadata (per page and channel, the smallest and largest key) and
the criticality of a page, `U = sum_d max(q_d * min_d, q_d * max_d)`; section 3.3 the selection of the best pages and
attention over them alone. What the metadata of a page is, its form says (`quest_attention.forms`), with an oracle of
its own for the keys and the score of one page. Shapes use the letters of `pages.py`. All arithmetic is in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quest_attention.config import GroupReduction
from quest_attention.forms import FP8, MetadataForm
from quest_attention.ops.hot_units import ABSENT, HotUnits
from quest_attention.pages import PagedKV, num_pages

__all__ = [
    "append_slots",
    "append_token",
    "count_reads",
    "fetch_units",
    "score_pages",
    "select_pages",
    "sparse_decode_attention",
    "update_page_metadata",
    "update_slot_metadata",
]

_LARGEST = torch.finfo(FP8).max


def update_page_metadata(kv: PagedKV, seq_lens: list[int], num_new_tokens: list[int]) -> None:
    """Take the tokens written last into the metadata of their pages, one page at a time."""
    for b, length in enumerate(seq_lens):
        start = max(0, length - num_new_tokens[b])
        if kv.form.takes_whole_pages:
            for page in range(start // kv.page_size, length // kv.page_size):  # those that the new tokens complete
                _take_whole(kv, int(kv.page_table[b, page]))
            continue
        for page in range(start // kv.page_size, num_pages(length, kv.page_size)):
            first = page * kv.page_size
            new = range(max(start, first) - first, min(length, first + kv.page_size) - first)
            physical = int(kv.page_table[b, page])
            if new:
                _take(kv.form, kv.metadata[physical], kv.keys[physical, new.start : new.stop], new.start)


def append_token(kv: PagedKV, keys: Tensor, values: Tensor, seq_lens: list[int]) -> None:
    """Write the last token of each sequence, and take it into the metadata of its page."""
    for b, length in enumerate(seq_lens):
        if length:
            page, offset = divmod(length - 1, kv.page_size)
            _write(kv, int(kv.page_table[b, page]), offset, keys[b], values[b])
    update_page_metadata(kv, seq_lens, [min(1, length) for length in seq_lens])


def append_slots(kv: PagedKV, keys: Tensor, values: Tensor, slots: list[int]) -> None:
    """Write tokens to their slots, and take them into the metadata of their pages."""
    for token, slot in enumerate(slots):
        if slot >= 0:
            _write(kv, *divmod(slot, kv.page_size), keys[token], values[token])
    if kv.form.takes_whole_pages:
        for slot in slots:
            if slot >= 0 and slot % kv.page_size == kv.page_size - 1:
                _take_whole(kv, slot // kv.page_size)
        return
    scale = _scales(kv.key_scale, kv.num_kv_heads)
    stored = torch.stack([_quantised(key, scale) for key in keys]) if kv.is_quantised and len(keys) else keys
    update_slot_metadata(kv.metadata, stored, slots, kv.page_size, kv.form)


def update_slot_metadata(metadata: Tensor, keys: Tensor, slots: list[int], page_size: int, form: MetadataForm) -> None:
    """Take tokens into the metadata of the pages that their slots lie in, the tokens of a page at a time."""
    token = 0
    while token < len(slots):
        page, offset = divmod(slots[token], page_size)
        last = token + 1
        while last < len(slots) and slots[last] // page_size == page:
            last += 1
        if slots[token] >= 0:
            _take(form, metadata[page], keys[token:last], offset)
        token = last


def _take(form: MetadataForm, kept: Tensor, keys: Tensor, before: int) -> None:
    """Take new keys `[T, HKV, D]` of one page into what is kept of it, `[HKV, *form.shape]`, in place."""
    for head in range(keys.shape[1]):
        kept[head] = form.take_by_hand(kept[head], keys[:, head], before)


def _take_whole(kv: PagedKV, page: int) -> None:
    """Take a complete page with all of its keys from the cache."""
    _take(kv.form, kv.metadata[page], kv.keys[page], 0)


def _write(kv: PagedKV, page: int, offset: int, key: Tensor, value: Tensor) -> None:
    """Write one token, `[HKV, D]`, to its place, quantised where the cache is."""
    for stored, token, scale in ((kv.keys, key, kv.key_scale), (kv.values, value, kv.value_scale)):
        heads = _scales(scale, kv.num_kv_heads)
        stored[page, offset] = _quantised(token, heads) if kv.is_quantised else token


def _quantised(token: Tensor, scales: Tensor) -> Tensor:
    """`[HKV, D]` in units of a scale for each head, the nearest numbers of 8 bits; what is beyond the largest is it."""
    return (token.double() / scales[:, None]).clamp(-_LARGEST, _LARGEST).float().to(FP8)


def _scales(scale: Tensor | None, heads: int) -> Tensor:
    """For each head, `[HKV]` float64."""
    return torch.ones(heads, dtype=torch.float64) if scale is None else scale.double().cpu().expand(heads)


def score_pages(
    query: Tensor,
    kv: PagedKV,
    seq_lens: list[int],
    token_mask: Tensor | None = None,
    group_reduction: GroupReduction = "max",
    *,
    sm_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    unit_size: int | None = None,
    candidates: int | None = None,
    candidate_pages: list[list[list[int]]] | None = None,
) -> Tensor:
    """Unscaled logit that each page promises: `[B, HKV, P]` float64, -inf where there is no page.

    Of a form that scores tokens the log mass of each unit, of `unit_size` tokens or of a page: `[B, HKV, U]`. What
    comes after the reduction is for those alone; so many `candidates`, the best units by the estimates, are weighed
    once more by their exact keys. With `candidate_pages`, as `select_pages` gives them, log masses too, by the exact
    keys of those pages.
    """
    scale = kv.head_dim**-0.5 if sm_scale is None else sm_scale
    size = kv.page_size if unit_size is None else unit_size
    if candidate_pages is not None:
        return _exact_masses(
            query, kv, seq_lens, token_mask, group_reduction, scale, softcap, sinks, size, candidate_pages
        )
    if kv.form.scores == "token":
        return _log_masses(query, kv, seq_lens, token_mask, group_reduction, scale, softcap, sinks, size, candidates)
    batch, num_query_heads, _ = query.shape
    group = num_query_heads // kv.num_kv_heads
    scores = torch.full((batch, kv.num_kv_heads, kv.max_pages), -math.inf, dtype=torch.float64)
    key_scales = _scales(kv.key_scale, kv.num_kv_heads)
    for b in range(batch):
        for page in _live_pages(b, kv.page_size, seq_lens, token_mask):
            physical = int(kv.page_table[b, page])
            for h in range(kv.num_kv_heads):
                heads = query[b, h * group : (h + 1) * group]
                each = torch.stack([kv.form.score_by_hand(q, kv.metadata[physical, h]) for q in heads]) * key_scales[h]
                score = each.mean() if group_reduction == "mean" else each.max()
                # A page with a non-finite key ranks first, so that it is read and shows as it would in dense attention.
                is_finite = bool(torch.isfinite(each).all() and torch.isfinite(kv.metadata[physical, h].float()).all())
                scores[b, h, page] = score if is_finite else math.inf
    return scores


def _log_masses(
    query: Tensor,
    kv: PagedKV,
    seq_lens: list[int],
    token_mask: Tensor | None,
    group_reduction: GroupReduction,
    sm_scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    unit_size: int,
    candidates: int | None,
) -> Tensor:
    """How much of the attention each unit would have, were the estimates true: log of its mass, `[B, HKV, U]` float64.

    `mass` is the mean over the heads of a group of the weights of the unit's tokens together, `max` the largest weight
    that any of its tokens has in any head. A unit without a live token has none.

    With `candidates`, so many units that come out best are weighed once more, by the exact logits of their tokens,
    which are normalised as the estimates were. All other units come last.
    """
    batch, num_query_heads, _ = query.shape
    group = num_query_heads // kv.num_kv_heads
    scores = torch.full((batch, kv.num_kv_heads, kv.max_pages * kv.page_size // unit_size), -math.inf).double()
    key_scales = _scales(kv.key_scale, kv.num_kv_heads)
    for b in range(batch):
        tokens = _live_tokens(b, seq_lens, token_mask)
        # The page being written has no estimates of a form that takes whole pages: it is read, and weighs nothing.
        begun = seq_lens[b] // kv.page_size * kv.page_size if kv.form.takes_whole_pages else seq_lens[b]
        units = sorted({token // unit_size for token in tokens})
        for h in range(kv.num_kv_heads):
            heads = range(h * group, (h + 1) * group)
            queries, scale = query[b, h * group : (h + 1) * group], float(key_scales[h]) * sm_scale
            of_heads = [_estimates(q, kv, b, h, tokens, begun, scale, softcap) for q in queries]
            normalisers = [_normaliser(logits, sinks, head) for head, logits in zip(heads, of_heads, strict=True)]
            found = _of_units(of_heads, normalisers, tokens, unit_size, group_reduction)
            if candidates is not None:
                best = set(sorted(units, key=lambda unit: (-found[unit], unit))[:candidates])
                passing = [token for token in tokens if token // unit_size in best]
                of_heads = [_exact_logits(q, kv, b, h, passing, begun, scale, softcap) for q in queries]
                exact = _of_units(of_heads, normalisers, passing, unit_size, group_reduction)
                found = {unit: exact.get(unit, torch.finfo(torch.float32).min) for unit in units}
            for unit, score in found.items():
                scores[b, h, unit] = score
    return scores


def _exact_masses(
    query: Tensor,
    kv: PagedKV,
    seq_lens: list[int],
    token_mask: Tensor | None,
    group_reduction: GroupReduction,
    sm_scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    unit_size: int,
    candidate_pages: list[list[list[int]]],
) -> Tensor:
    """`_log_masses` by the keys of some pages of each head, over whose tokens they are normalised.

    Units of other pages come last, those without a live token have none.
    """
    batch, num_query_heads, _ = query.shape
    group = num_query_heads // kv.num_kv_heads
    scores = torch.full((batch, kv.num_kv_heads, kv.max_pages * kv.page_size // unit_size), -math.inf).double()
    key_scales = _scales(kv.key_scale, kv.num_kv_heads)
    for b in range(batch):
        live = _live_tokens(b, seq_lens, token_mask)
        for h in range(kv.num_kv_heads):
            for token in live:
                scores[b, h, token // unit_size] = torch.finfo(torch.float32).min
            tokens = [token for token in live if token // kv.page_size in candidate_pages[b][h]]
            if not tokens:
                continue
            heads, scale = range(h * group, (h + 1) * group), float(key_scales[h]) * sm_scale
            of_heads = [_exact_logits(query[b, head], kv, b, h, tokens, seq_lens[b], scale, softcap) for head in heads]
            normalisers = [_normaliser(logits, sinks, head) for head, logits in zip(heads, of_heads, strict=True)]
            for unit, score in _of_units(of_heads, normalisers, tokens, unit_size, group_reduction).items():
                scores[b, h, unit] = score
    return scores


def _normaliser(logits: Tensor, sinks: Tensor | None, head: int) -> Tensor:
    """Log of the sum of all weights of a query head, by those of its logits `[T]` that are known, and its sink."""
    known = logits[~logits.isnan()]
    return torch.logsumexp(known if sinks is None else torch.cat([known, sinks[head].double().cpu()[None]]), 0)


def _of_units(
    of_heads: list[Tensor],
    normalisers: list[Tensor],
    tokens: list[int],
    unit_size: int,
    group_reduction: GroupReduction,
) -> dict[int, float]:
    """Scores of units, from the logits `[T]` of each head of a group, NaN where not known, and what normalises them."""
    weights = [(logits - normal).tolist() for logits, normal in zip(of_heads, normalisers, strict=True)]  # [G][T]
    places: dict[int, list[int]] = {}
    for i, token in enumerate(tokens):
        places.setdefault(token // unit_size, []).append(i)
    found = {}
    for unit in sorted(places):
        here = [of_head[i] for of_head in weights for i in places[unit]]
        if any(math.isnan(weight) for weight in here):  # read, so that it shows as it would in dense attention
            found[unit] = math.inf
        elif group_reduction == "mass":
            found[unit] = float(torch.logsumexp(torch.tensor(here, dtype=torch.float64), 0)) - math.log(len(weights))
        else:
            found[unit] = max(here)
    return found


def _estimates(
    query: Tensor, kv: PagedKV, b: int, h: int, tokens: list[int], begun: int, scale: float, softcap: float | None
) -> Tensor:
    """Logits of some tokens of a sequence, as the form estimates them, scaled and capped: `[T]` float64.

    NaN for those that nobody knows: estimates that are not finite, and all from token `begun` on.
    """
    pages = {token // kv.page_size for token in tokens if token < begun}
    of_page = {
        page: kv.form.score_by_hand(query, kv.metadata[int(kv.page_table[b, page]), h]).tolist() for page in pages
    }
    logits = [
        of_page[token // kv.page_size][token % kv.page_size] * scale if token < begun else math.nan for token in tokens
    ]
    return _capped(torch.tensor(logits, dtype=torch.float64), softcap)


def _exact_logits(
    query: Tensor, kv: PagedKV, b: int, h: int, tokens: list[int], begun: int, scale: float, softcap: float | None
) -> Tensor:
    """`_estimates` by the tokens' keys."""
    known = [token for token in tokens if token < begun]  # tokens ascend
    logits = torch.full((len(tokens),), math.nan, dtype=torch.float64)
    pages, offsets = _places(kv, kv.page_table[b], known)
    keys = kv.keys[pages, offsets, h].double()
    logits[: len(known)] = (keys * query.double()).sum(1).cpu() * scale
    return _capped(logits, softcap)


def _places(kv: PagedKV, table: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Where tokens of a sequence lie, by its page table: numbers of pages and places in them, `[T]` each."""
    position = torch.tensor(tokens, dtype=torch.int64, device=table.device)
    return table[position // kv.page_size].long(), position % kv.page_size


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Capped logits `[T]`; NaN for those that are not finite."""
    logits = logits.masked_fill(~torch.isfinite(logits), math.nan)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def select_pages(
    scores: Tensor,
    seq_lens: list[int],
    page_size: int,
    token_budget: int,
    num_sink_pages: int = 0,
    num_recent_pages: int = 1,
    token_mask: Tensor | None = None,
    unit_size: int | None = None,
) -> list[list[list[int]]]:
    """Logical units to read, ascending, as `selected[b][h]`: forced ones, then by score; ties go to the lower index.

    A unit is a page, or `unit_size` tokens of one; forced pages are read with all of their units. Tokens within the
    budget are all read, as long as they lie in at most one unit more than hold the budget, as they do where padding is
    on one side. Holes may spread them wider: without this limit what a step reads, and how much memory it needs, would
    depend on where the holes are, which only the device knows. Single tokens have no holes.
    """
    size = page_size if unit_size is None else unit_size
    most = num_pages(token_budget, size) + 1
    selected = []
    for b in range(scores.shape[0]):
        tokens = _live_tokens(b, seq_lens, token_mask)
        pages = _live_pages(b, page_size, seq_lens, token_mask)
        live = sorted({token // size for token in tokens})
        always = pages[:num_sink_pages] + pages[-max(1, num_recent_pages) :]
        forced = {unit for unit in live if unit * size // page_size in always}
        row = []
        for h in range(scores.shape[1]):
            count = most if len(tokens) <= token_budget else token_budget // size
            ranked = sorted(live, key=lambda unit: (unit not in forced, -float(scores[b, h, unit]), unit))
            row.append(sorted(ranked[:count]))
        selected.append(row)
    return selected


def fetch_units(
    kv: PagedKV, hot: HotUnits, wanted: list[list[list[int]]], seq_lens: list[int], keys_only: bool = False
) -> tuple[int, int, int, int]:
    """Have the wanted units in the pool, `wanted[b][h]`, or their keys.

    Returns:
        Units looked up, those of them that were not there, and those whose keys and those whose values were copied.
    """
    assert kv.contiguous is not None, "units of a contiguous cache"
    hot.clock.add_(1)
    size = hot.unit_size
    looked_up = fetched = keys = values = 0
    for b, length in enumerate(seq_lens):
        first = b * kv.num_kv_heads * hot.slots  # of the sequence's pages in the pool
        for h in range(kv.num_kv_heads):
            table, owners, stamps, valued = hot.table[b, h], hot.owners[b, h], hot.stamps[b, h], hot.valued[b, h]
            now = int(hot.clock[b, h])
            units = [unit for unit in wanted[b][h] if unit >= 0 and unit * size < length]
            missing = [unit for unit in units if table[unit] == ABSENT]
            for unit in units:
                if unit not in missing:
                    stamps[int(table[unit]) - first] = now
            for unit in missing:
                slot = _next_slot(hot, b, h)
                if owners[slot] != ABSENT:
                    table[int(owners[slot])] = ABSENT
                owners[slot], stamps[slot], table[unit] = unit, now, first + slot
            written = (length - 1) // size  # has a token more than when it was copied
            for unit in units:
                slot = int(table[unit]) - first
                to, of = slice(slot * size, (slot + 1) * size), slice(unit * size, (unit + 1) * size)
                if is_new := unit in missing or unit == written:
                    keys += 1
                    hot.keys[b, h, to] = kv.contiguous.keys[b, h, of]
                    valued[slot] = 0
                if not keys_only and (is_new or not valued[slot]):
                    values += 1
                    hot.values[b, h, to] = kv.contiguous.values[b, h, of]
                    valued[slot] = 1
            looked_up, fetched = looked_up + len(units), fetched + len(missing)
    return looked_up, fetched, keys, values


def _next_slot(hot: HotUnits, b: int, h: int) -> int:
    """The clock: the hand goes round, lets a slot be that was used since it passed last, and takes the next other."""
    stamps = hot.stamps[b, h]
    while True:
        slot = int(hot.hands[b, h])
        hot.hands[b, h] = (slot + 1) % hot.slots
        if stamps[slot] == 0:
            return slot
        if stamps[slot] != hot.clock[b, h]:  # what this fetch uses stays
            stamps[slot] = 0


def sparse_decode_attention(
    query: Tensor,
    kv: PagedKV,
    seq_lens: list[int],
    selected: list[list[list[int]]],
    sm_scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    token_mask: Tensor | None = None,
    unit_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of the selected pages, or of units of `unit_size` tokens.

    Returns:
        Output `[B, HQ, DV]` and log-sum-exp `[B, HQ]`, float64.
    """
    size = kv.page_size if unit_size is None else unit_size
    batch, num_query_heads, _ = query.shape
    group = num_query_heads // kv.num_kv_heads
    output = torch.zeros(batch, num_query_heads, kv.values.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, num_query_heads), -math.inf, dtype=torch.float64)
    key_scales, value_scales = (_scales(scale, kv.num_kv_heads) for scale in (kv.key_scale, kv.value_scale))
    for b in range(batch):
        live = set(_live_tokens(b, seq_lens, token_mask))
        for head in range(num_query_heads):
            h = head // group
            tokens = [
                unit * size + offset
                for unit in selected[b][h]
                for offset in range(size)
                if unit * size + offset in live
            ]
            if not tokens:
                lse[b, head] = -math.inf if sinks is None else sinks[head].double()
                continue
            table = kv.page_table[b, h] if kv.has_table_by_head else kv.page_table[b]
            pages, offsets = _places(kv, table, tokens)
            keys = kv.keys[pages, offsets, h].double() * key_scales[h]
            values = kv.values[pages, offsets, h].double() * value_scales[h]
            logits = keys @ query[b, head].double() * sm_scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            # An attention sink is one more logit that takes weight and gives no value.
            everything = logits if sinks is None else torch.cat([logits, sinks[head].double()[None]])
            lse[b, head] = torch.logsumexp(everything, 0)
            output[b, head] = torch.exp(logits - lse[b, head]) @ values
    return output, lse


def count_reads(counts: list[list[int]], seq_lens: list[int], unit_size: int, token_budget: int) -> list[int]:
    """Rows past the budget, rows within it, units read per KV head (the mean, rounded down) and units held."""
    sparse = sum(length > token_budget for length in seq_lens)
    dense = sum(0 < length <= token_budget for length in seq_lens)
    read = sum(sum(row) for row in counts) // len(counts[0]) if counts else 0
    return [sparse, dense, read, sum(num_pages(length, unit_size) for length in seq_lens)]


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


# Longer than 250 lines: the equations of all verbs, to be read as one text.

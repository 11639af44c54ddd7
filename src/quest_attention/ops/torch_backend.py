"""The vectorised path: plain PyTorch, any device, and what runs on a CPU.

Every verb has a fast form for what a decode step of a transformers model looks like (a contiguous cache, every
sequence equally long, nothing masked) and a general form. Two choices were made by timing them, and are easy to undo by
accident: the query is contiguous and transposed on the right of the product with the metadata, and units are copied as
`ops/gathering.py` does it. `benchmarks/decode_cpu.py` shows what undoing either costs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from quest_attention.forms import FP8, MetadataForm, round_near
from quest_attention.ops.fetching import fetch_units
from quest_attention.ops.gathering import UnitCopies, copies_of_keys, copies_of_values, metadata_rows
from quest_attention.ops.liveness import attendable, live_tokens, live_units
from quest_attention.ops.masses import score_candidates, score_masses
from quest_attention.ops.ranking import ALWAYS, ranking
from quest_attention.ops.selection import DecodeWorkspace, Selection
from quest_attention.ops.step import Rows, Step
from quest_attention.pages import ContiguousKV, PagedKV, num_pages

__all__ = [
    "append_slots",
    "append_token",
    "candidates_of",
    "count_reads",
    "fetch_units",
    "score_pages",
    "select_pages",
    "sparse_decode_attention",
    "update_page_metadata",
    "update_slot_metadata",
]

_CHUNK_BYTES = 1 << 21
"""Float32 metadata scored at a time on a CPU [bytes]: a bound on scratch memory."""
_PART_BYTES = 3 << 20
"""Keys and values copied at a time on a CPU [bytes]: so that attention finds them in its caches, and the next part in
memory that this one gave back."""

_NEVER = torch.iinfo(torch.int64).min
_BEYOND = torch.iinfo(torch.int32).max


def update_page_metadata(kv: PagedKV, seq_lens: Tensor | int, num_new_tokens: Tensor | int) -> None:
    """See `ops.update_page_metadata`."""
    if isinstance(seq_lens, int) and isinstance(num_new_tokens, int) and kv.contiguous is not None:
        _update_contiguous(kv.contiguous, kv.form, kv.page_size, seq_lens - num_new_tokens, seq_lens)
        return
    lengths, new = _per_row(seq_lens, kv), _per_row(num_new_tokens, kv)
    begin = (lengths - new).clamp(min=0)  # [B]; where nobody checked values, more new tokens than there are mean all
    first = begin // kv.page_size
    # Past the last page that is touched; of forms that take whole pages, that the new tokens complete.
    last = lengths // kv.page_size if kv.form.takes_whole_pages else _num_pages(lengths, kv.page_size)
    span = int((last - first).clamp(min=0).max()) if lengths.numel() else 0
    if span == 0:
        return
    page = first[:, None] + torch.arange(span, device=lengths.device)  # [B, S]
    touched = (page < last[:, None]) & (new > 0)[:, None]
    b, s = touched.nonzero(as_tuple=True)
    logical = page[b, s]  # [M]
    physical = kv.page_table[b, logical].long()
    if kv.form.takes_whole_pages:
        _take_whole(kv, physical)
        return
    token = logical[:, None] * kv.page_size + torch.arange(kv.page_size, device=lengths.device)  # [M, page_size]
    written = (token >= begin[b, None]) & (token < lengths[b, None])
    before = (begin[b] - token[:, 0]).clamp(min=0)
    _take(kv.metadata, kv.form, physical, kv.keys[physical], before, written)


def _take(metadata: Tensor, form: MetadataForm, pages: Tensor, keys: Tensor, before: Tensor, written: Tensor) -> None:
    """Take those keys `[M, page_size, HKV, D]` that are new, `[M, page_size]`, into the metadata of pages `[M]`."""
    kept = metadata[pages]
    form.take(kept, keys.transpose(1, 2), before[:, None].expand(kept.shape[:2]), written[:, None])
    metadata[pages] = kept


def _take_whole(kv: PagedKV, pages: Tensor) -> None:
    """Take complete pages `[M]` with all of their keys from the cache."""
    kept = kv.metadata[pages]
    kv.form.take(kept, kv.keys[pages].transpose(1, 2), 0)
    kv.metadata[pages] = kept


def _update_contiguous(cache: ContiguousKV, form: MetadataForm, page_size: int, start: int, end: int) -> None:
    """Take tokens `start` to `end` of every sequence: the rest of a page, whole pages, the beginning of a page."""
    keys, metadata = cache.keys, cache.metadata
    if form.takes_whole_pages:  # from the beginning of the page that the new tokens go on with to the last complete one
        start, end = start // page_size * page_size, end // page_size * page_size
    if start % page_size and start < end:
        page = start // page_size
        stop = min(end, (page + 1) * page_size)
        form.take(metadata[:, :, page], keys[:, :, start:stop], start % page_size)
        start = stop
    whole = (end - start) // page_size
    if whole:
        first = start // page_size
        stop = start + whole * page_size
        form.take(metadata[:, :, first : first + whole], keys[:, :, start:stop].unflatten(2, (whole, page_size)), 0)
        start = stop
    if start < end:
        form.take(metadata[:, :, start // page_size], keys[:, :, start:end], 0)


def append_token(kv: PagedKV, keys: Tensor, values: Tensor, seq_lens: Tensor) -> None:
    """See `ops.append_token`."""
    rows = (seq_lens > 0).nonzero()[:, 0]
    position = seq_lens[rows].long() - 1
    physical = kv.page_table[rows, position // kv.page_size].long()
    offset = position % kv.page_size
    kv.keys[physical, offset] = _as_stored(keys[rows], kv.key_scale)
    kv.values[physical, offset] = _as_stored(values[rows], kv.value_scale)
    if kv.form.takes_whole_pages:
        _take_completed(kv, physical, offset)
        return
    update_page_metadata(kv, seq_lens, seq_lens.clamp(max=1))


def append_slots(kv: PagedKV, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """See `ops.append_slots`."""
    used = slots >= 0
    keys, values, slots = (
        _as_stored(keys[used], kv.key_scale),
        _as_stored(values[used], kv.value_scale),
        slots[used].long(),
    )
    page, offset = slots // kv.page_size, slots % kv.page_size
    kv.keys[page, offset] = keys
    kv.values[page, offset] = values
    if kv.form.takes_whole_pages:
        _take_completed(kv, page, offset)
        return
    update_slot_metadata(kv.metadata, keys, slots, kv.page_size, kv.form)


def _take_completed(kv: PagedKV, pages: Tensor, offsets: Tensor) -> None:
    """Take those of some pages `[T]` whose last token was written, at these offsets."""
    completed = pages[offsets == kv.page_size - 1]
    if completed.numel():
        _take_whole(kv, completed)


def update_slot_metadata(metadata: Tensor, keys: Tensor, slots: Tensor, page_size: int, form: MetadataForm) -> None:
    """See `ops.update_slot_metadata`."""
    used = slots >= 0
    keys, slots = keys[used], slots[used].long()
    pages, where = torch.unique_consecutive(slots // page_size, return_inverse=True)  # [M], [T]
    offset = slots % page_size
    by_page = keys.new_zeros(pages.shape[0], page_size, *keys.shape[1:])
    written = torch.zeros(by_page.shape[:2], dtype=torch.bool, device=keys.device)
    by_page[where, offset], written[where, offset] = keys, True
    before = slots.new_full(pages.shape, page_size).scatter_reduce_(0, where, offset, "amin")
    _take(metadata, form, pages, by_page, before, written)


def _as_stored(tokens: Tensor, scale: Tensor | None) -> Tensor:
    """Tokens `[T, HKV, D]` as a cache holds them, which is quantised if it has scales."""
    if scale is None:
        return tokens
    return round_near(tokens.float() / scale[:, None], FP8)


def score_pages(step: Step, out: Tensor | None = None) -> Tensor:
    """See `ops.score_pages`. The metadata of many pages at a time, as the form scores it."""
    if step.kv.form.scores == "token":
        return score_masses(step, out)
    if step.config.candidate_pages:
        return score_candidates(step, candidates_of(step), out)
    return _score_pages(step, out)


def candidates_of(step: Step) -> Selection:
    """Pages whose keys rank tokens, `[B, HKV, C]`: chosen by their scores as pages that are read would be."""
    return _select(step, _score_pages(step, None), step.kv.page_size, step.config.candidate_pages * step.kv.page_size)


def _score_pages(step: Step, out: Tensor | None) -> Tensor:
    """Scores of pages `[B, HKV, P]` by a form that scores pages."""
    query, kv, seq_lens, token_mask = step.query, step.kv, step.seq_lens, step.token_mask
    batch, heads, dim = kv.batch_size, kv.num_kv_heads, kv.head_dim
    scores = out if out is not None else query.new_empty(batch, heads, kv.max_pages, dtype=torch.float32)
    # A slice, perhaps, of all that a layer projects.
    grouped = query.float().reshape(batch * heads, query.shape[1] // heads, dim)
    seen = kv.form.see(grouped)
    live = num_pages(seq_lens, kv.page_size) if isinstance(seq_lens, int) else kv.max_pages
    chunk = max(1, live)
    if query.device.type == "cpu":
        chunk = max(16, _CHUNK_BYTES // max(1, batch * heads * seen.shape[2] * 4))
    table, dead = kv.page_table, None
    if isinstance(seq_lens, Tensor):
        dead = ~live_units(seq_lens, None, kv.page_size, kv.max_pages, scores)
        if kv.contiguous is None:  # past the end of a sequence the table may hold anything
            table = table.masked_fill(dead, 0)
    for start in range(0, live, chunk):
        stop = min(live, start + chunk)
        kept = metadata_rows(kv, table[:, start:stop], start, stop)
        logits = kv.form.score(seen, kept).view(batch, heads, stop - start, grouped.shape[1])
        if kv.key_scale is not None:
            logits *= kv.key_scale[:, None, None]
        part = scores[:, :, start:stop]
        if step.config.group_reduction == "mean":
            torch.mean(logits, 3, out=part)
        else:
            torch.amax(logits, 3, out=part)
    used = scores[:, :, :live]
    # 0 * inf is NaN: a page with a non-finite key ranks first, so that it is read and shows as in dense attention.
    torch.nan_to_num_(used, nan=math.inf, posinf=math.inf, neginf=math.inf)
    if live < kv.max_pages:
        scores[:, :, live:] = -math.inf
    if token_mask is not None:
        dead = ~live_units(seq_lens, token_mask, kv.page_size, kv.max_pages, scores)
    if dead is not None:
        scores.masked_fill_(dead[:, None], -math.inf)
    return scores


def select_pages(rows: Rows, scores: Tensor) -> Selection:
    """See `ops.select_pages`."""
    return _select(rows, scores, rows.config.unit_size, rows.config.token_budget)


def _select(rows: Rows, scores: Tensor, size: int, token_budget: int) -> Selection:
    """`select_pages` of units of another size, with another budget."""
    seq_lens, token_mask, workspace, config = rows.seq_lens, rows.token_mask, rows.workspace, rows.config
    num_sink_pages = config.num_sink_pages
    batch, heads, max_units = scores.shape
    if not isinstance(workspace, DecodeWorkspace):
        workspace = DecodeWorkspace.allocate(batch, heads, max_units, scores.device)
    unit_budget, recent, per_page = token_budget // size, max(1, config.num_recent_pages), config.page_size // size
    if isinstance(seq_lens, int) and token_mask is None:
        live = num_pages(seq_lens, size)
        if seq_lens <= token_budget:
            every = torch.arange(live, dtype=torch.int32, device=scores.device).expand(batch, heads, live)
            return Selection(every, every.new_full((batch, heads), live), size)
        keys = ranking(scores[:, :, :live], workspace)
        keys[:, :, : num_sink_pages * per_page] = ALWAYS
        keys[:, :, (num_pages(seq_lens, config.page_size) - recent) * per_page :] = ALWAYS
        units = keys.topk(unit_budget, sorted=False).indices.to(torch.int32).sort(-1).values
        return Selection(units, units.new_full((batch, heads), unit_budget), size)

    slots = rows.slots_of(max_units, size, token_budget)
    if slots == 0:
        counts = torch.zeros(batch, heads, dtype=torch.int32, device=scores.device)
        return Selection(counts.new_empty(batch, heads, 0), counts, size)
    alive = live_units(seq_lens, token_mask, size, max_units, scores)  # [B, U]
    forced, total = _forced(alive, per_page, num_sink_pages, recent)
    keys = ranking(scores, workspace)
    keys.masked_fill_(forced[:, None], ALWAYS)
    keys.masked_fill_(~alive[:, None], _NEVER)
    if token_mask is None:
        assert isinstance(seq_lens, Tensor), "an int without a mask was answered above"
        tokens = seq_lens[:, None]
    else:
        tokens = live_tokens(seq_lens, token_mask, max_units * size, scores).sum(1, keepdim=True)
    counts = torch.where(tokens <= token_budget, total, total.clamp(max=unit_budget)).clamp(max=slots)  # [B, 1]
    best = keys.topk(slots, sorted=True).indices
    unused = torch.arange(slots, device=scores.device) >= counts
    best = best.masked_fill(unused[:, None], _BEYOND).to(torch.int32).sort(-1).values
    return Selection(best.masked_fill(best == _BEYOND, -1), counts.to(torch.int32).expand(-1, heads), size)


def _forced(alive: Tensor, per_page: int, num_sink_pages: int, recent: int) -> tuple[Tensor, Tensor]:
    """Units `[B, U]` that are read whatever their score, if they are alive, and how many units are, `[B, 1]`.

    Sink and recent pages are counted among the pages that hold a unit alive.
    """
    held = alive
    if per_page > 1:  # a caller's scores may end within a page
        held = F.pad(alive, (0, -alive.shape[1] % per_page)).unflatten(1, (-1, per_page)).any(2)
    rank = held.cumsum(1)  # 1 for the first page that is alive
    total = rank[:, -1:]
    forced = (rank <= num_sink_pages) | (rank > total - recent)
    if per_page > 1:
        forced = forced.repeat_interleave(per_page, 1)[:, : alive.shape[1]]
        total = alive.sum(1, keepdim=True)
    return forced, total


def sparse_decode_attention(
    step: Step, selected: Selection, *, return_lse: bool = False, is_own: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See `ops.sparse_decode_attention`."""
    query, kv, seq_lens, token_mask, sinks = step.query, step.kv, step.seq_lens, step.token_mask, step.sinks
    batch, heads, dim = kv.batch_size, kv.num_kv_heads, kv.head_dim
    units, size = selected.units, selected.unit_size
    slots = units.shape[2]
    if slots == 0 or kv.max_pages == 0:  # nothing is read
        empty = query.new_full(query.shape[:2], -math.inf, dtype=torch.float32)
        lse = empty if sinks is None else sinks.float().expand(batch, -1)
        return query.new_zeros(*query.shape[:2], kv.values.shape[-1]), lse if return_lse else None

    is_unit, seen, used = None, None, slots * size
    if isinstance(seq_lens, int) and token_mask is None and (is_own or _is_whole(units, seq_lens, size)):
        # The part-filled unit is last, and cutting the tail masks everything there is to mask.
        used = (slots - 1) * size + (seq_lens - 1) % size + 1
    else:
        ends = seq_lens[:, None, None] if isinstance(seq_lens, Tensor) else seq_lens
        is_unit = (units >= 0) & (units < (ends + size - 1) // size)
        units = units.masked_fill(~is_unit, 0).long()
        seen = attendable(units, is_unit, ends, token_mask, size).flatten(0, 1)  # [B * HKV, T]
    keys, values = copies_of_keys(kv, units, size, is_unit), copies_of_values(kv, units, size, is_unit)
    # [B * HKV, G, D]: no key is repeated for its group
    grouped = query.reshape(batch * heads, query.shape[1] // heads, dim)
    extra = None if sinks is None else sinks.float().expand(batch, -1).reshape(grouped.shape[:2])
    outputs: list[Tensor] = []
    masses: list[Tensor] = []
    for part in _parts(keys, values):
        near, far = keys.of_heads(part)[:, :used], values.of_heads(part)[:, :used]
        mask = None
        if seen is not None:
            # What was never written may be NaN, and no weight of zero takes NaN away.
            near, far = (copied.masked_fill(~seen[part, :, None], 0) for copied in (near, far))
            mask = seen[part, None]  # [N, 1, T]
        if step.softcap is None and sinks is None and not return_lse:
            outputs.append(_attend(grouped[part], near, far, mask, step.scale))
            continue
        attended, mass = _attend_by_hand(step, grouped[part], near, far, mask, None if extra is None else extra[part])
        outputs.append(attended)
        masses.append(mass)
    output = (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).flatten(0, 1).unflatten(0, query.shape[:2])
    return output, torch.cat(masses).view(query.shape[:2]) if return_lse else None


def _parts(keys: UnitCopies, values: UnitCopies) -> list[slice]:
    """Heads whose keys and values are copied together: all of them, on a CPU as many as its caches hold.

    Copies of many sequences at once are memory that is asked for, and given back, at every step of every layer.
    """
    heads = keys.index.shape[0]
    together = heads
    if keys.rows.device.type == "cpu":  # each thread has a head at least
        room = _PART_BYTES // max(1, keys.head_bytes + values.head_bytes)
        together = max(1, room, torch.get_num_threads())
    return [slice(start, start + together) for start in range(0, max(1, heads), max(1, together))]


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of heads `[N, G, D]`, each to its own keys and values `[N, T, D and DV]`: `[N, G, DV]`.

    Args:
        query: Of the heads.
        keys: Copied.
        values: Copied.
        mask: `[N, 1, T]` bool, which tokens there are; None for all.
        scale: Of the logits.
    """
    every = None if mask is None else mask[None]
    near, far = keys[None], values[None]
    output = F.scaled_dot_product_attention(query[None].to(keys.dtype), near, far, attn_mask=every, scale=scale)[0]
    if mask is not None:  # a row with nothing to attend to is zero, not NaN
        output = output.masked_fill(~mask.any(-1, keepdim=True), 0)
    return output.to(query.dtype)


def count_reads(selected: Selection, seq_lens: Tensor, counters: Tensor, token_budget: int) -> None:
    """See `ops.count_reads`."""
    past = seq_lens > token_budget
    within = (seq_lens > 0) & ~past
    held = _num_pages(seq_lens, selected.unit_size)
    counters += torch.stack([past.sum(), within.sum(), selected.units_read, held.sum()])


def _attend_by_hand(
    step: Step, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax in float32 for what scaled_dot_product_attention does not offer: a softcap, sinks, the log-sum-exp.

    Of heads as `_attend` has them, with sinks `[N, G]`: `[N, G, DV]` and the log-sum-exp, `[N, G]`.
    """
    softcap = step.softcap
    logits = query.float() @ keys.float().transpose(1, 2) * step.scale  # [N, G, T]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    everything = logits
    if sinks is not None:  # one more logit that takes weight and gives no value
        everything = torch.cat([logits, sinks[..., None]], -1)
    lse = torch.logsumexp(everything, -1, keepdim=True)
    # Not the exponentials of what is left of the logits without `lse`, which is rounded as coarsely as they are large.
    weights = torch.softmax(everything, -1)[..., : logits.shape[-1]]
    if mask is not None:  # a row with nothing to attend to is zero, not NaN
        weights = weights.masked_fill(lse == -math.inf, 0)
    return (weights @ values.float()).to(query.dtype), lse[..., 0]


def _is_whole(units: Tensor, seq_len: int, unit_size: int) -> bool:
    """Whether every slot is used and the last one of each list has the last unit of its sequence.

    Seen on a CPU alone: elsewhere the host would have to wait, and masks what it does not know to be so.
    """
    if units.device.type != "cpu" or units.numel() == 0:
        return False
    last = num_pages(seq_len, unit_size) - 1
    low, high = torch.aminmax(units)
    return int(low) >= 0 and int(high) == last and int(units[:, :, -1].min()) == last


def _num_pages(seq_lens: Tensor, page_size: int) -> Tensor:
    """`pages.num_pages` for a tensor of lengths."""
    return (seq_lens + page_size - 1) // page_size


def _per_row(value: Tensor | int, kv: PagedKV) -> Tensor:
    if isinstance(value, int):
        return torch.full((kv.batch_size,), value, dtype=torch.int64, device=kv.keys.device)
    return value.long()


# Longer than 250 lines: the verbs, side by side; what they share to copy and to mask lies in files of its own.

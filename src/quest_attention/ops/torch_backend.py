"""The vectorised path: plain PyTorch, any device, and what runs on a CPU.

Every verb has a fast form for what a decode step of a transformers model looks like (a contiguous cache, every
sequence equally long, nothing masked) and a general form. Two choices were made by timing them, and are easy to undo by
accident: the query is contiguous and transposed on the right of the product with the metadata, and pages are copied by
`index_select` of whole rows, not by `gather`. `benchmarks/decode_cpu.py` shows what undoing either costs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from quest_attention.forms import FP8, MetadataForm
from quest_attention.ops.selection import DecodeWorkspace, Selection
from quest_attention.ops.step import Rows, Step
from quest_attention.pages import ContiguousKV, PagedKV, num_pages

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

_CHUNK_BYTES = 1 << 21
"""Float32 metadata scored at a time on a CPU [bytes]: a bound on scratch memory."""

_LARGEST = torch.finfo(FP8).max
_ALWAYS = torch.iinfo(torch.int64).max
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
    span = int((_num_pages(lengths, kv.page_size) - first).clamp(min=0).max()) if lengths.numel() else 0
    if span == 0:
        return
    page = first[:, None] + torch.arange(span, device=lengths.device)  # [B, S]
    touched = (page * kv.page_size < lengths[:, None]) & (new > 0)[:, None]
    b, s = touched.nonzero(as_tuple=True)
    logical = page[b, s]  # [M]
    physical = kv.page_table[b, logical].long()
    token = logical[:, None] * kv.page_size + torch.arange(kv.page_size, device=lengths.device)  # [M, page_size]
    written = (token >= begin[b, None]) & (token < lengths[b, None])
    before = (begin[b] - token[:, 0]).clamp(min=0)
    _take(kv.metadata, kv.form, physical, kv.keys[physical], before, written)


def _take(metadata: Tensor, form: MetadataForm, pages: Tensor, keys: Tensor, before: Tensor, written: Tensor) -> None:
    """Take those keys `[M, page_size, HKV, D]` that are new, `[M, page_size]`, into the metadata of pages `[M]`."""
    kept = metadata[pages]
    form.take(kept, keys.transpose(1, 2), before[:, None].expand(kept.shape[:2]), written[:, None])
    metadata[pages] = kept


def _update_contiguous(cache: ContiguousKV, form: MetadataForm, page_size: int, start: int, end: int) -> None:
    """Take tokens `start` to `end` of every sequence: the rest of a page, whole pages, the beginning of a page."""
    keys, metadata = cache.keys, cache.metadata
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
    kv.keys[physical, position % kv.page_size] = _as_stored(keys[rows], kv.key_scale)
    kv.values[physical, position % kv.page_size] = _as_stored(values[rows], kv.value_scale)
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
    update_slot_metadata(kv.metadata, keys, slots, kv.page_size, kv.form)


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
    return (tokens.float() / scale[:, None]).clamp(-_LARGEST, _LARGEST).to(FP8)


def score_pages(step: Step, out: Tensor | None = None) -> Tensor:
    """See `ops.score_pages`. The metadata of many pages at a time, as the form scores it."""
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
        dead = ~_live_pages(seq_lens, None, kv.page_size, kv.max_pages, scores)
        if kv.contiguous is None:  # past the end of a sequence the table may hold anything
            table = table.masked_fill(dead, 0)
    for start in range(0, live, chunk):
        stop = min(live, start + chunk)
        kept = _metadata_rows(kv, table[:, start:stop], start, stop)
        logits = kv.form.score(seen, kept).view(batch, heads, stop - start, grouped.shape[1])
        if kv.key_scale is not None:
            logits *= kv.key_scale[:, None, None]
        part = scores[:, :, start:stop]
        if step.config.group_reduction == "max":
            torch.amax(logits, 3, out=part)
        else:
            torch.mean(logits, 3, out=part)
    used = scores[:, :, :live]
    # 0 * inf is NaN: a page with a non-finite key ranks first, so that it is read and shows as in dense attention.
    torch.nan_to_num_(used, nan=math.inf, posinf=math.inf, neginf=math.inf)
    if live < kv.max_pages:
        scores[:, :, live:] = -math.inf
    if token_mask is not None:
        dead = ~_live_pages(seq_lens, token_mask, kv.page_size, kv.max_pages, scores)
    if dead is not None:
        scores.masked_fill_(dead[:, None], -math.inf)
    return scores


def _metadata_rows(kv: PagedKV, physical: Tensor, start: int, stop: int) -> Tensor:
    """Of logical pages `start` to `stop`: `[B * HKV, stop - start, numbers]`, a view of a contiguous cache."""
    if kv.contiguous is not None:
        return kv.contiguous.metadata.flatten(0, 1)[:, start:stop].flatten(2)
    rows = _gather(kv.metadata.flatten(2)[:, None], physical[:, None].expand(-1, kv.num_kv_heads, -1))
    return rows.flatten(0, 1)


def select_pages(rows: Rows, scores: Tensor) -> Selection:
    """See `ops.select_pages`."""
    seq_lens, token_mask, workspace, config = rows.seq_lens, rows.token_mask, rows.workspace, rows.config
    page_size, token_budget, num_sink_pages = config.page_size, config.token_budget, config.num_sink_pages
    batch, heads, max_pages = scores.shape
    if not isinstance(workspace, DecodeWorkspace):
        workspace = DecodeWorkspace.allocate(batch, heads, max_pages, scores.device)
    page_budget, recent = config.page_budget, max(1, config.num_recent_pages)
    if isinstance(seq_lens, int) and token_mask is None:
        live = num_pages(seq_lens, page_size)
        if seq_lens <= token_budget:
            every = torch.arange(live, dtype=torch.int32, device=scores.device).expand(batch, heads, live)
            return Selection(every, every.new_full((batch, heads), live))
        keys = _ranking(scores[:, :, :live], workspace)
        keys[:, :, :num_sink_pages] = _ALWAYS
        keys[:, :, live - recent :] = _ALWAYS
        pages = keys.topk(page_budget, sorted=False).indices.to(torch.int32).sort(-1).values
        return Selection(pages, pages.new_full((batch, heads), page_budget))

    slots = min(max_pages, config.page_slots + (token_mask is not None))  # padding may shift a page
    if slots == 0:
        counts = torch.zeros(batch, heads, dtype=torch.int32, device=scores.device)
        return Selection(counts.new_empty(batch, heads, 0), counts)
    alive = _live_pages(seq_lens, token_mask, page_size, max_pages, scores)  # [B, P]
    rank = alive.cumsum(1)  # 1 for the first live page
    total = rank[:, -1:]
    forced = alive & ((rank <= num_sink_pages) | (rank > total - recent))
    keys = _ranking(scores, workspace)
    keys.masked_fill_(forced[:, None], _ALWAYS)
    keys.masked_fill_(~alive[:, None], _NEVER)
    if token_mask is None:
        assert isinstance(seq_lens, Tensor), "an int without a mask was answered above"
        tokens = seq_lens[:, None]
    else:
        tokens = _live_tokens(seq_lens, token_mask, max_pages * page_size, scores).sum(1, keepdim=True)
    counts = torch.where(tokens <= token_budget, total, total.clamp(max=page_budget)).clamp(max=slots)  # [B, 1]
    best = keys.topk(slots, sorted=True).indices
    unused = torch.arange(slots, device=scores.device) >= counts
    best = best.masked_fill(unused[:, None], _BEYOND).to(torch.int32).sort(-1).values
    return Selection(best.masked_fill(best == _BEYOND, -1), counts.to(torch.int32).expand(-1, heads))


def _ranking(scores: Tensor, workspace: DecodeWorkspace) -> Tensor:
    """Distinct int64 keys `[B, HKV, P]` that order pages by score and, where scores are equal, the lower page first.

    The bits of a float32, negated when its sign is set, order like the number (and -0.0 like 0.0); the page index goes
    below them.
    """
    live = scores.shape[2]
    bits = scores.view(torch.int32)
    ordered, keys = workspace.ordered[:, :, :live], workspace.keys[:, :, :live]
    torch.bitwise_right_shift(bits, 31, out=ordered)
    ordered.bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    keys.copy_(ordered).sub_(ordered.bitwise_right_shift_(31))
    return keys.bitwise_left_shift_(32).bitwise_or_(workspace.below[:live])


def sparse_decode_attention(
    step: Step, selected: Selection, *, return_lse: bool = False, is_own: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See `ops.sparse_decode_attention`."""
    query, kv, seq_lens, token_mask, sinks = step.query, step.kv, step.seq_lens, step.token_mask, step.sinks
    batch, heads, dim = kv.batch_size, kv.num_kv_heads, kv.head_dim
    # [B, HKV, G, D]: no key is repeated for its group
    grouped = query.view(batch, heads, query.shape[1] // heads, dim)
    pages, slots = selected.pages, selected.pages.shape[2]
    if slots == 0 or kv.max_pages == 0:  # no page is read
        empty = query.new_full(query.shape[:2], -math.inf, dtype=torch.float32)
        lse = empty if sinks is None else sinks.float().expand(batch, -1)
        return query.new_zeros(*query.shape[:2], kv.values.shape[-1]), lse if return_lse else None

    mask = None
    if isinstance(seq_lens, int) and token_mask is None and (is_own or _is_whole(pages, seq_lens, kv.page_size)):
        # The part-filled page is last, and cutting the tail masks everything there is to mask.
        keys, values = _gather_pages(kv, pages)  # [B, HKV, K * page_size, D and DV]
        used = (slots - 1) * kv.page_size + (seq_lens - 1) % kv.page_size + 1
        keys, values = keys[:, :, :used], values[:, :, :used]
    else:
        ends = seq_lens[:, None, None] if isinstance(seq_lens, Tensor) else seq_lens
        is_page = (pages >= 0) & (pages < (ends + kv.page_size - 1) // kv.page_size)
        pages = pages.masked_fill(~is_page, 0).long()
        keys, values = _gather_pages(kv, pages, is_page)
        attendable = _attendable(pages, is_page, ends, token_mask, kv.page_size)  # [B, HKV, T]
        # What was never written may be NaN, and no weight of zero takes NaN away.
        keys = keys.masked_fill(~attendable[..., None], 0)
        values = values.masked_fill(~attendable[..., None], 0)
        mask = attendable[:, :, None]
    if step.softcap is None and sinks is None and not return_lse:
        output = F.scaled_dot_product_attention(
            grouped.to(keys.dtype), keys, values, attn_mask=mask, scale=step.scale
        ).to(query.dtype)
        if mask is not None:  # a row with nothing to attend to is zero, not NaN
            output = output.masked_fill(~mask.any(-1, keepdim=True), 0)
        return output.flatten(1, 2), None
    output, lse = _attend_by_hand(step, grouped, keys, values, mask)
    return output, lse if return_lse else None


def count_reads(selected: Selection, seq_lens: Tensor, counters: Tensor, page_size: int, token_budget: int) -> None:
    """See `ops.count_reads`."""
    past = seq_lens > token_budget
    within = (seq_lens > 0) & ~past
    held = _num_pages(seq_lens, page_size)
    counters += torch.stack([past.sum(), within.sum(), selected.pages_read, held.sum()])


def _attend_by_hand(
    step: Step, grouped: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax in float32 for what scaled_dot_product_attention does not offer: a softcap, sinks, the log-sum-exp."""
    query, softcap = step.query, step.softcap
    logits = grouped.float() @ keys.float().transpose(2, 3) * step.scale  # [B, HKV, G, T]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    everything = logits
    if step.sinks is not None:  # one more logit that takes weight and gives no value
        column = step.sinks.float().view(1, logits.shape[1], -1, 1).expand(logits.shape[0], -1, -1, 1)
        everything = torch.cat([logits, column], -1)
    lse = torch.logsumexp(everything, -1, keepdim=True)
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0))
    return (weights @ values.float()).to(query.dtype).flatten(1, 2), lse.view(query.shape[:2])


def _is_whole(pages: Tensor, seq_len: int, page_size: int) -> bool:
    """Whether every slot is used and the last one of each list has the last page of its sequence.

    Seen on a CPU alone: elsewhere the host would have to wait, and masks what it does not know to be so.
    """
    if pages.device.type != "cpu" or pages.numel() == 0:
        return False
    last = num_pages(seq_len, page_size) - 1
    low, high = torch.aminmax(pages)
    return int(low) >= 0 and int(high) == last and int(pages[:, :, -1].min()) == last


def _gather_pages(kv: PagedKV, pages: Tensor, is_page: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Copy logical pages `[B, HKV, K]` out of the cache; some page is copied for what is none, to be masked.

    Returns:
        Keys `[B, HKV, K * page_size, D]` and values `[B, HKV, K * page_size, DV]`; of a quantised cache what they stand
        for, in float32.
    """
    keys, values = _copy_pages(kv, pages, is_page)
    if kv.key_scale is None or kv.value_scale is None:
        return keys, values
    return keys.float() * kv.key_scale[:, None, None], values.float() * kv.value_scale[:, None, None]


def _copy_pages(kv: PagedKV, pages: Tensor, is_page: Tensor | None) -> tuple[Tensor, Tensor]:
    used = pages.long()
    if kv.contiguous is None:
        physical = kv.page_table[:, None].expand(-1, pages.shape[1], -1).gather(2, used)
        if is_page is not None:  # the table of a sequence without tokens may hold anything
            physical = physical.masked_fill(~is_page, 0)
        return _gather(kv.keys, physical), _gather(kv.values, physical)
    rows = (kv.contiguous.first_rows + used).flatten()  # the same for keys and values, and no page table

    def take(storage: Tensor) -> Tensor:
        by_page = storage.view(-1, kv.page_size * storage.shape[3])
        return by_page.index_select(0, rows).view(*pages.shape[:2], pages.shape[2] * kv.page_size, storage.shape[3])

    return take(kv.contiguous.keys), take(kv.contiguous.values)


def _gather(storage: Tensor, physical: Tensor) -> Tensor:
    """Copy pages out of storage `[N, T, HKV, D]`, each head its own: `[B, HKV, K * T, D]` for ids `[B, HKV, K]`.

    `index_select` over rows is faster than indexing with two tensors, so the storage is seen as rows of
    the longest run that lies together: a whole page where a head's tokens follow each other (HND, contiguous),
    else the channels of one token (NHD).
    """
    pages, tokens, heads, dim = storage.shape
    batch, _, slots = physical.shape
    if pages == 0:  # and no sequence has any
        return storage.new_zeros(batch, heads, slots * tokens, dim)
    if storage.stride(3) != 1 and dim > 1:  # two bounds of one channel, which a cache may have apart
        storage = storage.contiguous()
    page_stride, token_stride, head_stride, _ = storage.stride()
    head_ids = torch.arange(heads, device=storage.device)[None, :, None]
    if tokens == 1 or token_stride == dim:
        unit = math.gcd(page_stride, head_stride) or 1
        index = physical.long() * (page_stride // unit) + head_ids * (head_stride // unit)
        reach, run = (pages - 1) * page_stride + (heads - 1) * head_stride, tokens * dim
    else:
        unit = math.gcd(page_stride, token_stride, head_stride) or 1
        index = physical.long() * (page_stride // unit) + head_ids * (head_stride // unit)
        steps = torch.arange(tokens, device=storage.device) * (token_stride // unit)
        index = index[..., None] + steps
        reach = (pages - 1) * page_stride + (tokens - 1) * token_stride + (heads - 1) * head_stride
        run = dim
    rows = storage.as_strided((reach // unit + 1, run), (unit, 1), storage.storage_offset())
    return rows.index_select(0, index.flatten()).view(batch, heads, slots * tokens, dim)


def _num_pages(seq_lens: Tensor, page_size: int) -> Tensor:
    """`pages.num_pages` for a tensor of lengths."""
    return (seq_lens + page_size - 1) // page_size


def _per_row(value: Tensor | int, kv: PagedKV) -> Tensor:
    if isinstance(value, int):
        return torch.full((kv.batch_size,), value, dtype=torch.int64, device=kv.keys.device)
    return value.long()


def _live_tokens(seq_lens: Tensor | int, token_mask: Tensor, max_tokens: int, like: Tensor) -> Tensor:
    """`[B, max_tokens]` bool: tokens a sequence may attend to, by logical position."""
    token = torch.arange(max_tokens, device=like.device)
    ends = seq_lens[:, None] if isinstance(seq_lens, Tensor) else seq_lens
    known = min(token_mask.shape[1], max_tokens)
    return (token < ends) & F.pad(token_mask[:, :known], (0, max_tokens - known), value=False)


def _live_pages(
    seq_lens: Tensor | int, token_mask: Tensor | None, page_size: int, max_pages: int, like: Tensor
) -> Tensor:
    """`[B, P]` bool: pages that hold a token the sequence may attend to."""
    if token_mask is None:
        ends = seq_lens[:, None] if isinstance(seq_lens, Tensor) else seq_lens
        starts = torch.arange(0, max_pages * page_size, page_size, device=like.device)
        return (starts < ends).expand(like.shape[0], -1)
    live = _live_tokens(seq_lens, token_mask, max_pages * page_size, like)
    return live.view(like.shape[0], max_pages, page_size).any(-1)


def _attendable(
    pages: Tensor, is_page: Tensor, ends: Tensor | int, token_mask: Tensor | None, page_size: int
) -> Tensor:
    """`[B, HKV, K * page_size]` bool: tokens of the gathered pages that may be attended to."""
    offsets = torch.arange(page_size, device=pages.device)
    token = pages[..., None] * page_size + offsets  # [B, HKV, K, page_size]
    live = (token < (ends[..., None] if isinstance(ends, Tensor) else ends)) & is_page[..., None]
    if token_mask is None:
        return live.flatten(2)
    token, known = token.flatten(2), token_mask.shape[1]
    table = token_mask[:, None].expand(-1, pages.shape[1], -1)
    return live.flatten(2) & (token < known) & table.gather(2, token.clamp(max=known - 1))


# Longer than 250 lines: the verbs share how pages are gathered and what is live.

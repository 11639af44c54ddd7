"""The oracle in the shape of a backend: tensors in and out, so that a model can run on it in place of a fast path."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_attention.config import GroupReduction
from quest_attention.ops import reference
from quest_attention.ops.selection import Selection, Workspace
from quest_attention.pages import PagedKV

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


def update_page_metadata(kv: PagedKV, seq_lens: Tensor | int, num_new_tokens: Tensor | int) -> None:
    """See `ops.update_page_metadata`."""
    reference.update_page_metadata(kv, _per_row(seq_lens, kv.batch_size), _per_row(num_new_tokens, kv.batch_size))


def append_token(kv: PagedKV, keys: Tensor, values: Tensor, seq_lens: Tensor) -> None:
    """See `ops.append_token`."""
    reference.append_token(kv, keys, values, _per_row(seq_lens, kv.batch_size))


def append_slots(kv: PagedKV, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """See `ops.append_slots`."""
    reference.append_slots(kv, keys, values, slots.tolist())


def update_slot_metadata(metadata: Tensor, keys: Tensor, slots: Tensor, page_size: int) -> None:
    """See `ops.update_slot_metadata`."""
    reference.update_slot_metadata(metadata, keys, slots.tolist(), page_size)


def score_pages(
    query: Tensor,
    kv: PagedKV,
    seq_lens: Tensor | int,
    token_mask: Tensor | None = None,
    group_reduction: GroupReduction = "max",
    out: Tensor | None = None,
) -> Tensor:
    """See `ops.score_pages`."""
    lengths = _per_row(seq_lens, kv.batch_size)
    scores = reference.score_pages(query, kv, lengths, token_mask, group_reduction)
    scores = scores.to(query.device, torch.float32)
    return scores if out is None else out.copy_(scores)


def select_pages(
    scores: Tensor,
    seq_lens: Tensor | int,
    page_size: int,
    token_budget: int,
    num_sink_pages: int = 0,
    num_recent_pages: int = 1,
    token_mask: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Selection:
    """See `ops.select_pages`."""
    lengths = _per_row(seq_lens, scores.shape[0])
    lists = reference.select_pages(
        scores, lengths, page_size, token_budget, num_sink_pages, num_recent_pages, token_mask
    )
    slots = max((len(pages) for row in lists for pages in row), default=0)
    padded = [[pages + [-1] * (slots - len(pages)) for pages in row] for row in lists]
    pages = torch.tensor(padded, dtype=torch.int32, device=scores.device).view(*scores.shape[:2], slots)
    counts = torch.tensor([len(row[0]) for row in lists], dtype=torch.int32, device=scores.device)
    return Selection(pages, counts)


def sparse_decode_attention(
    query: Tensor,
    kv: PagedKV,
    seq_lens: Tensor | int,
    selected: Selection,
    sm_scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_lse: bool = False,
    is_whole: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `ops.sparse_decode_attention`; whatever the host knows of the selection, each page is looked up."""
    del is_whole
    lists = [[[page for page in head if page >= 0] for head in row] for row in selected.pages.tolist()]
    lengths = _per_row(seq_lens, kv.batch_size)
    output, lse = reference.sparse_decode_attention(
        query, kv, lengths, lists, sm_scale, softcap=softcap, sinks=sinks, token_mask=token_mask
    )
    return output.to(query.device, query.dtype), lse.to(query.device, torch.float32) if return_lse else None


def count_reads(selected: Selection, seq_lens: Tensor, counters: Tensor, page_size: int, token_budget: int) -> None:
    """See `ops.count_reads`."""
    counted = reference.count_reads(selected.counts.tolist(), seq_lens.tolist(), page_size, token_budget)
    counters += torch.tensor(counted, device=counters.device)


def _per_row(value: Tensor | int, batch: int) -> list[int]:
    return [value] * batch if isinstance(value, int) else [int(one) for one in value]

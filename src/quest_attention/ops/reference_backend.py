"""The oracle in the shape of a backend: tensors in and out, so that a model can run on it in place of a fast path."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_attention.forms import MetadataForm
from quest_attention.ops import reference
from quest_attention.ops.hot_units import HotUnits
from quest_attention.ops.selection import Selection
from quest_attention.ops.step import Rows, Step
from quest_attention.pages import PagedKV

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


def update_page_metadata(kv: PagedKV, seq_lens: Tensor | int, num_new_tokens: Tensor | int) -> None:
    """See `ops.update_page_metadata`."""
    reference.update_page_metadata(kv, _per_row(seq_lens, kv.batch_size), _per_row(num_new_tokens, kv.batch_size))


def append_token(kv: PagedKV, keys: Tensor, values: Tensor, seq_lens: Tensor) -> None:
    """See `ops.append_token`."""
    reference.append_token(kv, keys, values, _per_row(seq_lens, kv.batch_size))


def append_slots(kv: PagedKV, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """See `ops.append_slots`."""
    reference.append_slots(kv, keys, values, slots.tolist())


def update_slot_metadata(metadata: Tensor, keys: Tensor, slots: Tensor, page_size: int, form: MetadataForm) -> None:
    """See `ops.update_slot_metadata`."""
    reference.update_slot_metadata(metadata, keys, slots.tolist(), page_size, form)


def score_pages(step: Step, out: Tensor | None = None) -> Tensor:
    """See `ops.score_pages`."""
    kv, config, lengths = step.kv, step.config, _per_row(step.seq_lens, step.kv.batch_size)
    passing = None
    if config.candidate_pages:  # chosen as pages that are read would be
        most, mask = config.candidate_pages * kv.page_size, step.token_mask
        scores = reference.score_pages(step.query, kv, lengths, mask, config.group_reduction)
        forced = (config.num_sink_pages, config.num_recent_pages)
        passing = reference.select_pages(scores, lengths, kv.page_size, most, *forced, mask)
    scores = reference.score_pages(
        step.query, kv, lengths, step.token_mask, config.group_reduction,
        sm_scale=step.scale, softcap=step.softcap, sinks=step.sinks, unit_size=config.unit_size,
        candidates=config.candidate_budget or None, candidate_pages=passing,
    )  # fmt: skip
    scores = scores.to(step.query.device, torch.float32)
    return scores if out is None else out.copy_(scores)


def select_pages(rows: Rows, scores: Tensor) -> Selection:
    """See `ops.select_pages`."""
    config, lengths = rows.config, _per_row(rows.seq_lens, scores.shape[0])
    sinks, recent = config.num_sink_pages, config.num_recent_pages
    lists = reference.select_pages(
        scores, lengths, config.page_size, config.token_budget, sinks, recent, rows.token_mask, config.unit_size
    )
    slots = max((len(units) for row in lists for units in row), default=0)
    padded = [[units + [-1] * (slots - len(units)) for units in row] for row in lists]
    units = torch.tensor(padded, dtype=torch.int32, device=scores.device).view(*scores.shape[:2], slots)
    counts = torch.tensor([[len(head) for head in row] for row in lists], dtype=torch.int32, device=scores.device)
    return Selection(units, counts.view(scores.shape[:2]), config.unit_size)


def sparse_decode_attention(
    step: Step, selected: Selection, *, return_lse: bool = False, is_own: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See `ops.sparse_decode_attention`; whoever chose the units, each is looked up."""
    query, lengths = step.query, _per_row(step.seq_lens, step.kv.batch_size)
    lists = [[[unit for unit in head if unit >= 0] for head in row] for row in selected.units.tolist()]
    output, lse = reference.sparse_decode_attention(
        query, step.kv, lengths, lists, step.scale, step.softcap, step.sinks, step.token_mask, selected.unit_size
    )
    return output.to(query.device, query.dtype), lse.to(query.device, torch.float32) if return_lse else None


def fetch_units(
    kv: PagedKV, hot: HotUnits, units: Tensor, seq_lens: Tensor | int, *, is_again: bool = False,
    keys_only: bool = False,
) -> None:  # fmt: skip
    """See `ops.fetch_units`. Nothing was looked up before: candidates are weighed by the keys of the cache."""
    counted = reference.fetch_units(kv, hot, units.tolist(), _per_row(seq_lens, kv.batch_size), keys_only)
    hot.counts[:4].add_(torch.tensor(counted, device=hot.counts.device))


def count_reads(selected: Selection, seq_lens: Tensor, counters: Tensor, token_budget: int) -> None:
    """See `ops.count_reads`."""
    counted = reference.count_reads(selected.counts.tolist(), seq_lens.tolist(), selected.unit_size, token_budget)
    counters += torch.tensor(counted, device=counters.device)


def _per_row(value: Tensor | int, batch: int) -> list[int]:
    return [value] * batch if isinstance(value, int) else [int(one) for one in value]

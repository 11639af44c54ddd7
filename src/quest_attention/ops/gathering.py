"""Copies out of a cache: the keys or values of units, the metadata of pages. For the PyTorch path.

Units are copied by `index_select` of whole rows, not by `gather`: `benchmarks/decode_cpu.py` shows what undoing that
costs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quest_attention.pages import PagedKV

__all__ = ["gather_keys", "gather_values", "metadata_rows"]


def metadata_rows(kv: PagedKV, physical: Tensor, start: int, stop: int) -> Tensor:
    """Of logical pages `start` to `stop`: `[B * HKV, stop - start, numbers]`, a view of a contiguous cache."""
    if kv.contiguous is not None:
        return kv.contiguous.metadata.flatten(0, 1)[:, start:stop].flatten(2)
    kept = kv.metadata.flatten(2)[:, None]
    return _gather(kept, physical[:, None].expand(-1, kv.num_kv_heads, -1), 1, None).flatten(0, 1)


def gather_keys(kv: PagedKV, units: Tensor, unit_size: int, is_unit: Tensor | None = None) -> Tensor:
    """Copy the keys of logical units `[B, HKV, K]`; of some unit for what is none, to be masked.

    Returns:
        `[B, HKV, K * unit_size, D]`; of a quantised cache what they stand for, in float32.
    """
    keys = _copy_units(kv, kv.keys, None if kv.contiguous is None else kv.contiguous.keys, units, unit_size, is_unit)
    return keys if kv.key_scale is None else keys.float() * kv.key_scale[:, None, None]


def gather_values(kv: PagedKV, units: Tensor, unit_size: int, is_unit: Tensor | None = None) -> Tensor:
    """`gather_keys` for values: `[B, HKV, K * unit_size, DV]`."""
    stored = None if kv.contiguous is None else kv.contiguous.values
    values = _copy_units(kv, kv.values, stored, units, unit_size, is_unit)
    return values if kv.value_scale is None else values.float() * kv.value_scale[:, None, None]


def _copy_units(
    kv: PagedKV, pages_of: Tensor, contiguous: Tensor | None, units: Tensor, unit_size: int, is_unit: Tensor | None
) -> Tensor:
    """Of keys or values `[N, page_size, HKV, D]`, which are `[B, HKV, capacity, D]` of a contiguous cache."""
    used, per_page = units.long(), kv.page_size // unit_size
    if kv.contiguous is None or contiguous is None:
        pages, place = (used, None) if per_page == 1 else (used // per_page, used % per_page)
        table = kv.page_table if kv.has_table_by_head else kv.page_table[:, None].expand(-1, units.shape[1], -1)
        physical = table.gather(2, pages)
        if is_unit is not None:  # the table of a sequence without tokens may hold anything
            physical = physical.masked_fill(~is_unit, 0)
        return _gather(pages_of, physical, unit_size, place)
    first = kv.contiguous.first_rows if per_page == 1 else kv.contiguous.first_rows * per_page
    rows = (first + used).flatten()
    by_unit = contiguous.view(-1, unit_size * contiguous.shape[3])
    return by_unit.index_select(0, rows).view(*units.shape[:2], units.shape[2] * unit_size, contiguous.shape[3])


def _gather(storage: Tensor, physical: Tensor, unit_size: int, place: Tensor | None) -> Tensor:
    """Copy units out of storage `[N, T, HKV, D]`, each head its own: `[B, HKV, K * unit_size, D]`.

    `index_select` over rows is faster than indexing with two tensors, so the storage is seen as rows of
    the longest run that lies together: a whole unit where a head's tokens follow each other (HND, contiguous),
    else the channels of one token (NHD).

    Args:
        storage: What is copied.
        physical: `[B, HKV, K]`, pages that the units lie in.
        unit_size: Tokens of a unit [tokens].
        place: `[B, HKV, K]`, which unit of its page each is; None where a page is one.
    """
    pages, tokens, heads, dim = storage.shape
    batch, _, slots = physical.shape
    if pages == 0:  # and no sequence has any
        return storage.new_zeros(batch, heads, slots * unit_size, dim)
    if storage.stride(3) != 1 and dim > 1:  # two bounds of one channel, which a cache may have apart
        storage = storage.contiguous()
    page_stride, token_stride, head_stride, _ = storage.stride()
    is_together = unit_size == 1 or token_stride == dim
    strides = [page_stride, head_stride]
    if place is not None:
        strides.append(unit_size * token_stride)
    if not is_together:
        strides.append(token_stride)
    step = math.gcd(*strides) or 1
    head_ids = torch.arange(heads, device=storage.device)[None, :, None]
    index = physical.long() * (page_stride // step) + head_ids * (head_stride // step)
    reach = (pages - 1) * page_stride + (heads - 1) * head_stride + (tokens - unit_size) * token_stride
    if place is not None:
        index = index + place * (unit_size * token_stride // step)
    run = unit_size * dim
    if not is_together:
        index = index[..., None] + torch.arange(unit_size, device=storage.device) * (token_stride // step)
        reach, run = reach + (unit_size - 1) * token_stride, dim
    rows = storage.as_strided((reach // step + 1, run), (step, 1), storage.storage_offset())
    return rows.index_select(0, index.flatten()).view(batch, heads, slots * unit_size, dim)

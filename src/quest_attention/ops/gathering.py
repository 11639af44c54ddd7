"""Copies out of a cache: the keys or values of units, the metadata of pages. For the PyTorch path.

Units are copied by `index_select` of whole rows, not by `gather`: `benchmarks/decode_cpu.py` shows what undoing that
costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quest_attention.pages import PagedKV

__all__ = ["UnitCopies", "copies_of_keys", "copies_of_values", "gather_keys", "gather_values", "metadata_rows"]


@dataclass(frozen=True, slots=True, eq=False)
class UnitCopies:
    """Keys or values of units, to be copied: all at once, or for some KV heads of some sequences at a time.

    Attributes:
        rows: `[N, run]`, the storage as rows that lie together.
        index: `[B * HKV, R]` int64, which rows each head's units are.
        scale: `[B * HKV]`, of a quantised cache: what is stored times that is what it stands for.
        shape: `(K * unit_size, D)`, tokens and channels of a head's copy.
    """

    rows: Tensor
    index: Tensor
    scale: Tensor | None
    shape: tuple[int, int]

    @property
    def head_bytes(self) -> int:
        """What the copy for one head takes [bytes]."""
        return math.prod(self.shape) * (self.rows if self.scale is None else self.scale).element_size()

    def of_heads(self, heads: slice) -> Tensor:
        """The copies for some of all `B * HKV` heads: `[heads, K * unit_size, D]`; quantised ones in float32."""
        index = self.index[heads]
        copied: Tensor = self.rows.index_select(0, index.flatten()).view(index.shape[0], *self.shape)
        return copied if self.scale is None else copied.float() * self.scale[heads, None, None]


def metadata_rows(kv: PagedKV, physical: Tensor, start: int, stop: int) -> Tensor:
    """Of logical pages `start` to `stop`: `[B * HKV, stop - start, numbers]`, a view of a contiguous cache."""
    if kv.contiguous is not None:
        return kv.contiguous.metadata.flatten(0, 1)[:, start:stop].flatten(2)
    kept = kv.metadata.flatten(2)[:, None]
    rows, index = _rows_of(kept, physical[:, None].expand(-1, kv.num_kv_heads, -1), 1, None)
    return UnitCopies(rows, index, None, (stop - start, kept.shape[3])).of_heads(slice(None))


def gather_keys(kv: PagedKV, units: Tensor, unit_size: int, is_unit: Tensor | None = None) -> Tensor:
    """Copy the keys of logical units `[B, HKV, K]`; of some unit for what is none, to be masked.

    Returns:
        `[B, HKV, K * unit_size, D]`; of a quantised cache what they stand for, in float32.
    """
    copied = copies_of_keys(kv, units, unit_size, is_unit).of_heads(slice(None))
    keys: Tensor = copied.unflatten(0, units.shape[:2])
    return keys


def gather_values(kv: PagedKV, units: Tensor, unit_size: int, is_unit: Tensor | None = None) -> Tensor:
    """`gather_keys` for values: `[B, HKV, K * unit_size, DV]`."""
    copied = copies_of_values(kv, units, unit_size, is_unit).of_heads(slice(None))
    values: Tensor = copied.unflatten(0, units.shape[:2])
    return values


def copies_of_keys(kv: PagedKV, units: Tensor, unit_size: int, is_unit: Tensor | None = None) -> UnitCopies:
    """What `gather_keys` copies, before it does."""
    stored = None if kv.contiguous is None else kv.contiguous.keys
    return _copies(kv, kv.keys, stored, kv.key_scale, units, unit_size, is_unit)


def copies_of_values(kv: PagedKV, units: Tensor, unit_size: int, is_unit: Tensor | None = None) -> UnitCopies:
    """What `gather_values` copies, before it does."""
    stored = None if kv.contiguous is None else kv.contiguous.values
    return _copies(kv, kv.values, stored, kv.value_scale, units, unit_size, is_unit)


def _copies(
    kv: PagedKV, pages_of: Tensor, contiguous: Tensor | None, scale: Tensor | None, units: Tensor, unit_size: int,
    is_unit: Tensor | None,
) -> UnitCopies:  # fmt: skip
    """Of keys or values `[N, page_size, HKV, D]`, which are `[B, HKV, capacity, D]` of a contiguous cache."""
    used, per_page = units.long(), kv.page_size // unit_size
    scales = None if scale is None else scale.expand(units.shape[1]).repeat(units.shape[0])
    shape = (units.shape[2] * unit_size, pages_of.shape[3])
    if kv.contiguous is None or contiguous is None:
        pages, place = (used, None) if per_page == 1 else (used // per_page, used % per_page)
        table = kv.page_table if kv.has_table_by_head else kv.page_table[:, None].expand(-1, units.shape[1], -1)
        physical = table.gather(2, pages)
        if is_unit is not None:  # the table of a sequence without tokens may hold anything
            physical = physical.masked_fill(~is_unit, 0)
        rows, index = _rows_of(pages_of, physical, unit_size, place)
        return UnitCopies(rows, index, scales, shape)
    first = kv.contiguous.first_rows if per_page == 1 else kv.contiguous.first_rows * per_page
    return UnitCopies(contiguous.view(-1, unit_size * shape[1]), (first + used).flatten(0, 1), scales, shape)


def _rows_of(storage: Tensor, physical: Tensor, unit_size: int, place: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of storage `[N, T, HKV, D]`, and which of them are the units of each head: `[N, run]`, `[B * HKV, R]`.

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
    if pages == 0:  # and no sequence has any
        return storage.new_zeros(1, unit_size * dim), torch.zeros_like(physical, dtype=torch.int64).flatten(0, 1)
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
    return rows, index.flatten(2).flatten(0, 1)

"""Random caches in every layout, with the same contents, for the tests of the verbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quest_attention.forms import FP8, Bounds, MetadataForm
from quest_attention.pages import PagedKV, num_pages

LAYOUTS = ("nhd", "hnd", "contiguous")


@dataclass(frozen=True)
class Cache:
    """One paged cache and the lengths of its sequences; metadata is poisoned until a test updates it."""

    kv: PagedKV
    seq_lens: Tensor  # [B] int32

    @property
    def lengths(self) -> list[int]:
        return [int(n) for n in self.seq_lens]


def make_cache(
    lengths: list[int],
    *,
    heads: int = 2,
    dim: int = 16,
    page_size: int = 8,
    dtype: torch.dtype = torch.float32,
    layout: str = "nhd",
    seed: int = 0,
    spare_pages: int = 3,
    narrow: bool = False,
    form: MetadataForm = Bounds(),  # noqa: B008 - a frozen value
    scales: str | None = None,
) -> Cache:
    """A cache of random keys and values; what is past a sequence's end is NaN, so that reading it shows.

    With `scales`, "tensor" or "head", it is in 8 bits, and they are no powers of two.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    pages = max(1, num_pages(max(lengths), page_size)) + 1
    shape = (batch, heads, pages * page_size, dim)
    keys = torch.randn(shape, generator=generator).to(dtype)
    values = torch.randn(shape, generator=generator).to(dtype)
    for b, length in enumerate(lengths):
        keys[b, :, length:] = float("nan")
        values[b, :, length:] = float("nan")
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    others: dict[str, Any] = {"form": form}
    if scales is not None:
        dtype = FP8
        keys, values = (keys / 0.3).to(dtype), (values / 0.7).to(dtype)
        others["key_scale"] = torch.tensor([0.3] if scales == "tensor" else [0.3 + 0.1 * h for h in range(heads)])
        others["value_scale"] = torch.tensor([0.7] if scales == "tensor" else [0.7 + 0.1 * h for h in range(heads)])
    metadata_dtype = FP8 if narrow else form.dtypes(dtype)[0]
    poison = float("nan") if metadata_dtype.is_floating_point else 255  # four such bytes are a NaN too
    if layout == "contiguous":
        metadata = torch.full((batch, heads, pages, *form.shape(page_size, dim)), poison, dtype=metadata_dtype)
        return Cache(PagedKV.from_contiguous(keys, values, metadata, **others), seq_lens)
    total = batch * pages + spare_pages
    order = torch.randperm(total, generator=generator)[: batch * pages]
    page_table = order.view(batch, pages).to(torch.int32)
    metadata = torch.full((total, heads, *form.shape(page_size, dim)), poison, dtype=metadata_dtype)

    def scatter(source: Tensor) -> Tensor:
        out = torch.full((total, page_size, heads, dim), float("nan"), dtype=dtype)
        cut = source.view(batch, heads, pages, page_size, dim).permute(0, 2, 3, 1, 4)
        out[order] = cut.reshape(batch * pages, page_size, heads, dim)
        return out

    if layout == "nhd":
        # As a server stores it: K and V in one tensor, so that the page stride is not the size of a page.
        both = torch.stack([scatter(keys), scatter(values)], dim=1)
        return Cache(PagedKV.from_nhd(both[:, 0], both[:, 1], metadata, page_table, **others), seq_lens)
    nhd_keys, nhd_values = scatter(keys), scatter(values)
    hnd_keys, hnd_values = nhd_keys.transpose(1, 2).contiguous(), nhd_values.transpose(1, 2).contiguous()
    return Cache(PagedKV.from_hnd(hnd_keys, hnd_values, metadata, page_table, **others), seq_lens)

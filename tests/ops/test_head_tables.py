"""A page table of each KV head: pages of one head lie apart from those of another, and attention finds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, available
from caches import Cache, make_cache
from likeness import query_for
from quest_attention import QuestConfig, QuestValueError, Selection, quest_decode, sparse_decode_attention
from quest_attention.config import Backend
from quest_attention.ops import append_token, reference, score_pages, update_page_metadata
from quest_attention.pages import PagedKV

LENGTH = 90


def apart(cache: Cache, seed: int = 0) -> PagedKV:
    """The same tokens with the pages of each KV head shuffled on their own; what nobody looks up is NaN."""
    kv = cache.kv
    batch, pages, heads = kv.batch_size, kv.max_pages, kv.num_kv_heads
    total = batch * pages + 3
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(total, generator=generator)[: batch * pages] for _ in range(heads)])
    table = order.view(heads, batch, pages).transpose(0, 1).to(torch.int32)  # [B, HKV, P]

    def scattered(tensor: Tensor) -> Tensor:
        out = torch.full((total, *tensor.shape[1:]), float("nan"), dtype=tensor.dtype)
        for h in range(heads):
            out[order[h], :, h] = tensor[kv.page_table.flatten().long(), :, h]
        return out

    return PagedKV(scattered(kv.keys), scattered(kv.values), kv.keys.new_zeros(total, heads, 2, kv.head_dim), table)


@pytest.mark.parametrize("size", [8, 4, 1])
@pytest.mark.parametrize("layout", ["nhd", "contiguous"])
@pytest.mark.parametrize("lengths", ["host", "device"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_that_of_one_table_bit_by_bit(layout: str, lengths: str, size: int, backend: Backend) -> None:
    available(backend)
    cache = make_cache([LENGTH, LENGTH if lengths == "host" else 33], heads=3, layout=layout)
    seq_lens = LENGTH if lengths == "host" else cache.seq_lens
    units = -(-LENGTH // size)
    generator = torch.Generator().manual_seed(size)
    lists = torch.stack([torch.randperm(units, generator=generator)[: units // 2].sort().values for _ in range(6)])
    lists = lists.view(2, 3, -1).to(torch.int32)
    lists[:, :, -1] = units - 1  # the one being written
    selected = Selection(lists, torch.full((2, 3), lists.shape[2], dtype=torch.int32), size)
    query, by_head = query_for(cache, 2, dtype=torch.float32), apart(cache)
    for mask in (None, torch.arange(LENGTH).expand(2, -1) % 3 != 0):
        for options in ({}, {"softcap": 5.0, "sinks": torch.linspace(-1, 1, query.shape[1])}):
            given: dict[str, Any] = {"token_mask": mask, "return_lse": True, "backend": backend, **options}
            expected, expected_lse = sparse_decode_attention(query, cache.kv, seq_lens, selected, **given)
            output, lse = sparse_decode_attention(query, by_head, seq_lens, selected, **given)
            assert torch.equal(output, expected)
            assert lse is not None and expected_lse is not None and torch.equal(lse, expected_lse)
            exact, _ = reference.sparse_decode_attention(
                query, by_head, cache.lengths, lists.tolist(), query.shape[2] ** -0.5, unit_size=size, token_mask=mask,
                **options,
            )  # fmt: skip
            torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=3e-6)


def test_what_needs_one_table_for_all_heads_refuses_others() -> None:
    cache = make_cache([LENGTH])
    kv, config = apart(cache), QuestConfig(32, 8, metadata="bounds")
    query, token = query_for(cache, 2, dtype=torch.float32), torch.zeros(1, 2, 16)
    several = Selection(torch.zeros(1, 2, 1, dtype=torch.int32), torch.ones(1, 2, dtype=torch.int32), 8)
    for refused in (
        lambda: update_page_metadata(kv, LENGTH, LENGTH),
        lambda: append_token(kv, token, token, LENGTH),
        lambda: score_pages(query, kv, LENGTH),
        lambda: quest_decode(query, kv, LENGTH, config),
        lambda: sparse_decode_attention(query[:, None], kv, LENGTH, several),
    ):
        with pytest.raises(QuestValueError, match=r"kv.page_table.shape: got \[1, 2, 13\], expected \[B, P\]"):
            refused()
    with pytest.raises(QuestValueError, match=r"page_table.shape: got \[1, 3, 13\], expected \[B, P\] or \[B, 2, P\]"):
        PagedKV(kv.keys, kv.values, kv.metadata, torch.zeros(1, 3, 13, dtype=torch.int32))

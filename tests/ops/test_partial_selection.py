"""Attention over a selection that is not the sequence's own: part of it, unused slots, any order, pages it has not."""

from __future__ import annotations

import pytest
import torch

from backends import BACKENDS, available
from caches import LAYOUTS, make_cache
from likeness import query_for
from quest_attention import QuestConfig, quest_decode, select_pages, sparse_decode_attention, update_page_metadata
from quest_attention.config import Backend
from quest_attention.ops import Selection, reference

LENGTH, PAGE_SIZE = 44, 8  # six pages, of which the last holds four tokens
SELECTIONS = {
    "the first pages": [0, 1],
    "the last page first": [5, 0],
    "the last page alone": [5],
    "unused slots": [0, 4, -1, -1],
    "an unused slot after the last page": [0, 5, -1],
    "an unused slot before": [-1, 0, 5],
    "an unused slot between": [1, -1, 5, 3],
    "nothing": [-1, -1],
    "no slots": [],
    "a page past the end": [0, 6],
    "pages that the table has not": [0, 7, 1 << 28, 2],
    "numbers below -1": [-7, 2, -(1 << 31)],
    "all pages": [0, 1, 2, 3, 4, 5],
    "all pages, backwards": [5, 4, 3, 2, 1, 0],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nhd", "contiguous"])
@pytest.mark.parametrize("lengths", ["host", "int32"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("chosen", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_every_backend_reads_the_pages_that_are_named(
    chosen: list[int], masked: bool, lengths: str, layout: str, backend: Backend
) -> None:
    cache = make_cache([LENGTH, LENGTH], layout=layout)
    query = query_for(cache, 2)
    mask = torch.arange(LENGTH).expand(2, -1) % 3 != 0 if masked else None
    other = [3, *[-1] * len(chosen)][: len(chosen)]  # what another head reads
    pages = torch.tensor([[chosen, other], [other, chosen]], dtype=torch.int32).view(2, 2, len(chosen))
    counts = (pages >= 0).sum(-1, dtype=torch.int32)
    selected = Selection(pages, counts, cache.kv.page_size)
    seq_lens = LENGTH if lengths == "host" else cache.seq_lens.to(getattr(torch, lengths))
    output, lse = sparse_decode_attention(
        query, cache.kv, seq_lens, selected, sm_scale=0.25, token_mask=mask, return_lse=True,
        backend=available(backend),
    )  # fmt: skip
    alone, _ = sparse_decode_attention(
        query,
        cache.kv,
        seq_lens,
        selected,
        sm_scale=0.25,
        token_mask=mask,
        backend=backend,
    )
    exact, exact_lse = reference.sparse_decode_attention(
        query, cache.kv, [LENGTH] * 2, pages.tolist(), 0.25, token_mask=mask
    )
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(alone.double(), exact, rtol=1e-5, atol=2e-6)
    assert lse is not None
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_slots_than_a_program_looks_up_at_once(backend: Backend) -> None:
    """Lists with gaps, in no order, of which programs take pieces."""
    cache = make_cache([1500], heads=1, page_size=4)
    query, live = query_for(cache, 2), 375
    order = torch.randperm(live, generator=torch.Generator().manual_seed(2))[:300].to(torch.int32)
    pages = torch.full((1, 1, 450), -1, dtype=torch.int32)
    pages[0, 0, torch.arange(300) * 3 // 2] = order
    pages[0, 0, 17] = live - 1 if live - 1 not in order else pages[0, 0, 17]  # part-filled, and not the last
    selected = Selection(pages, torch.tensor([[300]], dtype=torch.int32), 4)
    lengths = torch.tensor([1498])
    output, _ = sparse_decode_attention(query, cache.kv, lengths, selected, backend=available(backend))
    exact, _ = reference.sparse_decode_attention(query, cache.kv, [1498], pages.tolist(), 0.25)
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("then", [1, 40, 41, 48, 52])
def test_a_selection_made_at_another_length(then: int, backend: Backend) -> None:
    cache = make_cache([56, 56], layout="contiguous")
    query, kv = query_for(cache, 2), cache.kv
    update_page_metadata(kv, 56, 56)
    scores = torch.randn(2, 2, kv.max_pages)
    selected = select_pages(scores, LENGTH, page_size=8, token_budget=24, backend=available(backend))
    output, _ = sparse_decode_attention(query, kv, then, selected, backend=backend)
    exact, _ = reference.sparse_decode_attention(query, kv, [then] * 2, selected.units.tolist(), 0.25)
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 8, 24, 25, 44, 48])
def test_a_length_known_to_the_host_gives_what_one_on_the_device_gives(layout: str, length: int) -> None:
    cache = make_cache([length, length], layout=layout)
    update_page_metadata(cache.kv, length, length)
    query, config = query_for(cache, 2), QuestConfig(24, 8, backend="torch")
    by_host = quest_decode(query, cache.kv, length, config)
    by_device = quest_decode(query, cache.kv, cache.seq_lens, config)
    torch.testing.assert_close(by_host.output, by_device.output, rtol=1e-5, atol=1e-6)
    again, _ = sparse_decode_attention(query, cache.kv, length, by_host.selected, backend="torch")
    assert torch.equal(again, by_host.output), "the same selection takes the same way"

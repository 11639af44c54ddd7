"""The step over single tokens at real sizes: ranks by binary products, launches that start early, graphs."""

from __future__ import annotations

import pytest
import torch

from caches import Cache
from quest_attention import QuestConfig, update_page_metadata
from quest_attention.forms import Sketch
from quest_attention.ops import Step, make_workspace
from quest_attention.pages import PagedKV, num_pages

pytest.importorskip("triton", reason="Triton is for Linux")
from quest_attention.ops.triton import token_decode, token_workspace
from token_choice import assert_chosen

pytestmark = pytest.mark.gpu

_SIGNS_IN_4_BITS = 1.0
"""How far a rank may be off by queries rounded to 4 bits for signs: an eighth of the worth of one, as measured."""


def make_cache(lengths: list[int], heads: int, dim: int, dtype: torch.dtype, page_size: int = 16) -> Cache:
    """Pages in random order whose keys differ from page to page, as those of texts do."""
    torch.manual_seed(0)
    batch, pages, form = len(lengths), num_pages(max(lengths), page_size), Sketch(page_size)
    shape = (batch * pages, page_size, heads, dim)
    keys, values = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(2))
    keys += torch.randn(batch * pages, 1, heads, dim, dtype=dtype, device="cuda")
    kept = torch.full((batch * pages, heads, *form.shape(page_size, dim)), 255, dtype=torch.uint8, device="cuda")
    table = torch.randperm(batch * pages, device="cuda").to(torch.int32).view(batch, pages)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    kv = PagedKV.from_nhd(keys, values, kept, table, form=form)
    update_page_metadata(kv, seq_lens, seq_lens)
    return Cache(kv, seq_lens)


@pytest.mark.parametrize(("dim", "group", "dtype", "page_size"), [
    (128, 4, torch.bfloat16, 16), (128, 1, torch.bfloat16, 16), (128, 8, torch.float16, 16),
    (64, 7, torch.bfloat16, 16), (256, 4, torch.bfloat16, 16), (256, 6, torch.float32, 16),
    (80, 3, torch.bfloat16, 16), (128, 12, torch.bfloat16, 16), (128, 4, torch.bfloat16, 32),
])  # fmt: skip
def test_whom_it_chooses(dim: int, group: int, dtype: torch.dtype, page_size: int) -> None:
    cache = make_cache([20_000, 300, 4_321], 2, dim, dtype, page_size)
    scans = dim in {64, 128, 256} and group <= 8 and page_size == 16
    assert token_workspace.can_scan(cache.kv, group) == scans
    query = torch.randn(3, 2 * group, dim, device="cuda").to(dtype)
    config = QuestConfig(512, page_size, metadata="sketch", selection_unit="token")
    shares = assert_chosen(cache, query, config, rounding=_SIGNS_IN_4_BITS if scans else 0.05)
    assert min(shares) > 0.7, "most of the best tokens"


@pytest.mark.parametrize(("dim", "group"), [(128, 4), (64, 1), (256, 8), (80, 4)])
def test_softcaps(dim: int, group: int) -> None:
    """A cap that most logits feel: `scan` caps estimates by an instruction of its own."""
    cache = make_cache([20_000, 300, 4_321], 2, dim, torch.bfloat16)
    query = torch.randn(3, 2 * group, dim, device="cuda").to(torch.bfloat16)
    config = QuestConfig(512, metadata="sketch", selection_unit="token")
    sinks = torch.linspace(-1, 2, 2 * group, device="cuda")
    assert min(assert_chosen(cache, query, config, _SIGNS_IN_4_BITS, softcap=2.0, sinks=sinks)) > 0.7


def test_a_captured_step_follows_lengths_and_queries() -> None:
    cache = make_cache([30_000, 9_000], 4, 128, torch.bfloat16)
    config = QuestConfig(512, metadata="sketch", selection_unit="token")
    query = torch.randn(2, 16, 128, dtype=torch.bfloat16, device="cuda")
    step = Step(
        query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config,
        workspace=make_workspace(cache.kv, 16, config), out=torch.empty_like(query),
    )  # fmt: skip
    token_decode.decode_tokens(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_decode.decode_tokens(step)
    assert captured is not None
    for lengths in ([30_000, 9_000], [511, 29_999], [12_345, 513]):
        cache.seq_lens.copy_(torch.tensor(lengths))
        query.normal_()
        update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
        graph.replay()
        output, units = captured[0].clone(), captured[1].units.clone()
        again = token_decode.decode_tokens(step)
        assert again is not None
        assert torch.equal(output, again[0]) and torch.equal(units, again[1].units)

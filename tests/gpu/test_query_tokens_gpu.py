"""Several query tokens of a sequence in one step at real sizes, and in a CUDA graph whose lengths are the device's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux")

from quest_attention import QuestConfig, quest_decode
from quest_attention.ops import Selection, sparse_decode_attention
from quest_attention.pages import PagedKV
from test_token_steps import make_cache

pytestmark = pytest.mark.gpu
CONFIG = QuestConfig(512, metadata="sketch", selection_unit="token")
COUNT, GROUP, DIM = 5, 4, 128
"""More heads together than `scan` multiplies with."""


def causal(kv: PagedKV, query: Tensor, length: int, have: int, b: int, units: Tensor) -> Tensor:
    """Float64 attention `[have, HQ, D]` of a row's tokens over its chosen ones that are no later than each."""
    made = []
    for h in range(kv.num_kv_heads):
        chosen = units[h][units[h] >= 0].long()
        pages = kv.page_table[b, chosen // kv.page_size].long()
        keys, values = (part[pages, chosen % kv.page_size, h].double() for part in (kv.keys, kv.values))
        heads = query[:have, h * GROUP : (h + 1) * GROUP].double()
        logits = heads @ keys.T * DIM**-0.5
        at = length - have + torch.arange(have, device=query.device)
        logits = logits.masked_fill((chosen > at[:, None])[:, None], -torch.inf)
        made.append(torch.softmax(logits, -1) @ values)
    return torch.cat(made, 1)


def assert_right(
    kv: PagedKV, query: Tensor, lengths: list[int], lens: list[int], output: Tensor, units: Tensor
) -> None:
    for b, (length, have) in enumerate(zip(lengths, lens, strict=True)):
        last = range(length - have, length)
        assert all(set(last) <= set(row.tolist()) for row in units[b]), "the tokens of the step are read"
        exact = causal(kv, query[b], length, have, b, units[b])
        precision = torch.finfo(query.dtype).eps
        torch.testing.assert_close(output[b, :have].double(), exact, rtol=4 * precision, atol=8 * precision)
        assert not output[b, have:].any()


def test_one_choice_serves_all_and_a_graph_follows_lengths() -> None:
    lengths, lens = [20_000, 300, 4_321], [5, 2, 3]
    cache = make_cache(lengths, 2, DIM, torch.bfloat16)
    query = torch.randn(3, COUNT, 2 * GROUP, DIM, dtype=torch.bfloat16, device="cuda")
    seq_lens, query_lens = cache.seq_lens.clone(), torch.tensor(lens, dtype=torch.int32, device="cuda")
    step = quest_decode(query, cache.kv, seq_lens, CONFIG, query_lens=query_lens)
    assert_right(cache.kv, query, lengths, lens, step.output, step.selected.units)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = quest_decode(query, cache.kv, seq_lens, CONFIG, query_lens=query_lens)
    lengths, lens = [19_990, 290, 4_300], [1, 4, 2]
    seq_lens.copy_(torch.tensor(lengths))
    query_lens.copy_(torch.tensor(lens))
    query.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert_right(cache.kv, query, lengths, lens, captured.output, captured.selected.units)


def test_a_dense_check_follows_lengths_in_a_graph() -> None:
    """Over every page, as lossless decoding checks drafts."""
    lengths, lens = [20_000, 300, 4_321], [COUNT] * 3
    cache = make_cache(lengths, 2, DIM, torch.bfloat16)
    kv = cache.kv
    pages = torch.arange(kv.max_pages, dtype=torch.int32, device="cuda").expand(3, 2, -1)
    everything = Selection(pages, torch.full_like(pages[..., 0], kv.max_pages), kv.page_size)
    tokens = torch.arange(kv.max_pages * kv.page_size, device="cuda").expand(3, 2, -1)
    query = torch.randn(3, COUNT, 2 * GROUP, DIM, dtype=torch.bfloat16, device="cuda")
    seq_lens = cache.seq_lens.clone()
    output, _ = sparse_decode_attention(query, kv, seq_lens, everything)
    assert_right(kv, query, lengths, lens, output, tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = sparse_decode_attention(query, kv, seq_lens, everything)
    lengths = [19_990, 290, 4_300]
    seq_lens.copy_(torch.tensor(lengths))
    query.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert_right(kv, query, lengths, lens, output, tokens)

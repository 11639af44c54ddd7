"""How a backend is held to the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from caches import Cache
from quest_attention import QuestConfig, quest_decode, score_pages, update_page_metadata
from quest_attention.ops import reference

__all__ = ["as_lists", "assert_like_oracle", "query_for"]


def query_for(cache: Cache, group: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kv = cache.kv
    return torch.randn(kv.batch_size, kv.num_kv_heads * group, kv.head_dim, generator=generator).to(kv.keys.dtype)


def plain_attention_error(
    query: torch.Tensor, cache: Cache, selected: list[list[list[int]]], exact: torch.Tensor
) -> float:
    """Largest error of PyTorch's own attention in the dtype of the cache, head by head over the same tokens.

    What a fast path is held to. It is PyTorch's fused kernel, not a matmul and a softmax, since that is what a user has
    without us (its float32 exponential on a CPU is an approximation good to about 1e-6).
    """
    kv, worst = cache.kv, 0.0
    group = query.shape[1] // kv.num_kv_heads
    for b, length in enumerate(cache.lengths):
        for head in range(query.shape[1]):
            h = head // group
            tokens = [t for t in range(length) if t // kv.page_size in selected[b][h]]
            if not tokens:
                continue
            where = [(int(kv.page_table[b, t // kv.page_size]), t % kv.page_size) for t in tokens]
            keys = torch.stack([kv.keys[p, o, h] for p, o in where])
            values = torch.stack([kv.values[p, o, h] for p, o in where])
            plain = F.scaled_dot_product_attention(
                query[b, head][None, None, None], keys[None, None], values[None, None]
            )
            worst = max(worst, float((plain[0, 0, 0] - exact[b, head]).abs().max()))
    return worst


def assert_like_oracle(cache: Cache, group: int, config: QuestConfig, host_length: int | None = None) -> None:
    """`quest_decode` reads the oracle's pages and is at most twice as far from it as plain PyTorch."""
    kv = cache.kv
    query = query_for(cache, group)
    seq_lens = cache.seq_lens if host_length is None else host_length
    update_page_metadata(kv, seq_lens, seq_lens, backend=config.backend)
    scores = score_pages(query, kv, seq_lens, group_reduction=config.group_reduction, backend=config.backend)
    exact_scores = reference.score_pages(query, kv, cache.lengths, group_reduction=config.group_reduction)
    torch.testing.assert_close(scores.double(), exact_scores, rtol=1e-5, atol=1e-4)
    step = quest_decode(query, kv, seq_lens, config)
    selected = reference.select_pages(
        scores, cache.lengths, config.page_size, config.token_budget, config.num_sink_pages, config.num_recent_pages
    )
    assert as_lists(step.selected.pages) == selected
    assert step.selected.counts.tolist() == [len(row[0]) for row in selected]
    exact, _ = reference.sparse_decode_attention(query, kv, cache.lengths, selected, kv.head_dim**-0.5)
    error = float((step.output.double() - exact).abs().max())
    assert error <= 2 * plain_attention_error(query, cache, selected, exact) + torch.finfo(torch.float32).eps


def as_lists(pages: torch.Tensor) -> list[list[list[int]]]:
    return [[[page for page in head if page >= 0] for head in row] for row in pages.tolist()]

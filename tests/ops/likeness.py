"""How a backend is held to the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from caches import Cache
from quest_attention import QuestConfig, quest_decode, score_pages, update_page_metadata
from quest_attention.config import GroupReduction
from quest_attention.ops import reference

__all__ = ["as_lists", "assert_like_oracle", "assert_scores_like_oracle", "query_for"]


def query_for(cache: Cache, group: int, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """In the dtype of the cache, or in `dtype` where that is in 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    kv = cache.kv
    query = torch.randn(kv.batch_size, kv.num_kv_heads * group, kv.head_dim, generator=generator)
    return query.to(dtype if kv.is_quantised else kv.keys.dtype)


def score_tolerance(query: Tensor, cache: Cache) -> Tensor:
    """How far scores may be from the exact ones, `[B, HKV, P]` float64; anything where there is no finite score.

    A score is computed in float32 whatever the dtype of the cache: 2D products are summed in some order, the scores of
    a group perhaps too, and both factors of a product are rounded where the cache is float64. Each of these n roundings
    is off by at most 2 ** -24 of the sum of the products' magnitudes, as often up as down, so together they go as far
    as a random walk does: sqrt(n) steps (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis,
    2019). Every step is taken for the longest there can be, which is why none of thousands goes so far.
    """
    kv, group = cache.kv, query.shape[1] // cache.kv.num_kv_heads
    roundings = 2 * kv.head_dim + group + 2
    live = torch.arange(kv.max_pages) * kv.page_size < cache.seq_lens[:, None]
    kept = kv.metadata[kv.page_table.masked_fill(~live, 0).long()].double().abs()  # [B, P, HKV, 2, D]
    grouped = query.double().unflatten(1, (kv.num_kv_heads, group))  # [B, HKV, G, D]
    magnitude = kv.form.see(grouped).abs() @ kept.flatten(3).permute(0, 2, 3, 1)  # [B, HKV, G, P]
    if kv.key_scale is not None:
        roundings += 1
        magnitude = magnitude * kv.key_scale.double()[:, None, None]
    return roundings**0.5 * torch.finfo(torch.float32).eps / 2 * magnitude.amax(2)


def assert_scores_like_oracle(
    scores: Tensor,
    query: Tensor,
    cache: Cache,
    *,
    token_mask: Tensor | None = None,
    group_reduction: GroupReduction = "max",
) -> None:
    """Scores are the oracle's but for the rounding of float32; infinite ones are the same."""
    exact = reference.score_pages(query, cache.kv, cache.lengths, token_mask, group_reduction)
    error = (scores.double() - exact).abs()
    is_like = (scores.double() == exact) | (error <= score_tolerance(query, cache))
    assert bool(is_like.all()), f"off by up to {error[~is_like].max():.3g}"


def plain_attention_error(query: Tensor, cache: Cache, selected: list[list[list[int]]], exact: Tensor) -> float:
    """Largest error of PyTorch's own attention in the dtype of the cache, head by head over the same tokens.

    What a fast path is held to. It is PyTorch's fused kernel, not a matmul and a softmax, since that is what a user has
    without us. In float32 it is the worse of the two: each is off by a few roundings, and which has luck differs from
    one processor to the next (the fused kernel's exponential is good to 1e-6 on some, and to 1e-7 on others).
    """
    kv, worst = cache.kv, 0.0
    kinds = [SDPBackend.FLASH_ATTENTION]
    if query.dtype == torch.float32:
        kinds.append(SDPBackend.MATH)
    group = query.shape[1] // kv.num_kv_heads
    for b, length in enumerate(cache.lengths):
        for head in range(query.shape[1]):
            h = head // group
            tokens = [t for t in range(length) if t // kv.page_size in selected[b][h]]
            if not tokens:
                continue
            where = [(int(kv.page_table[b, t // kv.page_size]), t % kv.page_size) for t in tokens]
            keys, values = (torch.stack([stored[p, o, h] for p, o in where]) for stored in (kv.keys, kv.values))
            if kv.key_scale is not None and kv.value_scale is not None:
                key_scale, value_scale = (one.expand(kv.num_kv_heads)[h] for one in (kv.key_scale, kv.value_scale))
                keys, values = keys.float() * key_scale, values.float() * value_scale
            keys, values = keys.to(query.dtype), values.to(query.dtype)
            for kind in kinds:
                with sdpa_kernel(kind):
                    plain = F.scaled_dot_product_attention(
                        query[b, head][None, None, None], keys[None, None], values[None, None]
                    )
                worst = max(worst, float((plain[0, 0, 0] - exact[b, head]).abs().max()))
    return worst


def assert_like_oracle(
    cache: Cache, group: int, config: QuestConfig, host_length: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> None:
    """`quest_decode` reads the oracle's pages and is at most twice as far from it as plain PyTorch."""
    kv = cache.kv
    config = config.resolved(kv.keys.device.type, kv.form.name)
    query = query_for(cache, group, dtype=dtype)
    seq_lens = cache.seq_lens if host_length is None else host_length
    update_page_metadata(kv, seq_lens, seq_lens, backend=config.backend)
    scores = score_pages(query, kv, seq_lens, group_reduction=config.group_reduction, backend=config.backend)
    assert_scores_like_oracle(scores, query, cache, group_reduction=config.group_reduction)
    step = quest_decode(query, kv, seq_lens, config)
    selected = reference.select_pages(
        scores, cache.lengths, config.page_size, config.token_budget, config.num_sink_pages, config.num_recent_pages
    )
    assert as_lists(step.selected.units) == selected
    assert step.selected.counts.tolist() == [[len(head) for head in row] for row in selected]
    exact, _ = reference.sparse_decode_attention(query, kv, cache.lengths, selected, kv.head_dim**-0.5)
    error = float((step.output.double() - exact).abs().max())
    assert error <= 2 * plain_attention_error(query, cache, selected, exact) + torch.finfo(torch.float32).eps


def as_lists(pages: Tensor) -> list[list[list[int]]]:
    return [[[page for page in head if page >= 0] for head in row] for row in pages.tolist()]

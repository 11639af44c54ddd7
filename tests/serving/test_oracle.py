"""What the oracle of a server lets pass as the rounding of float32, and what it does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="runs with make test-vllm, which installs vLLM")

from caches import make_cache
from likeness import query_for
from quest_attention.ops import reference
from vllm_oracle import Oracle

EPS = torch.finfo(torch.float32).eps
GROUP, PAGES = 3, [0, 2, 5]
LENGTH = 82
"""Of the last page two tokens: PyTorch's vectors of 16 floats leave them over."""


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_float32_may_be_off_by_its_exponentials_and_not_by_what_bfloat16_would(seed: int, has_sinks: bool) -> None:
    cache = make_cache([LENGTH], dim=64, page_size=16, seed=seed)
    kv, query = cache.kv, 2 * query_for(cache, GROUP, seed)
    heads = query.shape[1]
    impl = SimpleNamespace(scale=64**-0.5, _softcap=None, sinks=torch.randn(heads) if has_sinks else None)
    chosen = [[PAGES] * kv.num_kv_heads]
    exact, lse = reference.sparse_decode_attention(query, kv, [LENGTH], chosen, impl.scale, sinks=impl.sinks)
    allowed = 2 * Oracle._plain_error(query, kv, [LENGTH], chosen, 16, exact, impl)

    tokens = torch.cat([torch.arange(16) + 16 * page for page in PAGES])
    tokens = tokens[tokens < LENGTH]
    where = kv.page_table[0, tokens // 16].long(), tokens % 16
    keys, values = (part[where].transpose(0, 1).double().repeat_interleave(GROUP, 0) for part in (kv.keys, kv.values))
    weights = torch.exp((keys @ query[0, :, :, None].double())[..., 0] * impl.scale - lse[0, :, None])  # [HQ, T]
    rest = 1 - weights.sum(-1, keepdim=True)  # the sinks'

    def error(weights: torch.Tensor) -> float:
        output = (weights[:, None] @ values)[:, 0] / (weights.sum(-1, keepdim=True) + rest)
        return float((output - exact[0]).abs().max())

    # As unlucky as PyTorch's exponentials can be in some channel of each head: 20 units in the last place.
    apart = values - exact[0, :, None]  # [HQ, T, D]
    worst = (weights[:, None] @ apart.abs()).argmax(-1)[:, 0]
    signs = apart.gather(2, worst[:, None, None].expand(-1, len(tokens), 1))[..., 0].sign()
    assert error(weights) < EPS < error(weights * (1 + 20 * EPS * signs)) <= allowed
    assert allowed < error(weights.bfloat16().double()) / 100
    assert allowed < error(weights * (1 + 1e-4 * signs))

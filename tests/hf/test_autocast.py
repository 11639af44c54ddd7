"""Under `torch.autocast` keys and values come in different dtypes, which may change from step to step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from quest_attention import QuestCache, enable_quest, quest_decode
from quest_attention.hf import QuestLayer, cache_argument
from tiny import LARGE, SMALL, generate, make_llama, prompt

NEW = 12


def without_rotation(model: Any) -> None:
    """Rotary embeddings leave keys in float32; without them autocast's keys are as narrow as its values."""

    class Still(nn.Module):
        def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            shape = (*position_ids.shape, 8)
            narrow = {"dtype": torch.bfloat16, "device": hidden.device}
            return torch.ones(shape, **narrow), torch.zeros(shape, **narrow)

    model.model.rotary_emb = Still()


def step_by_step(model: Any, cache: Cache, ids: Tensor, autocast: list[bool]) -> list[Tensor]:
    """Logits of a prefill and of decode steps of given tokens, each under autocast or not."""
    logits = []
    passes = [ids[:, : 1 - len(autocast)], *ids[:, 1 - len(autocast) :].split(1, dim=1)]
    for tokens, is_on in zip(passes, autocast, strict=True):
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            logits.append(model(tokens, **cache_argument(cache)).logits)
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(
    "autocast",
    [[True] * NEW, [False] + [True] * (NEW - 1), [True] + [False] * (NEW - 1), [True, False, True] * (NEW // 3)],
    ids=["always", "for decoding", "for the prompt", "in turn"],
)
def test_within_the_budget_it_is_the_model_alone(autocast: list[bool], rotates: bool, attention: str) -> None:
    model, ids = make_llama(), prompt(length=60)
    model.set_attn_implementation(attention)
    if not rotates:
        without_rotation(model)
    stock = step_by_step(model, DynamicCache(config=model.config), ids, autocast)
    with enable_quest(model, LARGE) as quest:
        ours = step_by_step(model, quest.make_cache(), ids, autocast)
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    with enable_quest(model, SMALL) as quest:
        sparse = step_by_step(model, quest.make_cache(), ids, autocast)
        assert quest.counters.sparse_steps == 2 * (NEW - 1)
    assert all(logits.isfinite().all() for logits in sparse)
    assert [logits.dtype for logits in sparse] == [logits.dtype for logits in stock]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generate_under_autocast(dtype: torch.dtype) -> None:
    model, ids = make_llama(), prompt(batch=2, length=60)
    ids[0, :7] = 0
    options: dict[str, Any] = {"attention_mask": (ids != 0).long()}
    with torch.autocast("cpu", dtype=dtype):
        stock = generate(model, ids, **options)
        with enable_quest(model, LARGE):
            assert torch.equal(generate(model, ids, **options), stock)
        with enable_quest(model, SMALL) as quest:
            generate(model, ids, **options)
            assert quest.counters.sparse_steps > 0
            assert quest.counters.bypassed_steps == 0


def test_scores_are_not_rounded() -> None:
    model, ids = make_llama(), prompt(length=200)
    compared = 0
    with enable_quest(model, SMALL) as quest:
        cache = quest.make_cache()

        def compare(index: int, selection: Any, query: Tensor, keys: Tensor, **_: Any) -> None:
            nonlocal compared
            layer = cache.layers[index]
            assert isinstance(layer, QuestLayer)
            with torch.autocast("cpu", enabled=False):
                exact = quest_decode(query[:, :, 0], layer.paged, keys.shape[2], SMALL)
            assert torch.equal(selection.units, exact.selected.units)
            compared += 1

        for layer in cache.layers:
            assert isinstance(layer, QuestLayer)
            layer.on_read = compare
        step_by_step(model, cache, ids, [True] * 60)
    assert compared == 2 * 59


def test_a_cache_of_ones_own_outlives_autocast() -> None:
    model, ids = make_llama(), prompt(length=60)
    without_rotation(model)
    with enable_quest(model, SMALL):
        cache = QuestCache(model.config, SMALL)
        step_by_step(model, cache, ids[:, :58], [True, True])
        assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}
        step_by_step(model, cache, ids[:, 57:], [False, False])
        assert {layer.keys.dtype for layer in cache.layers} == {torch.float32}

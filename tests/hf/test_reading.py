"""What a pass reads is said where its tokens are written, and is what attention then goes by."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from families import FAMILIES, build
from quest_attention import UnsupportedModelError, enable_quest
from quest_attention.eval.methods import make_method
from quest_attention.hf import attention, cache_argument
from quest_attention.hf.attention import SDPA_NAME
from quest_attention.hf.reading import Reading
from tiny import PAGE_SIZE, SMALL, make_llama, prompt, quest_layers

BUDGET = SMALL.token_budget
SEVERAL, WITHIN, DENSE, SPARSE, _ = Reading
ALL_SEVERAL, ALL_WITHIN, STEP = [SEVERAL] * 3, [WITHIN] * 3, [DENSE, SPARSE, SPARSE]
"""Of the three layers of the tiny Llama, the first of which is dense."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Reading]:
    """What the layers say at each call of the attention function, in its order."""
    found: list[Reading] = []
    attend: Any = attention._attend

    def watched(dense: Any, module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = getattr(key, attention.LAYER_ATTRIBUTE, None)
        if layer is not None:
            found.append(layer.reading)
        return attend(dense, module, query, key, *args, **kwargs)

    monkeypatch.setattr(attention, "_attend", watched)
    return found


def run(model: Any, cache: Any, count: int, seen: list[Reading]) -> list[Reading]:
    """A pass of so many tokens, and what its layers said."""
    seen.clear()
    with torch.inference_mode():
        model(prompt(length=count), **cache_argument(cache))
    return list(seen)


def test_from_a_prompt_of_one_token_past_the_budget(seen: list[Reading]) -> None:
    model = make_llama()
    with enable_quest(model, SMALL) as quest:
        cache = quest.make_cache()
        for _ in range(BUDGET):
            assert run(model, cache, 1, seen) == ALL_WITHIN
        assert run(model, cache, 1, seen) == STEP
        counted = quest.counters.to_dict()["layers"]
    assert [layer["dense_steps"] for layer in counted] == [
        {"within budget": BUDGET, "dense layer": 1},
        {"within budget": BUDGET},
        {"within budget": BUDGET},
    ]
    assert [layer["sparse_steps"] for layer in counted] == [0, 1, 1]


def test_prompts_drafts_and_what_is_taken_back(seen: list[Reading]) -> None:
    model = make_llama()
    with enable_quest(model, SMALL) as quest:
        cache = quest.make_cache()
        assert run(model, cache, BUDGET - 1, seen) == ALL_SEVERAL
        assert run(model, cache, 1, seen) == ALL_WITHIN
        assert run(model, cache, 4, seen) == ALL_SEVERAL, "drafts to verify, past the budget"
        assert run(model, cache, 1, seen) == STEP
        cache.crop(-5)
        assert run(model, cache, 1, seen) == STEP
        cache.crop(-2)
        assert run(model, cache, 1, seen) == ALL_WITHIN
        cache.reset()
        assert run(model, cache, 1, seen) == ALL_WITHIN


def test_caches_in_turn(seen: list[Reading]) -> None:
    model = make_llama()
    with enable_quest(model, SMALL) as quest:
        short, long = quest.make_cache(), quest.make_cache()
        run(model, short, 5, seen)
        run(model, long, 60, seen)
        for _ in range(2):
            assert run(model, short, 1, seen) == ALL_WITHIN
            assert run(model, long, 1, seen) == STEP


def test_layers_that_share_the_keys_of_another(seen: list[Reading]) -> None:
    """They write nothing, and go by what the layer says whose keys they are given."""
    model = build(FAMILIES["gemma3n"])
    with enable_quest(model, dataclasses.replace(SMALL, num_dense_layers=0)) as quest:
        cache = quest.make_cache()
        assert len(quest_layers(cache)) == 1, "the second shares its keys"
        assert run(model, cache, 1, seen) == [WITHIN] * 2
        assert run(model, cache, 60, seen) == [SEVERAL] * 2
        assert run(model, cache, 1, seen) == [SPARSE] * 2
        assert quest.counters.sparse_steps == quest.counters.dense_steps == 2


@pytest.mark.parametrize("method", ["oracle", "token_oracle", "streaming_llm", "h2o"])
def test_the_methods_of_the_evaluation_go_by_it(method: str, seen: list[Reading]) -> None:
    options: dict[str, Any] = {"page_size": PAGE_SIZE} if method == "oracle" else {}
    made = make_method(method, token_budget=BUDGET, num_dense_layers=1, **options)
    model = make_llama()
    with made.session(model) as session:
        readers = [index for index, layer in enumerate(session.cache.layers) if hasattr(layer, "attend")]
        assert readers == [1, 2]
        for count, reading in ((1, WITHIN), (BUDGET - 2, SEVERAL), (1, WITHIN), (1, SPARSE)):
            assert run(model, session.cache, count, seen)[-2:] == [reading] * 2
        if method == "oracle":
            assert run(model, session.cache, 4, seen)[-2:] == [SEVERAL] * 2
        assert all(reads.is_sparse for reads in session.reads()[1:])


def test_queries_that_are_not_of_the_tokens_written() -> None:
    """Fewer read what the pass reads; more than the one token of a step are refused."""
    model: Any = make_llama()
    with enable_quest(model, SMALL) as quest, torch.inference_mode():
        attend: Any = AttentionInterface()[SDPA_NAME]
        module, cache = model.model.layers[1].self_attn, quest.make_cache()
        written, queries = torch.randn(2, 1, 2, 61, 8), torch.randn(1, 4, 61, 8)
        keys, values = cache.update(*written[:, :, :, :60], 1)
        every, _ = attend(module, queries[:, :, :60], keys, values, None, scaling=0.3)
        last, _ = attend(module, queries[:, :, 59:60], keys, values, None, scaling=0.3, is_causal=False)
        torch.testing.assert_close(last, every[:, -1:])
        assert quest.counters.sparse_steps == quest.counters.dense_steps == 0
        keys, values = cache.update(*written[:, :, :, 60:], 1)
        with pytest.raises(UnsupportedModelError, match="query: got 2 tokens, expected 1"):
            attend(module, queries[:, :, :2], keys, values, None, scaling=0.3)
        attend(module, queries[:, :, :1], keys, values, None, scaling=0.3)
        assert quest.counters.sparse_steps == 1

"""`enable_quest`: what it changes, that it undoes all of it, and what it refuses."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from quest_attention import (
    BackendError,
    QuestCache,
    QuestConfig,
    QuestStateError,
    QuestValueError,
    QuestWarning,
    UnsupportedModelError,
    enable_quest,
)
from quest_attention.hf import cache_argument
from quest_attention.hf.naming import CACHE
from quest_attention.ops import dispatch
from tiny import LARGE, SMALL, generate, make_llama, prompt


def snapshot(model: LlamaForCausalLM) -> tuple[Any, ...]:
    """What a user could see of a model's state."""
    return (
        {name for name in model.__dict__ if not name.startswith("__")},
        id(model.config),
        model.config.to_dict(),
        model.config._attn_implementation,
        model.generation_config.to_dict(),
        [id(module.config) for module in model.modules() if hasattr(module, "config")],
    )


def test_it_undoes_itself() -> None:
    model, ids = make_llama(), prompt()
    before, stock = snapshot(model), generate(model, ids)
    for _ in range(2):
        with enable_quest(model, SMALL) as quest:
            generate(model, ids)
            assert quest.is_enabled
            assert quest.counters.sparse_steps > 0
        assert not quest.is_enabled
        assert snapshot(model) == before
    assert torch.equal(generate(model, ids), stock)
    assert not isinstance(model(ids)[CACHE], QuestCache)


def test_it_undoes_itself_after_an_error() -> None:
    model = make_llama()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), enable_quest(model, SMALL):
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_without_a_with_statement() -> None:
    model = make_llama()
    before = snapshot(model)
    quest = enable_quest(model)
    assert quest.config == QuestConfig().resolved("cpu") and quest.config.metadata == "moments"
    quest.disable()
    quest.disable()
    assert snapshot(model) == before


def test_a_model_of_the_same_configuration_is_left_alone() -> None:
    first = make_llama()
    second = LlamaForCausalLM(first.config).eval()
    ids = prompt()
    stock = generate(second, ids)
    with enable_quest(first, SMALL) as quest:
        assert second.config._attn_implementation == "sdpa"
        assert torch.equal(generate(second, ids), stock)
        assert quest.counters.sparse_steps == 0
    assert first.config is second.config


def test_counters_say_what_was_read() -> None:
    model, ids = make_llama(), prompt(length=64)
    with enable_quest(model, SMALL) as quest:
        generate(model, ids, new=5)
        counters = quest.counters
        dense, first, second = counters.layers
        assert (dense.kind, first.kind, second.kind) == ("dense", "quest", "quest")
        assert dense.dense_steps_by_reason == {"dense layer": 4}
        assert (first.sparse_steps, first.dense_steps, first.prefill_tokens) == (4, 0, 64)
        assert first.pages_held == second.pages_held == 17 * 4
        assert first.pages_read == second.pages_read == 6 * 4
        assert counters.share_read == pytest.approx((17 + 6 + 6) / (17 * 3))
        assert counters.bypassed_steps == 0
        assert "35.3%" in counters.summary()
        assert counters.to_dict()["layers"][1]["pages_read"] == 24
        counters.reset()
        assert counters.sparse_steps == 0
        assert counters.share_read == 1.0


def test_counters_of_a_padded_batch() -> None:
    model, ids = make_llama(), prompt(batch=2, length=64)
    ids[0, :44] = 0  # 20 tokens on 5 pages: within the budget of 24 tokens until four more
    with enable_quest(model, SMALL) as quest:
        generate(model, ids, new=3, attention_mask=(ids != 0).long())
        assert quest.counters.layers[1].pages_read == (6 + 6) + (6 + 6)
        assert quest.counters.layers[1].pages_held == 17 * 2 * 2


@pytest.mark.parametrize("model", [None, "a path", nn.Linear(2, 2)])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model: got .*, expected a transformers PreTrainedModel"):
        enable_quest(model, SMALL)


def test_a_wrong_config_and_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make_llama()
    with pytest.raises(QuestValueError, match="config"):
        enable_quest(model, {"token_budget": 5})  # type: ignore[arg-type]
    with enable_quest(model, SMALL) as quest:
        with pytest.raises(QuestStateError, match="enabled on this model already"):
            enable_quest(model, SMALL)
        assert quest.is_enabled
    monkeypatch.setattr(dispatch, "_why_no_triton", lambda kind: f"no kernels for {kind}")
    with pytest.raises(BackendError, match="no kernels for cpu"):
        enable_quest(model, QuestConfig(backend="triton"))
    assert model.config._attn_implementation == "sdpa"


def test_continuous_batching_is_refused() -> None:
    model: Any = make_llama()
    with enable_quest(model, SMALL):
        for method in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
            with pytest.raises(UnsupportedModelError, match="generate_batch"):
                getattr(model, method)([[1, 2, 3]])
    assert "generate_batch" not in model.__dict__


def test_caches_that_would_make_it_dense_in_silence() -> None:
    model, ids = make_llama(), prompt()
    stock = generate(model, ids)
    with enable_quest(model, SMALL) as quest:
        with pytest.warns(QuestWarning, match="was given a DynamicCache"):
            assert torch.equal(generate(model, ids, **cache_argument(DynamicCache(config=model.config))), stock)
        with pytest.warns(QuestWarning, match="use_cache=False"):
            assert torch.equal(generate(model, ids, use_cache=False), stock)
        with pytest.raises(QuestValueError, match="cache_implementation: got 'static'"):
            generate(model, ids, cache_implementation="static")
        assert quest.counters.sparse_steps == 0


def test_a_cache_that_the_model_made_itself_is_warned_of_once() -> None:
    model, ids = make_llama(), prompt()
    with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with enable_quest(model, SMALL) as quest:
            cache = model(ids[:, :20])[CACHE]  # the model makes a cache of transformers' own
            model(ids[:, 20:21], **cache_argument(cache))  # within the budget
            assert not caught
            for at in range(21, 40):
                model(ids[:, at : at + 1], **cache_argument(cache))
            assert quest.counters.sparse_steps == 0
        model(ids[:, 40:41], **cache_argument(cache))  # nobody's business any more
    (warned,) = caught
    assert warned.category is QuestWarning and warned.filename == __file__
    assert "given a DynamicCache" in str(warned.message) and "make_cache()" in str(warned.message)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("by_position", [False, True])
def test_a_decode_step_of_embeddings_or_by_position_is_warned_of_too(by_position: bool) -> None:
    model, ids = make_llama(), prompt()
    with torch.inference_mode(), enable_quest(model, SMALL):
        cache = model(ids[:, :40])[CACHE]
        embeds = model.get_input_embeddings()(ids[:, 40:41])
        args = (ids[:, 40:41], None, None, cache) if by_position else (None,)
        kwargs = {} if by_position else {"inputs_embeds": embeds, **cache_argument(cache)}
        with pytest.warns(QuestWarning, match="given a DynamicCache"):
            model(*args, **kwargs)


def test_every_layer_dense_is_warned_of() -> None:
    model, ids = make_llama(), prompt()
    with pytest.warns(QuestWarning, match="num_dense_layers=3 leaves no layer"):
        quest = enable_quest(model, QuestConfig(token_budget=24, page_size=4, num_dense_layers=3))
    with quest:
        stock = generate(make_llama(), ids)
        assert torch.equal(generate(model, ids), stock)
        assert quest.counters.sparse_steps == 0


def test_masks_that_bounds_cannot_see() -> None:
    model, ids = make_llama(), prompt()
    with enable_quest(model, SMALL) as quest, torch.inference_mode():
        cache = quest.make_cache()
        model(ids, **cache_argument(cache))
        bias = torch.zeros(1, 1, 1, 61)
        bias[..., 3] = -1.5
        with pytest.raises(QuestValueError, match="bounds see no bias"):
            model(ids[:, :1], attention_mask=bias, **cache_argument(cache))
        cache.crop(-1)
        mask = torch.zeros(1, 1, 1, 61)
        mask[..., :8] = torch.finfo(torch.float32).min
        by_bias = model(ids[:, :1], attention_mask=mask, **cache_argument(cache)).logits
        cache.crop(-1)
        by_bool = model(ids[:, :1], attention_mask=mask == 0, **cache_argument(cache)).logits
        torch.testing.assert_close(by_bias, by_bool, rtol=0, atol=0)


def test_a_model_that_was_eager_stays_eager() -> None:
    model, ids = make_llama(), prompt()
    model.set_attn_implementation("eager")
    stock = generate(model, ids)
    with enable_quest(model, LARGE):
        assert torch.equal(generate(model, ids), stock)
    with enable_quest(model, SMALL) as quest:
        generate(model, ids)
        assert quest.counters.sparse_steps > 0
    assert model.config._attn_implementation == "eager"


@pytest.mark.filterwarnings("ignore:a QuestCache is in use but its keys:quest_attention.QuestWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_key_shows_as_in_dense_attention(bad: float) -> None:
    model, ids = make_llama(), prompt()
    with enable_quest(model, SMALL) as quest, torch.inference_mode():
        cache = quest.make_cache()
        model(ids, **cache_argument(cache))
        keys = torch.zeros(1, 2, 1, 8)
        keys[0, 0, 0, 0] = bad
        for layer in range(3):
            cache.update(keys, torch.ones_like(keys), layer)
        logits = model(ids[:, :1], **cache_argument(cache)).logits
        assert quest.counters.sparse_steps == 2
        assert logits.isnan().all()


def test_dropout_is_refused() -> None:
    model, ids = make_llama(attention_dropout=0.5), prompt()
    with enable_quest(model, SMALL) as quest:
        generate(model, ids, new=2)
        assert quest.counters.sparse_steps > 0
        model.train()
        with pytest.raises(UnsupportedModelError, match=r"dropout: got 0\.5"):
            generate(model, ids, new=2)


def test_a_quest_cache_on_a_model_without_quest_is_warned_of() -> None:
    model, ids = make_llama(), prompt()
    cache = QuestCache(model.config, SMALL)
    with torch.inference_mode():
        model(ids, **cache_argument(cache))
        model(ids[:, :1], **cache_argument(cache))
        with pytest.warns(QuestWarning, match="do not reach Quest's attention"):
            model(ids[:, :1], **cache_argument(cache))
    assert cache.counters.bypassed_steps == 2 * 3
    assert cache.counters.sparse_steps == 0

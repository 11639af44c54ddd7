"""The support table of docs/transformers.md, family by family."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from families import BASE, FAMILIES, IS_GPTJ_SERVED, LATENT, Family, build, build_refused
from quest_attention import QuestCache, QuestWarning, UnsupportedModelError, enable_quest
from quest_attention.hf import QuestLayer, layer_kinds
from tiny import LARGE, SMALL, generate, logits_of_steps, prompt

NEW = 6


@pytest.mark.parametrize("name", FAMILIES)
def test_what_runs_quest(name: str) -> None:
    family = FAMILIES[name]
    small, large = (dataclasses.replace(each, num_dense_layers=family.num_dense_layers) for each in (SMALL, LARGE))
    model = build(family)
    assert tuple(layer_kinds(model.config, small).values()) == family.kinds
    cache = QuestCache(model.config, small)
    replaced = [isinstance(layer, QuestLayer) for layer in cache.layers]
    assert sum(replaced) == sum(kind in ("quest", "dense") for kind in family.kinds)

    ids = prompt(batch=2, length=50)
    if family.eager:
        model.set_attn_implementation("eager")  # 5.17 gives Gemma 2 sdpa by default, which drops its softcap
    stock = generate(model, ids, new=NEW)
    model = build(family)  # with its default attention, which Quest must not trust
    with enable_quest(model, large) as quest:
        assert torch.equal(generate(model, ids, new=NEW), stock)
        assert quest.counters.dense_steps > 0
        assert quest.counters.sparse_steps == 0

    ours, counters = logits_of_steps(model, ids, small, NEW)
    for layer in counters.layers:
        if layer.kind == "quest":
            assert layer.sparse_steps >= NEW - 1
            assert 0 < layer.pages_read < layer.pages_held
        else:
            assert layer.sparse_steps == 0
    assert counters.bypassed_steps == 0
    oracle, _ = logits_of_steps(model, ids, dataclasses.replace(small, backend="reference"), NEW)
    torch.testing.assert_close(ours, oracle, rtol=1e-3, atol=1e-3)
    dense, _ = logits_of_steps(model, ids, large, NEW)
    assert not torch.allclose(ours, dense, rtol=1e-3, atol=1e-3), "something was left out"


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_softcap_and_sinks_with_padding(name: str) -> None:
    model = build(FAMILIES[name])
    ids = prompt(batch=2, length=50)
    ids[0, :13] = 0
    ours, counters = logits_of_steps(model, ids, SMALL, NEW)
    assert counters.sparse_steps > 0
    oracle, _ = logits_of_steps(model, ids, dataclasses.replace(SMALL, backend="reference"), NEW)
    torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("eager")
    mask = (ids != 0).long()
    stock = generate(model, ids, new=NEW, attention_mask=mask)
    with enable_quest(model, LARGE):
        assert torch.equal(generate(model, ids, new=NEW, attention_mask=mask), stock)


def test_the_softcap_is_felt() -> None:
    """With the cap taken away the same weights give other logits under Quest: it is not dropped on the way."""
    family = FAMILIES["gemma2"]
    ids = prompt(length=50)
    capped, counters = logits_of_steps(build(family), ids, SMALL, NEW)
    assert counters.sparse_steps > 0
    free = dataclasses.replace(family, options=family.options | {"attn_logit_softcapping": 1e6})
    uncapped, _ = logits_of_steps(build(free), ids, SMALL, NEW)
    assert not torch.allclose(capped, uncapped, atol=1e-3)


def test_latent_attention_runs_dense_and_says_so() -> None:
    model = build(Family("DeepseekV3", (), LATENT))
    ids = prompt(batch=2, length=50)
    stock = generate(model, ids, new=NEW)
    with pytest.warns(QuestWarning, match="rebuilds its keys from a latent cache"):
        quest = enable_quest(model, SMALL)
    with quest:
        assert torch.equal(generate(model, ids, new=NEW), stock)
        assert quest.counters.sparse_steps == 0
        assert {layer.kind for layer in quest.counters.layers} == {"latent"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mistral_windowed", "all of this one's are windowed"),
        ("deepseek_v32", "selects tokens with an indexer"),
        ("falcon", "no such seam"),
        pytest.param("gptj", "no such seam", marks=pytest.mark.skipif(IS_GPTJ_SERVED, reason="served here")),
        ("bloom", "no such seam"),
        ("mpt", "no such seam"),
        ("mamba", "(no such seam|state of its own|has none)"),
        ("rwkv", "(no such seam|state of its own|has none)"),
        ("t5", "decoder-only"),
        ("bart", "decoder-only"),
    ],
)
def test_what_is_refused(name: str, reason: str) -> None:
    model = build_refused(name)
    before = set(model.__dict__)
    implementation = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        enable_quest(model, SMALL)
    assert f"got {type(model).__name__}, expected" in str(caught.value)
    assert set(model.__dict__) == before
    assert model.config._attn_implementation == implementation


def test_a_model_without_a_head() -> None:
    with pytest.raises(UnsupportedModelError, match="language-model head"):
        enable_quest(LlamaModel(LlamaConfig(**BASE)), SMALL)

"""`generate()` where exact keys rank the tokens of some pages: the model's own within the budget, then the oracle's."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from families import FAMILIES, Family, build
from quest_attention import QuestCache, QuestConfig, QuestValueError, enable_quest
from quest_attention.config import Metadata
from quest_attention.hf import cache_argument, layer_kinds
from tiny import LARGE, PAGE_SIZE, SMALL, generate, logits_of_steps, make_llama, prompt
from ways import WAYS, tokens_of

BY_TOKEN = dataclasses.replace(SMALL, metadata="moments", selection_unit="token", candidate_factor=1)


@pytest.mark.parametrize("way", WAYS)
def test_within_the_budget_it_is_the_model_itself_and_past_it_the_oracle(way: str) -> None:
    model = make_llama()
    stock = tokens_of(model, way)
    with enable_quest(model, dataclasses.replace(LARGE, metadata="moments", selection_unit="token")) as quest:
        assert torch.equal(tokens_of(model, way), stock)
        assert quest.counters.dense_steps > 0 == quest.counters.sparse_steps
    with enable_quest(model, BY_TOKEN) as quest:
        ours = tokens_of(model, way)
        assert quest.counters.sparse_steps > 0
    if way in ("greedy", "padded"):
        with enable_quest(model, dataclasses.replace(BY_TOKEN, backend="reference")):
            assert torch.equal(tokens_of(model, way), ours)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_families(family: Family) -> None:
    """Past the budget logits are the oracle's, with whatever softcap and sinks the family has."""
    config = dataclasses.replace(BY_TOKEN, num_dense_layers=family.num_dense_layers)
    model, ids = build(family), prompt(batch=2, length=50)
    ours, counters = logits_of_steps(model, ids, config, new=3)
    assert {layer.layer for layer in counters.layers if layer.sparse_steps} == {
        index for index, kind in layer_kinds(model.config, config).items() if kind == "quest"
    }
    exact, _ = logits_of_steps(model, ids, dataclasses.replace(config, backend="reference"), new=3)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metadata", ["bounds", "moments"])
@pytest.mark.parametrize("factor", [1, 2])
def test_tokens_attended_to_and_keys_that_rank_them_are_counted(metadata: Metadata, factor: int) -> None:
    model = make_llama()
    config = dataclasses.replace(BY_TOKEN, metadata=metadata, candidate_factor=factor)
    with enable_quest(model, config) as quest:
        generate(model, prompt(2, 60), new=5)
        layer = quest.counters.layers[-1]
    steps = layer.sparse_steps
    assert steps == 4
    assert layer.tokens_read == 2 * steps * config.token_budget
    assert layer.keys_read == 2 * steps * config.candidate_pages * PAGE_SIZE > layer.tokens_read
    dense = quest.counters.layers[0]
    assert dense.keys_read == dense.tokens_read == dense.tokens_held
    assert (
        quest.counters.to_dict()["keys_read"]
        == quest.counters.keys_read
        == sum(layer.keys_read for layer in quest.counters.layers)
    )


def test_where_no_keys_rank_tokens_those_read_are_the_tokens_read() -> None:
    model = make_llama()
    with enable_quest(model, SMALL) as quest:
        generate(model, prompt(1, 60), new=5)
    assert quest.counters.keys_read == quest.counters.tokens_read
    assert "keys_read" not in quest.counters.to_dict()


def test_auto_is_a_form_when_quest_is_enabled() -> None:
    model, auto = make_llama(), QuestConfig(24, PAGE_SIZE, 1, metadata="auto")
    with enable_quest(model, auto) as quest:
        assert quest.config == auto.resolved("cpu") and quest.config.metadata == "moments"
        made = generate(model, prompt())
        assert quest.make_cache().quest == quest.config
        assert quest.counters.layers[-1].unit_size == PAGE_SIZE and quest.counters.sparse_steps > 0
    with enable_quest(model, auto.resolved("cpu")):
        assert torch.equal(generate(model, prompt()), made)
    with pytest.raises(QuestValueError, match=r'2 forced pages of 4 tokens; metadata "auto" is moments on cpu$'):
        # By bounds, which a GPU's list comes to, one page is enough.
        enable_quest(model, QuestConfig(4, PAGE_SIZE, 1, metadata="auto", group_reduction="mean"))
    assert not hasattr(model, "_quest_handle")


def test_a_cache_of_ones_own_with_auto_has_a_form_once_there_are_tokens() -> None:
    model, auto = make_llama(), QuestConfig(24, PAGE_SIZE, 1, metadata="auto", selection_unit="token")
    cache = QuestCache(model.config, auto)
    assert cache.quest == auto and cache.counters.metadata == "auto"
    with enable_quest(model, auto) as quest:
        made = generate(model, prompt(), **cache_argument(cache))
        assert cache.quest == quest.config == auto.resolved("cpu")
        assert cache.counters.metadata == "moments" and cache.counters.pages_read is None
        assert torch.equal(generate(model, prompt()), made)
        assert cache.counters.to_dict() == quest.counters.to_dict()
    read = quest.counters.tokens_read, sum(layer.keys_read for layer in quest.counters.layers)
    assert read[0] < read[1]
    said = "values of {} tokens were read, and keys of {}, to rank them".format(*read)
    assert f"sparse steps chose by moments\n{said}" in quest.counters.summary()

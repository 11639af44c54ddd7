"""`output_attentions`: given as transformers gives it, and refused where a step reads some pages only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quest_attention import QuestConfig, QuestValueError, QuestWarning, enable_quest
from quest_attention.hf import cache_argument
from quest_attention.hf.naming import CACHE
from tiny import LARGE, PAGE_SIZE, SMALL, generate, make_llama, prompt


@pytest.fixture
def model() -> Any:
    made = make_llama(layers=6)
    made.set_attn_implementation("eager")
    return made


def of_generate(model: Any, **options: Any) -> list[list[torch.Tensor]]:
    made: Any = generate(model, prompt(), new=4, output_attentions=True, return_dict_in_generate=True, **options)
    return [list(step) for step in made.attentions]


def test_within_the_budget_they_are_the_models(model: Any) -> None:
    stock = of_generate(model)
    with enable_quest(model, LARGE):
        ours = of_generate(model)
    assert [len(step) for step in ours] == [6] * 4
    for mine, theirs in zip(ours, stock, strict=True):
        for first, second in zip(mine, theirs, strict=True):
            assert torch.equal(first, second)


def test_past_the_budget_they_are_refused_before_anything_is_written(model: Any) -> None:
    ids = prompt()
    with enable_quest(model, SMALL) as quest, torch.inference_mode():
        with pytest.raises(QuestValueError, match="output_attentions: got True, expected False in a decode step"):
            of_generate(model)
        cache = quest.make_cache()
        assert len(model(ids, output_attentions=True, **cache_argument(cache)).attentions) == 6
        expected = model(ids, use_cache=False).logits[:, -1:]
        assert expected.isfinite().all()
        with pytest.raises(QuestValueError, match="output_attentions"):
            model(ids[:, :1], output_attentions=True, **cache_argument(cache))
        assert {layer.get_seq_length() for layer in cache.layers} == {60}
        with pytest.raises(QuestValueError, match="output_attentions"):
            model.model(ids[:, :1], output_attentions=True, **cache_argument(cache))
        assert quest.counters.sparse_steps == 0


def test_asked_for_by_the_configuration(model: Any) -> None:
    model.config.output_attentions = True
    ids = prompt()
    with enable_quest(model, SMALL) as quest, torch.inference_mode():
        cache = quest.make_cache()
        assert len(model(ids, **cache_argument(cache)).attentions) == 6
        with pytest.raises(QuestValueError, match="output_attentions"):
            model(ids[:, :1], **cache_argument(cache))
        model(ids[:, :1], output_attentions=False, **cache_argument(cache))
        assert quest.counters.sparse_steps == 5


def test_a_model_whose_layers_are_all_dense_gives_them(model: Any) -> None:
    config = QuestConfig(token_budget=24, page_size=PAGE_SIZE, num_dense_layers=6)
    with pytest.warns(QuestWarning, match="leaves no layer"):
        quest = enable_quest(model, config)
    with quest:
        assert [len(step) for step in of_generate(model)] == [6] * 4


def test_another_cache_than_quests_gives_them(model: Any) -> None:
    ids = prompt()
    with enable_quest(model, SMALL), torch.inference_mode():
        cache = model(ids)[CACHE]
        with pytest.warns(QuestWarning, match="was given a DynamicCache"):
            assert len(model(ids[:, :1], output_attentions=True, **cache_argument(cache)).attentions) == 6

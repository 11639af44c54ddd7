"""`num_dense_layers` is a rank among full-attention layers, whatever stands before and between them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from families import FAMILIES, build
from quest_attention import QuestConfig, QuestValueError, QuestWarning, enable_quest
from quest_attention.eval.context import read_context
from quest_attention.eval.demo import check_fits
from quest_attention.eval.methods import make_method
from quest_attention.hf import QuestLayer, layer_kinds
from tiny import SMALL, make_llama, prompt

FULL_LAYERS = {"llama": [0, 1, 2, 3], "gemma3": [1, 3], "llama4": [1, 3], "qwen3_next": [1, 3], "lfm2": [1, 3]}
"""Indices of the full-attention layers of models that begin with one, a window, a chunk, a state, a convolution."""


@pytest.mark.parametrize("num_dense_layers", [0, 1, 2])
@pytest.mark.parametrize("family", FULL_LAYERS)
def test_the_first_full_attention_layers_are_dense(family: str, num_dense_layers: int) -> None:
    config = dataclasses.replace(SMALL, num_dense_layers=num_dense_layers)
    model: Any = build(FAMILIES[family])
    full = FULL_LAYERS[family]
    kinds = layer_kinds(model.config, config)
    assert [index for index, kind in kinds.items() if kind == "dense"] == full[:num_dense_layers]
    assert [index for index, kind in kinds.items() if kind == "quest"] == full[num_dense_layers:]
    if full == full[:num_dense_layers]:
        with pytest.warns(QuestWarning, match=f"num_dense_layers={num_dense_layers} leaves no layer of .* to Quest"):
            quest = enable_quest(model, config)
    else:
        quest = enable_quest(model, config)
    with quest:
        model.generate(prompt(length=50), min_new_tokens=5, max_new_tokens=5, do_sample=False, pad_token_id=0)
        steps = {counter.layer: counter for counter in quest.counters.layers}
    for rank, index in enumerate(full):
        dense = steps[index].dense_steps_by_reason.get("dense layer", 0)
        assert (dense, steps[index].sparse_steps) == ((4, 0) if rank < num_dense_layers else (0, 4))


@pytest.mark.parametrize("method", ["quest", "oracle", "token_oracle", "streaming_llm", "snapkv"])
@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
def test_the_evaluation_leaves_the_same_layers_dense(family: str, method: str) -> None:
    model: Any = build(FAMILIES[family])
    made = make_method(method, token_budget=16, num_dense_layers=1, page_size=4)
    context = read_context(model, prompt(length=50), observe=made.observes, num_dense_layers=1)
    assert list(context.observations) == ([3] if made.observes else [])
    with torch.inference_mode(), made.session(model, 60) as session:
        session.load(context)
        assert isinstance(session.cache.layers[3], QuestLayer) == (method in ("quest", "oracle"))
        assert [reads.layer for reads in session.reads()] == [1, 3]


def test_the_demonstration_wants_a_layer_that_chooses() -> None:
    model = build(FAMILIES["gemma3"])
    check_fits(model, 100, QuestConfig(token_budget=32, num_dense_layers=1))
    expected = "num_dense_layers: got 2, expected less than the model's 2 full-attention layers"
    with pytest.raises(QuestValueError, match=expected):
        check_fits(model, 100, QuestConfig(token_budget=32, num_dense_layers=2))
    with pytest.raises(QuestValueError, match="less than the model's 3 layers"):
        check_fits(make_llama(), 100, QuestConfig(token_budget=32, num_dense_layers=3))

"""`generate()` with moments in place of bounds: the model's own tokens within the budget, the oracle's past it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES, build
from quest_attention import QuestCache, enable_quest, update_page_metadata
from quest_attention.forms import Moments, form_of
from quest_attention.hf import cache_argument, layer_kinds
from quest_attention.hf.naming import CACHE
from quest_attention.pages import PagedKV
from tiny import LARGE, PAGE_SIZE, SMALL, generate, logits_of_steps, make_llama, prompt, quest_layers
from ways import WAYS, tokens_of

MOMENTS = dataclasses.replace(SMALL, metadata="moments", moments_coefficient=0.5, num_sink_pages=1)
MOMENTS_LARGE = dataclasses.replace(LARGE, metadata="moments", num_sink_pages=1)
REFERENCE = dataclasses.replace(MOMENTS, backend="reference")


def assert_moments_are_of_the_keys(cache: QuestCache) -> None:
    """As the oracle makes them of the keys that are there, but for a rounding for each token of a page."""
    layers = quest_layers(cache)
    assert layers
    for layer in layers:
        stored, length = layer.paged.contiguous, layer.get_seq_length()
        assert stored is not None and layer.paged.form == form_of(layer.config)
        fresh = torch.full_like(stored.metadata, float("nan"))
        kv = PagedKV.from_contiguous(stored.keys, stored.values, fresh, form=layer.paged.form)
        update_page_metadata(kv, length, length, backend="reference")
        room = PAGE_SIZE * torch.finfo(fresh.dtype).eps * float(stored.keys[:, :, :length].abs().max())
        pages = layer.num_pages
        torch.testing.assert_close(stored.metadata[:, :, :pages], fresh[:, :, :pages], rtol=0, atol=room)


@pytest.mark.parametrize("way", WAYS)
def test_within_the_budget_it_is_the_model_itself_and_past_it_the_oracle(way: str) -> None:
    model = make_llama()
    stock = tokens_of(model, way)
    with enable_quest(model, MOMENTS_LARGE) as quest:
        assert torch.equal(tokens_of(model, way), stock)
        assert quest.counters.dense_steps > 0 == quest.counters.sparse_steps
    with enable_quest(model, MOMENTS) as quest:
        ours = tokens_of(model, way)
        assert quest.counters.sparse_steps > 0
        assert quest.counters.pages_read < quest.counters.pages_held
    with enable_quest(model, REFERENCE):
        assert torch.equal(tokens_of(model, way), ours)


def test_logits_are_the_oracles_and_other_pages_are_read_than_by_bounds() -> None:
    model, ids = make_llama(), prompt(batch=2, length=120)
    ids[0, :31] = 0
    seen: list[list[Tensor]] = []
    for config in (MOMENTS, dataclasses.replace(SMALL, num_sink_pages=1)):
        seen.append([])
        with enable_quest(model, config, on_select=lambda _, chosen, __, to=seen[-1]: to.append(chosen.units)):
            generate(model, ids, new=6, attention_mask=(ids != 0).long())
    assert len(seen[0]) == 2 * 5
    assert not torch.equal(seen[0][0], seen[1][0])
    logits, counters = logits_of_steps(model, ids, MOMENTS)
    torch.testing.assert_close(logits, logits_of_steps(model, ids, REFERENCE)[0], rtol=1e-4, atol=1e-4)
    assert [layer.sparse_steps for layer in counters.layers] == [0, 5, 5]


def test_the_sink_page_is_always_read_and_shown_to_an_observer() -> None:
    model, ids = make_llama(), prompt(length=90)
    first: list[int] = []
    with enable_quest(model, MOMENTS, on_select=lambda _, chosen, __: first.extend(chosen.units[..., 0].flatten())):
        generate(model, ids, new=5)
    assert len(first) == 2 * 2 * 4 and set(map(int, first)) == {0}


def test_beams_growth_crop_and_other_batches_keep_moments_with_their_keys() -> None:
    model: Any = make_llama()
    options = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    with enable_quest(model, MOMENTS) as quest, torch.inference_mode():
        made = model.generate(prompt(batch=2), num_beams=4, return_dict_in_generate=True, **options)
        assert_moments_are_of_the_keys(made[CACHE])
        cache = quest.make_cache()
        model(prompt(batch=2, length=37), **cache_argument(cache))
        capacities = set()
        for step in range(60):  # over storage that grows
            model(prompt(batch=2, length=1, seed=step), **cache_argument(cache))
            capacities |= {layer.capacity for layer in quest_layers(cache)}
            if step % 7 == 3:
                cache.crop(-2)
        assert len(capacities) > 1
        assert_moments_are_of_the_keys(cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 2, 2]))
        model(prompt(batch=4, length=3), **cache_argument(cache))
        cache.batch_select_indices(torch.tensor([1, 2]))
        model(prompt(batch=2, length=1), **cache_argument(cache))
        assert_moments_are_of_the_keys(cache)
        assert quest.counters.sparse_steps > 60


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_families_with_windowed_layers(name: str) -> None:
    family = FAMILIES[name]
    model, ids = build(family), prompt(batch=2, length=50)
    if family.eager:
        model.set_attn_implementation("eager")
    assert tuple(layer_kinds(model.config, MOMENTS).values()) == family.kinds
    stock = generate(model, ids, new=6)
    model = build(family)
    with enable_quest(model, MOMENTS_LARGE) as quest:
        assert torch.equal(generate(model, ids, new=6), stock)
        assert quest.counters.dense_steps > 0
    ours, counters = logits_of_steps(model, ids, MOMENTS)
    assert {layer.layer for layer in counters.layers if layer.sparse_steps} == {
        index for index, kind in layer_kinds(model.config, MOMENTS).items() if kind == "quest"
    }
    torch.testing.assert_close(ours, logits_of_steps(model, ids, REFERENCE)[0], rtol=1e-4, atol=1e-4)


def test_a_cache_has_the_form_of_its_config() -> None:
    model = make_llama()
    with enable_quest(model, MOMENTS) as quest, torch.inference_mode():
        cache = quest.make_cache()
        model(prompt(), **cache_argument(cache))
        assert {layer.paged.form for layer in quest_layers(cache)} == {Moments(0.5)}

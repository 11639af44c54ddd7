"""`generate()` with sketches: the model's own tokens within the budget, the oracle's past it, whatever is selected."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from backends import available, interpreted
from families import FAMILIES, Family, build
from quest_attention import QuestCache, QuestConfig, QuestValueError, enable_quest, update_page_metadata
from quest_attention.config import SelectionUnit
from quest_attention.forms import Sketch
from quest_attention.hf import cache_argument, layer_kinds
from quest_attention.hf.naming import CACHE
from quest_attention.pages import PagedKV
from tiny import LARGE, PAGE_SIZE, SMALL, generate, logits_of_steps, make_llama, prompt, quest_layers
from ways import WAYS, tokens_of

UNITS: list[SelectionUnit] = ["token", 4, "page"]


def sketch(config: QuestConfig, unit: SelectionUnit, **others: Any) -> QuestConfig:
    given = {"num_sink_pages": 1, "candidate_factor": 1, **others}
    return dataclasses.replace(config, metadata="sketch", selection_unit=unit, group_reduction=None, **given)


def assert_sketches_are_of_the_keys(cache: QuestCache) -> None:
    """Those of the complete pages, as made anew of the keys that are there."""
    layers = quest_layers(cache)
    assert layers
    for layer in layers:
        stored, length = layer.paged.contiguous, layer.get_seq_length()
        assert stored is not None and layer.paged.form == Sketch(PAGE_SIZE)
        kv = PagedKV.from_contiguous(
            stored.keys, stored.values, torch.zeros_like(stored.metadata), form=layer.paged.form
        )
        update_page_metadata(kv, length, length)
        assert kv.contiguous is not None
        pages = length // PAGE_SIZE
        assert torch.equal(stored.metadata[:, :, :pages], kv.contiguous.metadata[:, :, :pages])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("way", WAYS)
def test_within_the_budget_it_is_the_model_itself_and_past_it_the_oracle(way: str, unit: SelectionUnit) -> None:
    model = make_llama()
    stock = tokens_of(model, way)
    with enable_quest(model, sketch(LARGE, unit)) as quest:
        assert torch.equal(tokens_of(model, way), stock)
        assert quest.counters.dense_steps > 0 == quest.counters.sparse_steps
    with enable_quest(model, sketch(SMALL, unit)) as quest:
        ours = tokens_of(model, way)
        assert quest.counters.sparse_steps > 0
        assert quest.counters.tokens_read < quest.counters.tokens_held
    if way in ("greedy", "padded"):
        with enable_quest(model, sketch(SMALL, unit, backend="reference")):
            assert torch.equal(tokens_of(model, way), ours)


def test_beams_growth_crop_and_other_batches_keep_sketches_with_their_keys() -> None:
    model: Any = make_llama()
    options = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    with enable_quest(model, sketch(SMALL, "token")) as quest, torch.inference_mode():
        made = model.generate(prompt(batch=2), num_beams=4, return_dict_in_generate=True, **options)
        assert_sketches_are_of_the_keys(made[CACHE])
        cache = quest.make_cache()
        model(prompt(batch=2, length=37), **cache_argument(cache))
        capacities = set()
        for step in range(60):  # over storage that grows
            model(prompt(batch=2, length=1, seed=step), **cache_argument(cache))
            capacities |= {layer.capacity for layer in quest_layers(cache)}
            if step % 7 == 3:
                cache.crop(-2)
        assert len(capacities) > 1
        assert_sketches_are_of_the_keys(cache)
        cache.crop(-(2 * PAGE_SIZE + 3))
        model(prompt(batch=2, length=PAGE_SIZE), **cache_argument(cache))
        assert_sketches_are_of_the_keys(cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 2, 2]))
        model(prompt(batch=4, length=3), **cache_argument(cache))
        cache.batch_select_indices(torch.tensor([1, 2]))
        for step in range(PAGE_SIZE):
            model(prompt(batch=2, length=1, seed=step), **cache_argument(cache))
        assert_sketches_are_of_the_keys(cache)
        assert quest.counters.sparse_steps > 60


def test_another_dtype_keeps_the_bytes() -> None:
    model: Any = make_llama()
    with enable_quest(model, sketch(SMALL, "token")) as quest, torch.inference_mode():
        cache = quest.make_cache()
        with torch.autocast("cpu", torch.bfloat16):
            model(prompt(length=40), **cache_argument(cache))
        model(prompt(length=3), **cache_argument(cache))
        assert {layer.dtype for layer in quest_layers(cache)} == {torch.float32}
        assert {layer.paged.metadata.dtype for layer in quest_layers(cache)} == {torch.uint8}
        assert_sketches_are_of_the_keys(cache)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_families(family: Family) -> None:
    """Past the budget by tokens; a budget of everything gives the model's own logits."""
    model, ids = build(family), prompt(batch=2, length=50)
    if family.eager:
        model.set_attn_implementation("eager")
    few, every = (
        dataclasses.replace(sketch(config, "token"), num_dense_layers=family.num_dense_layers)
        for config in (SMALL, LARGE)
    )
    assert tuple(layer_kinds(model.config, few).values()) == family.kinds
    stock = generate(model, ids, new=6)
    model = build(family)
    with enable_quest(model, every) as quest:
        assert torch.equal(generate(model, ids, new=6), stock)
        assert quest.counters.dense_steps > 0
    ours, counters = logits_of_steps(model, ids, few)
    assert {layer.layer for layer in counters.layers if layer.sparse_steps} == {
        index for index, kind in layer_kinds(model.config, few).items() if kind == "quest"
    }
    assert ours.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_logits_are_the_oracles(name: str) -> None:
    family = FAMILIES[name]
    config = dataclasses.replace(sketch(SMALL, "token"), num_dense_layers=family.num_dense_layers)
    model, ids = build(family), prompt(batch=2, length=50)
    ours, _ = logits_of_steps(model, ids, config)
    exact, _ = logits_of_steps(model, ids, dataclasses.replace(config, backend="reference"))
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unit", UNITS)
def test_counters_are_of_what_was_read(unit: SelectionUnit) -> None:
    model, ids = make_llama(), prompt(length=90)
    config = sketch(SMALL, unit)
    with enable_quest(model, config) as quest:
        generate(model, ids, new=4)
    layer = quest.counters.layers[1].to_dict()
    size, lengths = config.unit_size, (91, 92, 93)
    assert layer["tokens_read"] == 3 * config.token_budget
    assert layer["tokens_held"] == sum(-(-length // size) * size for length in lengths)
    assert "keys_read" not in layer, "as many candidates as are read"
    assert quest.counters.share_read == quest.counters.tokens_read / quest.counters.tokens_held
    everything = quest.counters.to_dict()
    if size == PAGE_SIZE:
        assert layer["pages_read"] == 3 * config.page_budget
        assert everything["pages_held"] * PAGE_SIZE == everything["tokens_held"]
        assert "pages read" in quest.counters.summary()
    else:
        assert quest.counters.pages_read is None and quest.counters.layers[1].pages_held is None
        assert "pages_read" not in layer and "pages_held" not in everything
        assert "tokens read" in quest.counters.summary() and "pages" not in quest.counters.summary()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("factor", [0, 2, 9])
def test_keys_that_rank_candidates_are_counted(factor: int, unit: SelectionUnit) -> None:
    """Those of all that a sequence has, where there are no more."""
    model, config = make_llama(), sketch(SMALL, unit, candidate_factor=factor)
    with enable_quest(model, config) as quest:
        generate(model, prompt(batch=2, length=90), new=4)
    layer, size = quest.counters.layers[1], config.unit_size
    assert layer.sparse_steps == 3
    candidates = factor * config.unit_budget * size
    held = [-(-length // size) * size for length in (91, 92, 93)]
    expected = [min(candidates, tokens) for tokens in held] if factor else [config.token_budget] * 3
    assert layer.keys_read == 2 * sum(expected)
    assert quest.counters.to_dict()["keys_read" if factor else "tokens_read"] == quest.counters.keys_read


@interpreted
def test_what_kernels_let_pass_is_counted_and_not_the_budget() -> None:
    available("triton")
    model, seen = make_llama(), []
    config = sketch(SMALL, "token", candidate_factor=0, backend="triton")
    with enable_quest(model, config, on_select=lambda _, chosen, __: seen.append(chosen.counts)) as quest:
        generate(model, prompt(batch=2, length=90), new=4)
        read = sum(int(counts.sum()) // counts.shape[1] for counts in seen)
        sparse = quest.counters.layers[1:]
        assert sum(layer.tokens_read for layer in sparse) == read < len(seen) * 2 * config.token_budget
        assert sum(layer.keys_read for layer in sparse) == read
        quest.counters.reset()
        assert quest.counters.tokens_read == 0


def test_what_the_device_counts_is_reset_whatever_mode_it_was_counted_in() -> None:
    model, config = make_llama(), sketch(SMALL, "token", candidate_factor=0)
    with enable_quest(model, config) as quest:
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                generate(model, prompt(batch=2, length=90), new=4)
            assert quest.counters.layers[1].tokens_read == 3 * 2 * config.token_budget
            quest.counters.reset()
            assert quest.counters.tokens_read == 0


def test_heads_that_no_sketch_fits_are_refused_before_anything_is_written() -> None:
    model = make_llama(dim=12)
    with pytest.raises(QuestValueError, match="head_dim: got 12, expected a multiple of 8"):
        enable_quest(model, sketch(SMALL, "token"))
    assert enable_quest(model, SMALL).make_cache().get_seq_length() == 0

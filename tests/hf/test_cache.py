"""`QuestCache` and its layers: storage, growth, rollback, reordering, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers.cache_utils import DynamicCache

from families import FAMILIES, build
from quest_attention import QuestCache, QuestConfig, QuestStateError, QuestValueError, enable_quest
from quest_attention.eval.context import read_context
from quest_attention.eval.methods.page_ceiling import PageCeiling
from quest_attention.eval.methods.quest import Quest
from quest_attention.hf import QuestLayer, cache_argument, layer_kinds
from quest_attention.hf.naming import CACHE
from tiny import PAGE_SIZE, SMALL, VOCABULARY, assert_metadata_is_exact, make_llama, prompt, quest_layers

HEADS, DIM = 2, 8

# Storage is tested by itself here, and no model reads what is written.
pytestmark = pytest.mark.filterwarnings("ignore:a QuestCache is in use but its keys:quest_attention.QuestWarning")


def tokens(count: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, batch, HEADS, count, DIM, generator=torch.Generator().manual_seed(seed))
    return keys, values


def filled(*counts: int, max_length: int | None = None) -> QuestCache:
    """A cache that took so many tokens at a time, the same in every layer."""
    cache = QuestCache(make_llama().config, SMALL, max_length=max_length)
    for seed, count in enumerate(counts):
        for layer in range(len(cache.layers)):
            cache.update(*tokens(count, seed=seed), layer)
    return cache


@pytest.mark.parametrize("counts", [(1,), (50,), (7, 1, 1, 1, 30, 1), (16, 16), (3, 200)])
def test_it_holds_what_a_dynamic_cache_holds(counts: tuple[int, ...]) -> None:
    cache = filled(*counts)
    stock = DynamicCache(config=make_llama().config)
    for seed, count in enumerate(counts):
        for layer in range(len(stock.layers)):
            stock.update(*tokens(count, seed=seed), layer)
    assert cache.get_seq_length() == stock.get_seq_length() == sum(counts)
    assert cache.get_mask_sizes(3, 1) == stock.get_mask_sizes(3, 1)
    for ours, theirs in zip(cache.layers, stock.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=0)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=0)
    assert_metadata_is_exact(cache)


def test_storage_grows_by_doubling_not_at_every_token() -> None:
    cache = filled(40)
    layer = quest_layers(cache)[0]
    moves, where = 0, None
    for seed in range(400):
        layer.update(*tokens(1, seed=seed))
        assert layer.keys is not None
        moves += layer.keys.data_ptr() != where
        where = layer.keys.data_ptr()
    assert moves <= 6, "440 tokens from 40 are four doublings"
    assert layer.capacity < 4 * 440
    assert_metadata_is_exact(cache)


def test_room_is_made_at_once_where_the_length_is_known() -> None:
    layer = quest_layers(filled(40, max_length=70))[0]
    assert layer.capacity == 72, "whole pages"
    assert layer.keys is not None
    before = layer.keys.data_ptr()
    for seed in range(30):
        layer.update(*tokens(1, seed=seed))
    assert layer.keys.data_ptr() == before
    for first in (1, 40):
        assert {layer.capacity for layer in quest_layers(filled(first, max_length=4000))} == {4000}


def test_generate_makes_room_for_twice_the_prompt_at_most() -> None:
    model: Any = make_llama()
    with enable_quest(model, SMALL):
        every_token = list(range(VOCABULARY))
        options = {"eos_token_id": every_token, "pad_token_id": 0, "return_dict_in_generate": True}
        cache = model.generate(prompt(length=60), max_length=400, **options)[CACHE]
    assert {layer.capacity for layer in quest_layers(cache)} == {120}, "it may end early, as here"


def test_generate_makes_room_for_no_more_than_it_may_write() -> None:
    """A prompt of one token starts with room for the budget, unless less may come."""
    model: Any = make_llama()
    options = {"min_new_tokens": 6, "max_new_tokens": 6, "pad_token_id": 0, "return_dict_in_generate": True}
    with enable_quest(model, SMALL):
        cache = model.generate(prompt(length=1), **options)[CACHE]
    assert {layer.capacity for layer in quest_layers(cache)} == {8}, "whole pages"


@pytest.mark.parametrize("first", [1, 60])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_every_place_that_takes_a_length_makes_room_for_it_at_once(family: str, first: int) -> None:
    """The handle, a reset cache and a session of the evaluation, in every layer of Quest's and in no other."""
    model: Any = build(FAMILIES[family])
    with enable_quest(model, SMALL) as quest, torch.inference_mode():
        cache = quest.make_cache(max_length=8192)
        model(prompt(length=first), **cache_argument(cache))
        for layer, kind in layer_kinds(model.config, SMALL).items():
            stored = cache.layers[layer]
            if kind in ("quest", "dense"):
                assert isinstance(stored, QuestLayer)
                assert stored.capacity == 8192
            else:  # a window of 16 keeps one token less, the place of the next
                assert not isinstance(stored, QuestLayer)
                assert stored.keys.shape[2] == min(first, 15)
        cache.reset()
        for stored in cache.layers:
            if isinstance(stored, QuestLayer):
                stored.update(*tokens(first))
                assert stored.capacity == 8192
    context = read_context(model, prompt(length=first))
    for method in (Quest(SMALL), PageCeiling(SMALL)):
        with torch.inference_mode(), method.session(model, 8192) as session:
            session.load(context)
            assert {layer.capacity for layer in session.cache.layers if isinstance(layer, QuestLayer)} == {8192}


@pytest.mark.parametrize("metadata", ["kv", "fp8"])
@pytest.mark.parametrize(
    "dtypes",  # of keys and values, update by update
    [
        [(torch.float32, torch.bfloat16)] * 3,
        [(torch.bfloat16, torch.float32)] * 3,
        [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
        [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)],
        [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)],
        [(torch.float16, torch.float16), (torch.float64, torch.float32), (torch.float32, torch.float32)],
    ],
)
def test_dtypes_that_differ_or_change(dtypes: list[tuple[torch.dtype, torch.dtype]], metadata: Any) -> None:
    config = dataclasses.replace(SMALL, metadata_dtype=metadata)
    cache, stock = QuestCache(make_llama().config, config), DynamicCache(config=make_llama().config)
    for seed, (count, (of_keys, of_values)) in enumerate(zip((30, 1, 1), dtypes, strict=True)):
        keys, values = tokens(count, seed=seed)
        for layer in range(len(cache.layers)):
            for one in (cache, stock):
                one.update(keys.to(of_keys), values.to(of_values), layer)
        for ours, theirs in zip(cache.layers, stock.layers, strict=True):
            assert ours.keys.dtype == ours.values.dtype == torch.promote_types(theirs.keys.dtype, theirs.values.dtype)
            assert torch.equal(ours.keys.double(), theirs.keys.double()), "nothing is rounded"
            assert torch.equal(ours.values.double(), theirs.values.double())
    if metadata == "kv":
        assert_metadata_is_exact(cache)
    for quest_layer in quest_layers(cache):
        stored = quest_layer.paged.contiguous
        assert stored is not None
        bounds = stored.metadata.to(torch.float64)
        for token in range(32):
            assert (quest_layer.keys[:, :, token] <= bounds[:, :, token // PAGE_SIZE, 0]).all()
            assert (quest_layer.keys[:, :, token] >= bounds[:, :, token // PAGE_SIZE, 1]).all()


@pytest.mark.parametrize("remove", [0, 1, 5, 12, 40])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("metadata", ["bounds", "moments"])
def test_metadata_after_a_crop_is_of_the_keys_that_remain(remove: int, as_tensor: bool, metadata: str) -> None:
    """Moments that held tokens taken back would be wrong, and bounds wider than they need be."""
    config = dataclasses.replace(SMALL, metadata=metadata)
    cropped, short = (QuestCache(make_llama().config, config) for _ in range(2))
    first, then = tokens(40), tokens(6, seed=99)
    for layer in range(len(cropped.layers)):
        cropped.update(*first, layer)
        if remove < 40:
            short.update(*(tensor[:, :, : 40 - remove] for tensor in first), layer)
    count: Any = torch.tensor(-remove) if as_tensor else -remove
    cropped.crop(count)
    assert cropped.get_seq_length() == 40 - remove
    for cache in (cropped, short):
        for layer in range(len(cache.layers)):
            cache.update(*then, layer)
    for ours, expected in zip(quest_layers(cropped), quest_layers(short), strict=True):
        pages = ours.num_pages
        assert torch.equal(
            ours.paged.contiguous.metadata[:, :, :pages], expected.paged.contiguous.metadata[:, :, :pages]
        )
    if metadata == "bounds":
        assert_metadata_is_exact(cropped)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_select_indices(torch.tensor([False, True])),
        lambda cache: cache.batch_repeat_interleave(3),
    ],
)
def test_changes_of_the_batch(change: Callable[[Any], None]) -> None:
    cache, stock = filled(37), DynamicCache(config=make_llama().config)
    for layer in range(len(stock.layers)):
        stock.update(*tokens(37), layer)
    change(cache)
    change(stock)
    for ours, theirs in zip(cache.layers, stock.layers, strict=True):
        assert isinstance(ours, QuestLayer)
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=0)
    batch = stock.layers[0].keys.shape[0]
    for layer in range(len(cache.layers)):
        cache.update(*tokens(5, batch=batch, seed=4), layer)
    assert_metadata_is_exact(cache)


def test_reset_and_copy() -> None:
    cache = filled(37)
    twin = copy.deepcopy(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    cache.update(*tokens(9, batch=1), 1)
    assert cache.layers[1].keys.shape == (1, HEADS, 9, DIM), "another batch may begin"
    assert twin.get_seq_length() == 37
    assert_metadata_is_exact(twin)


def test_a_view_keeps_nothing_alive_that_keeps_it() -> None:
    cache = filled(37)
    layer = weakref.ref(cache.layers[1])
    gc.disable()
    try:
        del cache
        assert layer() is None, "freed at once, without the garbage collector: no cycle through the key view"
    finally:
        gc.enable()


def test_storage_outlives_inference_mode() -> None:
    model, ids = make_llama(), prompt()
    with enable_quest(model, SMALL) as quest:
        cache = quest.make_cache()
        with torch.inference_mode():
            model(ids, **cache_argument(cache))
        with torch.no_grad():
            model(ids[:, :1], **cache_argument(cache))
        assert quest.counters.sparse_steps == 2


def test_gradients_are_refused() -> None:
    model = make_llama()
    with enable_quest(model, SMALL) as quest:
        cache = quest.make_cache()
        with pytest.raises(QuestStateError, match="no_grad"):
            model(prompt(), **cache_argument(cache))
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("keys", "values", "names"),
    [
        (torch.zeros(3, HEADS, 1, DIM), torch.zeros(3, HEADS, 1, DIM), "key_states.shape"),
        (torch.zeros(2, 4, 1, DIM), torch.zeros(2, 4, 1, DIM), "key_states.shape"),
        (torch.zeros(2, HEADS, 1, 16), torch.zeros(2, HEADS, 1, 16), "key_states.shape"),
        (torch.zeros(2, HEADS, 1, DIM), torch.zeros(2, HEADS, 1, 16), "value_states.shape"),
        (torch.zeros(2, HEADS, 1, DIM).long(), torch.zeros(2, HEADS, 1, DIM), "key_states.dtype"),
        (
            torch.zeros(2, HEADS, 1, DIM, device="meta"),
            torch.zeros(2, HEADS, 1, DIM, device="meta"),
            "key_states.device",
        ),
    ],
)
def test_tokens_that_do_not_fit(keys: torch.Tensor, values: torch.Tensor, names: str) -> None:
    cache = filled(37)
    before = copy.deepcopy(cache)
    with pytest.raises(QuestValueError, match=names) as caught:
        cache.update(keys, values, 1)
    assert caught.value.argument == names
    assert cache.get_seq_length(1) == 37
    torch.testing.assert_close(cache.layers[1].keys, before.layers[1].keys, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("values", "argument"),
    [
        (torch.zeros(2, HEADS, 1, DIM), "value_states.shape"),
        (torch.zeros(3, HEADS, 4, DIM), "value_states.shape"),
        (torch.zeros(2, HEADS, 4), "value_states.shape"),
        (torch.zeros(2, HEADS, 4, DIM).long(), "value_states.dtype"),
        (torch.zeros(2, HEADS, 4, DIM, device="meta"), "value_states.device"),
    ],
)
@pytest.mark.parametrize("before", [0, 37])
def test_keys_and_values_of_different_tokens(values: torch.Tensor, argument: str, before: int) -> None:
    cache = filled(before) if before else QuestCache(make_llama().config, SMALL)
    with pytest.raises(QuestValueError) as caught:
        cache.update(torch.zeros(2, HEADS, 4, DIM), values, 1)
    assert caught.value.argument == argument
    assert cache.get_seq_length(1) == before
    assert cache.layers[1].is_initialized == bool(before), "a first update that fails leaves no storage behind"


def test_a_cache_of_another_model() -> None:
    first, second, ids = make_llama(), make_llama(heads=8, kv_heads=4), prompt()
    with enable_quest(first, SMALL) as quest, torch.inference_mode():
        cache = quest.make_cache()
        first(ids, **cache_argument(cache))
        with pytest.raises(QuestValueError, match="expected \\[1, 2, T, 8\\], as this cache holds"):
            second(ids, **cache_argument(cache))
        assert cache.get_seq_length() == 60


def test_assignment_and_offloading_are_refused() -> None:
    layer = quest_layers(filled(37))[0]
    with pytest.raises(QuestStateError, match="keys: assigned"):
        layer.keys = torch.zeros(2, HEADS, 3, DIM)
    with pytest.raises(QuestStateError, match="offloading"):
        layer.offload()
    assert layer.get_seq_length() == 37


def largest_allocation(length: int) -> int:
    """Bytes of the largest tensor that one sparse decode step allocates with a cache of `length` tokens."""
    model = make_llama(layers=2, kv_heads=4, dim=64).bfloat16()
    config = QuestConfig(token_budget=64, page_size=16, num_dense_layers=1)
    with enable_quest(model, config) as quest, torch.inference_mode():
        cache = quest.make_cache(max_length=length + 64)
        for layer in range(2):
            cache.update(*torch.ones(2, 1, 4, length, 64, dtype=torch.bfloat16), layer)
        token = torch.ones(1, 1, dtype=torch.long)
        for _ in range(2):  # the first step makes the workspace
            model(token, **cache_argument(cache))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
            model(token, **cache_argument(cache))
        assert quest.counters.sparse_steps == 3
    return max(event.self_cpu_memory_usage for event in profiled.events())


def test_a_step_allocates_nothing_that_grows_with_the_context() -> None:
    """Metadata is scored in pieces of a fixed size, which a context of 32K tokens fills."""
    assert largest_allocation(32768) == largest_allocation(131072) > 0

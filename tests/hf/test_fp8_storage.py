"""Keys and values stored in 8 bits: what is stored, that all attention reads it, and that metadata are of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from backends import FAST_BACKENDS, available, interpreted
from cases import only
from families import FAMILIES, build
from quest_attention import QuestConfig, QuestStateError, QuestValueError, enable_quest, quest_decode
from quest_attention.config import Backend
from quest_attention.forms import FP8, as_bits, form_of
from quest_attention.hf import QuestCache, cache_argument, cache_dtype
from quest_attention.hf.cache_dtype import check_stored
from quest_attention.hf.offload import CacheShape, Offload, memory_of
from quest_attention.ops import sparse_decode_attention, update_page_metadata
from quest_attention.pages import PagedKV, num_pages
from tiny import LARGE, PAGE_SIZE, SMALL, assert_metadata_is_exact, generate, make_llama, prompt, quest_layers
from ways import WAYS, tokens_of

CONFIGS = {
    "bounds": SMALL,
    "moments": QuestConfig(24, PAGE_SIZE, num_dense_layers=1, metadata="moments"),
    "tokens by sketch": QuestConfig(
        16, PAGE_SIZE, num_dense_layers=1, metadata="sketch", selection_unit="token", candidate_factor=2
    ),
    "runs by sketch": QuestConfig(
        16, PAGE_SIZE, num_dense_layers=1, metadata="sketch", selection_unit=4, candidate_factor=2
    ),
    "tokens by bounds": QuestConfig(24, PAGE_SIZE, num_dense_layers=1, metadata="bounds", selection_unit="token"),
}


LENGTH = 90
"""Tokens of a cache [tokens]."""


class RoundedCache(DynamicCache):
    """transformers' own cache of tokens that were in 8 bits: what every attention is to read, without any of ours."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the base class does."""
        rounded = (each.clamp(-448, 448).to(FP8).to(each.dtype) for each in (key_states, value_states))
        return super().update(*rounded, *args, **kwargs)


def logits(model: Any, cache: Any, ids: Tensor, **options: Any) -> Tensor:
    """Of a pass."""
    with torch.inference_mode():
        found: Tensor = model(ids, **cache_argument(cache), **options).logits
    return found


def fp8_cache(model: Any, config: QuestConfig, **options: Any) -> QuestCache:
    """In 8 bits."""
    return QuestCache(model.config, config, kv_cache_dtype="fp8", **options)


def after_steps(config: QuestConfig) -> QuestCache:
    """Of a model in bfloat16 after a prompt and some steps."""
    model, ids = make_llama().to(torch.bfloat16), prompt(2, LENGTH)
    with enable_quest(model, config):
        cache = fp8_cache(model, config)
        for part in (ids[:, :-6], *ids[:, -6:].split(1, 1)):
            logits(model, cache, part)
    return cache


def written_out(paged: PagedKV) -> PagedKV:
    """The same cache in bfloat16, which holds every number of 8 bits."""
    stored = paged.contiguous
    assert stored is not None and stored.keys.dtype == FP8
    metadata = stored.metadata.bfloat16() if stored.metadata.dtype == FP8 else stored.metadata
    return PagedKV.from_contiguous(stored.keys.bfloat16(), stored.values.bfloat16(), metadata, form=paged.form)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@only(lambda backend, name: backend != "triton" or not CONFIGS[name].candidate_pages)  # kernels rank no pages' tokens
def test_a_step_is_the_oracles_over_keys_written_out(backend: Backend, name: str) -> None:
    config = replace(CONFIGS[name], backend=available(backend))
    cache = after_steps(CONFIGS[name])  # by PyTorch, since each step takes long in the interpreter
    oracle = replace(config, backend="reference")
    for layer in quest_layers(cache):
        assert layer.keys.dtype == layer.values.dtype == FP8
        for seed in range(3):
            query = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
            found = quest_decode(query, layer.paged, LENGTH, config)
            wide = written_out(layer.paged)
            if backend == "torch" or config.unit_size > 1:  # the kernels rank tokens in a few bits to find candidates
                expected = quest_decode(query, wide, LENGTH, oracle)
                assert torch.equal(found.selected.units, expected.selected.units)
            output, _ = sparse_decode_attention(query, wide, LENGTH, found.selected, backend="reference")
            torch.testing.assert_close(found.output, output, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("name", CONFIGS)
def test_metadata_are_those_of_the_keys_as_stored(name: str) -> None:
    """Bounds by the oracle; of every form what the same verb makes of these keys in bfloat16."""
    form, cache = form_of(CONFIGS[name]), after_steps(CONFIGS[name])
    if form.name == "bounds":
        assert_metadata_is_exact(cache)
    for layer in quest_layers(cache):
        stored = written_out(layer.paged).contiguous
        assert stored is not None
        fresh = PagedKV.from_contiguous(stored.keys, stored.values, torch.zeros_like(stored.metadata), form=form)
        whole = LENGTH // PAGE_SIZE * PAGE_SIZE if form.takes_whole_pages else LENGTH
        update_page_metadata(fresh, whole, whole)
        pages = num_pages(whole, PAGE_SIZE)
        found, expected = stored.metadata[:, :, :pages], fresh.contiguous.metadata[:, :, :pages]
        tolerance = 2**-7 if form.name == "moments" else 0  # of which a token at a time rounds each time
        torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [70, 23], ids=["whole", "chunks"])
def test_all_attention_reads_what_is_stored(chunk: int, dtype: torch.dtype) -> None:
    """Prompts, chunks, dense layers and steps within the budget, bit by bit; nothing is left of what was rounded."""
    model, ids = make_llama().to(dtype), prompt(2, 80)
    plain, exact = RoundedCache(config=model.config), DynamicCache(config=model.config)
    with enable_quest(model, LARGE, kv_cache_dtype="fp8") as quest:
        cache = quest.make_cache()
        found = [logits(model, cache, part) for part in ids[:, :70].split(chunk, 1)]
        found += [logits(model, cache, part) for part in ids[:, 70:].split(1, 1)]
    for other, is_same in ((plain, True), (exact, False)):
        expected = [logits(model, other, part) for part in ids[:, :70].split(chunk, 1)]
        expected += [logits(model, other, part) for part in ids[:, 70:].split(1, 1)]
        assert torch.equal(torch.cat(found, 1), torch.cat(expected, 1)) is is_same
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert layer.keys.dtype == layer.values.dtype == FP8 and layer.dtype == dtype
        assert torch.equal(layer.keys.to(dtype), other.keys) and torch.equal(layer.values.to(dtype), other.values)


def test_a_chunked_prompt_is_stored_as_a_whole_one() -> None:
    model, ids = make_llama(layers=1), prompt(2, 70)
    stored = []
    for chunk in (70, 16, 5):
        with enable_quest(model, replace(SMALL, num_dense_layers=0), kv_cache_dtype="fp8") as quest:
            cache = quest.make_cache()
            for part in ids.split(chunk, 1):
                logits(model, cache, part)
        assert_metadata_is_exact(cache)
        layer = quest_layers(cache)[0]
        stored.append([as_bits(layer.keys), as_bits(layer.values), as_bits(layer.paged.contiguous.metadata[:, :, :17])])
    for other in stored[1:]:
        assert all(torch.equal(*pair) for pair in zip(stored[0], other, strict=True))


@pytest.mark.parametrize("name", ["bounds", "moments", "tokens by sketch"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate_are_the_oracles(way: str, name: str) -> None:
    """Padding, beams that change places, tokens taken back, chunks."""
    model, made = make_llama(), []
    for backend in ("reference", "torch"):
        with enable_quest(model, replace(CONFIGS[name], backend=backend), kv_cache_dtype="fp8") as quest:
            made.append(tokens_of(model, way))
            assert quest.counters.sparse_steps > 0
    assert torch.equal(made[0], made[1])


@interpreted
@pytest.mark.parametrize("name", ["bounds", "tokens by sketch"])
def test_the_kernels_read_a_pool_as_the_cache(name: str) -> None:
    """In Triton's interpreter. One launch for pages of the cache splits its sums otherwise."""
    model, ids = make_llama(layers=2), prompt(1, 50)
    config = replace(CONFIGS[name], backend=available("triton"))
    found = []
    with enable_quest(model, config):
        for offload in (None, Offload(36)):
            cache = fp8_cache(model, config, offload=offload)
            made = generate(
                model, ids, 6, **cache_argument(cache), output_logits=True, return_dict_in_generate=True
            )  # fmt: skip
            found.append(torch.stack(made.logits))
            assert cache.counters.sparse_steps == 5
    tolerance = 0 if config.unit_size == 1 else 1e-5
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gemma3n"])
def test_other_families(name: str) -> None:
    """Softcaps, sinks, and layers that share keys and values."""
    family = FAMILIES[name]
    model, ids, made = build(family), prompt(2, 60), []
    for backend in ("reference", "torch"):
        config = replace(SMALL, num_dense_layers=family.num_dense_layers, backend=backend)
        with enable_quest(model, config, kv_cache_dtype="fp8") as quest:
            made.append(generate(model, ids, 12))
            assert quest.counters.sparse_steps > 0
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize("name", ["bounds", "moments", "tokens by sketch"])
@pytest.mark.parametrize("batch", [1, 2])
def test_lossless_writes_what_the_model_writes_with_that_cache(name: str, batch: int) -> None:
    model, ids = make_llama(), prompt(batch, 60)
    with enable_quest(model, LARGE, kv_cache_dtype="fp8"):
        expected = generate(model, ids, 40)
    assert not torch.equal(generate(model, ids, 40), expected), "that of its own cache"
    with enable_quest(model, CONFIGS[name], lossless=True, kv_cache_dtype="fp8") as quest:
        assert torch.equal(generate(model, ids, 40), expected)
        drafts = quest.counters.drafts
    assert drafts is not None and drafts.checks > 0


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("is_dense", [False, True], ids=["", "dense layer"])
def test_tokens_written_where_the_device_says(backend: Backend, is_dense: bool) -> None:
    """As in a CUDA graph and for the rows of a lossless batch; what is beyond the range is the largest number."""
    config = replace(SMALL, backend=available(backend), num_dense_layers=int(is_dense))
    model = make_llama(layers=1)
    tokens = torch.randn(2, 2, 9, 8, generator=torch.Generator().manual_seed(3)) * 100
    tokens[0, 0, 8, :2] = torch.tensor([1e6, -1e6])
    caches = [fp8_cache(model, config, max_length=16) for _ in range(2)]
    layers = [cache.layers[0] for cache in caches]
    layers[0].update(tokens, -tokens)
    layers[1].update(tokens[:, :, :8], -tokens[:, :, :8])
    layers[1].storage.append(tokens[:, :, 8:], -tokens[:, :, 8:], torch.full((2,), 9, dtype=torch.int32))
    layers[1].settle(9)
    for part in ("keys", "values"):
        assert torch.equal(as_bits(getattr(layers[0], part)), as_bits(getattr(layers[1], part)))
        assert torch.equal(getattr(layers[0], part).float().abs()[0, 0, 8, :2], torch.tensor([448.0, 448.0]))
    if not is_dense:
        assert_metadata_is_exact(caches[1])


def test_a_wider_dtype_moves_nothing_that_is_stored() -> None:
    """Autocast that ends: attention goes on in float32 over the same numbers."""
    cache = fp8_cache(make_llama(layers=1), replace(SMALL, num_dense_layers=0))
    layer = quest_layers(cache)[0]
    tokens = torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(3))
    keys, _ = layer.update(tokens.bfloat16(), tokens.bfloat16())
    wider, _ = layer.update(tokens, tokens)
    assert (keys.dtype, wider.dtype, layer.keys.dtype, layer.dtype) == (
        torch.bfloat16, torch.float32, FP8, torch.float32
    )  # fmt: skip
    assert torch.equal(wider[:, :, :20], keys.float())
    assert_metadata_is_exact(cache)


def test_memory() -> None:
    shape = CacheShape(2, 1000, 2, 8, 8, torch.bfloat16, sparse_layers=2, dense_layers=1, group=2)
    narrow = shape._replace(stored=FP8)
    config = replace(SMALL, metadata="bounds")
    wide, found = memory_of(shape, config, 40), memory_of(narrow, config, 40)
    assert (found.host, found.dense, found.metadata) == (wide.host // 2, wide.dense // 2, wide.metadata // 2)
    assert found.pool == 2 * 2 * 2 * 10 * (PAGE_SIZE * 16 + 9) and found.table == wide.table
    assert found.prompt == wide.prompt == 2 * 2 * 1000 * 16 * 2, "written out in bfloat16"
    assert (wide.widened, found.widened) == (0, found.prompt) and not memory_of(
        narrow._replace(dense_layers=0), config, 40
    ).widened
    model, ids = make_llama(), prompt(2, 60)
    held = []
    for name in ("auto", "fp8"):
        with enable_quest(model, SMALL, kv_cache_dtype=name) as quest:
            assert CacheShape.of(model, ["dense"], batch=1, length=8).group == 2
            cache = quest.make_cache(100)
            generate(model, ids, 4, **cache_argument(cache))
            held.append(cache.memory)
    assert held[1] == (0, held[0].device // 4) and held[0].host == 0
    assert held[1].device == 3 * 2 * 2 * 100 * 16 + 2 * 2 * 2 * 25 * 2 * 8
    with enable_quest(model, SMALL):
        cache = fp8_cache(model, SMALL, offload=Offload(36), max_length=100)
        generate(model, ids, 4, **cache_argument(cache))
    planned = memory_of(CacheShape(2, 100, 2, 8, 8, torch.float32, 2, 1, stored=FP8), SMALL, 36)
    assert cache.memory == (planned.host, planned.dense + planned.metadata + planned.table + planned.pool)


def test_what_a_handle_passes_on() -> None:
    model, ids = make_llama(), prompt(1, 40)
    with enable_quest(model, SMALL, kv_cache_dtype="fp8") as quest:
        for given, stored in ((None, FP8), ("auto", torch.float32), ("fp8", FP8)):
            cache = quest.make_cache(kv_cache_dtype=given)
            logits(model, cache, ids)
            assert {layer.keys.dtype for layer in cache.layers} == {stored}
    with enable_quest(model, SMALL) as quest:
        cache = quest.make_cache(kv_cache_dtype="fp8")
        logits(model, cache, ids)
        assert {layer.keys.dtype for layer in cache.layers} == {FP8}


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_llama(), prompt(1, 40)
    wrong = r"kv_cache_dtype: got 'fp8_e5m2', expected one of 'auto', 'fp8'"
    with pytest.raises(QuestValueError, match=wrong):
        enable_quest(model, SMALL, kv_cache_dtype="fp8_e5m2")
    with pytest.raises(QuestValueError, match=wrong):
        QuestCache(model.config, SMALL, kv_cache_dtype="fp8_e5m2")
    with enable_quest(model, SMALL) as quest, pytest.raises(QuestValueError, match=wrong):
        quest.make_cache(kv_cache_dtype="fp8_e5m2")
    double = r"kv_cache_dtype: got 'fp8', expected 'auto' for keys and values in torch\.float64"
    with pytest.raises(QuestValueError, match=double):
        enable_quest(make_llama().double(), SMALL, kv_cache_dtype="fp8")
    cache = fp8_cache(model, SMALL)
    layer = quest_layers(cache)[0]
    tokens = torch.zeros(1, 2, 5, 8)
    with pytest.raises(QuestValueError, match=double):
        layer.update(tokens.double(), tokens.double())
    assert layer.storage is None
    layer.update(tokens, tokens)
    with pytest.raises(QuestValueError, match=double):
        layer.update(tokens.double(), tokens.double())
    assert layer.get_seq_length() == 5 and layer.dtype == torch.float32
    assert not hasattr(model, "_quest_handle")

    with pytest.raises(QuestValueError, match=r"expected 'auto' on device mps: a CPU or a CUDA device"):
        check_stored("fp8", torch.bfloat16, torch.device("mps"), "auto")
    gpu = torch.device("cuda")
    monkeypatch.setattr(cache_dtype, "resolve_backend", lambda name, *_: type("Backend", (), {"name": name}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(QuestValueError, match=r"on a GPU of compute capability 8\.0, below 8\.9"):
        check_stored("fp8", torch.bfloat16, gpu, "triton")
    check_stored("fp8", torch.bfloat16, gpu, "torch")
    check_stored("auto", torch.float64, gpu, "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    check_stored("fp8", torch.bfloat16, gpu, "triton")

    alone = fp8_cache(model, SMALL)
    logits(model, alone, ids)
    with pytest.raises(QuestStateError, match=r"kv_cache_dtype: got 'fp8' in a QuestCache whose keys do not reach"):
        logits(model, alone, ids[:, :1])
    for each in quest_layers(alone)[:1]:
        assert each.get_seq_length() == 40, "nothing was written"
    with enable_quest(model, SMALL):  # whose attention reads what was written before
        logits(model, alone, ids[:, :1])

"""Keys and values in host memory: every step is that of a cache on the device, bit by bit, whatever the pool holds.

On a CPU both memories are the host's; what is fetched, kept and read is the same.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import FAMILIES, build
from quest_attention import BackendError, QuestConfig, QuestValueError, enable_quest
from quest_attention.hf import QuestCache, cache_argument, host_memory, host_storage
from quest_attention.hf.host_storage import HostStorage
from quest_attention.hf.naming import CACHE
from quest_attention.hf.offload import CacheShape, Offload, memory_of
from quest_attention.hf.outgoing import Outgoing
from quest_attention.models import bundled_model_path
from tiny import PAGE_SIZE, SMALL, assert_metadata_is_exact, generate, make_llama, prompt, quest_layers

CONFIGS = {
    "bounds": SMALL,
    "moments": QuestConfig(24, PAGE_SIZE, num_dense_layers=1, metadata="moments"),
    "sketch": QuestConfig(
        16, PAGE_SIZE, num_dense_layers=1, metadata="sketch", selection_unit="token", candidate_factor=2
    ),
    "runs": QuestConfig(16, PAGE_SIZE, num_dense_layers=1, metadata="sketch", selection_unit=4, candidate_factor=2),
}
HOT = 36
"""Tokens of the pool: a little more than a step reads, so that what is read makes room for others."""
in_any_dtype = pytest.mark.parametrize("stored", ["auto", "fp8"])
"""For tests of caches whose keys and values may be in 8 bits, on the device as on the host."""


@pytest.fixture(autouse=True)
def late_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prompt writes to host memory arrives when somebody waits for it, and no sooner."""

    class Late(Outgoing):
        def __init__(self) -> None:
            super().__init__()
            self.copies: list[Callable[[], None]] = []

        def send(self, copy: Callable[[], None], *tensors: Tensor) -> None:
            assert tensors
            self.copies.append(copy)

        def wait(self) -> None:
            while self.copies:
                self.copies.pop(0)()

    monkeypatch.setattr(host_storage, "Outgoing", Late)


def caches(model: Any, config: QuestConfig, **options: Any) -> tuple[QuestCache, QuestCache]:
    """One on the device, and one with a pool."""
    return QuestCache(model.config, config, **options), QuestCache(
        model.config, config, offload=Offload(HOT), **options
    )


def pools(cache: QuestCache) -> list[HostStorage]:
    """The storages of the layers that choose, each with a pool."""
    stored = [layer.storage for layer in quest_layers(cache)]
    assert stored and all(isinstance(storage, HostStorage) for storage in stored)
    return [storage for storage in stored if isinstance(storage, HostStorage)]


def assert_evicted(cache: QuestCache) -> None:
    """Units were fetched, found and displaced: more came than there is room for."""
    for storage in pools(cache):
        looked_up, fetched, *_ = storage.hot.counts.tolist()
        assert storage.hot.owners.numel() < fetched < looked_up


def logits(model: Any, cache: QuestCache, ids: Tensor, **options: Any) -> Tensor:
    """Of a pass."""
    with torch.inference_mode():
        found: Tensor = model(ids, **cache_argument(cache), **options).logits
    return found


def assert_steps_are_equal(model: Any, both: tuple[QuestCache, QuestCache], token: Tensor, steps: int) -> None:
    """Greedy steps give the same logits."""
    for _ in range(steps):
        expected, found = (logits(model, cache, token) for cache in both)
        assert torch.equal(found, expected)
        token = expected[:, -1:].argmax(-1)


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "fp8")], ids=str
)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_generate_gives_the_same_logits(name: str, batch: int, dtype: torch.dtype, stored: str) -> None:
    model = make_llama().to(dtype)
    ids = prompt(batch, 70)
    found = []
    with enable_quest(model, CONFIGS[name]):
        both = caches(model, CONFIGS[name], kv_cache_dtype=stored)
        for cache in both:
            made = generate(
                model, ids, 40, **cache_argument(cache), output_logits=True, return_dict_in_generate=True
            )  # fmt: skip
            found.append(torch.stack(made.logits))
    assert torch.equal(found[0], found[1])
    assert both[1].counters.sparse_steps == both[0].counters.sparse_steps == 2 * 39
    assert_evicted(both[1])


@in_any_dtype
@pytest.mark.parametrize("name", ["bounds", "sketch"])
def test_padded_batches(name: str, stored: str) -> None:
    model, ids = make_llama(), prompt(2, 70)
    mask = torch.ones_like(ids)
    ids[0, :11], mask[0, :11] = 0, 0
    with enable_quest(model, CONFIGS[name]):
        both = caches(model, CONFIGS[name], kv_cache_dtype=stored)
        made = [generate(model, ids, 20, attention_mask=mask, **cache_argument(cache)) for cache in both]
    assert torch.equal(made[0], made[1])
    assert_evicted(both[1])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gemma3n", "qwen3_next"])
def test_other_families(name: str) -> None:
    """Softcaps, sinks, layers that share keys and values, windowed and linear layers beside full attention."""
    family = FAMILIES[name]
    config = replace(SMALL, num_dense_layers=family.num_dense_layers)
    model, ids = build(family), prompt(2, 60)
    with enable_quest(model, config) as quest:
        both = caches(model, config)
        made = [generate(model, ids, 20, **cache_argument(cache)) for cache in both]
        assert quest.graphs is None
    assert torch.equal(made[0], made[1])
    assert both[1].counters.sparse_steps > 0
    assert pools(both[1])[0].hot.counts[0] > 0


@in_any_dtype
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_rollbacks_and_growth(name: str, stored: str) -> None:
    """A prompt in chunks, steps, tokens taken back and others written there, several at once and one by one."""
    model = make_llama()
    ids = prompt(2, 140)
    config = CONFIGS[name]
    with enable_quest(model, config):
        both = caches(model, config, kv_cache_dtype=stored)
        for start, stop in ((0, 33), (33, 34), (34, 61), (61, 70)):
            expected, found = (logits(model, cache, ids[:, start:stop]) for cache in both)
            assert torch.equal(found, expected)
        assert_steps_are_equal(model, both, ids[:, 70:71], 12)
        for taken, again in ((5, 1), (9, 7), (3, 2), (40, 1)):
            for cache in both:
                cache.crop(-taken)
            expected, found = (logits(model, cache, ids[:, 80 : 80 + again]) for cache in both)
            assert torch.equal(found, expected)
            assert_steps_are_equal(model, both, ids[:, 90:91], 9)
    for layers in zip(*map(quest_layers, both), strict=True):
        assert layers[0].capacity == layers[1].capacity > 100
    assert_evicted(both[1])


def test_a_token_that_no_step_fetched_is_not_read_from_the_pool() -> None:
    """A step that was given up after its token was written: the page that it filled is hot without it."""
    model, ids = make_llama(), prompt(1, 70)
    with enable_quest(model, SMALL):
        both = caches(model, SMALL, max_length=100)  # so that it keeps its pool
        for cache in both:
            logits(model, cache, ids)
        assert_steps_are_equal(model, both, ids[:, :1], 1)
        for cache in both:
            for layer in cache.layers:  # token 72, the last of its page, which nobody attends to
                layer.update(torch.full((1, 2, 1, 8), 9.0), torch.ones(1, 2, 1, 8))
                layer.was_attended = True  # or a warning says that it was not
        assert_steps_are_equal(model, both, ids[:, :1], 12)


@in_any_dtype
def test_beam_search(stored: str) -> None:
    model, ids = make_llama(), prompt(2, 60)
    with enable_quest(model, SMALL):
        both = caches(model, SMALL, kv_cache_dtype=stored)
        made = [generate(model, ids, 10, num_beams=3, **cache_argument(cache)) for cache in both]
    assert torch.equal(made[0], made[1])
    assert both[1].counters.sparse_steps == 2 * 9


@in_any_dtype
def test_copies_and_other_batches(stored: str) -> None:
    model, ids = make_llama(), prompt(2, 60)
    with enable_quest(model, SMALL):
        both = caches(model, SMALL, kv_cache_dtype=stored)
        for cache in both:
            logits(model, cache, ids)
        assert_steps_are_equal(model, both, ids[:, :1], 5)
        copied = copy.deepcopy(both[0]), copy.deepcopy(both[1])
        assert_steps_are_equal(model, both, ids[:, 1:2], 5)
        counted = [cache[1].counters.fetches for cache in (both, copied)]
        assert_steps_are_equal(model, copied, ids[:, 2:3], 9)
        assert both[1].counters.fetches == counted[0]
        assert copied[1].counters.fetches.units_looked_up > counted[1].units_looked_up
        assert_steps_are_equal(model, both, ids[:, 3:4], 5)
        for cache in both:
            cache.batch_select_indices(torch.tensor([1]))
        assert_steps_are_equal(model, both, ids[:1, :1], 5)
        for cache in both:
            cache.batch_repeat_interleave(2)
        assert_steps_are_equal(model, both, ids[:, :1], 5)
        for cache in both:
            cache.reset()
            logits(model, cache, ids)
        assert_steps_are_equal(model, both, ids[:, :1], 5)


def test_only_layers_that_choose_lie_in_host_memory() -> None:
    model, ids = make_llama(), prompt(1, 60)
    cache = QuestCache(model.config, SMALL, offload=Offload(HOT))
    with enable_quest(model, SMALL):
        logits(model, cache, ids)
        logits(model, cache, ids[:, :1])
    storages = [layer.storage for layer in cache.layers]
    assert [type(storage) is HostStorage for storage in storages] == [False, True, True]
    assert_metadata_is_exact(cache)
    for storage in pools(cache):
        assert storage.hot.keys.shape == (1, 2, HOT, 8)
        assert storage.hot.keys.data_ptr() != storage.keys.data_ptr()


def test_hot_tokens_left_open_are_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    from quest_attention.hf import offload  # noqa: PLC0415 - a module beside a class of its name

    model, ids = make_llama(), prompt(1, 200)
    token_bytes = 2 * 2 * 2 * (8 + 8) * 4  # two layers, two heads, in float32
    monkeypatch.setattr(offload, "free_device_bytes", lambda _: 2 * 60 * token_bytes)
    cache = QuestCache(model.config, SMALL, offload=Offload())
    with enable_quest(model, SMALL):
        logits(model, cache, ids)
        logits(model, cache, ids[:, :1])
        assert [storage.hot.slots * PAGE_SIZE for storage in pools(cache)] == [112, 112], (
            "120 but for what is kept of slots"
        )
        monkeypatch.setattr(offload, "free_device_bytes", lambda _: 6 * token_bytes)
        cache.reset()  # the pools of a cache stay as they are, whatever is free
        logits(model, cache, ids)
        logits(model, cache, ids[:, :1])
        assert [storage.hot.slots * PAGE_SIZE for storage in pools(cache)] == [112, 112]
        other = QuestCache(model.config, SMALL, offload=Offload())
        logits(model, other, ids)
        with pytest.raises(QuestValueError, match=r"offload: got .* free on the device', expected at least"):
            logits(model, other, ids[:, :1])


def test_a_cache_that_grows_past_host_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from quest_attention.hf import offload  # noqa: PLC0415 - likewise

    model, ids = make_llama(), prompt(1, 60)
    cache, plain = QuestCache(model.config, SMALL, offload=Offload(HOT)), QuestCache(model.config, SMALL)
    with enable_quest(model, SMALL):
        for one in (cache, plain):
            logits(model, one, ids)
        monkeypatch.setattr(offload, "free_host_bytes", lambda: 1000)
        with pytest.raises(QuestValueError, match=r"offload: got 'keys or values of .* \(7680 bytes\) in host memory'"):
            logits(model, cache, ids[:, :1])
        monkeypatch.undo()
        cache.keep(60)
        assert_steps_are_equal(model, (plain, cache), ids[:, :1], 8)


def test_what_cannot_be_is_refused() -> None:
    model = make_llama()
    with pytest.raises(QuestValueError, match=r"hot_tokens: got 0, expected"):
        Offload(0)
    with pytest.raises(QuestValueError, match=r"offload: got 'host', expected an Offload"):
        QuestCache(model.config, SMALL, offload="host")
    with pytest.raises(QuestValueError, match=r"offload: got .* expected None with lossless=True"):
        QuestCache(model.config, SMALL, offload=Offload(), is_lossless=True)
    ids = prompt(1, 40)
    with enable_quest(model, SMALL):
        few = QuestCache(model.config, SMALL, offload=Offload(24))
        with pytest.raises(QuestValueError, match=r"hot_tokens: got 24, expected at least 28: what a step reads"):
            logits(model, few, ids)
        assert few.get_seq_length() == 0
    ranked = QuestConfig(24, PAGE_SIZE, num_dense_layers=1, metadata="bounds", selection_unit="token")
    refused = pytest.raises(
        QuestValueError, match=r"selection_unit: got 'token', expected page for bounds with offload"
    )
    with enable_quest(model, ranked), refused:
        logits(model, QuestCache(model.config, ranked, offload=Offload()), ids)


@pytest.mark.parametrize("name", ["bounds", "sketch"])
def test_the_bundled_model_writes_the_same(name: str) -> None:
    """A long prompt, and a pool of a twelfth of it."""
    model: Any = AutoModelForCausalLM.from_pretrained(bundled_model_path())
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    ids = tokenizer("The grass is green. The sky is blue. The sun is yellow. Here we go. " * 60, return_tensors="pt")
    config = {
        "bounds": QuestConfig(128, metadata="bounds"),
        "sketch": QuestConfig(64, metadata="sketch", selection_unit="token", candidate_factor=2),
    }[name]
    with enable_quest(model, config):
        both = QuestCache(model.config, config), QuestCache(model.config, config, offload=Offload(160))
        made = [
            model.generate(**ids, do_sample=False, max_new_tokens=48, min_new_tokens=48, **cache_argument(cache))
            for cache in both
        ]
    assert torch.equal(made[0], made[1])
    sparse = len(pools(both[1]))
    assert both[1].counters.sparse_steps == sparse * 47
    assert made[0].shape[1] > 12 * 80
    for storage in pools(both[1]):
        looked_up, fetched, *_ = storage.hot.counts.tolist()
        assert storage.hot.owners.numel() < fetched < looked_up


def test_a_user_has_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory and 8 bits: the bytes that come to the device are those of 8 bits."""
    on_a_gpu(monkeypatch)
    model, ids = make_llama(), prompt(2, 70)
    with enable_quest(model, SMALL, kv_cache_dtype="fp8") as quest:
        expected = generate(model, ids, 30)
        kept = quest.make_cache(200, offload="host", hot_tokens=40)
        assert torch.equal(generate(model, ids, 30, **cache_argument(kept)), expected)
        assert {storage.hot.keys.dtype for storage in pools(kept)} == {torch.float8_e4m3fn}
    with enable_quest(model, SMALL, offload="host", hot_tokens=HOT, kv_cache_dtype="fp8") as quest:
        assert torch.equal(generate(model, ids, 30), expected)
        fetches = quest.counters.fetches
        assert fetches is not None and fetches.bytes_fetched % (PAGE_SIZE * 16) == 0
        assert fetches.units_fetched < fetches.bytes_fetched // (PAGE_SIZE * 16) < 2 * fetches.units_looked_up


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a user asks for be answered as on a GPU, on which these tests do not run."""
    asked = Offload.asked
    gpu = torch.device("cuda")
    monkeypatch.setattr(Offload, "asked", lambda offload, hot, config, _: asked(offload, hot, config, gpu))


def test_what_a_user_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate()` and `make_cache()` have their keys and values in host memory, and the counters say what came."""
    on_a_gpu(monkeypatch)
    model, ids = make_llama(), prompt(2, 70)
    with enable_quest(model, SMALL) as quest:
        expected = generate(model, ids, 30)
        assert quest.counters.fetches is None and "fetches" not in quest.counters.to_dict()
        kept = quest.make_cache(200, offload="host", hot_tokens=40)
        assert torch.equal(generate(model, ids, 30, **cache_argument(kept)), expected)
        assert {storage.hot.slots for storage in pools(kept)} == {10}
    with enable_quest(model, SMALL, offload="host", hot_tokens=HOT) as quest:
        assert torch.equal(generate(model, ids, 30), expected)
        fetches = quest.counters.fetches
        assert fetches is not None and fetches.hit_rate is not None
        assert fetches.units_looked_up == 2 * 2 * 2 * 29 * 6, "layers, sequences, heads, steps, pages"
        assert 0 < fetches.units_fetched < fetches.units_looked_up
        copied, page_bytes = divmod(fetches.bytes_fetched, PAGE_SIZE * (8 + 8) * 4)
        assert page_bytes == 0 and copied > fetches.units_fetched, "the page being written is copied again"
        said = f"{fetches.hit_rate:.1%} of {fetches.units_looked_up:,} units looked up were hot"
        assert said in quest.counters.summary()
        assert quest.counters.to_dict()["fetches"]["units_fetched"] == fetches.units_fetched
        assert [("fetches" in layer.to_dict()) for layer in quest.counters.layers] == [False, True, True]
        quest.counters.reset()
        assert quest.counters.fetches == (0, 0, 0, 0) and quest.counters.fetches.hit_rate is None
        assert quest.make_cache(100).offload_to == quest.make_cache(100, offload="host").offload_to == Offload(HOT)
        assert quest.make_cache(hot_tokens=50).offload_to == Offload(50)


def test_a_user_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    reason = r"offload: got 'host', expected None on device cpu, where keys and values lie in host memory already"
    with pytest.raises(QuestValueError, match=reason):
        enable_quest(model, SMALL, offload="host")
    with pytest.raises(QuestValueError, match=r"offload: got 'host', expected None with lossless=True"):
        enable_quest(model, SMALL, offload="host", lossless=True)
    with pytest.raises(QuestValueError, match=r"hot_tokens: got 64, expected None without offload=\"host\""):
        enable_quest(model, SMALL, hot_tokens=64)
    with enable_quest(model, SMALL) as quest:
        with pytest.raises(QuestValueError, match=reason):
            quest.make_cache(offload="host")
        with pytest.raises(QuestValueError, match=r"hot_tokens: got 64, expected None without"):
            quest.make_cache(hot_tokens=64)
    on_a_gpu(monkeypatch)
    with pytest.raises(QuestValueError, match=r"offload: got 'disk', expected \"host\" or None"):
        enable_quest(model, SMALL, offload="disk")
    with pytest.raises(QuestValueError, match=r"hot_tokens: got 20, expected at least 28"):
        enable_quest(model, SMALL, offload="host", hot_tokens=20)
    assert not hasattr(model, "_quest_handle")


def test_files_that_a_container_caches_are_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the kernel counts them for the host: a model that was just read leaves its file there."""
    for name, text in (("_LIMIT", "9000\n"), ("_USED", "7000\n"), ("_STAT", "anon 1500\ninactive_file 5000\n")):
        monkeypatch.setattr(host_memory, name, tmp_path / name)
        (tmp_path / name).write_text(text)
    assert host_memory.free_host_bytes() == 7000
    (tmp_path / "_STAT").unlink()
    assert host_memory.free_host_bytes() == 2000
    (tmp_path / "_LIMIT").write_text("max\n")
    assert host_memory.free_host_bytes() > 9000


def test_memory_to_lock_is_in_huge_pages_where_there_are_any() -> None:
    size = 64 << 20
    memory = host_memory.in_huge_pages(size)
    assert memory.dtype == torch.uint8 and memory.shape == (size,) and not memory[:: 1 << 12].any()
    memory.fill_(3)
    assert memory.sum(dtype=torch.int64) == 3 * size
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no huge pages: the bytes are right")
    maps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", maps, flags=re.MULTILINE)[1:]
    spans = [([int(end, 16) for end in part.split()[0].split("-")], part) for part in parts]
    (where,) = (part for (start, stop), part in spans if start <= memory.data_ptr() < stop)
    assert " hg" in where[where.index("VmFlags") :]


def test_memory_that_the_host_does_not_give() -> None:
    with pytest.raises(BackendError, match=f"offload: cannot allocate {1 << 50} bytes of host memory: "):
        host_memory.in_huge_pages(1 << 50)
    assert host_memory.in_huge_pages(0).shape == (0,)


@pytest.mark.parametrize("answers", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_generate_takes_the_memory_that_was_counted(answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, however the prompt comes in chunks, for every answer."""
    on_a_gpu(monkeypatch)
    counted, made = [], []
    check, empty = Offload.check_fits, host_storage.host_empty

    def check_fits(offload: Offload, shape: CacheShape, quest: QuestConfig, *others: Any, **more: Any) -> None:
        counted.append(memory_of(shape, quest, HOT).host)
        check(offload, shape, quest, *others, **more)

    def host_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append(torch.Size(shape).numel() * dtype.itemsize)
        return empty(shape, dtype, device)

    monkeypatch.setattr(Offload, "check_fits", check_fits)
    monkeypatch.setattr(host_storage, "host_empty", host_empty)
    model, ids = make_llama(), prompt(1, 70)
    with enable_quest(model, SMALL, offload="host", hot_tokens=HOT):
        generate(model, ids, 10, prefill_chunk_size=16, **answers)
    assert counted == [sum(made)]


def test_a_cache_that_grows_has_room_for_what_will_come_at_most() -> None:
    model, ids = make_llama(), prompt(1, 70)
    with enable_quest(model, SMALL) as quest:
        options = {"return_dict_in_generate": True, "max_new_tokens": 10, "do_sample": False}
        cache = model.generate(ids, prefill_chunk_size=50, **options)[CACHE]
        assert {layer.capacity for layer in quest_layers(cache)} == {80}
        cache = QuestCache(model.config, quest.config)
        for _ in range(3):
            logits(model, cache, ids[:, :50])
        assert {layer.capacity for layer in quest_layers(cache)} == {208}, "nobody knows what will come"


def test_models_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    model = make_llama()
    model.lm_head.to("meta")
    with pytest.raises(QuestValueError, match="offload: got 'host', expected None for a model on several devices: cpu"):
        enable_quest(model, SMALL, offload="host", hot_tokens=HOT)


def test_memory_that_is_not_free_is_said_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from quest_attention.hf import offload  # noqa: PLC0415 - likewise

    on_a_gpu(monkeypatch)
    model, ids = make_llama(), prompt(1, 60)
    shape = CacheShape(1, 1000, 2, 8, 8, torch.float32, sparse_layers=2, dense_layers=1, group=2)
    for wrong in ("a", 0, None):
        with pytest.raises(QuestValueError, match=r"^hot_tokens: got .*, expected a positive integer"):
            memory_of(shape, SMALL, wrong)  # type: ignore[arg-type]
    with pytest.raises(QuestValueError, match=r"^shape.length: got -5, expected a positive integer"):
        memory_of(shape._replace(length=-5), SMALL, HOT)
    with pytest.raises(QuestValueError, match=r"^chunk: got 'a', expected a positive integer"):
        memory_of(shape, SMALL, HOT, chunk="a")  # type: ignore[arg-type]
    memory = memory_of(shape, SMALL, HOT)
    assert memory.host == 2 * 2 * 1000 * 16 * 4 and memory.dense == memory.prompt == memory.host // 2
    assert memory.metadata == 2 * 2 * 250 * 2 * 8 * 4 and memory.table == 2 * 2 * 250 * 4
    assert memory.device == memory.dense + memory.metadata + memory.table + memory.prompt
    monkeypatch.setattr(offload, "free_host_bytes", lambda: memory.host - 1)
    with enable_quest(model, SMALL, offload="host", hot_tokens=HOT) as quest:
        asked = rf"offload: got 'a cache of 0.00 GiB \({memory.host} bytes\) in host memory', expected at most"
        with pytest.raises(QuestValueError, match=asked):
            quest.make_cache(1000)
        with pytest.raises(QuestValueError, match=r"in host memory"):
            generate(model, ids, 940)
        monkeypatch.setattr(offload, "free_host_bytes", lambda: memory.host)
        monkeypatch.setattr(offload, "free_device_bytes", lambda _: memory.device - 1)
        with pytest.raises(QuestValueError, match=rf"\({memory.device} bytes\) on the device \(dense .*, metadata"):
            quest.make_cache(1000)
        in_chunks = memory_of(shape, SMALL, HOT, chunk=16)
        assert memory.mask == memory.repeated == 0 and in_chunks.mask == 16 * 1000 * (1 + 4)
        with pytest.raises(QuestValueError, match=r"repeated .*, mask .* or smaller chunks"):
            generate(model, ids, 940, prefill_chunk_size=16)
        monkeypatch.setattr(offload, "free_device_bytes", lambda _: memory.device)
        assert quest.make_cache(1000).get_seq_length() == 0
        assert quest.counters.sparse_steps == 0


@pytest.mark.parametrize("chunk", [None, 20, 25])
def test_the_mask_that_is_counted_is_the_one_that_is_made(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind other chunks transformers makes one, and has keys repeated for every query head; else neither."""
    model, ids = make_llama(), prompt(1, 100)
    masks: list[Tensor] = []
    widths: set[tuple[int, int]] = set()
    attend = torch.nn.functional.scaled_dot_product_attention

    def seen(query: Tensor, key: Tensor, *args: Any, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if query.shape[2] > 1:
            widths.add((key.shape[1], key.shape[2]))
            masks.extend([] if attn_mask is None else [attn_mask])
        return attend(query, key, *args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    with enable_quest(model, SMALL):
        generate(model, ids, 2, prefill_chunk_size=chunk)
    shape = CacheShape.of(model, ["dense", "quest", "quest"], batch=1, length=100)
    assert shape is not None
    memory = memory_of(shape, SMALL, HOT, chunk=chunk)
    largest = max((mask.numel() * mask.element_size() for mask in masks), default=0)
    assert {mask.dtype for mask in masks} <= {torch.bool}
    assert memory.mask == largest * (1 + 4), "and as a number of float32 to add"
    heads = next(heads for heads, length in widths if length == 100)
    assert memory.repeated == (memory.prompt * 2 if heads == 4 else 0)
    assert (chunk is None) == (memory.mask == memory.repeated == 0)
    assert memory.device == memory.dense + memory.metadata + memory.table + max(
        memory.pool, memory.prompt + memory.repeated + memory.mask
    )

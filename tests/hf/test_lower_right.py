"""Chunks of a prompt behind earlier tokens, whose mask a GPU does without: the same as with it, whatever the cache.

On a CPU the path is forced: PyTorch then writes the mask in place of a kernel that is aligned so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask

from families import FAMILIES, LATENT, Family, build
from quest_attention import QuestCache, QuestConfig, QuestWarning, enable_quest
from quest_attention.hf import attention, cache_argument, lower_right, offload
from quest_attention.hf.offload import CacheShape, Offload, memory_of
from quest_attention.hf.reading import Reading
from tiny import SMALL, assert_metadata_is_exact, generate, make_llama, prompt
from ways import WAYS, tokens_of

CPU = torch.device("cpu")
REFUSED_LOSSLESS = ("beams", "prompt lookup")


class Path:
    """What took the path, `(T, length)` of each call, and masks that were written all the same."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, int]] = []
        self.masks: list[Tensor] = []


@contextmanager
def forced(*, groups: bool = False) -> Iterator[Path]:
    """A CPU that is said to know the alignment; with `groups` as where flash attention serves."""
    path = Path()
    attend = attention.attend_lower_right

    def seen(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        path.passes.append((query.shape[2], key.shape[2]))
        return attend(query, key, *args, **options)

    def written(*args: Any, **options: Any) -> Tensor | None:
        mask: Tensor | None = sdpa_mask(*args, **options)
        path.masks.extend([] if mask is None else [mask])
        return mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower_right, "knows_lower_right", lambda _: True)
        patch.setattr(attention, "attend_lower_right", seen)
        patch.setattr(lower_right, "sdpa_mask", written)
        if groups:
            patch.setattr(lower_right, "_takes_groups", lambda *_: True)
        yield path


def in_chunks(model: Any, cache: Cache, ids: Tensor, sizes: Sequence[int], **options: Any) -> Tensor:
    """Logits `[B, T, V]` of a prompt in chunks of so many tokens."""
    mask = options.pop("attention_mask", None)
    logits, start = [], 0
    for chunk in ids[:, : sum(sizes)].split(list(sizes), dim=1):
        given = dict(options) if mask is None else {"attention_mask": mask[:, : start + chunk.shape[1]], **options}
        logits.append(model(chunk, **cache_argument(cache), **given).logits)
        start += chunk.shape[1]
    return torch.cat(logits, dim=1)


CACHES: dict[str, Callable[[Any], Cache]] = {
    "quest": lambda model: QuestCache(model.config, SMALL),
    "dense layers": lambda model: QuestCache(model.config, replace(SMALL, num_dense_layers=3)),
    "offload": lambda model: QuestCache(model.config, SMALL, offload=Offload(48)),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "dynamic, of layers made as they come": lambda _: DynamicCache(),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.filterwarnings("ignore:the model was given a DynamicCache")
def test_chunks_are_those_with_a_mask(kind: str, kv_heads: int, batch: int) -> None:
    model, ids = make_llama(kv_heads=kv_heads), prompt(batch, 60)
    sizes = [20, 17, 2, 21]
    results = []
    with torch.inference_mode(), enable_quest(model, SMALL):
        plain = in_chunks(model, CACHES[kind](model), ids, sizes)
        for groups in (False, True):
            with forced(groups=groups) as path:
                results.append(in_chunks(model, CACHES[kind](model), ids, sizes))
            assert path.passes == [each for each in [(17, 37), (2, 39), (21, 60)] for _ in range(3)]
            assert not path.masks
    assert torch.equal(results[0], plain)
    torch.testing.assert_close(results[1], plain, rtol=1e-4, atol=1e-4)  # another order of sums


@pytest.mark.parametrize("sizes", [[60], [59, 1]])
def test_what_needs_no_mask_anyway_stays(sizes: list[int]) -> None:
    model, ids = make_llama(), prompt(2, 60)
    with torch.inference_mode(), enable_quest(model, SMALL):
        plain = in_chunks(model, QuestCache(model.config, SMALL), ids, sizes)
        with forced() as path:
            assert torch.equal(in_chunks(model, QuestCache(model.config, SMALL), ids, sizes), plain)
    assert path.passes == path.masks == []


@pytest.mark.parametrize("given", ["ones", "none", "own"])
@pytest.mark.parametrize("batch", [1, 2])
def test_generate_in_chunks_asks_for_padding_once(given: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask that `generate()` makes, or the caller's, says nothing, and no pass is given it."""
    model, ids = make_llama(), prompt(batch, 60)
    options: dict[str, Any] = {"prefill_chunk_size": 16}
    if given != "own":
        options["attention_mask"] = torch.ones_like(ids) if given == "ones" else None
    else:
        options["attention_mask"] = torch.ones(batch, 60, dtype=torch.bool)
    with enable_quest(model, SMALL):
        plain = generate(model, ids, **options)
    asked: list[int] = []
    ask = Tensor.all
    with enable_quest(model, SMALL) as quest, forced() as path:
        monkeypatch.setattr(Tensor, "all", lambda *args: (asked.append(args[0].dim()), ask(*args))[1])
        assert torch.equal(generate(model, ids, **options), plain)
        assert quest.counters.sparse_steps > 0
    assert path.passes == [each for each in [(16, 32), (16, 48), (12, 60)] for _ in range(3)]
    assert asked.count(2) == 1 and not path.masks


def test_padded_batches_keep_their_mask() -> None:
    model, ids = make_llama(), prompt(2, 60)
    ids[0, :9] = 0
    mask = (ids != 0).long()
    with torch.inference_mode(), enable_quest(model, SMALL) as quest:
        plain = generate(model, ids, attention_mask=mask, prefill_chunk_size=16)
        with forced() as path:
            assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=16), plain)
        assert not path.passes and path.masks
        by_hand = in_chunks(model, quest.make_cache(), ids, [30, 30], attention_mask=mask)
        with forced() as path:
            assert torch.equal(in_chunks(model, quest.make_cache(), ids, [30, 30], attention_mask=mask), by_hand)
        assert not path.passes and path.masks


def test_a_mask_that_its_owner_writes_to_is_asked_anew() -> None:
    """What `generate()` was given said nothing then; the same memory may say something in a pass by hand."""
    model, ids = make_llama(), prompt(2, 60)
    mask = torch.ones_like(ids)
    with torch.inference_mode(), enable_quest(model, SMALL) as quest, forced() as path:
        generate(model, ids, 1, attention_mask=mask, prefill_chunk_size=16)
        assert path.passes
        path.passes.clear()
        mask[0, :9] = 0
        masked = in_chunks(model, quest.make_cache(), ids, [30, 30], attention_mask=mask)
        assert not path.passes
        plain = in_chunks(model, quest.make_cache(), ids, [30, 30])
        assert path.passes and not torch.allclose(masked[0, 40:], plain[0, 40:])


def test_a_second_turn() -> None:
    """More tokens at once behind a cache that was kept."""
    model, ids = make_llama(), prompt(1, 90)

    def turns() -> Tensor:
        cache = QuestCache(model.config, SMALL)
        first = generate(model, ids[:, :60], 5, **cache_argument(cache))
        second = generate(model, torch.cat([first, ids[:, 60:]], dim=1), 5, **cache_argument(cache))
        assert_metadata_is_exact(cache)
        return second

    with enable_quest(model, SMALL):
        plain = turns()
        with forced() as path:
            assert torch.equal(turns(), plain)
    assert path.passes == [(31, 95)] * 3


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    """Windowed and other layers have what they had, and so have models whose dense attention is eager."""
    family = FAMILIES[name]
    model, ids = build(family), prompt(2, 60)
    config = replace(SMALL, num_dense_layers=family.num_dense_layers)
    with enable_quest(model, config):
        plain = generate(model, ids, 6, prefill_chunk_size=16)
    with enable_quest(model, config), forced() as path:
        assert torch.equal(generate(model, ids, 6, prefill_chunk_size=16), plain)
    several = {each for each in path.passes if each[0] > 1}  # Gemma4's last layers take the last token alone
    assert several == (set() if family.eager else {(16, 32), (16, 48), (12, 60)})


@pytest.mark.parametrize(
    ("way", "lossless"),
    [(way, lossless) for way in WAYS for lossless in (False, True) if not lossless or way not in REFUSED_LOSSLESS],
)
def test_ways_to_generate(way: str, lossless: bool) -> None:
    model = make_llama()
    with enable_quest(model, SMALL, lossless=lossless):
        plain = tokens_of(model, way)
        with forced() as path:
            assert torch.equal(tokens_of(model, way), plain)
    if way != "prompt lookup":  # whose candidates take it where transformers makes no mask of padding, since 5.24
        assert bool(path.passes) == (way == "chunked prefill")


def test_latent_layers() -> None:
    """Multi-head latent attention, whose values have fewer channels than its keys."""
    family = Family("DeepseekV3", (), LATENT)
    model, ids = build(family), prompt(2, 60)
    with torch.inference_mode(), pytest.warns(QuestWarning, match="every layer runs dense"):
        handle = enable_quest(model, SMALL)
    with torch.inference_mode(), handle as quest:
        plain = in_chunks(model, quest.make_cache(), ids, [30, 30])
        with forced() as path:
            assert torch.equal(in_chunks(model, quest.make_cache(), ids, [30, 30]), plain)
    assert set(path.passes) == {(30, 60)}


def test_after_a_crop() -> None:
    model, ids = make_llama(), prompt(1, 70)

    def cropped() -> Tensor:
        cache = QuestCache(model.config, SMALL)
        in_chunks(model, cache, ids, [25, 25])
        cache.crop(-17)
        logits = in_chunks(model, cache, ids[:, 50:], [11, 9])
        assert_metadata_is_exact(cache)
        return logits

    with torch.inference_mode(), enable_quest(model, SMALL):
        plain = cropped()
        with forced() as path:
            assert torch.equal(cropped(), plain)
    assert set(path.passes) == {(25, 50), (11, 44), (9, 53)}


@pytest.mark.parametrize("length", [60, 64, 100])
@pytest.mark.filterwarnings("ignore:the model was given a StaticCache")
def test_static_caches(length: int) -> None:
    """The first tokens come without a mask too, and are aligned at the upper left of a cache with room behind them."""
    model, ids = make_llama(), prompt(2, 60)
    with torch.inference_mode(), enable_quest(model, SMALL):
        plain = in_chunks(model, StaticCache(config=model.config, max_cache_len=length), ids, [20, 25, 15])
        with forced() as path:
            forced_logits = in_chunks(model, StaticCache(config=model.config, max_cache_len=length), ids, [20, 25, 15])
    assert torch.equal(forced_logits, plain)
    assert {each for each in path.passes if each[1] != 60} == set()
    with torch.inference_mode():
        stock = in_chunks(model, DynamicCache(config=model.config), ids, [20, 25, 15])
    torch.testing.assert_close(forced_logits, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.filterwarnings("ignore:the model was given a DynamicCache")
def test_gradients(groups: bool) -> None:
    model, ids = make_llama(), prompt(2, 60)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        in_chunks(model, DynamicCache(config=model.config), ids, [30, 30]).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    with enable_quest(model, SMALL):
        plain = gradients()
        with forced(groups=groups) as path:
            ours = gradients()
    assert path.passes and len(ours) == len(plain) > 10
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Rotary embeddings leave queries and keys in float32, beside values that are narrow."""
    model, ids = make_llama(), prompt(2, 60)
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype), enable_quest(model, SMALL):
        plain = in_chunks(model, QuestCache(model.config, SMALL), ids, [20, 25, 15])
        with forced() as path:
            ours = in_chunks(model, QuestCache(model.config, SMALL), ids, [20, 25, 15])
    assert path.passes and ours.dtype == plain.dtype
    assert torch.equal(ours, plain)


def test_lossless_text_and_checks() -> None:
    """A check has a mask of its own, or, where somebody calls the model in one, gets it written out."""
    model, ids = make_llama(), prompt(2, 60)
    with enable_quest(model, SMALL, lossless=True) as quest:
        plain = generate(model, ids, 20, prefill_chunk_size=16)
        with forced() as path:
            assert torch.equal(generate(model, ids, 20, prefill_chunk_size=16), plain)
            assert set(path.passes) == {(16, 32), (16, 48), (12, 60)}
        drafts = quest.counters.drafts
        assert drafts is not None and drafts.checks > 0

        def checked() -> Tensor:
            cache = quest.make_cache()
            in_chunks(model, cache, ids, [50])
            assert cache.rows is not None
            cache.rows.begin((50, 50), torch.tensor([54, 54]), is_drafting=False)
            assert cache.reading_of(4) is Reading.CHECK
            logits: Tensor = model(ids[:, 50:54], **cache_argument(cache)).logits
            return logits

        with torch.inference_mode():
            plain = checked()
            with forced() as path:
                assert torch.equal(checked(), plain)
            assert not path.passes


def test_eager_by_choice_keeps_its_mask() -> None:
    model, ids = make_llama(), prompt(1, 60)
    model.set_attn_implementation("eager")
    with torch.inference_mode(), enable_quest(model, SMALL), forced() as path:
        forced_logits = in_chunks(model, QuestCache(model.config, SMALL), ids, [30, 30])
    assert not path.passes
    with torch.inference_mode(), enable_quest(model, SMALL):
        assert torch.equal(in_chunks(model, QuestCache(model.config, SMALL), ids, [30, 30]), forced_logits)


ASKED: dict[str, Any] = {
    "batch_size": 2, "q_length": 5, "kv_length": 12, "q_offset": 7, "kv_offset": 0, "device": CPU,
    "mask_function": causal_mask_function, "attention_mask": None, "allow_is_causal_skip": True, "use_vmap": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [
        {"q_length": 1, "kv_length": 8},
        {"q_offset": 0, "kv_length": 5},
        {"q_offset": 0},  # the first tokens of a static cache
        {"kv_length": 20},
        {"q_offset": torch.tensor(7)},
        {"kv_offset": 3},
        {"attention_mask": torch.ones(2, 12, dtype=torch.bool)},
        {"local_size": 4, "mask_function": and_masks(causal_mask_function, causal_mask_function)},
        {"local_size": 400},
        {"mask_function": and_masks(causal_mask_function, causal_mask_function)},
        {"allow_is_causal_skip": False},
        {"use_vmap": True},
        {"config": type("Config", (), {"alibi": True})},
    ],
    ids=" ".join,
)
def test_other_masks_are_transformers_own(other: dict[str, Any]) -> None:
    with forced():
        assert lower_right.is_lower_right(lower_right.chunk_mask(**ASKED))
        mask = lower_right.chunk_mask(**ASKED | other)
    own = sdpa_mask(**ASKED | other)
    assert not lower_right.is_lower_right(mask)
    assert (mask is None) == (own is None)
    assert mask is None or torch.equal(mask, own)


def test_the_mask_of_no_heads_says_what_the_mask_says() -> None:
    with forced():
        mask = lower_right.chunk_mask(**ASKED)
    assert mask is not None and mask.numel() == 0 and mask.shape == (2, 0, 5, 12)
    own = sdpa_mask(**ASKED)
    assert torch.equal(lower_right.written_out(mask), own)
    assert torch.equal(lower_right.written_out(mask[:, :, -2:]), own[:, :, -2:]), "of the last tokens alone"
    assert not lower_right.knows_lower_right(CPU)
    query = torch.randn(2, 4, 5, 8)
    with pytest.raises(RuntimeError, match="must match"):  # attention that does not know it
        torch.nn.functional.scaled_dot_product_attention(query, *torch.randn(2, 2, 4, 12, 8), attn_mask=mask)


@pytest.mark.parametrize("option", ["position_bias", "length"])
def test_what_the_path_cannot_do_is_done_with_the_mask(option: str) -> None:
    """A bias by position, or keys that the mask is not of."""
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    given: dict[str, Any] = {"position_bias": torch.randn(1, 4, 5, 12)} if option == "position_bias" else {}
    with forced() as path:
        mask = lower_right.chunk_mask(**ASKED)
        if option == "length":
            key, value = key[:, :, :11], value[:, :, :11]
            with pytest.raises(RuntimeError, match="must match"):
                attention._sdpa_or_quest(module, query, key, value, mask, **given)
            return
        ours, _ = attention._sdpa_or_quest(module, query, key, value, mask, **given)
    assert not path.passes
    theirs, _ = attention._sdpa_or_quest(module, query, key, value, sdpa_mask(**ASKED), **given)
    assert torch.equal(ours, theirs)


def test_memory_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither mask nor repeated keys where flash attention serves; both for padding, float32 and wide heads."""
    shape = CacheShape(1, 4096, 2, 64, 64, torch.bfloat16, sparse_layers=2, group=4)
    config = QuestConfig(256, metadata="bounds")
    for other in (shape, shape._replace(stored=torch.float8_e4m3fn)):
        memory = memory_of(other, config, 512, chunk=512)
        assert memory.mask == memory.repeated == 0 and memory == memory_of(other, config, 512)
    for other, is_masked in [
        (shape, True), (shape._replace(dtype=torch.float32), False),
        (shape._replace(head_dim=512, value_dim=512), False), (shape._replace(head_dim=36, value_dim=36), False),
        (shape._replace(value_dim=32), False),
    ]:  # fmt: skip
        memory = memory_of(other, config, 512, chunk=512, is_masked=is_masked)
        assert memory.mask == 512 * 4096 * (1 + other.dtype.itemsize) and memory.repeated == 4 * memory.prompt
        assert memory_of(other, config, 512, is_masked=is_masked).mask == 0
    said: list[bool] = []
    monkeypatch.setattr(offload, "memory_of", lambda *_, is_masked, **__: said.append(is_masked) or memory)
    monkeypatch.setattr(offload, "check_memory", lambda *_: None)
    monkeypatch.setattr(offload, "free_device_bytes", lambda _: 0)
    for name, is_masked in [("cpu", False), ("cuda", False), ("cuda", True)]:
        Offload(512).check_fits(shape, config, torch.device(name), chunk=512, is_masked=is_masked)
    assert said == [True, False, True]

"""Caches in float8_e4m3fn with scales: what they store, how they are read, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, FAST_BACKENDS, available
from caches import LAYOUTS, make_cache
from likeness import assert_like_oracle, query_for
from quest_attention import QuestConfig, QuestValueError, quest_decode, sparse_decode_attention, update_page_metadata
from quest_attention.config import Backend
from quest_attention.forms import FP8, KEY_MAX, KEY_MIN, Bounds, MetadataForm, Moments
from quest_attention.ops import append_slots, append_token, reference, update_slot_metadata

WIDE = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = torch.finfo(FP8).max


def bits(tensor: Tensor) -> Tensor:
    """What is stored, every NaN as one."""
    return torch.where(tensor.isnan(), 0x7F, tensor.view(torch.uint8)) if tensor.dtype == FP8 else tensor


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scales", ["tensor", "head"])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_a_step_is_the_oracles(backend: Backend, layout: str, scales: str, dtype: torch.dtype, group: int) -> None:
    cache = make_cache([100, 37, 1, 0], layout=layout, scales=scales)
    config = QuestConfig.from_dict({"token_budget": 32, "page_size": 8, "backend": available(backend)})
    assert_like_oracle(cache, group, config, dtype=dtype)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("group", [1, 4])
def test_moments_of_a_cache_in_8_bits(backend: Backend, group: int) -> None:
    cache = make_cache([90, 90], layout="contiguous", scales="head", form=Moments(1.0))
    assert cache.kv.metadata.dtype == torch.bfloat16
    config = QuestConfig(32, 8, metadata="moments", backend=available(backend))
    assert_like_oracle(cache, group, config, host_length=90)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_softcap_sinks_and_lse(backend: Backend, softcap: float | None) -> None:
    cache = make_cache([70, 20], scales="head")
    kv, lengths = cache.kv, cache.seq_lens
    update_page_metadata(kv, lengths, lengths)
    query = query_for(cache, 2, dtype=torch.float32)
    options = {"softcap": softcap, "sinks": torch.linspace(-1, 1, 4)}
    config = QuestConfig(32, 8, backend=available(backend))
    step = quest_decode(query, kv, lengths, config, **options)
    output, lse = sparse_decode_attention(
        query, kv, lengths, step.selected, return_lse=True, backend=config.backend, **options
    )
    lists = [[[page for page in head if page >= 0] for head in row] for row in step.selected.units.tolist()]
    exact, exact_lse = reference.sparse_decode_attention(query, kv, cache.lengths, lists, kv.head_dim**-0.5, **options)
    for found, expected in ((step.output, exact), (output, exact), (lse, exact_lse)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def awkward(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Keys `[count, 2, 16]` of every size, some beyond the range of 8 bits, some half way between two numbers of it."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, 2, 16, generator=generator) * 10.0 ** torch.randint(
        -4, 3, (count, 2, 16), generator=generator
    )
    halves = torch.arange(126, dtype=torch.uint8).view(FP8).float()
    between = (halves[:-1] + halves[1:]) / 2 * 0.3
    keys.view(-1)[: len(between)] = between[: keys.numel()]
    keys[0, 0, :5] = torch.tensor([1e9, -1e9, float("inf"), float("nan"), -0.0])
    return keys.to(dtype)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("scales", ["tensor", "head"])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("form", [Bounds(), Moments(1.0)], ids=str)
def test_written_tokens_are_the_oracles(
    backend: Backend, layout: str, scales: str, dtype: torch.dtype, form: MetadataForm
) -> None:
    ours, exact = (make_cache([64], layout=layout, scales=scales, form=form).kv for _ in range(2))
    keys, values = awkward(20, dtype, 1), awkward(20, dtype, 2)
    slots = torch.tensor([*range(8, 24), 40, -1, 5, 6])
    append_slots(ours, keys, values, slots, backend=available(backend))
    reference.append_slots(exact, keys, values, slots.tolist())
    table = ours.page_table[:1].expand(2, -1)
    two, two_exact = (replace(kv, page_table=torch.stack([table[0], table[0].flip(0)])) for kv in (ours, exact))
    lengths = torch.tensor([3, 9])
    append_token(two, keys[:2], values[:2], lengths, backend=backend)
    reference.append_token(two_exact, keys[:2], values[:2], lengths.tolist())
    for part in ("keys", "values"):
        assert torch.equal(bits(getattr(ours, part)), bits(getattr(exact, part)))
    if form.is_bound:
        torch.testing.assert_close(ours.metadata.float(), exact.metadata.float(), rtol=0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(ours.metadata.float(), exact.metadata.float(), rtol=2**-7, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_are_of_what_is_stored(backend: Backend) -> None:
    """Rounding carries a key past the bound of its unrounded self: 0.99 is stored as 1.0."""
    kv = make_cache([8], scales="tensor").kv
    kv.key_scale.fill_(1.0)
    keys = torch.full((8, 2, 16), 0.99)
    keys[3] = -0.99
    slots = torch.arange(8)
    append_slots(kv, keys, keys, slots, backend=available(backend))
    assert kv.metadata.dtype == FP8
    stored = kv.keys[0].float()
    assert (stored.amax(0) == 1.0).all()
    assert torch.equal(kv.metadata[0, :, KEY_MAX].float(), stored.amax(0))
    assert torch.equal(kv.metadata[0, :, KEY_MIN].float(), stored.amin(0))
    alone = torch.full_like(kv.metadata, 0)
    update_slot_metadata(alone, kv.keys[0], slots, page_size=8, backend=backend)
    assert torch.equal(bits(alone[0]), bits(kv.metadata[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_beyond_the_range_is_the_largest_number(backend: Backend) -> None:
    kv = make_cache([8], scales="tensor").kv
    token = torch.full((1, 2, 16), 1e6)
    token[0, 1] = -1e6
    append_slots(kv, token, token, torch.tensor([0]), backend=available(backend))
    assert (kv.keys[0, 0, 0].float() == LARGEST).all() and (kv.values[0, 0, 1].float() == -LARGEST).all()


def test_what_is_refused() -> None:
    kv, plain = make_cache([10], scales="head").kv, make_cache([10]).kv
    for scale in (None, torch.ones(3), torch.ones(1, dtype=torch.float64), torch.ones(1, 1)):
        with pytest.raises(QuestValueError, match=r"key_scale: got .* expected \[1\] or \[2\] torch.float32"):
            replace(kv, key_scale=scale)
    for scale in (torch.zeros(1), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])):
        with pytest.raises(QuestValueError, match=r"value_scale: got .*, expected finite numbers above 0"):
            replace(kv, value_scale=scale)
    with pytest.raises(
        QuestValueError, match=r"value_scale: got .*, expected None: a cache in torch\.float32 has no scales"
    ):
        replace(plain, value_scale=torch.ones(1))
    config, lengths = QuestConfig.paper(8, page_size=8), torch.tensor([10])
    for dtype in (FP8, torch.float64):
        query = torch.zeros(1, 2, 16).to(dtype)
        with pytest.raises(QuestValueError, match=r"query\.dtype"):
            quest_decode(query, kv, lengths, config)
        with pytest.raises(QuestValueError, match=r"keys\.dtype"):
            append_token(kv, query, torch.zeros(1, 2, 16), lengths)
    with pytest.raises(QuestValueError, match=r"key_scale: got 0\.3, expected a tensor"):
        replace(kv, key_scale=0.3)
    with pytest.raises(QuestValueError, match=r"metadata\.dtype"):
        replace(kv, metadata=kv.metadata.bfloat16())

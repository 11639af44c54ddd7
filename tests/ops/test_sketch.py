"""The sketch of a page: its bytes, its estimates and what it is taken from, against the oracle and the exact keys."""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from backends import BACKENDS, available
from caches import LAYOUTS, Cache, make_cache
from cases import only
from quest_attention import QuestValueError, update_page_metadata
from quest_attention.config import Backend
from quest_attention.forms import Sketch, SketchLayout
from quest_attention.forms.sketch import MEAN_BITS
from quest_attention.ops import append_slots, append_token, reference, update_slot_metadata
from quest_attention.pages import PagedKV

NEAR = 1e-4
"""Of zero, in units of the residuals' mean absolute value: there float32 may find either sign."""


def turning(dim: int) -> Tensor:
    """The matrix by which keys are turned, from its definition by blocks: `[D, D]` float64."""
    order = dim & -dim
    block = torch.ones(1, 1, dtype=torch.float64)
    while len(block) < order:
        block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), block)
    return torch.block_diag(*[block / order**0.5] * (dim // order))


def parts(kept: Tensor, page_size: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of sketches `[..., bytes]`: signs `[..., page_size, D]`, 1 or -1, means `[..., D]` and levels `[..., 1]`."""
    at = SketchLayout.of(page_size, dim)
    rows = []
    for start, count in ((at.signs, page_size), (at.mean, MEAN_BITS)):
        some = kept[..., start : start + count * at.row].unflatten(-1, (count, at.row))
        assert not some[..., dim // 8 :].any(), "padding is zero"
        rows.append(torch.cat([some[..., : dim // 8] >> j & 1 for j in range(8)], -1))
    scales = kept[..., at.scales : at.scales + 8].contiguous().view(torch.float32).double()
    assert not kept[..., at.scales + 8 :].any(), "padding is zero"
    worth = torch.tensor([1, 2, 4, 8, 16, 32, -64]).double()
    means = (rows[1].double() * worth[:, None]).sum(-2) * scales[..., :1]
    return 2 * rows[0].double() - 1, means, scales[..., 1:]


def sketched(keys: Tensor) -> Tensor:
    """Sketches `[..., bytes]` of pages of keys `[..., page_size, D]`, by the PyTorch path."""
    form = Sketch(keys.shape[-2])
    kept = torch.full((*keys.shape[:-2], *form.shape(*keys.shape[-2:])), 0xA5, dtype=torch.uint8)
    form.take(kept, keys, 0)
    return kept[..., 0, :]


def stood_for(kept: Tensor, page_size: int, dim: int) -> Tensor:
    """Turned keys that sketches stand for, `[..., page_size, D]` float64."""
    signs, means, levels = parts(kept, page_size, dim)
    stands: Tensor = means[..., None, :] + signs * levels[..., None]
    return stands


def assert_sketches_alike(ours: Tensor, exact: Tensor, keys: Tensor) -> None:
    """Scales and means but for float32's roundings; signs but for residuals next to zero.

    Args:
        ours: `[..., bytes]`.
        exact: Of the oracle, likewise.
        keys: `[..., page_size, D]`.
    """
    page_size, dim = keys.shape[-2:]
    at = SketchLayout.of(page_size, dim)
    scales, expected = (kept[..., at.scales : at.scales + 8].contiguous().view(torch.float32) for kept in (ours, exact))
    torch.testing.assert_close(scales, expected, rtol=1e-4, atol=0, equal_nan=True)
    is_finite = expected.isfinite().all(-1)
    assert torch.equal(is_finite, keys.double().isfinite().flatten(-2).all(-1))
    ours, exact, keys = ours[is_finite], exact[is_finite], keys[is_finite].double()
    signs, means, _ = parts(ours, page_size, dim)
    expected_signs, expected_means, _ = parts(exact, page_size, dim)
    one = scales[is_finite][..., :1]
    assert ((means - expected_means).abs() <= 1.001 * one).all(), "a mean is at most one code away"
    rest = keys @ turning(dim) - expected_means[..., None, :]
    is_moved = (means != expected_means)[..., None, :] & ((means - expected_means).abs() > one / 2)[..., None, :]
    is_open = rest.abs() <= NEAR * rest.abs().mean((-2, -1), keepdim=True)
    wrong = (signs != expected_signs) & ~is_open & ~is_moved
    assert not wrong.any(), f"{int(wrong.sum())} signs differ away from zero"


def complete(cache: Cache, b: int) -> Tensor:
    """Physical pages of a sequence that are complete."""
    return cache.kv.page_table[b, : cache.lengths[b] // cache.kv.page_size].long()


def assert_kept_is_the_keys(cache: Cache) -> None:
    """What is kept of every complete page is the oracle's sketch of the keys that are there."""
    kv = cache.kv
    fresh = replace(kv, metadata=torch.zeros_like(kv.metadata), contiguous=None)
    reference.update_page_metadata(fresh, cache.lengths, cache.lengths)
    for b in range(len(cache.lengths)):
        pages = complete(cache, b)
        keys = kv.keys[pages].transpose(1, 2)
        assert_sketches_alike(kv.metadata[pages][:, :, 0], fresh.metadata[pages][:, :, 0], keys)


@pytest.mark.parametrize("page_size", [8, 16, 32])
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
def test_a_sketch_is_the_oracles(dim: int, page_size: int) -> None:
    generator = torch.Generator().manual_seed(dim + page_size)
    keys = torch.randn(2, page_size, dim, generator=generator) + 3 * torch.randn(2, 1, dim, generator=generator)
    form = Sketch(page_size)
    kept = sketched(keys)
    exact = torch.stack([form.take_by_hand(torch.empty(form.shape(page_size, dim)), page, 0)[0] for page in keys])
    assert_sketches_alike(kept, exact, keys)
    assert torch.equal(sketched(keys[0]), kept[0]), "one page alone"
    query = torch.randn(1, 2, dim, generator=generator)
    seen = form.see(query)
    estimates = form.score(seen, kept[None])[0].T  # [G, P * page_size]
    for head in range(2):
        by_hand = torch.cat([form.score_by_hand(query[0, head], page[None]) for page in kept])
        told = stood_for(kept, page_size, dim) @ (query[0, head].double() @ turning(dim))
        torch.testing.assert_close(estimates[head].double(), by_hand, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(told.flatten(), by_hand, rtol=1e-9, atol=1e-9)


def test_the_layout() -> None:
    assert SketchLayout.of(16, 128).total == 384
    for page_size in (1, 8, 16, 32):
        for dim in (8, 40, 64, 80, 96, 128, 256):
            at = SketchLayout.of(page_size, dim)
            assert at.row % 4 == 0 and at.row * 8 >= dim and at.scales % 4 == 0 and at.total % 16 == 0
            assert at.signs == 0 and at.mean == page_size * at.row and at.scales == at.mean + MEAN_BITS * at.row
            assert at.scales + 8 <= at.total < at.scales + 8 + 16
    with pytest.raises(QuestValueError, match="head_dim: got 20, expected a multiple of 8"):
        Sketch(16).shape(16, 20)
    with pytest.raises(QuestValueError, match=r"form: got Sketch\(page_size=16\), expected Sketch\(8\)"):
        make_cache([20], form=Sketch(16))


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.data())
def test_an_estimate_is_off_by_what_the_signs_leave(data: st.DataObject) -> None:
    """`|estimate - logit| <= |q| * |turned key - what is kept of it|`, Cauchy and Schwarz."""
    dim, page_size = data.draw(st.sampled_from([8, 24, 64, 80])), data.draw(st.sampled_from([4, 8, 16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    spread = data.draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
    keys = data.draw(st.sampled_from([0.0, 1.0, 1e-4])) * torch.randn(3, page_size, dim, generator=generator)
    keys = keys + spread * torch.randn(3, 1, dim, generator=generator)
    if data.draw(st.booleans()):
        keys[data.draw(st.integers(0, 2)), data.draw(st.integers(0, page_size - 1)), 3] = 50.0
    query = torch.randn(1, 2, dim, generator=generator)
    form, kept = Sketch(page_size), sketched(keys)
    logits = (keys.double() @ query[0].double().T).flatten(0, 1)  # [P * page_size, G]
    seen = form.see(query)
    estimates = form.score(seen, kept[None])
    left = (keys.double() @ turning(dim) - stood_for(kept, page_size, dim)).norm(dim=-1)
    room = query[0].double().norm(dim=-1) * left.flatten()[:, None]
    roundings = 1e-5 * query[0].double().norm(dim=-1) * (keys.double().norm(dim=-1).flatten()[:, None] + 1e-6)
    assert ((estimates[0].double() - logits).abs() <= room + roundings).all()


def test_how_much_of_normal_keys_is_left() -> None:
    """The sign of a normal number leaves the root of 1 - 2 / pi of its deviation, 0.603."""
    keys = torch.randn(400, 16, 128, generator=torch.Generator().manual_seed(0))
    keys += 2 * torch.randn(400, 1, 128, generator=torch.Generator().manual_seed(1))
    rest = (keys.double() - keys.double().mean(-2, keepdim=True)).norm()
    kept, turned = sketched(keys), keys.double() @ turning(128)
    assert float((turned - stood_for(kept, 16, 128)).norm() / rest) == pytest.approx(0.603, abs=0.01)


def test_no_other_level_leaves_less() -> None:
    """Of all numbers that a sign may stand for the kept one is nearest to the keys, by least squares."""
    keys = torch.randn(20, 8, 64, generator=torch.Generator().manual_seed(0)).exp()  # whose mean says little of signs
    signs, means, levels = parts(sketched(keys), 8, 64)
    rest = keys.double() @ turning(64) - means[:, None]
    left = [(rest - signs * (levels * factor)[..., None]).square().sum((1, 2)) for factor in (1, 0.99, 1.01)]
    assert (left[0] < left[1]).all() and (left[0] < left[2]).all()


def test_nothing_left_of_equal_keys() -> None:
    for keys in (torch.zeros(2, 8, 16), torch.zeros(2, 8, 16) + torch.eye(16)[3] * 127):
        _, means, levels = parts(sketched(keys), 8, 16)
        assert means.isfinite().all() and ((levels >= 0) & (levels <= 1e-3)).all()
    kept = sketched(torch.zeros(1, 8, 16))
    assert not Sketch(8).score(Sketch(8).see(torch.randn(1, 1, 16)), kept[None]).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_page_with_a_key_that_is_not_finite_has_no_finite_estimate(bad: float) -> None:
    keys = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(2))
    keys[1, 5, 2] = bad
    form, kept = Sketch(8), sketched(keys)
    exact = torch.stack([form.take_by_hand(torch.empty(form.shape(8, 16)), page, 0)[0] for page in keys])
    assert_sketches_alike(kept, exact, keys)
    seen = form.see(torch.randn(1, 2, 16))
    estimates = form.score(seen, kept[None])
    assert estimates[0].isfinite().all(1).view(3, 8).all(1).tolist() == [True, False, True]
    assert not estimates[0].view(3, 8, 2)[1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@only(lambda backend, dtype, **_: backend != "triton" or dtype != torch.float64)  # kernels compute in float32
def test_chunks_in_any_split(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    available(backend)
    scales = "head" if dtype == torch.float8_e4m3fn else None
    cache = make_cache(
        [70, 41, 8, 0], dtype=torch.float32 if scales else dtype, layout=layout, form=Sketch(8), scales=scales
    )
    lengths = torch.zeros(4, dtype=torch.int32)
    for step in ([20, 8, 1, 0], [1, 1, 1, 0], [4, 3, 0, 0], [3, 0, 6, 0], [42, 29, 0, 0]):
        new = torch.tensor(step, dtype=torch.int32)
        lengths += new
        update_page_metadata(cache.kv, lengths, new, backend=backend)
        assert_kept_is_the_keys(replace(cache, seq_lens=lengths))
    assert torch.equal(lengths, cache.seq_lens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start", [0, 3, 8])
def test_a_contiguous_cache_of_equal_lengths(backend: Backend, start: int) -> None:
    available(backend)
    cache = make_cache([40, 40], layout="contiguous", form=Sketch(8))
    update_page_metadata(cache.kv, start, start, backend=backend)
    for end in (start + 1, start + 7, 31, 40):
        update_page_metadata(cache.kv, end, end - start, backend=backend)
        start = end
        assert_kept_is_the_keys(replace(cache, seq_lens=torch.tensor([end, end])))


def without_tokens(cache: Cache) -> tuple[PagedKV, Tensor, Tensor]:
    """The cache with poison in place of its tokens, and they, `[B, HKV, T, D]`."""
    kv = cache.kv
    assert kv.contiguous is not None
    keys, values = kv.contiguous.keys.clone(), kv.contiguous.values.clone()
    kv.contiguous.keys.fill_(math.nan)
    kv.contiguous.values.fill_(math.nan)
    return kv, keys, values


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_one_by_one(backend: Backend) -> None:
    available(backend)
    cache = make_cache([33, 30], layout="contiguous", form=Sketch(8))
    kv, keys, values = without_tokens(cache)
    for length in range(1, 34):
        lengths = torch.tensor([length, max(0, length - 3)])
        where = (lengths - 1).clamp(min=0)
        new_keys, new_values = (torch.stack([tokens[b, :, where[b]] for b in range(2)]) for tokens in (keys, values))
        append_token(kv, new_keys, new_values, lengths, backend=backend)
        assert_kept_is_the_keys(replace(cache, seq_lens=lengths))


def test_a_token_that_completes_no_page_costs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache([15, 22], layout="contiguous", form=Sketch(8))
    taken: list[int] = []
    monkeypatch.setattr(Sketch, "take", lambda _, into, *__: taken.append(len(into)))
    token = torch.randn(2, 2, 16)
    append_token(cache.kv, token, token, torch.tensor([15, 22]))
    assert not taken
    append_token(cache.kv, token, token, torch.tensor([16, 23]))
    append_token(cache.kv, token, token, torch.tensor([0, 24]))
    assert taken == [1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_slots(layout: str, backend: Backend) -> None:
    """A page is taken when its last slot is written, whoever wrote the others, and when."""
    available(backend)
    kv = make_cache([64], layout=layout, form=Sketch(8)).kv
    for page in range(3):  # of which nobody knows anything but page 0, 1 and 2
        kv.keys[page] = math.nan
    kv.metadata.zero_()
    generator = torch.Generator().manual_seed(5)
    done = [[8, 9, 10], [*range(16, 24), -1, 11], [*range(12, 15)], [15, 0, 1], [22, 23], [*range(2, 8)], [3, -1]]
    complete_after: list[list[int]] = [[], [2], [2], [1, 2], [1, 2], [0, 1, 2], [1, 2]]
    for slots, pages in zip(done, complete_after, strict=True):
        keys, values = torch.randn(2, len(slots), 2, 16, generator=generator)
        append_slots(kv, keys, values, torch.tensor(slots), backend=backend)
        for page in pages:
            exact = torch.stack([Sketch(8).take_by_hand(kv.metadata[page, h], kv.keys[page, :, h], 0) for h in (0, 1)])
            assert_sketches_alike(kv.metadata[page, :, 0], exact[:, 0], kv.keys[page].transpose(0, 1))
        assert all(bool(kv.metadata[page].any()) == (page in pages or slots == [3, -1]) for page in range(3))


def test_metadata_alone_is_refused() -> None:
    kv = make_cache([64], form=Sketch(8)).kv
    with pytest.raises(QuestValueError, match="form: got 'sketch', expected a form that takes tokens"):
        update_slot_metadata(kv.metadata, kv.keys[0], torch.arange(8), page_size=8, form=Sketch(8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rolled_back_and_written_anew(layout: str, backend: Backend) -> None:
    available(backend)
    cache = make_cache([40, 40], layout=layout, form=Sketch(8))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend=backend)
    generator = torch.Generator().manual_seed(9)
    for length, end in ((21, 24), (8, 30), (29, 40)):
        for b in range(2):
            for token in range(length, end):
                page, offset = int(cache.kv.page_table[b, token // 8]), token % 8
                cache.kv.keys[page, offset] = torch.randn(2, 16, generator=generator)
        lengths = torch.tensor([end, end])
        update_page_metadata(cache.kv, lengths, lengths - length, backend=backend)
        assert_kept_is_the_keys(replace(cache, seq_lens=lengths))


def test_many_pages_are_sketched_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = (make_cache([90, 30], layout="contiguous", form=Sketch(8)) for _ in range(2))
    update_page_metadata(whole.kv, 30, 30)
    monkeypatch.setattr("quest_attention.forms.sketch._CHUNK", 1)
    update_page_metadata(cut.kv, 30, 30)
    assert_kept_is_the_keys(replace(cut, seq_lens=torch.tensor([30, 30])))
    torch.testing.assert_close(cut.kv.metadata, whole.kv.metadata)


def test_autocast_rounds_no_key() -> None:
    keys = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sketched(keys)
    assert torch.equal(rounded, sketched(keys))


# Longer than 250 lines: the bytes and what they are taken from, with the tests' own reading of both.

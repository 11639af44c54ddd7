"""Every form of page metadata on every backend; what bounds alone promise is in test_against_oracle.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, FAST_BACKENDS, available
from caches import LAYOUTS, Cache, make_cache
from likeness import assert_like_oracle, query_for
from quest_attention import QuestConfig, QuestValueError, quest_decode, score_pages, update_page_metadata
from quest_attention.config import Backend
from quest_attention.forms import DEVIATION, FP8, MEAN, Bounds, MetadataForm, Moments, form_of
from quest_attention.ops import append_slots, append_token, reference, update_slot_metadata
from quest_attention.pages import PagedKV, num_pages

KINDS = (Bounds(), Moments(1.0))
FORMS = (*KINDS, Moments(0.5))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDE = torch.finfo(torch.float32).eps


def config_of(form: MetadataForm, **options: object) -> QuestConfig:
    given = {"token_budget": 32, "page_size": 8, "num_sink_pages": 0, "metadata": form.name, **options}
    if isinstance(form, Moments):
        given["moments_coefficient"] = form.coefficient
    return QuestConfig.from_dict(given)


def assert_kept(ours: PagedKV, exact: PagedKV) -> None:
    """The oracle's metadata but for the order of float32's sums, and one rounding to the dtype it is stored in.

    A mean of n keys is off by at most n roundings of the largest of them, and a deviation, the length of a vector that
    the mean is taken from, by no more than the mean (both as in Higham, Accuracy and Stability, 2002, chapter 4).
    """
    stored, expected = ours.metadata.double(), exact.metadata.double()
    largest = exact.keys.double().nan_to_num(0).abs().max()
    room = 4 * exact.page_size * WIDE * largest + expected.abs() * torch.finfo(exact.metadata.dtype).eps
    if exact.form.is_bound:
        room = torch.zeros_like(expected)
    is_like = ((stored - expected).abs() <= room) | (stored.isnan() & expected.isnan())
    assert bool(is_like.all()), f"off by up to {(stored - expected)[~is_like].abs().max():.3g}"


@pytest.mark.parametrize("form", KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_chunks_are_taken_as_by_the_oracle(
    form: MetadataForm, layout: str, dtype: torch.dtype, backend: Backend
) -> None:
    """Each from what the oracle kept before it, so that a rounding of storage does not add to the next."""
    ours, exact = (make_cache([70, 41, 8], dtype=dtype, layout=layout, form=form) for _ in range(2))
    before = torch.zeros(3, dtype=torch.int32)
    for step in ([20, 8, 1], [1, 1, 1], [4, 3, 0], [45, 29, 6]):
        new = torch.tensor(step, dtype=torch.int32)
        before += new
        ours.kv.metadata.copy_(exact.kv.metadata)
        update_page_metadata(ours.kv, before, new, backend=available(backend))
        reference.update_page_metadata(exact.kv, before.tolist(), step)
        assert_kept(ours.kv, exact.kv)
    assert before.tolist() == exact.lengths


@pytest.mark.parametrize("form", KINDS, ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("start", [0, 3, 8])
def test_a_contiguous_cache_of_equal_lengths(form: MetadataForm, backend: Backend, start: int) -> None:
    ours, exact = (make_cache([40, 40], layout="contiguous", form=form) for _ in range(2))
    reference.update_page_metadata(exact.kv, [start] * 2, [start] * 2)
    for end in (start + 1, start + 7, 40):
        ours.kv.metadata.copy_(exact.kv.metadata)
        update_page_metadata(ours.kv, end, end - start, backend=available(backend))
        reference.update_page_metadata(exact.kv, [end] * 2, [end - start] * 2)
        assert_kept(ours.kv, exact.kv)
        start = end


@pytest.mark.parametrize("form", KINDS, ids=str)
@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_slots_are_taken_as_by_the_oracle(
    form: MetadataForm, layout: str, dtype: torch.dtype, backend: Backend
) -> None:
    ours, exact = (make_cache([64], dtype=dtype, layout=layout, form=form).kv for _ in range(2))
    generator = torch.Generator().manual_seed(5)
    for slots in ([*range(8, 21), 0, 1], [21, 2, -1], [22, 23, 3], [40, -1, 4], [*range(5, 8), *range(41, 48)]):
        ours.metadata.copy_(exact.metadata)
        where = torch.tensor(slots)
        keys, values = torch.randn(2, len(slots), 2, 16, generator=generator).to(dtype)
        append_slots(ours, keys, values, where, backend=available(backend))
        reference.append_slots(exact, keys, values, slots)
        assert torch.equal(ours.keys[1:3], exact.keys[1:3])
        assert_kept(ours, exact)
        alone = replace(ours, metadata=ours.metadata.clone())
        update_slot_metadata(alone.metadata, keys[:0], where[:0], page_size=8, form=form, backend=backend)
        assert torch.equal(alone.metadata.nan_to_num(7), ours.metadata.nan_to_num(7))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by", ["whole", "chunks", "tokens", "slots"])
def test_moments_are_those_of_the_keys_however_they_came(backend: Backend, dtype: torch.dtype, by: str) -> None:
    """A rounding to the stored dtype for each time that a page was written to."""
    cache = make_cache([61], layout="contiguous", dtype=dtype, form=Moments(1.0))
    kv, backend = cache.kv, available(backend)
    keys, values = (tensor[:, :, :61].clone() for tensor in (kv.contiguous.keys, kv.contiguous.values))
    lengths = [torch.tensor([end]) for end in range(1, 62)]
    if by == "whole":
        update_page_metadata(kv, 61, 61, backend=backend)
    elif by == "chunks":
        for start, end in ((0, 13), (13, 14), (14, 40), (40, 61)):
            update_page_metadata(kv, end, end - start, backend=backend)
    elif by == "tokens":
        for token, length in enumerate(lengths):
            append_token(kv, keys[:, :, token], values[:, :, token], length, backend=backend)
    else:  # head 0's pages come first
        slots = torch.arange(61)
        new_keys, new_values = (tensor[0].transpose(0, 1).contiguous() for tensor in (keys, values))
        for part in (slots[:30], slots[30:31], slots[31:]):
            append_slots(kv, new_keys[part], new_values[part], part, backend=backend)
    writes = 1 if by == "whole" else 8
    largest = float(keys.double().abs().max())
    for page in range(num_pages(61, 8)):
        exact = keys[0, :, page * 8 : (page + 1) * 8].double()
        for row, expected in ((MEAN, exact.mean(1)), (DEVIATION, exact.std(1, correction=0))):
            error = (kv.contiguous.metadata[0, :, page, row].double() - expected).abs().max()
            assert float(error) <= writes * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_step_is_the_oracles(
    form: MetadataForm, layout: str, dtype: torch.dtype, group: int, backend: Backend
) -> None:
    cache = make_cache([100, 37, 1, 0], dtype=dtype, layout=layout, form=form)
    reduction = "max" if group == 1 else "mean"
    assert_like_oracle(cache, group, config_of(form, backend=available(backend), group_reduction=reduction))


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize(("dim", "page_size"), [(80, 8), (128, 16), (64, 32)])
def test_head_dims_and_page_sizes(form: MetadataForm, backend: Backend, dim: int, page_size: int) -> None:
    cache = make_cache([page_size * 11 + 3] * 2, dim=dim, page_size=page_size, layout="contiguous", form=form)
    config = config_of(form, backend=available(backend), page_size=page_size, token_budget=4 * page_size)
    assert_like_oracle(cache, 2, config, host_length=page_size * 11 + 3)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("alone", [False, True], ids=["in a chunk", "appended"])
def test_a_page_with_a_non_finite_key_ranks_first(
    form: MetadataForm, backend: Backend, bad: float, alone: bool
) -> None:
    cache = make_cache([27], layout="nhd", form=form)
    kv, lengths, backend = cache.kv, cache.seq_lens, available(backend)
    cache.kv.keys[int(kv.page_table[0, 3]), 1, 1, 5] = bad
    if alone:
        update_page_metadata(kv, lengths - 2, lengths - 2, backend=backend)
        for back in (1, 0):
            update_page_metadata(kv, lengths - back, 1, backend=backend)
    else:
        update_page_metadata(kv, lengths, lengths, backend=backend)
    scores = score_pages(query_for(cache, 2), kv, lengths, backend=backend)
    assert scores[0, 1, 3] == float("inf")
    assert scores[0, 0].isfinite().tolist() == [True] * 4 + [False]  # no page, -inf


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_page_starts_anew_whoever_used_it(form: MetadataForm, backend: Backend) -> None:
    """Poisoned metadata of pages that begin does not show; a page taken anew after a rollback is that of its tokens."""
    cache, fresh = (make_cache([20], form=form, layout="contiguous") for _ in range(2))
    backend = available(backend)
    update_page_metadata(cache.kv, 20, 20, backend=backend)
    assert cache.kv.contiguous.metadata[:, :, :3].isfinite().all()
    update_page_metadata(cache.kv, 18, 18 % 8, backend=backend)
    update_page_metadata(fresh.kv, 18, 18, backend=backend)
    assert torch.equal(cache.kv.contiguous.metadata[:, :, :3], fresh.kv.contiguous.metadata[:, :, :3])


def test_a_configs_form_is_the_caches() -> None:
    cache = make_cache([70], form=Moments(0.5))
    query = query_for(cache, 1)
    with pytest.raises(QuestValueError, match=r"config\.metadata: got 'bounds', expected moments, as the cache"):
        quest_decode(query, cache.kv, cache.seq_lens, QuestConfig.paper(32, page_size=8))
    with pytest.raises(QuestValueError, match=r"config\.metadata: got Moments\(coefficient=1"):
        quest_decode(query, cache.kv, cache.seq_lens, QuestConfig(32, 8, metadata="moments"))
    assert form_of(QuestConfig(metadata="moments", moments_coefficient=0.5)) == cache.kv.form


def test_metadata_of_a_form_has_its_dtype() -> None:
    kv = make_cache([10]).kv

    def refused(form: MetadataForm, metadata: Tensor) -> str:
        with pytest.raises(QuestValueError) as caught:
            PagedKV(kv.keys, kv.values, metadata, kv.page_table, form=form)
        return str(caught.value)

    assert "for moments of keys in torch.float32" in refused(Moments(1.0), kv.metadata.to(FP8))
    assert "torch.float32 or torch.float8_e4m3fn, for bounds" in refused(Bounds(), kv.metadata.half())


def test_what_a_config_asks_of_a_form() -> None:
    assert QuestConfig(metadata="moments").num_sink_pages == 1
    assert QuestConfig(metadata="moments", num_sink_pages=0).num_sink_pages == 0
    assert QuestConfig(metadata="bounds").num_sink_pages == 0
    with pytest.raises(QuestValueError, match="metadata_dtype: got 'fp8', expected kv for moments"):
        QuestConfig(metadata="moments", metadata_dtype="fp8")
    with pytest.raises(QuestValueError, match="metadata: got 'moment', expected one of bounds, moments"):
        QuestConfig.from_dict({"metadata": "moment"})
    for bad in (-1, float("nan"), float("inf"), True, "1"):
        with pytest.raises(QuestValueError, match="moments_coefficient"):
            QuestConfig.from_dict({"moments_coefficient": bad})


def test_forms_of_the_users_own_are_named() -> None:
    kv = make_cache([10]).kv
    for form in ("moments", Moments):
        with pytest.raises(QuestValueError, match=r"form: got .*, expected a form, such as"):
            replace(kv, form=form)
    for bad in ("x", -1.0, float("nan"), 1e38, 10**400):
        with pytest.raises(QuestValueError, match=r"coefficient: got .*, expected a number from 0 to 100"):
            Moments(bad)
    pytest.importorskip("triton", reason="Triton is for Linux")
    from quest_attention.ops.triton.forms import kernel_form  # noqa: PLC0415 - needs triton

    class Mean(Bounds):
        name = "mean"

    with pytest.raises(QuestValueError, match="form: got 'mean', expected bounds or moments for the Triton kernels"):
        kernel_form(Mean())


def test_caches_of_one_form_are_alike() -> None:
    one, other = make_cache([5], form=Moments(2.0)), make_cache([5], form=Moments(2.0))
    assert isinstance(one, Cache) and one.kv.form == other.kv.form != Moments(1.0)

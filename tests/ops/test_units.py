"""Units smaller than a page: which are selected, and what is read of them, against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, available, interpreted
from caches import LAYOUTS, Cache, make_cache
from exact_keys import ExactKeys
from likeness import as_lists, query_for
from quest_attention import BackendError, QuestConfig, QuestValueError, Selection, select_pages, sparse_decode_attention
from quest_attention.config import Backend, SelectionUnit
from quest_attention.ops import (
    DecodeWorkspace,
    Step,
    append_slots,
    append_token,
    count_reads,
    make_workspace,
    reference,
    run_step,
    score_pages,
    update_page_metadata,
    update_slot_metadata,
)

LENGTH, PAGE_SIZE = 90, 8
UNITS: dict[SelectionUnit, int] = {"page": PAGE_SIZE, 4: 4, "token": 1}
TOKEN = torch.arange(LENGTH)
MASKS = {
    "no mask": None,
    "left padding": TOKEN >= 21,
    "right padding": TOKEN < 50,
    "padding within the budget": TOKEN >= 70,
    "a token of each page": TOKEN % PAGE_SIZE == 3,
    "every second token": TOKEN % 2 == 0,
    "one token": TOKEN == 40,
    "nothing": TOKEN < 0,
    "narrower than the sequence": TOKEN[:60] >= 0,
    "wider than the cache": torch.arange(300) % 3 > 0,
}


def mask_of(name: str) -> Tensor | None:
    """The mask for one sequence, its mirror image for another."""
    mask = MASKS[name]
    return None if mask is None else torch.stack([mask, mask.flip(0)])


def random_scores(batch: int, units: int, seed: int = 0) -> Tensor:
    """With ties, and infinite ones of either sign, as a caller's own may be."""
    scores = torch.randn(batch, 2, units, generator=torch.Generator().manual_seed(seed)).mul(2).round()
    scores[..., ::7], scores[..., 3::11] = float("inf"), -float("inf")
    return scores


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("host", [False, True], ids=["", "host"])
@pytest.mark.parametrize(("budget", "sinks", "recent"), [(24, 0, 1), (27, 1, 2), (30, 0, 0), (8, 0, 1), (89, 2, 1)])
@pytest.mark.parametrize("name", MASKS)
def test_units_are_chosen_as_by_the_oracle(
    name: str, budget: int, sinks: int, recent: int, host: bool, unit: SelectionUnit, backend: Backend
) -> None:
    available(backend)
    size, mask = UNITS[unit], mask_of(name)
    lengths = [LENGTH, LENGTH if host else 61]
    scores = random_scores(2, 13 * PAGE_SIZE // size)
    options = {"num_sink_pages": sinks, "num_recent_pages": recent, "token_mask": mask}
    selected = select_pages(
        scores, LENGTH if host else torch.tensor(lengths), page_size=PAGE_SIZE, token_budget=budget,
        selection_unit=unit, **options, backend=backend,
    )  # fmt: skip
    expected = reference.select_pages(scores, lengths, PAGE_SIZE, budget, **options, unit_size=size)
    assert as_lists(selected.units) == expected
    assert selected.counts.tolist() == [[len(head) for head in row] for row in expected]
    assert selected.unit_size == size
    assert selected.units.shape[2] <= -(-budget // size) + (mask is not None and size > 1)
    assert selected.units.dtype == torch.int32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [90, torch.tensor([90])], ids=["host", "device"])
def test_forced_pages_are_read_with_all_their_units(lengths: Tensor | int, backend: Backend) -> None:
    """Page 0, the whole page 10 and the two tokens of page 11: 18 tokens; the other 12 are the best."""
    available(backend)
    scores = -torch.arange(96.0).expand(1, 1, -1)
    options = {"page_size": 8, "token_budget": 30, "num_sink_pages": 1, "num_recent_pages": 2, "backend": backend}
    selected = select_pages(scores, lengths, **options, selection_unit="token")
    assert selected.units.tolist() == [[[*range(8 + 12), *range(80, 90)]]]
    selected = select_pages(scores[..., :24], lengths, **options, selection_unit=4)
    assert as_lists(selected.units) == [[[0, 1, 2, 3, 20, 21, 22]]], "28 tokens of 7 units, the last part-filled"


@pytest.mark.parametrize("backend", BACKENDS)
def test_sink_pages_are_counted_among_those_with_a_token_to_attend_to(backend: Backend) -> None:
    available(backend)
    mask = torch.arange(90)[None] >= 21
    scores = -torch.arange(96.0).expand(1, 1, -1)
    selected = select_pages(
        scores, 90, page_size=8, token_budget=16, num_sink_pages=1, token_mask=mask, selection_unit="token",
        backend=backend,
    )  # fmt: skip
    assert selected.units.tolist() == [[[*range(21, 21 + 14), 88, 89]]], "page 2 has three tokens that are alive"


@interpreted
@pytest.mark.parametrize("budget", [17, 30])
def test_candidates_of_many_sections_are_merged_some_at_a_time(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    available("triton")
    from quest_attention.ops.triton import choice  # noqa: PLC0415 - needs triton

    monkeypatch.setattr(choice, "_SECTION_UNITS", 16)
    monkeypatch.setattr(choice, "_MOST_CANDIDATES", 64)
    scores, lengths = random_scores(2, 13 * PAGE_SIZE), [LENGTH, 61]
    options = {"page_size": PAGE_SIZE, "token_budget": budget, "num_sink_pages": 1}
    for mask in (None, mask_of("every second token"), mask_of("left padding")):
        selected = select_pages(
            scores, torch.tensor(lengths), **options, selection_unit="token", token_mask=mask, backend="triton"
        )
        expected = reference.select_pages(scores, lengths, PAGE_SIZE, budget, 1, token_mask=mask, unit_size=1)
        assert as_lists(selected.units) == expected
    with pytest.raises(BackendError, match="got 'triton' for 40 units of 104, expected at most 32: backend 'torch'"):
        select_pages(scores, 100, **options | {"token_budget": 40}, selection_unit="token", backend="triton")


@pytest.mark.parametrize("unit", UNITS)
def test_scores_may_end_with_the_sequence(unit: SelectionUnit) -> None:
    size = UNITS[unit]
    scores = random_scores(1, -(-LENGTH // size))
    expected = reference.select_pages(scores, [LENGTH], PAGE_SIZE, 40, 1, 2, unit_size=size)
    for lengths in (LENGTH, torch.tensor([LENGTH])):
        selected = select_pages(
            scores, lengths, page_size=PAGE_SIZE, token_budget=40, num_sink_pages=1, num_recent_pages=2,
            selection_unit=unit,
        )  # fmt: skip
        assert as_lists(selected.units) == expected
    with pytest.raises(QuestValueError, match="seq_lens"):
        select_pages(scores[..., :-1], LENGTH, page_size=PAGE_SIZE, token_budget=40, selection_unit=unit)


def test_units_that_are_none_are_refused() -> None:
    scores = torch.zeros(1, 1, 40)
    for bad in ("pages", 8, 4.0, True):
        with pytest.raises(QuestValueError, match=r"selection_unit: got .*, expected one of page, token, 4"):
            select_pages(scores, 4, page_size=8, token_budget=16, selection_unit=bad)
    with pytest.raises(QuestValueError, match=r"selection_unit: got 4, .* does not divide 10"):
        select_pages(scores, 4, page_size=10, token_budget=20, selection_unit=4)


def lists_of_units(batch: int, units: int, size: int) -> Tensor:
    """Different units in no order, with gaps, and some that are none."""
    generator = torch.Generator().manual_seed(size)
    lists = torch.stack([torch.randperm(units, generator=generator)[: units // 2] for _ in range(2 * batch)])
    lists[:, 1], lists[:, 4] = -1, units + 3
    return lists.view(batch, 2, -1).to(torch.int32)


def selection_of(units: Tensor, size: int) -> Selection:
    return Selection(units, (units >= 0).sum(-1, dtype=torch.int32), size)


def assert_reads_like_oracle(cache: Cache, seq_lens: Tensor | int, units: Tensor, size: int, backend: Backend) -> None:
    query = query_for(cache, 3, dtype=torch.float32)
    lengths = [seq_lens] * cache.kv.batch_size if isinstance(seq_lens, int) else seq_lens.tolist()
    for mask in (None, torch.arange(LENGTH).expand(len(lengths), -1) % 3 != 0):
        for options in ({}, {"softcap": 5.0, "sinks": torch.linspace(-1, 1, query.shape[1])}):
            selected = selection_of(units, size)
            given = {"sm_scale": 0.25, "token_mask": mask, **options}
            exact, exact_lse = reference.sparse_decode_attention(
                query, cache.kv, lengths, units.tolist(), unit_size=size, **given
            )
            for return_lse in (False, True):
                output, lse = sparse_decode_attention(
                    query, cache.kv, seq_lens, selected, **given, return_lse=return_lse, backend=backend
                )
                torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=3e-6)
            assert lse is not None
            torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", ["host", "int32", "int64"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_of_any_units_are_read_as_by_the_oracle(layout: str, size: int, lengths: str, backend: Backend) -> None:
    available(backend)
    cache = make_cache([LENGTH, LENGTH if lengths == "host" else 33], layout=layout)
    seq_lens = LENGTH if lengths == "host" else cache.seq_lens.to(getattr(torch, lengths))
    units = lists_of_units(2, -(-LENGTH // size), size)
    assert_reads_like_oracle(cache, seq_lens, units, size, backend)
    assert_reads_like_oracle(cache, seq_lens, units[..., :0], size, backend)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("scales", ["tensor", "head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_units_of_a_cache_in_8_bits(size: int, scales: str, layout: str) -> None:
    cache = make_cache([LENGTH, 41], layout=layout, scales=scales)
    assert_reads_like_oracle(cache, cache.seq_lens, lists_of_units(2, -(-LENGTH // size), size), size, "torch")


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_units_of_storage_with_other_strides(size: int, layout: str) -> None:
    """Every second page, token, head and the first channels of a larger tensor."""
    cache = make_cache([LENGTH, 41], layout=layout)
    kv = cache.kv

    def spread(tensor: Tensor) -> Tensor:
        pages, tokens, heads, dim = tensor.shape
        large = torch.full((2 * pages, 2 * tokens, 3 * heads, dim + 5), float("nan"))
        if layout == "hnd":
            large = large.transpose(1, 2).contiguous().transpose(1, 2)
        view = large[::2, 1::2, 1::3, 2 : 2 + dim]
        view.copy_(tensor)
        return view

    apart = Cache(replace(kv, keys=spread(kv.keys), values=spread(kv.values)), cache.seq_lens)
    assert_reads_like_oracle(apart, cache.seq_lens, lists_of_units(2, -(-LENGTH // size), size), size, "torch")


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_page_tables_may_hold_anything_past_an_end(size: int, layout: str) -> None:
    cache = make_cache([LENGTH, 33, 0], layout=layout)
    for b, length in enumerate(cache.lengths):
        cache.kv.page_table[b, -(-length // PAGE_SIZE) :] = 10**9
    assert_reads_like_oracle(cache, cache.seq_lens, lists_of_units(3, 90 // size, size), size, "torch")


@pytest.mark.parametrize("size", [1, 4])
def test_whole_lists_of_the_host_need_no_mask(size: int) -> None:
    """The form of a decode step on a CPU: every slot used, the last unit last and perhaps part-filled."""
    last = -(-LENGTH // size) - 1
    units = torch.tensor([0, 3, 5, last], dtype=torch.int32).expand(2, 2, -1)
    for layout in LAYOUTS:
        assert_reads_like_oracle(make_cache([LENGTH, LENGTH], layout=layout), LENGTH, units, size, "torch")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_of_another_width(unit: SelectionUnit, layout: str) -> None:
    size = UNITS[unit]
    cache = make_cache([LENGTH, LENGTH], layout=layout)
    if layout == "contiguous":
        stored = cache.kv.contiguous
        kv = type(cache.kv).from_contiguous(stored.keys, stored.values[..., :12].contiguous(), stored.metadata)
    else:
        kv = replace(cache.kv, values=cache.kv.values[..., :12])
    assert_reads_like_oracle(Cache(kv, cache.seq_lens), LENGTH, lists_of_units(2, 90 // size, size), size, "torch")


def test_a_batch_of_none_and_a_table_of_none() -> None:
    cache = make_cache([20, 9])
    none = replace(cache.kv, page_table=cache.kv.page_table[:0])
    selected = selection_of(torch.zeros(0, 2, 3, dtype=torch.int32), 1)
    query = torch.zeros(0, 4, 16)
    assert sparse_decode_attention(query, none, torch.zeros(0, dtype=torch.int32), selected)[0].shape == (0, 4, 16)
    chosen = select_pages(
        torch.zeros(0, 2, 40), torch.zeros(0, dtype=torch.int32), page_size=8, token_budget=9, selection_unit="token"
    )
    assert chosen.units.shape == (0, 2, 9) and chosen.counts.shape == (0, 2)


@pytest.mark.parametrize("size", [0, 3, 16, -4, True, 4.0, "page"])
def test_units_that_do_not_fill_a_page_are_refused(size: int) -> None:
    cache = make_cache([20, 9])
    selected = selection_of(torch.zeros(2, 2, 1, dtype=torch.int32), size)
    with pytest.raises(QuestValueError, match=r"selected\.unit_size: got "):
        sparse_decode_attention(query_for(cache, 1), cache.kv, cache.seq_lens, selected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 4, 8])
def test_units_are_counted(size: int, backend: Backend) -> None:
    available(backend)
    units = torch.zeros(3, 2, 8, dtype=torch.int32)
    selected = Selection(units, torch.tensor([[8, 8], [5, 6], [0, 0]], dtype=torch.int32), size)
    counters = torch.tensor([1, 1, 1, 1])
    count_reads(selected, torch.tensor([90, 5, 0]), counters, token_budget=8, backend=backend)
    assert counters.tolist() == [2, 2, 1 + 27 // 2, 1 + -(-90 // size) + -(-5 // size)]


def test_memory_is_for_units() -> None:
    kv = make_cache([40, 40], form=ExactKeys()).kv
    pages = QuestConfig(16, 8, metadata="sketch")
    for unit, size in UNITS.items():
        config = replace(pages, selection_unit=unit)
        workspace = make_workspace(kv, 4, config)
        assert isinstance(workspace, DecodeWorkspace)
        assert workspace.scores.shape == (2, 2, kv.max_pages * 8 // size)
        assert workspace.fits(kv, 4, config)
        assert workspace.fits(kv, 4, pages) == (unit == "page")
        step = Step(
            query=torch.zeros(2, 4, 16), kv=kv, seq_lens=torch.tensor([40, 3]), config=config, workspace=workspace
        )
        assert step.scratch is workspace.scores
    with pytest.raises(QuestValueError, match="workspace"):
        replace(step, config=pages)


def test_scores_of_the_callers_own_are_of_units() -> None:
    cache = make_cache([40, 33], form=ExactKeys())
    config = QuestConfig(16, 8, metadata="sketch", num_sink_pages=0, selection_unit=4)
    query = query_for(cache, 2)
    step = Step(query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config)
    done = run_step(step, score=lambda _: -torch.arange(10.0).expand(2, 2, -1))
    assert as_lists(done.selected.units) == [[[0, 1, 8, 9]] * 2, [[0, 1, 2, 8]] * 2]
    exact, _ = reference.sparse_decode_attention(
        query, cache.kv, cache.lengths, as_lists(done.selected.units), 0.25, unit_size=4
    )
    torch.testing.assert_close(done.output.double(), exact, rtol=1e-5, atol=2e-6)
    with pytest.raises(QuestValueError, match="seq_lens"):
        run_step(step, score=lambda _: torch.zeros(2, 2, 9))


def test_the_kernels_refuse_what_they_have_not() -> None:
    backend = available("triton")
    cache = make_cache([20, 9], form=ExactKeys())
    kv, lengths, query = cache.kv, cache.seq_lens, query_for(cache, 2)
    tokens, slots = torch.zeros(2, 2, 16), torch.zeros(2, dtype=torch.int32)
    for call in (
        lambda: update_page_metadata(kv, lengths, lengths, backend=backend),
        lambda: append_token(kv, tokens, tokens, lengths, backend=backend),
        lambda: append_slots(kv, tokens, tokens, slots, backend=backend),
        lambda: update_slot_metadata(kv.metadata, tokens, slots, page_size=8, form=kv.form, backend=backend),
        lambda: score_pages(query, kv, lengths, backend=backend),
    ):
        with pytest.raises(QuestValueError, match=r"form: got .*, expected bounds.* for the Triton kernels"):
            call()


# Longer than 250 lines: selection, attention, counts and memory of the same units.

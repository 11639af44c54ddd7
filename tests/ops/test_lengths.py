"""Lengths of every kind, on host and device; no sequences, no pages, no tokens; table entries that nobody reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, FAST_BACKENDS, available
from caches import LAYOUTS, Cache, make_cache
from likeness import as_lists, query_for
from quest_attention import PagedKV, QuestConfig, QuestValueError
from quest_attention.config import Backend
from quest_attention.ops import (
    Selection,
    append_slots,
    append_token,
    checks,
    count_reads,
    make_workspace,
    quest_decode,
    reference,
    score_pages,
    select_pages,
    sparse_decode_attention,
    update_page_metadata,
    update_slot_metadata,
)

CONTEXT = {"page_size": 8, "token_budget": 24}


def every_verb(cache: Cache, seq_lens: Tensor | int, backend: Backend) -> dict[str, Any]:
    """What the verbs give that take lengths."""
    kv, query = cache.kv, query_for(cache, 2)
    config = QuestConfig(24, 8, backend=backend)
    scores = score_pages(query, kv, seq_lens, backend=backend)
    selected = select_pages(scores, seq_lens, **CONTEXT, backend=backend)
    output, lse = sparse_decode_attention(query, kv, seq_lens, selected, return_lse=True, backend=backend)
    counters = torch.zeros(4, dtype=torch.int64)
    count_reads(selected, seq_lens, counters, token_budget=24, backend=backend)
    step = quest_decode(query, kv, seq_lens, config)
    return {
        "scores": scores,
        "pages": as_lists(selected.units),
        "counts": selected.counts,
        "output": output,
        "lse": lse,
        "counters": counters,
        "step": step.output,
        "pages of the step": as_lists(step.selected.units),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in found.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)
        else:
            assert value == expected[name], name


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [0, 24, 44])
@pytest.mark.parametrize("kind", ["host", "int32", "int64"])
def test_every_kind_of_length(kind: str, length: int, layout: str, backend: Backend) -> None:
    made = {name: make_cache([48, 48], layout=layout) for name in (backend, "reference")}
    seq_lens = length if kind == "host" else torch.full((2,), length, dtype=getattr(torch, kind))
    for name, cache in made.items():
        update_page_metadata(cache.kv, seq_lens, seq_lens, backend=available(name))
    torch.testing.assert_close(made[backend].kv.metadata, made["reference"].kv.metadata, rtol=0, atol=0, equal_nan=True)
    assert_same(every_verb(made[backend], seq_lens, backend), every_verb(made["reference"], seq_lens, "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("host", [False, True])
def test_a_token_is_appended_at_a_length_of_either_kind(host: bool, layout: str, backend: Backend) -> None:
    mine, oracle = (make_cache([20, 20], layout=layout).kv for _ in range(2))
    keys, values = torch.randn(2, 2, 2, 16)
    for length in (17, 18, 0):
        append_token(mine, keys, values, length if host else torch.tensor([length] * 2), backend=available(backend))
        reference.append_token(oracle, keys, values, [length] * 2)
    for part in ("keys", "values", "metadata"):
        torch.testing.assert_close(getattr(mine, part), getattr(oracle, part), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [3.0, None, [40, 40], "40"], ids=repr)
def test_what_is_no_length_is_named(bad: Any) -> None:
    cache, rows = make_cache([40, 40]), torch.zeros(2, 2, 16)
    kv, query = cache.kv, query_for(cache, 2)
    selected = Selection(torch.zeros(2, 2, 1, dtype=torch.int32), torch.ones(2, 2, dtype=torch.int32), 8)
    for call in (
        lambda: append_token(kv, rows, rows, bad),
        lambda: update_page_metadata(kv, bad, 1),
        lambda: score_pages(query, kv, bad),
        lambda: select_pages(torch.zeros(2, 2, 5), bad, **CONTEXT),
        lambda: quest_decode(query, kv, bad, QuestConfig(24, 8)),
        lambda: sparse_decode_attention(query, kv, bad, selected),
        lambda: count_reads(selected, bad, torch.zeros(4, dtype=torch.int64), token_budget=24),
    ):
        with pytest.raises(QuestValueError, match=r"seq_lens: got .*, expected an int or a tensor"):
            call()
    with pytest.raises(QuestValueError, match=r"num_new_tokens: got .*, expected an int or a tensor"):
        update_page_metadata(kv, 40, bad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("seq_lens", "new", "row"),
    [(3, 5, None), ([40, 3], 5, 1), (3, [1, 5], 1), ([40, 3], [1, 5], 1), ([3, 40], [5, 5], 0)],
)
def test_no_more_new_tokens_than_tokens(seq_lens: Any, new: Any, row: int | None, backend: Backend) -> None:
    """Five new ones among three would reach around to the last page of the row's table."""
    cache = make_cache([40, 40])
    update_page_metadata(cache.kv, 40, 40, backend="reference")
    before = cache.kv.metadata.clone()
    lengths, fresh = (torch.tensor(one) if isinstance(one, list) else one for one in (seq_lens, new))
    with pytest.raises(QuestValueError) as caught:
        update_page_metadata(cache.kv, lengths, fresh, backend=available(backend))
    assert (caught.value.argument, caught.value.got) == ("num_new_tokens", 5)
    assert caught.value.expected == "at most seq_lens, 3" + ("" if row is None else f" in row {row}")
    torch.testing.assert_close(cache.kv.metadata, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_new_tokens_than_tokens_are_all_of_them_where_nobody_looks(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU lengths are not read by the host: no page but the row's own may be written to."""
    monkeypatch.setattr(checks, "_is_readable", lambda _: False)
    mine, oracle = make_cache([40, 3]), make_cache([40, 3])
    update_page_metadata(mine.kv, mine.seq_lens, torch.tensor([1, 5]), backend=available(backend))
    reference.update_page_metadata(oracle.kv, [40, 3], [1, 3])
    torch.testing.assert_close(mine.kv.metadata, oracle.kv.metadata, rtol=0, atol=0, equal_nan=True)


@pytest.mark.every_value
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_table_entries_past_the_end_are_not_read(layout: str, backend: Backend) -> None:
    """A server leaves there what it likes."""
    found = []
    for junk in (None, -1, 1 << 30, -(1 << 31)):
        cache = make_cache([44, 9, 0], layout=layout)
        past = torch.arange(cache.kv.max_pages) * 8 >= cache.seq_lens[:, None]
        if junk is not None:
            cache.kv.page_table[past] = junk
        update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend=available(backend))
        found.append(every_verb(cache, cache.seq_lens, backend))
        append_token(cache.kv, torch.zeros(3, 2, 16), torch.zeros(3, 2, 16), cache.seq_lens, backend=backend)
    for one in found[1:]:
        assert_same(one, found[0])


def empty(batch: int, pages: int, layout: str, held: int = 4) -> PagedKV:
    """A cache of so many sequences and pages."""
    if layout == "contiguous":
        keys = torch.zeros(batch, 2, max(1, pages) * 8, 16)
        kv = PagedKV.from_contiguous(keys, keys.clone(), torch.zeros(batch, 2, max(1, pages), 2, 16))
        return kv if pages else replace(kv, page_table=kv.page_table[:, :0], contiguous=None)
    shape = (held, 8, 2, 16) if layout == "nhd" else (held, 2, 8, 16)
    make = PagedKV.from_nhd if layout == "nhd" else PagedKV.from_hnd
    table = torch.zeros(batch, pages, dtype=torch.int32)
    return make(torch.zeros(shape), torch.zeros(shape), torch.zeros(held, 2, 2, 16), table)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["hnd", "contiguous"])
@pytest.mark.parametrize(("batch", "pages"), [(0, 4), (0, 0), (2, 0), (2, 4)])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("kind", ["host", "tensor"])
def test_no_sequences_no_pages_and_no_tokens(
    kind: str, masked: bool, batch: int, pages: int, layout: str, backend: Backend
) -> None:
    kv = empty(batch, pages, layout, held=0 if (batch, pages) == (0, 0) else 4)
    seq_lens: Any = 0 if kind == "host" else torch.zeros(batch, dtype=torch.int32)
    query, rows = torch.randn(batch, 4, 16), torch.randn(batch, 2, 16)
    options: dict[str, Any] = {"token_mask": torch.ones(batch, 30, dtype=torch.bool)} if masked else {}
    config = QuestConfig(24, 8, backend=available(backend))
    update_page_metadata(kv, seq_lens, seq_lens, backend=backend)
    append_token(kv, rows, rows, seq_lens, backend=backend)
    append_slots(kv, rows, rows, torch.full((batch,), -1), backend=backend)
    update_slot_metadata(kv.metadata, rows, torch.full((batch,), -1), page_size=8, backend=backend)
    scores = score_pages(query, kv, seq_lens, **options, backend=backend)
    assert scores.shape == (batch, 2, kv.max_pages) and (scores == -float("inf")).all()
    selected = select_pages(scores, seq_lens, **CONTEXT, **options, backend=backend)
    assert selected.units.shape[:2] == (batch, 2) and selected.counts.tolist() == [[0, 0]] * batch
    for sinks in (None, torch.arange(4.0)):
        output, lse = sparse_decode_attention(
            query, kv, seq_lens, selected, sinks=sinks, return_lse=True, **options, backend=backend
        )
        assert output.shape == (batch, 4, 16) and not output.any()
        assert lse is not None
        assert lse.tolist() == [[-float("inf")] * 4 if sinks is None else sinks.tolist()] * batch
    for workspace in (None, make_workspace(kv, 4, config)):
        out = torch.full((batch, 4, 16), float("nan"))
        step = quest_decode(query, kv, seq_lens, config, workspace=workspace, out=out, **options)
        assert step.output is out and not out.any() and step.selected.counts.tolist() == [[0, 0]] * batch
    counters = torch.zeros(4, dtype=torch.int64)
    count_reads(selected, seq_lens, counters, token_budget=24, backend=backend)
    assert not counters.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [None, [1, 2, 5]], ids=str)
@pytest.mark.parametrize("narrower", [0, 1], ids=["", "fewer pages"])
def test_a_workspace_serves_a_masked_step(narrower: int, sizes: list[int] | None, backend: Backend) -> None:
    """Where the kernel of one launch has no mask, the verbs take its memory."""
    cache = make_cache([44, 29])
    kv, query = cache.kv, query_for(cache, 2)
    config = QuestConfig.paper(24, page_size=8, backend=available(backend))
    update_page_metadata(kv, cache.seq_lens, cache.seq_lens)
    memory = make_workspace(kv, 4, config, batch_sizes=sizes)
    assert memory is not None
    kv = replace(kv, page_table=kv.page_table[:, : kv.max_pages - narrower])
    if not memory.fits(kv, 4, config):
        assert backend != "triton"
        return
    mask = torch.rand(2, 44) < 0.7
    step = quest_decode(query, kv, cache.seq_lens, config, token_mask=mask, workspace=memory)
    exact = quest_decode(query, kv, cache.seq_lens, replace(config, backend="reference"), token_mask=mask)
    assert as_lists(step.selected.units) == as_lists(exact.selected.units)
    torch.testing.assert_close(step.output, exact.output, rtol=1e-5, atol=2e-6)

"""Every backend against the oracle, and the oracle against facts that need no code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from caches import LAYOUTS, make_cache
from likeness import as_lists, assert_like_oracle, assert_scores_like_oracle, query_for
from quest_attention import (
    QuestConfig,
    QuestValueError,
    quest_decode,
    score_pages,
    select_pages,
    sparse_decode_attention,
    update_page_metadata,
)
from quest_attention.ops import reference, torch_backend
from quest_attention.ops.gathering import UnitCopies
from quest_attention.pages import KEY_MAX, KEY_MIN, num_pages

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
def test_group_sizes(layout: str, dtype: torch.dtype, group: int) -> None:
    cache = make_cache([100, 37, 1], dtype=dtype, layout=layout)
    assert_like_oracle(cache, group, QuestConfig(token_budget=32, page_size=8))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [8, 16, 32, 64])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_page_sizes_and_head_dims(layout: str, page_size: int, dim: int) -> None:
    cache = make_cache([page_size * 5 + 1, page_size * 4, 3], dim=dim, page_size=page_size, layout=layout)
    assert_like_oracle(cache, 2, QuestConfig(token_budget=3 * page_size, page_size=page_size))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [[1], [8], [9], [0, 40], [64, 64], [7, 8, 9, 63, 64, 65], [200, 0, 1]], ids=str)
@pytest.mark.parametrize("budget", [8, 24, 30, 64, 65, 1000])
def test_lengths_and_budgets(layout: str, lengths: list[int], budget: int) -> None:
    cache = make_cache(lengths, layout=layout)
    assert_like_oracle(cache, 2, QuestConfig.paper(budget, page_size=8))


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (1, 1), (2, 3), (0, 4)])
def test_forced_pages(reduction: str, sinks: int, recent: int) -> None:
    cache = make_cache([130, 90, 17])
    config = QuestConfig.from_dict(
        {
            "token_budget": 48,
            "page_size": 8,
            "num_sink_pages": sinks,
            "num_recent_pages": recent,
            "group_reduction": reduction,
        }
    )
    assert_like_oracle(cache, 3, config)


@pytest.mark.parametrize("length", [1, 15, 16, 33, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_length_known_to_the_host(length: int, dtype: torch.dtype) -> None:
    cache = make_cache([length, length], layout="contiguous", dtype=dtype)
    assert_like_oracle(cache, 3, QuestConfig(token_budget=32, page_size=8), host_length=length)
    by_host = cache.kv.metadata.clone()
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    torch.testing.assert_close(cache.kv.metadata, by_host, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_go_to_the_lower_page(layout: str) -> None:
    cache = make_cache([64], layout=layout)
    cache.kv.keys[:] = 1.0
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    step = quest_decode(query_for(cache, 2), cache.kv, cache.seq_lens, QuestConfig(token_budget=24, page_size=8))
    assert step.selected.units.tolist() == [[[0, 1, 7]] * 2]


def test_ties_of_negative_zero_and_infinite_scores() -> None:
    scores = torch.tensor([[[-1.0, float("inf"), -3.0, float("inf"), -1.0, -2.0, -1.0, -9.0]]])
    selected = select_pages(scores, 8, page_size=1, token_budget=5)
    assert selected.units.tolist() == [[[0, 1, 3, 4, 7]]]


@pytest.mark.parametrize("config", [
    QuestConfig(metadata="bounds"), QuestConfig(metadata="moments"), QuestConfig().resolved("cuda"),
], ids=lambda config: config.metadata)  # fmt: skip
def test_options_taken_from_a_config_count_whoever_gave_them(config: QuestConfig) -> None:
    scores = torch.randn(1, 2, 4096 // config.unit_size, generator=torch.Generator().manual_seed(0))
    scores[..., 0] = -99  # read where the first page always is
    options = {
        "page_size": config.page_size, "token_budget": config.token_budget, "num_sink_pages": config.num_sink_pages,
        "num_recent_pages": config.num_recent_pages, "selection_unit": config.selection_unit,
    }  # fmt: skip
    plain = {name: str(value) if isinstance(value, str) else int(value) for name, value in options.items()}
    taken, given = select_pages(scores, 4096, **options), select_pages(scores, 4096, **plain)
    assert torch.equal(taken.units, given.units)
    assert int(taken.counts[0, 0]) == config.unit_budget
    assert (taken.units[0, 0, 0] == 0) == (config.num_sink_pages > 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_page_with_a_non_finite_key_is_read(bad: float, layout: str) -> None:
    cache = make_cache([80], layout=layout)
    physical = int(cache.kv.page_table[0, 3])
    cache.kv.keys[physical, 2, 1, 5] = bad
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    query = query_for(cache, 2)
    scores = score_pages(query, cache.kv, cache.seq_lens)
    assert scores[0, 1, 3] == float("inf")
    assert_scores_like_oracle(scores, query, cache)
    step = quest_decode(query, cache.kv, cache.seq_lens, QuestConfig(token_budget=16, page_size=8))
    assert 3 in step.selected.units[0, 1].tolist()
    assert step.output[0, :2].isfinite().all(), "the other KV head is not touched"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_sinks_and_lse(layout: str, softcap: float | None, with_sinks: bool) -> None:
    cache = make_cache([90, 13, 0], layout=layout)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    query = query_for(cache, 3)
    sinks = torch.linspace(-1, 1, query.shape[1]) if with_sinks else None
    config = QuestConfig(token_budget=32, page_size=8)
    step = quest_decode(query, cache.kv, cache.seq_lens, config, softcap=softcap, sinks=sinks)
    output, lse = sparse_decode_attention(
        query, cache.kv, cache.seq_lens, step.selected, softcap=softcap, sinks=sinks, return_lse=True
    )
    lists = as_lists(step.selected.units)
    exact, exact_lse = reference.sparse_decode_attention(
        query, cache.kv, cache.lengths, lists, cache.kv.head_dim**-0.5, softcap=softcap, sinks=sinks
    )
    assert lse is not None
    torch.testing.assert_close(step.output.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_weights_sum_to_one_where_logits_are_large() -> None:
    """A weight is no exponential of the difference of two large numbers, each of them rounded."""
    cache = make_cache([256] * 4, layout="contiguous")
    query = query_for(cache, 4)
    query[..., 0], cache.kv.keys[..., 0] = 1000, 10  # of every logit, which softmax takes away again
    cache.kv.values[:] = 1
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    step = quest_decode(query, cache.kv, cache.seq_lens, QuestConfig(token_budget=128, page_size=8))
    output, _ = sparse_decode_attention(query, cache.kv, cache.seq_lens, step.selected, return_lse=True)
    rounding = 128 * torch.finfo(torch.float32).eps  # of a sum of so many weights
    assert float((output - 1).abs().max()) <= rounding


def masks() -> st.SearchStrategy[list[list[bool]]]:
    """Left padding, right padding, holes, nothing at all."""
    return st.lists(st.lists(st.booleans(), min_size=70, max_size=70), min_size=2, max_size=2)


@given(mask=masks(), pads=st.tuples(st.integers(0, 69), st.integers(0, 69)), host=st.booleans())
@settings(deadline=None, max_examples=40)
def test_token_mask(mask: list[list[bool]], pads: tuple[int, int], host: bool) -> None:
    token_mask = torch.tensor(mask)
    for b, pad in enumerate(pads):
        token_mask[b, :pad] = False
    cache = make_cache([70, 70], layout="contiguous")
    update_page_metadata(cache.kv, 70, 70)
    query = query_for(cache, 2)
    lengths = 70 if host else cache.seq_lens
    config = QuestConfig(token_budget=32, page_size=8, num_sink_pages=1)
    step = quest_decode(query, cache.kv, lengths, config, token_mask=token_mask)
    scores = score_pages(query, cache.kv, lengths, token_mask=token_mask)
    assert_scores_like_oracle(scores, query, cache, token_mask=token_mask)
    selected = reference.select_pages(scores, [70, 70], 8, 32, 1, 1, token_mask)
    assert as_lists(step.selected.units) == selected
    assert step.selected.counts.tolist() == [[len(head) for head in row] for row in selected]
    exact, _ = reference.sparse_decode_attention(
        query, cache.kv, [70, 70], selected, cache.kv.head_dim**-0.5, token_mask=token_mask
    )
    torch.testing.assert_close(step.output.double(), exact, rtol=1e-5, atol=1e-5)


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    group=st.integers(1, 5),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=40)
def test_score_bounds_every_logit(lengths: list[int], layout: str, dtype: torch.dtype, group: int, seed: int) -> None:
    cache = make_cache(lengths, layout=layout, dtype=dtype, seed=seed)
    kv = cache.kv
    update_page_metadata(kv, cache.seq_lens, cache.seq_lens)
    query = query_for(cache, group, seed)
    scores = score_pages(query, kv, cache.seq_lens)
    for b, length in enumerate(lengths):
        for t in range(length):
            key = kv.keys[int(kv.page_table[b, t // kv.page_size]), t % kv.page_size].double()  # [HKV, D]
            logits = (query[b].double().view(kv.num_kv_heads, group, -1) * key[:, None]).sum(-1).amax(1)
            slack = 1e-5 * (query[b].abs().double().amax() * key.abs().amax() * kv.head_dim)
            assert (scores[b, :, t // kv.page_size].double() >= logits - slack).all()
        assert (scores[b, :, num_pages(length, kv.page_size) :] == -float("inf")).all()


@given(
    layout=st.sampled_from(LAYOUTS),
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8),
    host=st.booleans(),
    backend=st.sampled_from(["torch", "reference"]),
)
@settings(deadline=None, max_examples=60)
def test_metadata_in_pieces_equals_metadata_at_once(
    layout: str, steps: list[tuple[int, int]], host: bool, backend: str
) -> None:
    if host:
        steps = [(n, n) for n, _ in steps]
    ends = [sum(step[b] for step in steps) for b in range(2)]
    cache = make_cache(ends, layout=layout, page_size=4)
    kv = cache.kv
    lengths = torch.zeros(2, dtype=torch.int32)
    for step in steps:
        new = torch.tensor(step, dtype=torch.int32)
        lengths = lengths + new
        if host:
            update_page_metadata(kv, int(lengths[0]), step[0], backend=backend)
        else:
            update_page_metadata(kv, lengths, new, backend=backend)
    pieces = kv.metadata.clone()
    kv.metadata.fill_(float("nan"))
    update_page_metadata(kv, cache.seq_lens, cache.seq_lens, backend="reference")
    torch.testing.assert_close(pieces, kv.metadata, rtol=0, atol=0, equal_nan=True)


def test_a_reused_page_starts_anew_and_a_rollback_stays_a_bound() -> None:
    cache = make_cache([12], page_size=8)
    kv = cache.kv
    update_page_metadata(kv, cache.seq_lens, cache.seq_lens)
    wide = kv.metadata[int(kv.page_table[0, 1])].clone()
    # Roll back to 10 tokens and write another eleventh one: the bounds of tokens 10 and 11 may stay.
    kv.keys[int(kv.page_table[0, 1]), 2] = 0.0
    update_page_metadata(kv, torch.tensor([11]), torch.tensor([1]))
    now = kv.metadata[int(kv.page_table[0, 1])]
    assert (now[:, KEY_MAX] >= wide[:, KEY_MAX]).all()
    assert (now[:, KEY_MIN] <= wide[:, KEY_MIN]).all()
    # Roll back to the page's beginning: its first token forgets everything.
    kv.keys[int(kv.page_table[0, 1]), 0] = 0.5
    update_page_metadata(kv, torch.tensor([9]), torch.tensor([1]))
    assert (kv.metadata[int(kv.page_table[0, 1])] == 0.5).all()


@given(
    length=st.integers(1, 90),
    budget_pages=st.integers(3, 12),
    sinks=st.integers(0, 2),
    recent=st.integers(0, 1),
    seed=st.integers(0, 999),
    ties=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_selection_properties(length: int, budget_pages: int, sinks: int, recent: int, seed: int, ties: bool) -> None:
    page_size = 8
    pages = num_pages(length, page_size)
    scores = torch.randn(1, 2, pages + 2, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores = scores.round()
    for lengths in (length, torch.tensor([length])):
        selected = select_pages(
            scores,
            lengths,
            page_size=page_size,
            token_budget=budget_pages * page_size,
            num_sink_pages=sinks,
            num_recent_pages=recent,
        )
        for head in as_lists(selected.units)[0]:
            assert len(set(head)) == len(head) == int(selected.counts[0, 0]) == min(pages, budget_pages)
            assert head == sorted(head)
            assert head[-1] == pages - 1, "the page being written is read, and last"
            assert set(range(min(sinks, pages))) <= set(head)
        expected = reference.select_pages(scores, [length], page_size, budget_pages * page_size, sinks, recent)
        assert as_lists(selected.units) == expected


@given(
    layout=st.sampled_from(["nhd", "hnd"]),
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=3),
    spare=st.integers(1, 7),
    group=st.integers(1, 4),
)
@settings(deadline=None, max_examples=40)
def test_permuting_physical_pages_changes_nothing(layout: str, lengths: list[int], spare: int, group: int) -> None:
    config = QuestConfig(token_budget=24, page_size=8)
    steps = []
    for spare_pages in (0, spare):  # another number of pages gives another permutation of the same contents
        cache = make_cache(lengths, layout=layout, spare_pages=spare_pages)
        update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
        steps.append(quest_decode(query_for(cache, group), cache.kv, cache.seq_lens, config))
    assert torch.equal(steps[0].output, steps[1].output)
    assert torch.equal(steps[0].selected.units, steps[1].selected.units)


def test_layouts_agree() -> None:
    config = QuestConfig(token_budget=24, page_size=8)
    steps = []
    for layout in LAYOUTS:
        cache = make_cache([77, 50], layout=layout)
        update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
        steps.append(quest_decode(query_for(cache, 2), cache.kv, cache.seq_lens, config))
    for step in steps[1:]:
        torch.testing.assert_close(step.output, steps[0].output)
        assert torch.equal(step.selected.units, steps[0].selected.units)


@given(
    layout=st.sampled_from(LAYOUTS),
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    more=st.integers(0, 20),
    group=st.integers(1, 4),
)
@settings(deadline=None, max_examples=40)
def test_a_budget_of_at_least_the_length_is_dense(layout: str, lengths: list[int], more: int, group: int) -> None:
    cache = make_cache(lengths, layout=layout)
    kv = cache.kv
    update_page_metadata(kv, cache.seq_lens, cache.seq_lens)
    query = query_for(cache, group)
    config = QuestConfig.paper(max(8, *lengths, 0) + more, page_size=8)
    step = quest_decode(query, kv, cache.seq_lens, config)
    for b, length in enumerate(lengths):
        if length == 0:
            assert (step.output[b] == 0).all()
            continue
        where = [(int(kv.page_table[b, t // 8]), t % 8) for t in range(length)]
        keys = torch.stack([kv.keys[page, offset] for page, offset in where], 1).repeat_interleave(group, 0)
        values = torch.stack([kv.values[page, offset] for page, offset in where], 1).repeat_interleave(group, 0)
        dense = F.scaled_dot_product_attention(query[b][:, None], keys, values)[:, 0]
        torch.testing.assert_close(step.output[b], dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_output_goes_where_it_is_asked_to(backend: str) -> None:
    cache = make_cache([100, 37], dtype=torch.bfloat16)
    config, query = QuestConfig(token_budget=32, page_size=8, backend=backend), query_for(cache, 2)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    expected = quest_decode(query, cache.kv, cache.seq_lens, config).output
    out = torch.full_like(query, float("nan"))
    assert quest_decode(query, cache.kv, cache.seq_lens, config, out=out).output is out
    assert torch.equal(out, expected)
    for match, wrong in [
        ("out.shape", out[:1]),
        ("out.dtype", out.float()),
        ("out.stride", torch.empty(2, 16, 4, dtype=out.dtype).transpose(1, 2)),
    ]:
        with pytest.raises(QuestValueError, match=match):
            quest_decode(query, cache.kv, cache.seq_lens, config, out=wrong)


@pytest.mark.parametrize(("lengths", "layout"), [([60, 9], "contiguous"), ([77, 0, 20], "nhd")])
def test_reference_is_a_backend(lengths: list[int], layout: str) -> None:
    cache = make_cache(lengths, layout=layout)
    query, config = query_for(cache, 3), QuestConfig(token_budget=32, page_size=8, num_sink_pages=1)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="reference")
    slow, fast = (
        quest_decode(query, cache.kv, cache.seq_lens, replace(config, backend=name)) for name in ("reference", "torch")
    )
    assert torch.equal(slow.selected.units, fast.selected.units)
    torch.testing.assert_close(slow.output, fast.output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scales", [None, "head"])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks", "mask"])
def test_copies_in_parts_are_those_at_once(
    layout: str, scales: str | None, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One KV head of one sequence at a time, and all of them."""
    dtype = torch.float32 if scales is None else torch.bfloat16
    cache = make_cache([100, 37, 64], heads=3, dtype=dtype, layout=layout, scales=scales)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    query = query_for(cache, 2)
    options: dict[str, Any] = {
        "plain": {}, "softcap": {"softcap": 5.0}, "sinks": {"sinks": torch.randn(6)},
        "mask": {"token_mask": torch.rand(3, 104) > 0.3},
    }[extra]  # fmt: skip
    config = QuestConfig.paper(32, page_size=8, backend="torch")
    copied: list[slice] = []
    of_heads = UnitCopies.of_heads

    def counted(copies: UnitCopies, heads: slice) -> Tensor:
        copied.append(heads)
        return of_heads(copies, heads)

    monkeypatch.setattr(UnitCopies, "of_heads", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found, parts = [], []
    for size in (1, 1 << 30):
        monkeypatch.setattr(torch_backend, "_PART_BYTES", size)
        copied.clear()
        found.append(quest_decode(query, cache.kv, cache.seq_lens, config, **options).output)
        parts.append(len(copied))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert parts[0] - parts[1] == 2 * (3 * 3 - 1), "keys and values of each head, in place of all"

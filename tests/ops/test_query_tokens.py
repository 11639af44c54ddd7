"""Several query tokens of a sequence in one step: one choice for all, and each attends to what is no later."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, FAST_BACKENDS, available
from caches import LAYOUTS, Cache, make_cache
from quest_attention import QuestConfig, QuestValueError, quest_decode, update_page_metadata
from quest_attention.config import Backend
from quest_attention.forms import Bounds, MetadataForm, Moments, Sketch
from quest_attention.ops import Selection, reference, sparse_decode_attention
from quest_attention.ops.query_tokens import MOST_QUERY_TOKENS, QueryTokens

PAGE = 8
FORMS: dict[str, tuple[MetadataForm, dict[str, Any]]] = {
    "bounds": (Bounds(), {"metadata": "bounds"}),
    "moments": (Moments(1.0), {"metadata": "moments"}),
    "sketch": (Sketch(PAGE), {"metadata": "sketch", "selection_unit": "token", "candidate_factor": 0}),
}


def made(lengths: list[int], form: str = "bounds", layout: str = "nhd", **options: Any) -> tuple[Cache, QuestConfig]:
    kept, settings = FORMS[form]
    cache = make_cache(lengths, page_size=PAGE, layout=layout, form=kept)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="reference")
    return cache, QuestConfig.from_dict({"token_budget": 40, "page_size": PAGE, **settings, **options})


def queries(cache: Cache, count: int, group: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(
        cache.kv.batch_size, count, cache.kv.num_kv_heads * group, cache.kv.head_dim, generator=generator
    )


def expected_units(cache: Cache, query: Tensor, lens: list[int], config: QuestConfig) -> list[list[list[int]]]:
    """Of each token alone the scores, of these the largest, and of those the best beside all pages that are forced."""
    kv, count = cache.kv, query.shape[1]
    of_tokens = torch.stack(
        [
            reference.score_pages(
                query[:, t], kv, cache.lengths, unit_size=config.unit_size, sm_scale=kv.head_dim**-0.5
            )
            for t in range(count)
        ],
        1,
    )  # [B, T, HKV, U]
    for b, have in enumerate(lens):
        of_tokens[b, have:] = -math.inf
    recent = max(config.num_recent_pages, 1 + math.ceil((count - 1) / PAGE))
    return reference.select_pages(
        of_tokens.amax(1), cache.lengths, PAGE, config.token_budget, config.num_sink_pages, recent,
        unit_size=config.unit_size,
    )  # fmt: skip


def causal(
    cache: Cache, query: Tensor, lens: list[int], units: list[list[list[int]]], size: int, sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of each token in float64 over the tokens of its units that are no later than itself."""
    kv, group = cache.kv, query.shape[2] // cache.kv.num_kv_heads
    output = torch.zeros(*query.shape[:3], kv.values.shape[3], dtype=torch.float64)
    for b, have in enumerate(lens):
        for t in range(have):
            for head in range(query.shape[2]):
                at = cache.lengths[b] - have + t
                chosen = [u * size + i for u in units[b][head // group] for i in range(size) if u * size + i <= at]
                where = [
                    (int(kv.page_table[b, token // kv.page_size]), token % kv.page_size, head // group)
                    for token in chosen
                ]
                keys, values = (torch.stack([part[one] for one in where]).double() for part in (kv.keys, kv.values))
                logits = keys @ query[b, t, head].double() * kv.head_dim**-0.5
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                extra = logits if sinks is None else torch.cat([logits, sinks[head].double()[None]])
                output[b, t, head] = (logits - torch.logsumexp(extra, 0)).exp() @ values
    return output


def as_lists(units: Tensor) -> list[list[list[int]]]:
    return [[[unit for unit in head if unit >= 0] for head in row] for row in units.tolist()]


@pytest.mark.parametrize("count", [2, 5, MOST_QUERY_TOKENS])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_choice_serves_all_and_nobody_sees_what_is_later(backend: Backend, form: str, count: int) -> None:
    cache, config = made([90, 33, 71], form, backend=available(backend))
    query, lens = queries(cache, count), [count, min(count, 2), 1]
    step = quest_decode(query, cache.kv, cache.seq_lens, config, query_lens=torch.tensor(lens))
    units, expected = as_lists(step.selected.units), expected_units(cache, query, lens, config)
    if backend == "triton" and form == "sketch":  # what passes, of the best: about four fifths of the budget
        for rows, bests in zip(units, expected, strict=True):
            for row, best in zip(rows, bests, strict=True):
                assert len(best) / 2 < len(row) <= len(best)
                assert set(row) <= set(best)
    else:
        assert units == expected
    torch.testing.assert_close(
        step.output.double(), causal(cache, query, lens, units, config.unit_size), rtol=1e-5, atol=2e-6
    )
    assert not step.output[2, 1:].any(), "a token that is not there"
    config = QuestConfig.from_dict({**FORMS[form][1], "token_budget": 96, "page_size": PAGE, "backend": backend})
    whole = quest_decode(query[:, :2], cache.kv, cache.seq_lens, config)
    everything = [[list(range(-(-length // config.unit_size)))] * 2 for length in cache.lengths]
    assert as_lists(whole.selected.units) == everything, "within the budget"
    exact = causal(cache, query[:, :2], [2, 2, 2], everything, config.unit_size)
    torch.testing.assert_close(whole.output.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_only_pads_a_batch_gives_zeros_whatever_its_table_holds(backend: Backend, form: str) -> None:
    cache, config = made([90, 33, 0], form, backend=available(backend))
    kv, query = cache.kv, queries(cache, 4)
    kv.page_table[2] = 1 << 20
    step = quest_decode(query, kv, torch.tensor([90, 33, 0], dtype=torch.int32), config)
    assert not step.output[2].any() and not step.selected.counts[2].any()
    alone = replace(kv, page_table=kv.page_table[:2])
    expected = quest_decode(query[:2], alone, torch.tensor([90, 33], dtype=torch.int32), config)
    torch.testing.assert_close(step.output[:2], expected.output)
    with pytest.raises(QuestValueError, match=r"seq_lens: got 0, expected at least the query tokens, or none at all"):
        quest_decode(query, kv, torch.tensor([90, 3, 0], dtype=torch.int32), config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_lengths_known_to_the_host_sinks_and_softcaps(backend: Backend, layout: str) -> None:
    cache, config = made([61, 61], layout=layout, backend=available(backend))
    query, sinks = queries(cache, 4), torch.tensor([0.5, -1.0, 2.0, 0.0])
    given = {"sinks": sinks, "softcap": 3.0}
    step = quest_decode(query, cache.kv, 61, config, **given)
    again = quest_decode(query, cache.kv, cache.seq_lens, config, query_lens=torch.tensor([4, 4]), **given)
    assert torch.equal(step.selected.units, again.selected.units)
    exact = causal(cache, query, [4, 4], as_lists(step.selected.units), PAGE, sinks, 3.0)
    for one in (step, again):
        torch.testing.assert_close(one.output.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_token_is_the_step_that_it_was(backend: Backend, form: str) -> None:
    cache, config = made([90, 20], form, backend=available(backend))
    query = queries(cache, 1)
    several, one = (quest_decode(q, cache.kv, cache.seq_lens, config) for q in (query, query[:, 0]))
    assert torch.equal(several.output[:, 0], one.output) and torch.equal(several.selected.units, one.selected.units)
    out = torch.empty_like(query)
    assert quest_decode(query, cache.kv, cache.seq_lens, config, out=out).output.data_ptr() == out.data_ptr()
    assert torch.equal(out[:, 0], one.output)


def test_output_is_written_where_it_is_asked_for() -> None:
    cache, config = made([90, 40])
    query = queries(cache, 3)
    out = torch.empty_like(query)
    step = quest_decode(query, cache.kv, cache.seq_lens, config, out=out)
    assert step.output is out
    assert torch.equal(out, quest_decode(query, cache.kv, cache.seq_lens, config).output)


def test_sequences_of_no_more_than_the_tokens_of_the_step() -> None:
    cache, config = made([3, 2])
    query, lens = queries(cache, 3), [3, 2]
    step = quest_decode(query, cache.kv, cache.seq_lens, config, query_lens=torch.tensor(lens))
    exact = causal(cache, query, lens, [[[0]] * 2] * 2, PAGE)
    torch.testing.assert_close(step.output.double(), exact, rtol=1e-5, atol=2e-6)


def test_what_cannot_be_asked() -> None:
    cache, config = made([90, 33])
    query = queries(cache, 3)

    def ask(query: Tensor, seq_lens: Any = None, settings: QuestConfig = config, **given: Any) -> None:
        quest_decode(query, cache.kv, cache.seq_lens if seq_lens is None else seq_lens, settings, **given)

    for wrong, message in (
        (lambda: ask(queries(cache, 17)), r"query.shape: got \[2, 17, 4, 16\], expected .* 1 to 16 tokens"),
        (lambda: ask(query[:1]), r"query.shape: got \[1, 3, 4, 16\]"),
        (lambda: ask(query[..., :8]), r"query.shape: got \[2, 3, 4, 8\]"),
        (lambda: ask(query[:, :, :3]), r"query.shape\[2\]: got 3, expected a multiple of the 2 KV heads"),
        (lambda: ask(query[:, 0], query_lens=torch.tensor([1, 1])), "query_lens: got 'a tensor', expected None"),
        (lambda: ask(query, query_lens=torch.tensor([4, 1])), r"query_lens: got \[4, 1\], expected 1 to 3"),
        (lambda: ask(query, query_lens=torch.tensor([0, 1])), r"query_lens: got \[0, 1\], expected 1 to 3"),
        (lambda: ask(query, query_lens=torch.tensor([3])), "query_lens: got"),
        (lambda: ask(query, query_lens=torch.tensor([1.0, 2.0])), "query_lens: got"),
        (lambda: ask(query, query_lens=[3, 3]), r"query_lens: got \[3, 3\], expected a tensor \[2\] or None"),
        (lambda: ask(query, torch.tensor([90])), r"seq_lens.shape: got \[1\], expected \[2\]"),
        (lambda: ask(query, "90"), "seq_lens: got '90'"),
        (lambda: ask(query, 2), "seq_lens: got 2, expected at least the query tokens"),
        (lambda: ask(query, sinks=torch.zeros(3)), r"sinks"),
        (lambda: ask(query, out=torch.empty(2, 4, 16)), r"out.shape"),
        (lambda: ask(query, settings=QuestConfig.paper(8, page_size=PAGE)), "at least 16: 2 forced pages"),
    ):
        with pytest.raises(QuestValueError, match=message):
            wrong()


def test_folded_queries_are_heads_of_their_kv_head() -> None:
    cache, _ = made([20, 20])
    query = queries(cache, 3)
    folded = QueryTokens(query, torch.tensor([3, 2]), cache.kv, cache.seq_lens).folded().view(2, 2, 3, 2, 16)
    assert torch.equal(folded[0, 1, 2], query[0, 2, 2:])
    assert torch.equal(folded[1, 0, 2], query[1, 1, :2]), "the last one again"


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("count", [1, 3, MOST_QUERY_TOKENS])
def test_every_page_is_causal_attention(backend: Backend, count: int) -> None:
    """`sparse_decode_attention` of several query tokens, which has no scores: what a dense check is, on the device."""
    cache, _ = made([16, 40, 57])
    kv = cache.kv
    query = queries(cache, count)
    pages = torch.arange(kv.max_pages, dtype=torch.int32).expand(kv.batch_size, kv.num_kv_heads, -1)
    everything = Selection(pages, torch.full(pages.shape[:2], kv.max_pages, dtype=torch.int32), PAGE)
    output, lse = sparse_decode_attention(
        query, kv, cache.seq_lens, everything, softcap=3.0, backend=available(backend)
    )
    assert lse is None
    assert output.shape == (*query.shape[:3], kv.values.shape[3])
    for nth in range(count):
        lengths = cache.seq_lens - (count - 1 - nth)
        alone, _ = sparse_decode_attention(query[:, nth], kv, lengths, everything, softcap=3.0, backend="reference")
        torch.testing.assert_close(output[:, nth], alone, rtol=1e-4, atol=1e-5)


def test_several_query_tokens_have_no_log_sum_exp() -> None:
    cache, _ = made([40])
    pages = Selection(torch.zeros(1, 2, 1, dtype=torch.int32), torch.ones(1, 2, dtype=torch.int32), PAGE)
    with pytest.raises(QuestValueError, match="return_lse: got True, expected False with several"):
        sparse_decode_attention(queries(cache, 2), cache.kv, 40, pages, return_lse=True)

"""Steps that choose by sketches: estimates of all tokens, exact keys of the best, held to the oracle."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, FAST_BACKENDS, available
from caches import LAYOUTS, Cache, make_cache
from cases import only
from likeness import as_lists, query_for
from quest_attention import QuestConfig, quest_decode, score_pages, update_page_metadata
from quest_attention.config import Backend, GroupReduction, SelectionUnit
from quest_attention.forms import Sketch
from quest_attention.ops import Step, make_workspace, reference, resolve_backend
from quest_attention.ops.gathering import gather_keys
from quest_attention.ops.masses import NO_CANDIDATE, score_masses

PAGE_SIZE = 8
LENGTHS = [99, 60, 40, 7, 1, 0]
"""More units than candidates, fewer, a complete last page, less than a page, nothing."""
UNITS: dict[SelectionUnit, int] = {"page": PAGE_SIZE, 4: 4, "token": 1}
REDUCTIONS: list[GroupReduction] = ["mass", "max"]
TOKEN = torch.arange(104)
MASKS = {
    "left padding": TOKEN >= 13,
    "a token of each page": TOKEN % PAGE_SIZE == 3,
    "no token of the page being written": TOKEN < 96,
    "holes": TOKEN % 3 > 0,
    "nothing": TOKEN < 0,
}


def filled(lengths: list[int], **options: Any) -> Cache:
    cache = make_cache(lengths, form=Sketch(options.get("page_size", PAGE_SIZE)), **options)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    return cache


def config_of(**options: Any) -> QuestConfig:
    return QuestConfig.from_dict({"token_budget": 24, "page_size": PAGE_SIZE, "metadata": "sketch", **options})


def scores_of(step: Step) -> Tensor:
    """As a step has them, whose config has a budget."""
    return resolve_backend(step.config.backend, step.query.device).verbs.score_pages(step, step.scratch)


def assert_scores_are_the_oracles(step: Step, lengths: list[int]) -> Tensor:
    """But for float32: a log mass is off by as much as the logits and the normaliser it is made of."""
    config, scores = step.config, scores_of(step)
    exact = reference.score_pages(
        step.query, step.kv, lengths, step.token_mask, config.group_reduction, sm_scale=step.scale,
        softcap=step.softcap, sinks=step.sinks, unit_size=config.unit_size, candidates=config.candidate_budget or None,
    )  # fmt: skip
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=2e-4)
    assert torch.equal(scores == NO_CANDIDATE, exact == NO_CANDIDATE)
    return scores


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("factor", [0, 1, 2])
@pytest.mark.parametrize("host", [False, True], ids=["", "host"])
@pytest.mark.parametrize(("layout", "backend"), [*((layout, "torch") for layout in LAYOUTS), ("hnd", "triton")])
@only(lambda backend, host, reduction, **_: backend != "triton" or not (host or reduction == "mass"))
def test_scores(
    layout: str, backend: Backend, host: bool, factor: int, unit: SelectionUnit, reduction: GroupReduction
) -> None:
    """Kernels make the estimates alone; PyTorch reduces them."""
    available(backend)
    lengths = [99, 99] if host else LENGTHS
    cache = filled(lengths, layout=layout)
    config = config_of(selection_unit=unit, group_reduction=reduction, candidate_factor=factor, backend=backend)
    query, seq_lens = query_for(cache, 3), 99 if host else cache.seq_lens
    size = UNITS[unit]
    for options in ({}, {"softcap": 1.5, "sinks": torch.linspace(-2, 2, query.shape[1]), "sm_scale": 0.7}):
        step = Step(query=query, kv=cache.kv, seq_lens=seq_lens, config=config, **options)
        scores = assert_scores_are_the_oracles(step, lengths)
        for b, length in enumerate(lengths):
            units, begun = -(-length // size), length // PAGE_SIZE * PAGE_SIZE // size
            assert (scores[b, :, begun:units] == math.inf).all(), "the page being written is read"
            assert (scores[b, :, units:] == -math.inf).all() and (scores[b, :, :begun] < math.inf).all()
            chosen = (scores[b, :, :units] != NO_CANDIDATE).sum(-1)
            assert (chosen == (min(units, config.candidate_budget) if factor else units)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("host", [False, True], ids=["", "host"])
@pytest.mark.parametrize("name", MASKS)
def test_masked_steps(name: str, host: bool, unit: SelectionUnit, backend: Backend) -> None:
    available(backend)
    lengths = [99, 99] if host else [99, 61]
    cache = filled(lengths, layout="contiguous" if host else "hnd")
    mask = torch.stack([MASKS[name], TOKEN >= 0])
    config = config_of(selection_unit=unit, candidate_factor=1, backend=backend)
    step = Step(
        query=query_for(cache, 2), kv=cache.kv, seq_lens=99 if host else cache.seq_lens, config=config, token_mask=mask
    )
    scores = assert_scores_are_the_oracles(step, lengths)
    selected = resolve_backend(backend, torch.device("cpu")).verbs.select_pages(step, scores)
    expected = reference.select_pages(scores, lengths, PAGE_SIZE, 24, 1, 1, mask, UNITS[unit])
    assert as_lists(selected.units) == expected


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scales", [None, "tensor", "head"])
@pytest.mark.parametrize(("dim", "page_size"), [(64, 8), (80, 16), (128, 32)])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@only(lambda backend, layout, unit, scales, **_: (
    backend != "triton" or (layout == "nhd" and unit != "token" and (scales is None or unit == 4))
))  # fmt: skip
def test_whole_steps(
    backend: Backend, unit: SelectionUnit, layout: str, scales: str | None, dim: int, page_size: int
) -> None:
    """test_token_decode has kernels and tokens; to kernels strides are like any others, and scales of any units."""
    available(backend)
    lengths = [9 * page_size + 5, 6 * page_size]
    cache = filled(lengths, layout=layout, dim=dim, page_size=page_size, scales=scales)
    budget = 3 * page_size
    config = config_of(selection_unit=unit, page_size=page_size, token_budget=budget, candidate_factor=2)
    config = replace(config, backend=backend)
    query = query_for(cache, 2, dtype=torch.float32)
    workspace = make_workspace(cache.kv, 4, config)
    assert (workspace is None) == (backend == "triton")
    if workspace is not None:
        workspace.scores.fill_(math.nan)
    step = quest_decode(query, cache.kv, cache.seq_lens, config, workspace=workspace)
    slow = quest_decode(query, cache.kv, cache.seq_lens, replace(config, backend="reference"))
    assert as_lists(step.selected.units) == as_lists(slow.selected.units)
    assert step.selected.counts.unique().tolist() == [config.unit_budget]
    torch.testing.assert_close(step.output, slow.output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_budget_scores_are_those_of_the_first_stage(backend: Backend) -> None:
    available(backend)
    cache = filled([99, 30])
    query = query_for(cache, 2)
    scores = score_pages(query, cache.kv, cache.seq_lens, selection_unit="token", backend=backend)
    config = config_of(selection_unit="token", candidate_factor=0, backend=backend)
    assert torch.equal(scores, scores_of(Step(query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("factor", "candidates"), [(1, 24), (2, 48), (9, 99)])
def test_candidates_are_the_best_by_their_estimates_and_rank_by_their_keys(
    factor: int, candidates: int, backend: Backend
) -> None:
    """All are, where there are no more: then the signs have no say."""
    available(backend)
    cache = filled([99], layout="contiguous")
    query, whole = query_for(cache, 1), 96
    config = config_of(selection_unit="token", candidate_factor=factor, backend=backend)
    scores = scores_of(Step(query=query, kv=cache.kv, seq_lens=99, config=config))
    estimates = score_pages(query, cache.kv, 99, selection_unit="token", backend=backend)
    assert cache.kv.contiguous is not None
    logits = (query.view(2, 1, -1) @ cache.kv.contiguous.keys[0, :, :whole].transpose(1, 2))[:, 0]
    for h in range(2):
        best = estimates[0, h, :99].argsort(descending=True)[:candidates]
        assert sorted((scores[0, h, :99] != NO_CANDIDATE).nonzero()[:, 0].tolist()) == sorted(best.tolist())
        best = best[best < whole]
        by_keys, by_signs = (best[of[best].argsort(descending=True)].tolist() for of in (logits[h], estimates[0, h]))
        assert best[scores[0, h, best].argsort(descending=True)].tolist() == by_keys != by_signs


@pytest.mark.parametrize("backend", BACKENDS)
def test_whatever_the_page_being_written_holds_changes_nothing(backend: Backend) -> None:
    available(backend)
    cache = filled([61, 38])
    query, config = query_for(cache, 2), config_of(selection_unit="token", candidate_factor=1, backend=backend)
    seen = []
    for poison in (0, 1, 127, 255):
        for b, length in enumerate(cache.lengths):
            cache.kv.metadata[cache.kv.page_table[b, length // PAGE_SIZE :].long()] = poison
        step = Step(query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config)
        seen.append(scores_of(step).clone())
        assert torch.equal(seen[-1], seen[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_unit_with_a_key_that_is_not_finite_is_read(bad: float, unit: SelectionUnit, backend: Backend) -> None:
    available(backend)
    cache = make_cache([99, 20], form=Sketch(PAGE_SIZE))
    cache.kv.keys[int(cache.kv.page_table[0, 3]), 5, 1, 2] = bad
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    reduction = "mass" if backend == "triton" else "max"  # test_token_decode has tokens by max
    config = config_of(
        selection_unit=unit, candidate_factor=1, backend=backend, num_sink_pages=0, group_reduction=reduction
    )
    step = quest_decode(query_for(cache, 2), cache.kv, cache.seq_lens, config)
    size = UNITS[unit]
    assert 29 // size in as_lists(step.selected.units)[0][1]
    assert step.output[0, :2].isfinite().all() and step.output[1].isfinite().all(), "no other row is touched"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", UNITS)
def test_a_budget_of_the_whole_context_is_dense(unit: SelectionUnit, backend: Backend) -> None:
    available(backend)
    cache = filled([99, 30], layout="contiguous")
    query = query_for(cache, 2)
    step = quest_decode(
        query, cache.kv, cache.seq_lens, config_of(selection_unit=unit, token_budget=104, backend=backend)
    )
    assert cache.kv.contiguous is not None
    for b, length in enumerate(cache.lengths):
        keys, values = cache.kv.contiguous.keys[b, :, :length], cache.kv.contiguous.values[b, :, :length]
        dense = torch.nn.functional.scaled_dot_product_attention(query[b].view(2, 2, -1), keys, values)
        torch.testing.assert_close(step.output[b], dense.flatten(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_bounds_hide_is_found(backend: Backend) -> None:
    """Every page but the needle's has for each channel of the query one large key, so that its bounds promise more."""
    available(backend)
    generator = torch.Generator().manual_seed(11)
    length, dim, needle = 400, 64, 197
    cache = make_cache([length], heads=1, dim=dim, layout="contiguous", form=Sketch(PAGE_SIZE))
    query = torch.randn(1, 2, dim, generator=generator).sign() * torch.tensor([1.0, 0.98])[:, None]
    query[0, 1] = query[0, 0]
    assert cache.kv.contiguous is not None
    keys = cache.kv.contiguous.keys
    keys[0, 0, :length] = 0.5 * torch.randn(length, dim, generator=generator)
    for token in range(length):  # channels in turn: no token has many of them
        channels = (torch.arange(dim) + token) % PAGE_SIZE == 0
        keys[0, 0, token, channels] += 2.0 * query[0, 0, channels]
        keys[0, 0, token, ~channels] -= 2.0 / 7 * query[0, 0, ~channels]
    keys[0, 0, needle // PAGE_SIZE * PAGE_SIZE : (needle // PAGE_SIZE + 1) * PAGE_SIZE] *= 0.5
    keys[0, 0, needle] = 0.8 * query[0, 0]
    logits = (query[0] @ keys[0, 0, :length].T) / dim**0.5
    assert (logits.argmax(-1) == needle).all()
    update_page_metadata(cache.kv, length, length)
    config = config_of(selection_unit="token", backend=backend, token_budget=24)
    assert needle in as_lists(quest_decode(query, cache.kv, length, config).selected.units)[0][0]
    bounds = make_cache([length], heads=1, dim=dim, layout="contiguous")
    assert bounds.kv.contiguous is not None
    bounds.kv.contiguous.keys.copy_(keys)
    update_page_metadata(bounds.kv, length, length)
    chosen = quest_decode(query, bounds.kv, length, QuestConfig(24, PAGE_SIZE, num_sink_pages=1, backend=backend))
    assert needle // PAGE_SIZE not in as_lists(chosen.selected.units)[0][0]


def test_many_pages_are_estimated_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled([99, 60])
    monkeypatch.setattr("quest_attention.ops.masses._CHUNK_BYTES", 1)
    config = config_of(selection_unit=4, candidate_factor=2)
    step = Step(query=query_for(cache, 2), kv=cache.kv, seq_lens=cache.seq_lens, config=config)
    assert_scores_are_the_oracles(step, cache.lengths)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_estimates_give_the_lower_units(backend: Backend) -> None:
    available(backend)
    cache = make_cache([80], form=Sketch(PAGE_SIZE))
    cache.kv.keys.zero_()
    update_page_metadata(cache.kv, 80, 80)
    config = config_of(selection_unit="token", candidate_factor=1, backend=backend, group_reduction="max")
    step = Step(query=query_for(cache, 2), kv=cache.kv, seq_lens=80, config=config)
    assert (scores_of(step)[0, :, :80] != NO_CANDIDATE).nonzero()[:, 1].view(2, -1).tolist() == [[*range(24)]] * 2


def test_page_tables_may_hold_anything_past_an_end() -> None:
    cache = filled([99, 33, 0])
    for b, length in enumerate(cache.lengths):
        cache.kv.page_table[b, -(-length // PAGE_SIZE) :] = 10**9
    config = config_of(selection_unit="token", candidate_factor=1)
    step = Step(query=query_for(cache, 2), kv=cache.kv, seq_lens=cache.seq_lens, config=config)
    assert_scores_are_the_oracles(step, cache.lengths)


@pytest.mark.parametrize("unit", UNITS)
def test_keys_that_lie_elsewhere_are_read_by_whoever_knows_where(unit: SelectionUnit) -> None:
    cache, size = filled([99, 33, 0]), UNITS[unit]
    config = config_of(selection_unit=unit, candidate_factor=1)
    step = Step(query=query_for(cache, 2), kv=cache.kv, seq_lens=cache.seq_lens, config=config)
    elsewhere = replace(step, kv=replace(cache.kv, keys=torch.full_like(cache.kv.keys, math.nan)))
    scores = score_masses(elsewhere, None, keys_of=lambda units: gather_keys(cache.kv, units, size))
    assert torch.equal(scores, scores_of(step))


# Longer than 250 lines: one step in two stages, by every way to ask for it.

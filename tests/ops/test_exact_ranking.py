"""Steps that rank the tokens of some pages by their exact keys, held to the oracle: the verbs, and the whole step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from backends import available
from caches import LAYOUTS, Cache, make_cache
from likeness import as_lists, query_for
from quest_attention import QuestConfig, QuestValueError, quest_decode, update_page_metadata
from quest_attention.config import GroupReduction, Metadata, SelectionUnit
from quest_attention.forms import Bounds, MetadataForm, Moments, Sketch
from quest_attention.ops import Step, candidates, make_workspace, resolve_backend, run_step
from quest_attention.ops.masses import NO_CANDIDATE
from quest_attention.ops.ranking import ranking, ranking_of_weights
from quest_attention.ops.torch_backend import candidates_of

PAGE_SIZE, BUDGET = 8, 24
LENGTHS = [99, 60, 40, 25, 24, 7, 1, 0]
"""More pages than candidates, as many, fewer, one token past the budget, the budget, less than a page, nothing."""
FORMS: list[MetadataForm] = [Bounds(), Moments(1.0)]
UNITS: list[SelectionUnit] = ["token", 4]
REDUCTIONS: list[GroupReduction] = ["max", "mass"]
TOKEN = torch.arange(104)
MASKS = {
    "left padding": TOKEN >= 13,
    "a token of each page": TOKEN % PAGE_SIZE == 3,
    "no token of the page being written": TOKEN < 96,
    "holes": TOKEN % 3 > 0,
    "nothing": TOKEN < 0,
}
TRICKS: list[dict[str, Any]] = [{}, {"softcap": 1.5, "sm_scale": 0.7}, {"softcap": 3.0, "sinks": True}]


def filled(lengths: list[int], form: MetadataForm, **options: Any) -> Cache:
    cache = make_cache(lengths, form=form, **options)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    return cache


def config_of(form: MetadataForm, **options: Any) -> QuestConfig:
    given = {"token_budget": BUDGET, "page_size": PAGE_SIZE, "metadata": form.name, "selection_unit": "token"}
    return QuestConfig.from_dict({**given, **options})


def assert_like_oracle(cache: Cache, query: Tensor, seq_lens: Tensor | int, config: QuestConfig, **tricks: Any) -> None:
    """The oracle's units, and an output off by no more than float32 is from float64."""
    if "sinks" in tricks:
        tricks["sinks"] = torch.linspace(-2, 2, query.shape[1])
    step = quest_decode(query, cache.kv, seq_lens, config, **tricks)
    exact = quest_decode(query, cache.kv, seq_lens, replace(config, backend="reference"), **tricks)
    width = exact.selected.units.shape[2]
    assert torch.equal(step.selected.units[:, :, :width], exact.selected.units), "the oracle's units, in its order"
    assert (step.selected.units[:, :, width:] == -1).all()
    assert torch.equal(step.selected.counts, exact.selected.counts)
    torch.testing.assert_close(step.output, exact.output, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS, ids=["bounds", "moments"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("factor", [1, 2, 9])
def test_steps_of_any_lengths(form: MetadataForm, layout: str, unit: SelectionUnit, factor: int) -> None:
    cache = filled(LENGTHS, form, layout=layout)
    for reduction, tricks in zip(REDUCTIONS * 2, [*TRICKS, {}], strict=False):
        config = config_of(form, selection_unit=unit, candidate_factor=factor, group_reduction=reduction)
        assert_like_oracle(cache, query_for(cache, 3), cache.seq_lens, config, **tricks)


@pytest.mark.parametrize("form", FORMS, ids=["bounds", "moments"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [25, 39, 40, 96, 97, 99])
@pytest.mark.parametrize("scales", [None, "head"])
def test_whole_steps(form: MetadataForm, layout: str, length: int, scales: str | None) -> None:
    """The way of a decode step in transformers; that it is taken is seen."""
    cache = filled([length, length], form, layout=layout, scales=scales)
    for tricks in TRICKS:
        for others in ({"group_reduction": "mass"}, {"num_sink_pages": 0, "num_recent_pages": 2}):
            for factor in (1, 2, 9):
                config = config_of(form, candidate_factor=factor, **others)
                query = query_for(cache, 3, dtype=torch.float32)  # or the output would be rounded
                assert_like_oracle(cache, query, length, config, **tricks)
                step = Step(query=query, kv=cache.kv, seq_lens=length, config=config)
                assert candidates.quest_decode(step) is not None


@pytest.mark.parametrize("form", FORMS, ids=["bounds", "moments"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("host", [False, True], ids=["", "host"])
@pytest.mark.parametrize("name", MASKS)
def test_masked_steps(name: str, host: bool, unit: SelectionUnit, form: MetadataForm) -> None:
    lengths = [99, 99] if host else [99, 61]
    cache = filled(lengths, form, layout="contiguous" if host else "hnd")
    mask = torch.stack([MASKS[name], TOKEN >= 0])
    for factor in (1, 3):
        config = config_of(form, selection_unit=unit, candidate_factor=factor)
        assert_like_oracle(cache, query_for(cache, 2), 99 if host else cache.seq_lens, config, token_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [40, 99])
def test_logits_are_float32_whatever_the_cache_is_in(dtype: torch.dtype, length: int) -> None:
    """Rounded logits would rank other tokens than the oracle."""
    cache = filled([length, length], Moments(1.0), layout="contiguous", dtype=dtype, dim=64)
    query = query_for(cache, 3, dtype=dtype)
    config = config_of(Moments(1.0), candidate_factor=2)
    step = quest_decode(query, cache.kv, length, config)
    exact = quest_decode(query, cache.kv, length, replace(config, backend="reference"))
    assert torch.equal(step.selected.units, exact.selected.units)
    assert step.output.dtype == dtype
    torch.testing.assert_close(step.output, exact.output)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("host", [False, True], ids=["", "host"])
@pytest.mark.parametrize("form", FORMS, ids=["bounds", "moments"])
def test_a_key_that_is_not_finite_is_read(form: MetadataForm, host: bool, softcap: float | None, bad: float) -> None:
    cache = make_cache([99, 99], form=form, layout="contiguous")
    assert cache.kv.contiguous is not None
    cache.kv.contiguous.keys[1, 0, 45, 3] = bad
    update_page_metadata(cache.kv, 99, 99)
    config, query = config_of(form, candidate_factor=1), query_for(cache, 2)
    step = quest_decode(query, cache.kv, 99 if host else cache.seq_lens, config, softcap=softcap)
    exact = quest_decode(query, cache.kv, 99, replace(config, backend="reference"), softcap=softcap)
    assert 45 in step.selected.units[1, 0].tolist()
    assert torch.equal(step.selected.units, exact.selected.units)
    torch.testing.assert_close(step.output, exact.output, equal_nan=True, rtol=1e-5, atol=2e-6)


def test_ties_go_to_the_lower_token() -> None:
    cache = make_cache([99], form=Bounds(), layout="contiguous", heads=1)
    assert cache.kv.contiguous is not None
    cache.kv.contiguous.keys[:, :, :99] = 1.0
    update_page_metadata(cache.kv, 99, 99)
    selected = quest_decode(query_for(cache, 2), cache.kv, 99, config_of(Bounds())).selected
    assert as_lists(selected.units) == [[[*range(21), 96, 97, 98]]]


def test_weights_are_ranked_as_scores_are() -> None:
    tiny = torch.finfo(torch.float32).tiny
    weights = torch.tensor([[[-3.0, -0.5, -0.5, 0.0, -1e-30, -tiny, -88.0, 0.0, -1e30]]])
    best = ranking(weights, None).topk(9).indices
    assert torch.equal(ranking_of_weights(weights.clone()).topk(9).indices[0, 0, 3:], best[0, 0, 3:])
    assert set(best[0, 0, :3].tolist()) == {3, 5, 7}, "weights of one, and what is as good as one"


def test_scores_say_which_units_were_no_candidates() -> None:
    cache = filled(LENGTHS, Bounds())
    config = config_of(Bounds(), candidate_factor=1)
    step = Step(query=query_for(cache, 2), kv=cache.kv, seq_lens=cache.seq_lens, config=config)
    for backend in ("torch", "reference"):
        scores = resolve_backend(backend, "cpu").verbs.score_pages(step)
        for b, length in enumerate(LENGTHS):
            live = scores[b, :, :length]
            candidates = min(length, (config.candidate_pages - 1) * PAGE_SIZE + (length - 1) % PAGE_SIZE + 1)
            assert ((live != NO_CANDIDATE).sum(-1) == candidates).all()
            assert (live <= 0).all() and (scores[b, :, length:] == -math.inf).all()


def test_what_has_no_whole_step_runs_the_verbs() -> None:
    cache = filled([99, 99], Bounds())
    query = query_for(cache, 2)
    for seq_lens, options, mask in (
        (cache.seq_lens, {}, None),
        (99, {}, torch.ones(2, 99, dtype=torch.bool)),
        (99, {"selection_unit": 4}, None),
        (99, {"selection_unit": "page"}, None),
        (24, {}, None),
    ):
        config = config_of(Bounds(), **options)
        step = Step(query=query, kv=cache.kv, seq_lens=seq_lens, config=config, token_mask=mask)
        assert candidates.quest_decode(step) is None


def test_memory_and_output_of_the_callers_are_used() -> None:
    cache = filled([99, 99], Moments(1.0), layout="contiguous")
    config, query = config_of(Moments(1.0)), query_for(cache, 2)
    expected = quest_decode(query, cache.kv, 99, config)
    out = torch.full_like(expected.output, math.nan)
    workspace = make_workspace(cache.kv, query.shape[1], config)
    done = quest_decode(query, cache.kv, 99, config, workspace=workspace, out=out)
    assert done.output is out and torch.equal(out, expected.output)


@pytest.mark.parametrize("form", [*FORMS, Sketch(PAGE_SIZE)])
def test_auto_is_the_form_that_the_cache_has(form: MetadataForm) -> None:
    cache = filled([99, 99], form, layout="contiguous")
    query = query_for(cache, 2)
    auto = QuestConfig(BUDGET, PAGE_SIZE, metadata="auto", selection_unit="token")
    named = replace(auto, metadata=cast("Metadata", form.name))
    step = quest_decode(query, cache.kv, 99, auto, workspace=make_workspace(cache.kv, query.shape[1], auto))
    assert step.selected.unit_size == 1
    assert torch.equal(step.output, quest_decode(query, cache.kv, 99, named).output)


def test_the_kernels_refuse_it() -> None:
    backend = available("triton")
    cache = filled([99, 99], Bounds())
    config = config_of(Bounds(), backend=backend)
    step = Step(query=query_for(cache, 2), kv=cache.kv, seq_lens=cache.seq_lens, config=config)
    for call in (lambda: run_step(step), lambda: make_workspace(cache.kv, 4, config)):
        with pytest.raises(
            QuestValueError, match=r"selection_unit: got 'token', expected page for bounds with the Tri"
        ):
            call()


def test_the_whole_step_reads_no_key_of_another_page() -> None:
    """What `candidate_factor` promises: of the pages that did not pass, nothing is read but their metadata."""
    cache = filled([99, 99], Bounds(), layout="contiguous")
    config, query = config_of(Bounds(), candidate_factor=1), query_for(cache, 2)
    expected = quest_decode(query, cache.kv, 99, config)
    step = Step(query=query, kv=cache.kv, seq_lens=99, config=config)
    passed = as_lists(candidates_of(step).units)
    assert all(len(head) == config.candidate_pages for row in passed for head in row)
    assert cache.kv.contiguous is not None
    for b, row in enumerate(passed):
        for h, pages in enumerate(row):
            for page in set(range(13)) - set(pages):
                cache.kv.contiguous.keys[b, h, page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = math.nan
    assert torch.equal(quest_decode(query, cache.kv, 99, config).output, expected.output)

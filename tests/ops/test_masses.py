"""Scores of metadata that scores tokens, log masses of units, and whole steps by them, against the oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from caches import LAYOUTS, Cache, make_cache
from exact_keys import ExactKeys, exact_keys_known
from likeness import as_lists, query_for
from quest_attention import QuestConfig, QuestValueError, quest_decode, score_pages, update_page_metadata
from quest_attention.config import Backend, GroupReduction, SelectionUnit
from quest_attention.forms import Bounds
from quest_attention.ops import append_slots, append_token, make_workspace, reference

LENGTH, PAGE_SIZE = 90, 8
UNITS: dict[SelectionUnit, int] = {"page": PAGE_SIZE, 4: 4, "token": 1}
SLOW_AND_FAST: list[Backend] = ["reference", "torch"]
REDUCTIONS: list[GroupReduction] = ["mass", "max"]
TOKEN = torch.arange(LENGTH)
MASKS = {
    "left padding": TOKEN >= 21,
    "a token of each page": TOKEN % PAGE_SIZE == 3,
    "one token": TOKEN == 40,
    "nothing": TOKEN < 0,
    "narrower than the sequence": TOKEN[:60] >= 0,
    "wider than the cache": torch.arange(300) % 3 > 0,
}


@pytest.fixture(autouse=True)
def _the_form_is_known() -> Iterator[None]:
    with exact_keys_known():
        yield


def filled(lengths: list[int], **options: Any) -> Cache:
    cache = make_cache(lengths, form=ExactKeys(), **options)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    return cache


def config_of(**options: Any) -> QuestConfig:
    return QuestConfig.from_dict({"token_budget": 32, "page_size": PAGE_SIZE, "metadata": "sketch", **options})


def mass_tolerance(exact: Tensor, query: Tensor, cache: Cache, scale: float) -> Tensor:
    """How far float32's log masses may be from the exact ones.

    A logit is off by no more than sqrt(n) roundings of the largest sum of its products' magnitudes (`likeness` says
    why), and a log mass by no more than the logit it is of and the normaliser, each of which is off by no more than the
    logits are: twice that. Then it is itself rounded, and so are the exponentials whose sum it is the logarithm of.
    """
    kept = cache.kv.keys.double().nan_to_num(0, 0, 0).abs().amax()
    if cache.kv.key_scale is not None:
        kept = kept * cache.kv.key_scale.amax()
    magnitude = scale * query.double().abs().sum(-1).amax() * kept
    eps = torch.finfo(torch.float32).eps
    return 2 * (cache.kv.head_dim + 4) ** 0.5 * eps / 2 * magnitude + 8 * eps * (1 + exact.abs())


def assert_masses_like_oracle(
    cache: Cache, query: Tensor, seq_lens: Tensor | int, unit: SelectionUnit, reduction: GroupReduction,
    backend: Backend = "torch", **options: Any,
) -> Tensor:  # fmt: skip
    scores = score_pages(
        query, cache.kv, seq_lens, group_reduction=reduction, selection_unit=unit, backend=backend, **options
    )
    mask = options.pop("token_mask", None)
    exact = reference.score_pages(query, cache.kv, cache.lengths, mask, reduction, unit_size=UNITS[unit], **options)
    assert scores.shape == exact.shape == (*cache.kv.page_table.shape[:1], 2, cache.kv.max_pages * 8 // UNITS[unit])
    assert scores.dtype == torch.float32
    error = (scores.double() - exact).abs()
    scale = options.get("sm_scale") or cache.kv.head_dim**-0.5
    is_like = (scores.double() == exact) | (error <= mass_tolerance(exact, query, cache, scale))
    assert bool(is_like.all()), f"off by up to {error[~is_like].max():.3g}"
    return scores


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("host", [False, True], ids=["", "host"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_the_oracles(
    layout: str, host: bool, group: int, unit: SelectionUnit, reduction: GroupReduction
) -> None:
    cache = filled([LENGTH, LENGTH] if host else [LENGTH, 37, 1, 0], layout=layout)
    query, lengths = query_for(cache, group), LENGTH if host else cache.seq_lens
    sinks = torch.linspace(-2, 2, query.shape[1])
    for options in ({}, {"softcap": 1.5}, {"sinks": sinks, "sm_scale": 0.7}, {"sinks": sinks, "softcap": 3.0}):
        assert_masses_like_oracle(cache, query, lengths, unit, reduction, **options)


@pytest.mark.parametrize("backend", SLOW_AND_FAST)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("host", [False, True], ids=["", "host"])
@pytest.mark.parametrize("name", MASKS)
def test_masked_scores(name: str, host: bool, unit: SelectionUnit, reduction: GroupReduction, backend: Backend) -> None:
    cache = filled([LENGTH, LENGTH], layout="contiguous" if host else "nhd")
    mask = torch.stack([MASKS[name], MASKS[name].flip(0)])
    scores = assert_masses_like_oracle(
        cache, query_for(cache, 2), LENGTH if host else cache.seq_lens, unit, reduction, backend, token_mask=mask
    )
    is_live = torch.nn.functional.pad(mask[:, :LENGTH], (0, 104 - min(LENGTH, mask.shape[1])))
    is_live = is_live.view(2, 1, -1, UNITS[unit]).any(-1).expand(-1, 2, -1)
    assert torch.equal(scores != -math.inf, is_live), "dead units score -inf, and others do not"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("scales", ["tensor", "head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_of_a_cache_in_8_bits(layout: str, scales: str, unit: SelectionUnit, reduction: GroupReduction) -> None:
    cache = filled([LENGTH, 41], layout=layout, scales=scales)
    query = query_for(cache, 2, dtype=torch.float32)
    assert_masses_like_oracle(cache, query, cache.seq_lens, unit, reduction)


@pytest.mark.parametrize("backend", SLOW_AND_FAST)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_unit_with_a_key_that_is_not_finite_ranks_first(
    bad: float, unit: SelectionUnit, reduction: GroupReduction, softcap: float | None, backend: Backend
) -> None:
    """And is left out where the others are weighed."""
    cache = make_cache([LENGTH, 20], form=ExactKeys())
    cache.kv.keys[int(cache.kv.page_table[0, 3]), 5, 1, 2] = bad
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    query = query_for(cache, 2)
    scores = assert_masses_like_oracle(cache, query, cache.seq_lens, unit, reduction, backend, softcap=softcap)
    assert (scores == math.inf).nonzero().tolist() == [[0, 1, 29 // UNITS[unit]]]
    if unit == "token" and reduction == "mass":
        assert scores[0, 1, :LENGTH].exp().masked_fill(TOKEN == 29, 0).sum().item() == pytest.approx(1, rel=1e-5)
    step = quest_decode(query, cache.kv, cache.seq_lens, config_of(selection_unit=unit, backend=backend))
    assert 29 // UNITS[unit] in as_lists(step.selected.units)[0][1]
    assert step.output[0, :2].isfinite().all() and step.output[1].isfinite().all(), "no other row is touched"


@pytest.mark.parametrize("backend", SLOW_AND_FAST)
def test_a_head_of_which_no_estimate_is_finite(backend: Backend) -> None:
    cache = make_cache([20], form=ExactKeys())
    cache.kv.keys[:, :, 0] = math.nan
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    scores = score_pages(query_for(cache, 2), cache.kv, cache.seq_lens, selection_unit="token", backend=backend)
    assert (scores[0, 0, :20] == math.inf).all() and scores[0, 1, :20].isfinite().all()
    assert (scores[..., 20:] == -math.inf).all()


@pytest.mark.parametrize("backend", SLOW_AND_FAST)
def test_masses_are_shares_of_the_attention(backend: Backend) -> None:
    cache = filled([LENGTH])
    query = query_for(cache, 4)
    of_units = {
        unit: score_pages(
            query, cache.kv, cache.seq_lens, group_reduction="mass", selection_unit=unit, backend=backend
        ).exp()
        for unit in UNITS
    }
    torch.testing.assert_close(of_units["token"].sum(-1), torch.ones(1, 2))
    for unit, size in UNITS.items():
        torch.testing.assert_close(of_units[unit], of_units["token"].unflatten(-1, (-1, size)).sum(-1))
    sinks = torch.full((8,), 3.0)
    rest = score_pages(
        query, cache.kv, cache.seq_lens, group_reduction="mass", sinks=sinks, selection_unit="token", backend=backend
    ).exp()
    grouped = query.view(2, 4, -1)
    keys = torch.stack([cache.kv.keys[int(cache.kv.page_table[0, t // 8]), t % 8] for t in range(LENGTH)], 1)
    logits = torch.cat([grouped @ keys.transpose(1, 2) / 4, torch.full((2, 4, 1), 3.0)], -1)
    torch.testing.assert_close(rest[0, :, :LENGTH], logits.softmax(-1)[..., :-1].mean(1))


@pytest.mark.parametrize("backend", SLOW_AND_FAST)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_is_far_below_the_largest_is_told_apart(reduction: GroupReduction, backend: Backend) -> None:
    """Weights of e ** -1000 and less, which no float holds, rank as their logits do."""
    cache = make_cache([64], heads=1, form=ExactKeys())
    cache.kv.keys[:] = 0
    ranks = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    for token, rank in enumerate(ranks.tolist()):
        cache.kv.keys[int(cache.kv.page_table[0, token // 8]), token % 8, 0, 0] = -1000.0 * rank
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    query = torch.zeros(1, 2, 16)
    query[..., 0] = 4.0
    scores = score_pages(
        query, cache.kv, cache.seq_lens, group_reduction=reduction, selection_unit="token", backend=backend
    )
    assert scores[0, 0, :64].argsort(descending=True).tolist() == ranks.argsort().tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("host", [False, True], ids=["", "host"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_a_step_is_the_oracles(
    layout: str, host: bool, masked: bool, unit: SelectionUnit, reduction: GroupReduction
) -> None:
    lengths = [LENGTH, LENGTH] if host else [LENGTH, 37, 1, 0]
    cache, size = filled(lengths, layout=layout), UNITS[unit]
    mask = torch.stack([(TOKEN + b) % 3 > 0 for b in range(len(lengths))]) if masked else None
    query, once = query_for(cache, 3), {"num_recent_pages": 2, "candidate_factor": 0}
    config = config_of(selection_unit=unit, group_reduction=reduction, **once)
    workspace = make_workspace(cache.kv, query.shape[1], config)
    assert workspace is not None
    workspace.scores.fill_(math.nan)
    options = {"softcap": 4.0, "sinks": torch.linspace(-1, 1, query.shape[1]), "sm_scale": 0.4}
    seq_lens = LENGTH if host else cache.seq_lens
    step = quest_decode(query, cache.kv, seq_lens, config, **options, token_mask=mask, workspace=workspace)
    scores = score_pages(
        query, cache.kv, seq_lens, group_reduction=reduction, selection_unit=unit, token_mask=mask, **options
    )
    assert torch.equal(scores, workspace.scores)
    expected = reference.select_pages(scores, lengths, 8, 32, 1, 2, mask, size)
    assert as_lists(step.selected.units) == expected
    assert step.selected.unit_size == size
    exact, _ = reference.sparse_decode_attention(
        query, cache.kv, lengths, expected, 0.4, 4.0, options["sinks"], mask, size
    )
    torch.testing.assert_close(step.output.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("unit", UNITS)
def test_the_oracle_is_a_backend(unit: SelectionUnit) -> None:
    cache = filled([77, 0, 20])
    query, config = query_for(cache, 3), config_of(selection_unit=unit)
    slow, fast = (
        quest_decode(query, cache.kv, cache.seq_lens, replace(config, backend=name)) for name in SLOW_AND_FAST
    )
    assert as_lists(slow.selected.units) == as_lists(fast.selected.units)
    assert slow.selected.unit_size == fast.selected.unit_size
    torch.testing.assert_close(slow.output, fast.output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("sinks", [0, 1, 2])
def test_tokens_by_mass_are_the_heaviest_and_the_forced(group: int, sinks: int) -> None:
    """What `token_oracle` of the evaluation reads by looking at every weight, with the forced pages put first."""
    pytest.importorskip("transformers", reason="the evaluation needs it")
    from quest_attention.eval.methods.token_ceiling import heaviest_tokens  # noqa: PLC0415
    from quest_attention.eval.observation import attention_weights  # noqa: PLC0415

    cache = filled([LENGTH, LENGTH], layout="contiguous")
    query = query_for(cache, group)
    step = quest_decode(
        query, cache.kv, LENGTH, config_of(selection_unit="token", num_sink_pages=sinks, group_reduction="mass")
    )
    assert cache.kv.contiguous is not None
    weights = attention_weights(query[:, :, None], cache.kv.contiguous.keys[:, :, :LENGTH])[:, :, :, 0]
    forced = [*range(8 * sinks), 88, 89]
    rest = weights.clone()
    rest[..., forced] = 2.0  # more than any weight
    expected = heaviest_tokens(rest, 32)
    assert torch.equal(step.selected.units.long(), expected)
    alone = heaviest_tokens(weights, 32)
    assert not torch.equal(alone, expected), "the forced ones are not among the heaviest by themselves"


@pytest.mark.parametrize("backend", SLOW_AND_FAST)
def test_tokens_come_in_chunks_one_by_one_and_by_slot(backend: Backend) -> None:
    cache = make_cache([LENGTH, 37], form=ExactKeys())
    kv = cache.kv
    update_page_metadata(kv, torch.tensor([21, 8]), torch.tensor([21, 8]), backend=backend)
    update_page_metadata(kv, torch.tensor([50, 9]), torch.tensor([29, 1]), backend=backend)
    for length in range(51, 81):
        lengths = torch.tensor([length, 9 + length - 50 if length < 78 else 0])
        rows = [(int(kv.page_table[b, (n - 1) // 8]), (n - 1) % 8) for b, n in enumerate(lengths.tolist())]
        keys, values = (torch.stack([stored[row] for row in rows]).clone() for stored in (kv.keys, kv.values))
        append_token(kv, keys, values, lengths, backend=backend)
    slots = torch.tensor([int(kv.page_table[0, t // 8]) * 8 + t % 8 for t in range(80, 90)] + [-1])
    slots = torch.cat([slots, torch.tensor([int(kv.page_table[1, 4]) * 8 + 4])])
    keys, values = (stored.flatten(0, 1)[slots.clamp(min=0)].clone() for stored in (kv.keys, kv.values))
    append_slots(kv, keys, values, slots, backend=backend)
    assert_masses_like_oracle(cache, query_for(cache, 2), cache.seq_lens, "token", "mass")
    for b, length in enumerate(cache.lengths):
        for token in range(length):
            page, offset = int(kv.page_table[b, token // 8]), token % 8
            assert torch.equal(kv.metadata[page, :, offset], kv.keys[page, offset])


@pytest.mark.parametrize("backend", SLOW_AND_FAST)
@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_page_tables_may_hold_anything_past_an_end(layout: str, backend: Backend) -> None:
    cache = filled([LENGTH, 33, 0], layout=layout)
    for b, length in enumerate(cache.lengths):
        cache.kv.page_table[b, -(-length // PAGE_SIZE) :] = 10**9
    assert_masses_like_oracle(cache, query_for(cache, 2), cache.seq_lens, "token", "mass", backend)
    step = quest_decode(query_for(cache, 2), cache.kv, cache.seq_lens, config_of(selection_unit=4, backend=backend))
    assert step.output.isfinite().all() and not step.output[2].any()


@pytest.mark.parametrize("backend", SLOW_AND_FAST)
def test_an_empty_batch(backend: Backend) -> None:
    cache = filled([20, 9])
    none = replace(cache.kv, page_table=cache.kv.page_table[:0])
    for lengths in (torch.zeros(0, dtype=torch.int32), 0):
        scores = score_pages(torch.zeros(0, 4, 16), none, lengths, selection_unit=4, backend=backend)
        assert scores.shape == (0, 2, cache.kv.max_pages * 2)
        step = quest_decode(torch.zeros(0, 4, 16), none, lengths, config_of(selection_unit=4, backend=backend))
        assert step.output.shape == (0, 4, 16)
    scores = score_pages(query_for(cache, 2), cache.kv, 0, selection_unit=4, backend=backend)
    assert (scores == -math.inf).all()


def test_scores_go_where_they_are_asked_to() -> None:
    cache = filled([LENGTH, 30])
    query = query_for(cache, 2)
    expected = score_pages(query, cache.kv, cache.seq_lens, selection_unit="token")
    out = torch.full((2, 3, 2 * expected.shape[2]), math.nan)[:, 1:, 5 : 5 + expected.shape[2]]
    assert score_pages(query, cache.kv, cache.seq_lens, selection_unit="token", out=out) is out
    assert torch.equal(out, expected)
    with pytest.raises(QuestValueError, match=r"out\.shape"):
        score_pages(query, cache.kv, cache.seq_lens, selection_unit=4, out=out)


def test_many_pages_are_scored_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled([LENGTH, 30])
    monkeypatch.setattr("quest_attention.ops.masses._CHUNK_BYTES", 1)
    assert_masses_like_oracle(cache, query_for(cache, 2), cache.seq_lens, "token", "mass")


def test_what_a_form_does_not_score_is_refused() -> None:
    tokens, pages = filled([20]), make_cache([20], form=Bounds())
    query = query_for(tokens, 2)
    with pytest.raises(QuestValueError, match="selection_unit: got 'token', expected page for bounds"):
        score_pages(query, pages.kv, 20, selection_unit="token")
    with pytest.raises(QuestValueError, match="group_reduction: got 'mass', expected max or mean for pages by bounds"):
        score_pages(query, pages.kv, 20, group_reduction="mass")
    with pytest.raises(QuestValueError, match="group_reduction: got 'mean', expected max or mass for sketch"):
        score_pages(query, tokens.kv, 20, group_reduction="mean")
    for wrong in ({"softcap": 0.0}, {"sm_scale": math.nan}, {"sinks": torch.zeros(3)}):
        with pytest.raises(QuestValueError, match=next(iter(wrong))):
            score_pages(query, tokens.kv, 20, **wrong)


def test_scale_softcap_and_sinks_change_no_score_of_a_page_by_bounds() -> None:
    cache = make_cache([LENGTH, 30])
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    query = query_for(cache, 2)
    plain = score_pages(query, cache.kv, cache.seq_lens)
    other = score_pages(query, cache.kv, cache.seq_lens, sm_scale=3.0, softcap=0.1, sinks=torch.ones(4))
    assert torch.equal(plain, other)


# Longer than 250 lines: scores by every way to ask for them, and the steps that rest on them.

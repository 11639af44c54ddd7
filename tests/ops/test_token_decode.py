"""The step over single tokens by sketches: whom it chooses, and attention to those, in Triton's interpreter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import available, interpreted
from caches import Cache, make_cache
from likeness import as_lists, query_for
from quest_attention import QuestConfig, QuestValueError, quest_decode, update_page_metadata
from quest_attention.forms import Sketch
from quest_attention.ops import Step, make_workspace

pytestmark = interpreted

available("triton")
from quest_attention.ops.triton import token_decode, token_workspace  # noqa: E402 - after what skips the file
from token_choice import assert_choice, assert_chosen  # noqa: E402


def config_of(budget: int = 64, page_size: int = 16, **options: Any) -> QuestConfig:
    return QuestConfig(
        budget, page_size, metadata="sketch", selection_unit="token", backend="triton",
        **{"candidate_factor": 4, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dim", "page_size", "group", "dtype", "scales", "layout"),
    [
        (16, 16, 4, torch.float32, None, "nhd"),
        (64, 8, 1, torch.bfloat16, None, "hnd"),
        (80, 32, 3, torch.float16, None, "contiguous"),
        (32, 16, 2, torch.bfloat16, "head", "nhd"),
        (32, 16, 12, torch.bfloat16, "tensor", "contiguous"),
        (32, 16, 20, torch.bfloat16, None, "nhd"),
        (16, 16, 40, torch.float32, None, "nhd"),
    ],
)
def test_whom_it_chooses(
    dim: int, page_size: int, group: int, dtype: torch.dtype, scales: str | None, layout: str
) -> None:
    cache = make_cache(
        [700, 60, 433], dim=dim, page_size=page_size, dtype=dtype, layout=layout, form=Sketch(page_size), scales=scales
    )
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    shares = assert_chosen(cache, query_for(cache, group), config_of(64 if page_size < 32 else 96, page_size))
    assert min(shares) > 0.7, "most of the best tokens"


@pytest.mark.parametrize(
    ("dim", "page_size", "group", "dtype", "budget", "sinks", "recent"),
    [
        (16, 16, 4, torch.float32, 64, 1, 1),
        (64, 8, 1, torch.bfloat16, 160, 0, 3),
        (80, 32, 3, torch.float16, 128, 2, 1),
        (32, 16, 12, torch.bfloat16, 256, 1, 2),
    ],
)
def test_what_passes_is_read_where_estimates_alone_choose(
    dim: int, page_size: int, group: int, dtype: torch.dtype, budget: int, sinks: int, recent: int
) -> None:
    cache = make_cache([700, 60, 433], dim=dim, page_size=page_size, dtype=dtype, form=Sketch(page_size))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    config = config_of(budget, page_size, candidate_factor=0, num_sink_pages=sinks, num_recent_pages=recent)
    given = {"softcap": 3.0, "sinks": torch.linspace(-1, 2, 2 * group)} if group == 3 else {}
    shares = assert_chosen(cache, query_for(cache, group), config, **given)
    assert min(shares) > 0.95, "those of the largest estimates"


@pytest.mark.parametrize("length", [256 + 16, 256 + 31], ids=["full", "half full"])
def test_about_four_fifths_of_the_budget_pass(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a sample of all pages, and of every second one."""
    monkeypatch.setattr(token_workspace, "_SAMPLED_TO_READ", (256,))
    cache = make_cache([length] * 3, heads=8, dim=16, page_size=16, form=Sketch(16))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    config, query = config_of(48, candidate_factor=0, num_sink_pages=0), query_for(cache, 1)
    workspace = token_workspace.make_token_workspace(cache.kv, query.shape[1], config)
    assert workspace is not None
    step = Step(query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config, workspace=workspace)
    assert token_decode.decode_tokens(step) is not None
    room = 48 - (length - 1) % 16 - 1
    passed = workspace.passed.view(24, -1).sum(1)
    assert 0.75 < float(passed.double().mean()) / (0.8 * (48 - 16)) < 1.15
    assert float((passed > room).double().mean()) < 0.3


def with_keys(positions: list[int], key: Tensor) -> Cache:
    """4,000 tokens of one KV head, some with a key of their own."""
    cache = make_cache([4000], heads=1, dim=16, page_size=16, form=Sketch(16))
    for token in positions:
        cache.kv.keys[int(cache.kv.page_table[0, token // 16]), token % 16, 0] = key
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    return cache


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_what_a_head_finds_is_read_beside_what_others_look_at(seed: int) -> None:
    """By a sum that has some of the needles at their exact weight, their estimates would rank too low."""
    query = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(seed))
    needles = list(range(1000, 1740, 37))
    cache = with_keys(needles, 12 * query[0, 1] / query[0, 1].norm())
    step = Step(query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config_of(256, candidate_factor=0))
    done = token_decode.decode_tokens(step)
    assert done is not None
    assert set(needles) <= set(done[1].units[0, 0].tolist())


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, 0.5])], ids=["", "sinks"])
def test_a_head_of_which_all_logits_are_equal_takes_no_more_than_others(sinks: Tensor | None) -> None:
    query = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(3))
    needles = [1003, 1807, 2511]
    cache = with_keys(needles, 10 * query[0, 1] / query[0, 1].norm())
    query[0, 0] = 0
    config = config_of(256, candidate_factor=0)
    workspace = token_workspace.make_token_workspace(cache.kv, 2, config)
    step = Step(
        query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config, sinks=sinks, workspace=workspace
    )  # fmt: skip
    done = token_decode.decode_tokens(step)
    assert done is not None
    assert_choice(step, done[1])
    assert set(needles) <= set(done[1].units[0, 0].tolist())


@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 6, 4)], ids=["", "sinks"])
def test_a_sample_of_which_few_are_live(sinks: Tensor | None) -> None:
    """Fewer of each part than are left out."""
    mask = (torch.arange(4000) % 61 == 0)[None]
    cache = make_cache([4000], heads=1, dim=16, page_size=16, form=Sketch(16))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    config = config_of(48, candidate_factor=0, num_sink_pages=1)
    assert_chosen(cache, query_for(cache, 4), config, token_mask=mask, sinks=sinks)


def test_what_passes_and_has_no_room() -> None:
    """All tokens have one rank, so that all pass: the latest are read."""
    cache = make_cache([1500], heads=1, dim=16, page_size=16, form=Sketch(16))
    cache.kv.keys.copy_(cache.kv.keys.nan_to_num()[:1, :1].expand_as(cache.kv.keys))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    config = config_of(96, candidate_factor=0)
    step = Step(query=query_for(cache, 2), kv=cache.kv, seq_lens=cache.seq_lens, config=config)
    done = token_decode.decode_tokens(step)
    assert done is not None
    assert done[1].units[0, 0].tolist() == [*range(16), *range(1500 - 80, 1500)]


def test_a_table_of_which_a_sample_says_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger sample, and where that is too small as well single verbs, which read all of the budget."""
    cache = make_cache([1500], heads=1, dim=16, page_size=16, form=Sketch(16))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    sampled = []
    for pages in (26_000, 52_000, 53_000):
        table = cache.kv.page_table.new_zeros(1, pages)
        plan = token_workspace.plan_of(replace(cache.kv, page_table=table), 2, config_of(1024, candidate_factor=0))
        sampled.append(plan and plan.sampled)
    assert sampled == [4096, 8192, None]
    monkeypatch.setattr(token_workspace, "_SAMPLED_TO_READ", (16,))
    config = config_of(32, candidate_factor=0)
    assert token_workspace.plan_of(cache.kv, 2, config) is None
    found = quest_decode(query_for(cache, 2), cache.kv, cache.seq_lens, config)
    assert found.selected.counts.tolist() == [[32]]


@pytest.mark.parametrize("name", [None, "holes", "left padding", "few"])
def test_who_attends_in_a_way_of_their_own_reads_the_same(name: str | None) -> None:
    """What passes is then listed alone."""
    mask = None if name is None else masks_of(430)[name]
    cache = masked_cache([413, 60, 301], torch.ones(3, 430, dtype=torch.bool) if mask is None else mask)
    config, query = config_of(96, candidate_factor=0), query_for(cache, 4)
    step = Step(query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config, token_mask=mask)
    done, listed = token_decode.decode_tokens(step), token_decode.choose_tokens(step)
    assert done is not None and listed is not None
    assert listed.units.tolist() == done[1].units.tolist()
    assert listed.counts.tolist() == done[1].counts.tolist()


def test_forced_pages_and_lists_longer_than_what_is_held_at_once() -> None:
    cache = make_cache([1500], heads=1, dim=16, page_size=16, form=Sketch(16))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    query = query_for(cache, 2)
    assert_chosen(cache, query, config_of(112, num_sink_pages=2, num_recent_pages=3))
    assert_chosen(cache, query, config_of(64, num_sink_pages=0))
    assert_chosen(cache, query, config_of(64, candidate_factor=1))
    cache.kv.keys.copy_(cache.kv.keys.nan_to_num()[:, :1].expand_as(cache.kv.keys))  # all keys of a page are one
    cache.kv.keys.copy_(cache.kv.keys[:1].expand_as(cache.kv.keys))  # and all pages
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    step = Step(query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config_of(64))
    done = token_decode.decode_tokens(step)
    assert done is not None
    assert done[1].units[0, 0].tolist() == [*range(64 - 1500 % 16), *range(1500 - 1500 % 16, 1500)], "ties: the first"


@pytest.mark.parametrize(("length", "options"), [(600, {}), (1500, {"candidate_factor": 1})])
def test_a_key_that_is_not_finite_is_read(length: int, options: dict[str, int]) -> None:
    """Late in a sequence, and where one in the sample must not decide what passes."""
    cache = make_cache([length], heads=1, dim=16, page_size=16, form=Sketch(16))
    token = length - 135
    cache.kv.keys[int(cache.kv.page_table[0, token // 16]), token % 16] = float("inf")
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    step = quest_decode(query_for(cache, 2), cache.kv, cache.seq_lens, config_of(48, **options))
    assert token in step.selected.units[0, 0].tolist()
    assert not step.output.isfinite().all()


@pytest.mark.parametrize("page_size", [128, 512])
def test_large_pages(page_size: int) -> None:
    """Whose first and last one would fill the sample that gives heads their normalisers."""
    cache = make_cache([3000], heads=1, dim=16, page_size=page_size, form=Sketch(page_size))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    assert_chosen(cache, query_for(cache, 2), config_of(2 * page_size + 64, page_size))


def test_a_length_past_the_table_is_the_tables() -> None:
    cache = make_cache([600, 600], heads=1, dim=16, page_size=16, form=Sketch(16))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    lengths = torch.tensor([cache.kv.max_pages * 16, 600], dtype=torch.int32)
    step = Step(query=query_for(cache, 2), kv=cache.kv, seq_lens=lengths, config=config_of())
    one = token_decode.decode_tokens(step)
    lengths[0] *= 5  # on a GPU nobody looks at them
    other = token_decode.decode_tokens(step)
    assert one is not None and other is not None
    assert torch.equal(one[0][1], other[0][1])
    assert torch.equal(one[1].units, other[1].units)


def test_sinks_and_a_length_of_the_host() -> None:
    cache = make_cache([500, 500], dim=16, page_size=16, form=Sketch(16))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    query, sinks = query_for(cache, 2), torch.tensor([0.5, 3.0, -1.0, 2.0])
    here = quest_decode(query, cache.kv, 500, config_of(), sinks=sinks)
    there = quest_decode(query, cache.kv, cache.seq_lens, config_of(), sinks=sinks)
    assert torch.equal(here.output, there.output)
    plain = quest_decode(query, cache.kv, cache.seq_lens, config_of())
    assert here.output.abs().sum() < plain.output.abs().sum(), "a sink takes weight and gives no value"


@pytest.mark.parametrize(("group", "softcap", "with_sinks"), [(1, 1.0, True), (4, 0.5, False), (4, 30.0, True)])
def test_softcaps(group: int, softcap: float, with_sinks: bool) -> None:
    """One that most logits feel, and one that few do."""
    cache = make_cache([433, 60], dim=16, page_size=16, form=Sketch(16))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    sinks = torch.linspace(-1, 2, 2 * group) if with_sinks else None
    query = query_for(cache, group)
    assert min(assert_chosen(cache, query, config_of(), softcap=softcap, sinks=sinks)) > 0.7
    capped, plain = (
        quest_decode(query, cache.kv, cache.seq_lens, config_of(), softcap=cap, sinks=sinks) for cap in (softcap, None)
    )
    assert not torch.allclose(capped.output, plain.output, rtol=1e-4, atol=1e-5)


def masks_of(width: int) -> dict[str, Tensor]:
    """For three sequences, of kinds that differ in where the live tokens are and in how many there are."""
    token = torch.arange(width)
    holes = torch.rand(3, width, generator=torch.Generator().manual_seed(1)) < 0.6
    return {
        "left padding": token >= torch.tensor([[37], [5], [201]]),
        "holes": holes,
        "holes of pages": token // 48 % 2 == torch.tensor([[0], [1], [1]]),
        "padding on both sides": (token >= torch.tensor([[131], [0], [16]]))
        & (token < torch.tensor([[390], [3], [280]])),
        "few": (token % 61 == 7) | (token == torch.tensor([[0], [1], [2]])),
        "hardly any": token == torch.tensor([[0], [59], [width]]),
        "all": holes | True,
    }


@pytest.mark.every_value
@pytest.mark.parametrize(
    ("group", "sinks", "recent", "factor"), [(1, 0, 1, 4), (4, 2, 2, 4), (2, 1, 1, 0), (1, 0, 3, 0)]
)
@pytest.mark.parametrize("name", masks_of(430))
def test_masks(name: str, group: int, sinks: int, recent: int, factor: int) -> None:
    """What a mask leaves out may be anything: it is NaN here, in one of its pages too, whose sketch then is."""
    cache = masked_cache([413, 60, 301], mask := masks_of(430)[name])
    config = config_of(80, num_sink_pages=sinks, num_recent_pages=recent, candidate_factor=factor)
    shares = assert_chosen(cache, query_for(cache, group), config, token_mask=mask)
    assert min(shares, default=1) > 0.7
    lengths = [int(mask[b, :end].sum()) for b, end in enumerate(cache.lengths)]
    assert len(shares) == 2 * sum(n > 80 for n in lengths), "rows past the budget, and no others"


def masked_cache(lengths: list[int], mask: Tensor, page_size: int = 16, dim: int = 16, **options: Any) -> Cache:
    """Sketched; keys and values of the dead are NaN, those of every fourth page before it is sketched."""
    cache = make_cache(lengths, dim=dim, page_size=page_size, form=Sketch(page_size), **options)
    kv = cache.kv
    for is_sketched in (False, True):
        for b, end in enumerate(cache.lengths):
            for token in range(end):
                page, offset = divmod(token, page_size)
                if (token >= mask.shape[1] or not mask[b, token]) and (is_sketched or page % 4 == 1):
                    for stored in (kv.keys, kv.values):
                        stored[int(kv.page_table[b, page]), offset] = float("nan")
        if not is_sketched:
            update_page_metadata(kv, cache.seq_lens, cache.seq_lens, backend="torch")
    return cache


@pytest.mark.every_value
@pytest.mark.parametrize("page_size", [8, 32, 48])
@pytest.mark.parametrize("width", [77, 500])
def test_masks_of_other_pages_and_widths(page_size: int, width: int) -> None:
    """Narrower than the sequences too: what it does not name is dead."""
    mask = torch.rand(2, width, generator=torch.Generator().manual_seed(2)) < 0.8
    mask[0, :21] = False
    cache = masked_cache([600, 333], mask, page_size)
    for factor in (4, 0):
        config = config_of(2 * page_size + 16, page_size, candidate_factor=factor)
        assert_chosen(cache, query_for(cache, 2), config, token_mask=mask)


@pytest.mark.parametrize("name", ["left padding", "holes", "padding on both sides"])
def test_masked_lists_of_many_words(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program lists what passes of a row, and does not look at all of its words at once."""
    monkeypatch.setattr(token_workspace, "_MOST_WORDS", 16)
    monkeypatch.setattr(token_workspace, "_MOST_ATTENDING", 1)
    cache = masked_cache([413, 60, 430], mask := masks_of(430)[name])
    shares = assert_chosen(cache, query_for(cache, 2), config_of(80, candidate_factor=0), token_mask=mask)
    assert shares


def test_a_masked_step_with_a_softcap_and_sinks() -> None:
    mask = torch.arange(700) >= torch.tensor([[135], [0]])
    cache = masked_cache([700, 433], mask, dtype=torch.bfloat16)
    sinks = torch.linspace(-1, 2, 8)
    assert_chosen(cache, query_for(cache, 4), config_of(), token_mask=mask, softcap=0.5, sinks=sinks)


@pytest.mark.parametrize("host", [False, True], ids=["", "host"])
def test_what_fits_the_budget_is_the_oracles(host: bool) -> None:
    """The choice cannot differ there: all live tokens, of sequences that are longer than the budget."""
    mask = (torch.arange(500) % 9 == 4) | (torch.arange(500) >= torch.tensor([[480], [500], [495]]))
    mask[1] = torch.arange(500) >= 437
    mask[2] = False
    cache = masked_cache([500, 500, 500], mask)
    query = query_for(cache, 2)
    lengths = 500 if host else cache.seq_lens
    mine, oracles = (
        quest_decode(query, cache.kv, lengths, replace(config_of(80), backend=name), token_mask=mask)
        for name in ("triton", "reference")
    )
    torch.testing.assert_close(mine.output, oracles.output, rtol=1e-5, atol=2e-6)
    assert as_lists(mine.selected.units) == as_lists(oracles.selected.units)
    assert torch.equal(mine.selected.counts, oracles.selected.counts)
    assert not mine.output[2].any(), "nothing to attend to"


def test_the_dead_set_no_threshold_and_have_no_weight() -> None:
    """Where they would rank first: of every second page of a sample, as the row is longer than one."""
    cache = make_cache([4500], heads=1, dim=16, page_size=16, form=Sketch(16))
    mask = (torch.arange(4500) >= 1301)[None] & (torch.arange(4500) // 160 % 3 > 0)
    dead, live = (one.nonzero().flatten() for one in (~mask[0], mask[0]))
    query, config = query_for(cache, 2), config_of()
    cache.kv.keys[cache.kv.page_table[0, dead // 16].long(), dead % 16] *= 20
    sink = int(live[0])  # which has most of the weight, and must be in the sample for it to be known
    cache.kv.keys[int(cache.kv.page_table[0, sink // 16]), sink % 16, 0] = 4 * query[0].sum(0)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    assert min(assert_chosen(cache, query, config, token_mask=mask)) > 0.7

    workspace = token_workspace.make_token_workspace(cache.kv, 2, config)
    step = Step(
        query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config, token_mask=mask, workspace=workspace
    )  # fmt: skip
    assert workspace is not None and token_decode.decode_tokens(step) is not None
    keys = cache.kv.keys[cache.kv.page_table[0, live // 16].long(), live % 16, 0]
    exact = torch.logsumexp(query[0] @ keys.T * 0.25, 1)
    sampled = torch.logsumexp(workspace.norms[0, :, :2] * math.log(2), 0)
    torch.testing.assert_close(sampled, exact, rtol=0, atol=0.5)


def test_recent_tokens_are_read_however_many_pass() -> None:
    """All keys are one, so that all tokens pass: more than there is room for."""
    cache = make_cache([1500], heads=1, dim=16, page_size=16, form=Sketch(16))
    cache.kv.keys.copy_(cache.kv.keys[:1, :1].expand_as(cache.kv.keys))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    mask = torch.arange(1500)[None] % 3 > 0
    config = config_of(48, num_sink_pages=1, candidate_factor=1, num_recent_pages=2)
    step = Step(query=query_for(cache, 2), kv=cache.kv, seq_lens=cache.seq_lens, config=config, token_mask=mask)
    plan = token_workspace.plan_of(cache.kv, 2, config)
    assert plan is not None and plan.listed < int(mask.sum())
    done = token_decode.decode_tokens(step)
    assert done is not None
    live = mask[0].nonzero().flatten()
    recent = live[live >= 1472]
    assert done[1].units[0, 0].tolist() == [*live[: 48 - len(recent)].tolist(), *recent.tolist()]


def test_a_mask_of_everything_is_none() -> None:
    cache = make_cache([700, 433], dim=16, page_size=16, form=Sketch(16))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    workspace = make_workspace(cache.kv, 4, config_of())
    query, everything = query_for(cache, 2), torch.ones(2, 900, dtype=torch.bool)
    masked, plain, masked_again = (
        quest_decode(query, cache.kv, cache.seq_lens, config_of(), token_mask=mask, workspace=workspace)
        for mask in (everything, None, everything)
    )
    assert torch.equal(masked.selected.units, plain.selected.units)
    assert torch.equal(masked.output, plain.output)
    assert torch.equal(masked_again.output, plain.output)


def test_a_softcap_hides_no_key_that_is_not_finite() -> None:
    cache = make_cache([600], heads=1, dim=16, page_size=16, form=Sketch(16))
    cache.kv.keys[int(cache.kv.page_table[0, 20]), 3] = float("inf")
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    step = quest_decode(query_for(cache, 2), cache.kv, cache.seq_lens, config_of(48), softcap=5.0)
    assert 20 * 16 + 3 in step.selected.units[0, 0].tolist(), "its logit would be no more than the cap"


@pytest.mark.parametrize(
    "options",
    [{"group_reduction": "mass"}, {"selection_unit": 4}],
    ids=str,
)
def test_what_it_leaves_to_the_verbs(options: dict[str, Any]) -> None:
    cache = make_cache([300], dim=16, page_size=16, form=Sketch(16))
    config = replace(config_of(), **options)
    assert make_workspace(cache.kv, 4, config) is None
    step = Step(query=query_for(cache, 2), kv=cache.kv, seq_lens=cache.seq_lens, config=config)
    assert token_decode.decode_tokens(step) is None


def test_a_workspace_of_another_shape_is_refused() -> None:
    small, large = (make_cache([n], dim=16, page_size=16, form=Sketch(16)) for n in (300, 3000))
    workspace = make_workspace(small.kv, 4, config_of())
    with pytest.raises(QuestValueError, match="workspace: got 'TokenWorkspace'"):
        quest_decode(query_for(large, 2), large.kv, large.seq_lens, config_of(), workspace=workspace)
    with pytest.raises(QuestValueError, match="workspace: got 'str', expected one that make_workspace gave"):
        quest_decode(query_for(small, 2), small.kv, small.seq_lens, config_of(), workspace="scratch")  # type: ignore[arg-type]
    roomy = make_workspace(large.kv, 4, config_of())
    update_page_metadata(small.kv, small.seq_lens, small.seq_lens, backend="torch")
    query = query_for(small, 2)
    given, made = (quest_decode(query, small.kv, small.seq_lens, config_of(), workspace=w) for w in (roomy, None))
    assert torch.equal(given.output, made.output)


def test_one_workspace_for_batches_of_several_sizes() -> None:
    cache = make_cache([300, 200], dim=16, page_size=16, form=Sketch(16))
    workspace = make_workspace(cache.kv, 4, config_of(), batch_sizes=(1, 2, 4))
    assert workspace is not None
    assert workspace.fits(cache.kv, 4, config_of())

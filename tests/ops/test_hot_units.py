"""Units fetched into a pool: what lies where, as by the oracle; steps that read the pool as the cache, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, FAST_BACKENDS, available, interpreted
from caches import Cache, make_cache
from likeness import query_for
from quest_attention import QuestConfig, QuestValueError, Selection, quest_decode, update_page_metadata
from quest_attention.config import Backend
from quest_attention.forms import Sketch, as_bits, form_of
from quest_attention.ops import HotUnits, Step, fetch_units, resolve_backend, run_step

LENGTH, PAGE_SIZE = 90, 8


def poisoned(hot: HotUnits) -> HotUnits:
    """The pool with NaN in it, which shows when a slot is read that holds nothing."""
    hot.keys.fill_(float("nan"))
    hot.values.fill_(float("nan"))
    return hot


def lists(units: int, count: int, seed: int) -> Tensor:
    """Different units in no order, of two sequences and two heads, and some that are none."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.stack([torch.randperm(units, generator=generator)[:count] for _ in range(4)]).to(torch.int32)
    made[1, 0], made[2, 1] = -1, units + 5
    return made.view(2, 2, count)


def assert_holds(hot: HotUnits, cache: Cache, wanted: Tensor, lengths: list[int], *, keys_only: bool = False) -> None:
    """Every wanted unit is where the table says, with the keys and values of the cache; the table and owners agree."""
    stored, size = cache.kv.contiguous, hot.unit_size
    assert stored is not None
    for b, length in enumerate(lengths):
        for h in range(2):
            first = b * 2 * hot.slots
            for unit in wanted[b, h].tolist():
                if unit < 0 or unit * size >= length:
                    continue
                slot = int(hot.table[b, h, unit]) - first
                assert 0 <= slot < hot.slots
                live = min(size, length - unit * size)
                pools = ((hot.keys, stored.keys), (hot.values, stored.values))
                assert keys_only or hot.valued[b, h, slot]
                for pool, whole in pools[: 1 + int(hot.valued[b, h, slot])]:
                    assert torch.equal(
                        as_bits(pool[b, h, slot * size : slot * size + live]),
                        as_bits(whole[b, h, unit * size : unit * size + live]),
                    )
            owned = {int(unit): slot for slot, unit in enumerate(hot.owners[b, h]) if unit >= 0}
            listed = {unit: int(page) - first for unit, page in enumerate(hot.table[b, h]) if page >= 0}
            assert owned == listed


@pytest.mark.parametrize("size", [8, 4, 1])
@pytest.mark.parametrize("lengths", ["host", "device"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_units_come_and_go_as_by_the_oracle(size: int, lengths: str, backend: Backend) -> None:
    available(backend)
    held = [LENGTH, LENGTH if lengths == "host" else 33]
    cache = make_cache(held, layout="contiguous")
    seq_lens = LENGTH if lengths == "host" else cache.seq_lens
    units, count = -(-LENGTH // size), 6
    pools = [poisoned(HotUnits.allocate(cache.kv, size, 9)) for _ in range(2)]
    for turn in range(8):
        wanted = lists(units, count, turn // 2)  # every second time the same
        keys_only = turn in (0, 3, 4, 5)  # so that values come later, at once, or never
        for pool, name in zip(pools, ("reference", backend), strict=True):
            verbs = resolve_backend(name, "cpu").verbs
            verbs.fetch_units(cache.kv, pool, wanted, seq_lens, keys_only=keys_only)
            assert_holds(pool, cache, wanted, held, keys_only=keys_only)
        for name in ("table", "owners", "stamps", "valued", "hands", "clock", "counts"):
            assert torch.equal(getattr(pools[0], name), getattr(pools[1], name)), name
    looked_up, fetched, keys, values, in_place = pools[1].counts.tolist()
    assert 0 < fetched <= keys < looked_up and values < keys and in_place == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_unit_being_written_is_copied_each_time(backend: Backend) -> None:
    available(backend)
    cache = make_cache([LENGTH, LENGTH], layout="contiguous")
    stored, kv = cache.kv.contiguous, cache.kv
    assert stored is not None
    hot = poisoned(HotUnits.allocate(kv, 8, 4))
    for length in (82, 83, 84):
        stored.keys[:, :, length - 1] = float(length)
        wanted = torch.tensor([2, 10], dtype=torch.int32).expand(2, 2, -1)
        fetch_units(kv, hot, Selection(wanted, torch.full((2, 2), 2), 8), length, backend=backend)
        assert_holds(hot, cache, wanted, [length, length])
    assert hot.counts.tolist() == [24, 8, 16, 16, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_the_unit_being_written_are_not_those_it_had(backend: Backend) -> None:
    """When its keys alone are fetched, its values in the pool lack a token."""
    verbs = resolve_backend(available(backend), "cpu").verbs
    cache = make_cache([LENGTH, LENGTH], layout="contiguous")
    hot = poisoned(HotUnits.allocate(cache.kv, 8, 4))
    wanted = torch.tensor([2, 10], dtype=torch.int32).expand(2, 2, -1)
    for length, keys_only, valued in ((82, False, [1, 1]), (83, True, [1, 0]), (84, False, [1, 1])):
        verbs.fetch_units(cache.kv, hot, wanted, length, keys_only=keys_only)
        assert hot.valued[..., :2].flatten(0, 1).unique(dim=0).tolist() == [valued]
        assert_holds(hot, cache, wanted, [length, length], keys_only=keys_only)
    assert hot.counts.tolist() == [24, 8, 16, 12, 0]


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_what_a_step_looks_up_is_counted_once(backend: Backend) -> None:
    """Candidates, and what is selected beside them, which is fetched too: no more than was looked up."""
    verbs = resolve_backend(available(backend), "cpu").verbs
    cache = make_cache([LENGTH, LENGTH], layout="contiguous")
    hot = HotUnits.allocate(cache.kv, 8, 6)
    for candidates, selected, counts in (
        ([4, 5, 6], [4, 6, 0], [16, 16]),  # the last is no candidate
        ([4, 5, 7], [4, 7, 0], [32, 20]),
    ):
        for units, is_again in ((candidates, False), (selected, True)):
            wanted = torch.tensor(units, dtype=torch.int32).expand(2, 2, -1)
            verbs.fetch_units(cache.kv, hot, wanted, LENGTH, is_again=is_again)
        assert hot.counts[:2].tolist() == counts


def test_what_is_written_over_is_forgotten() -> None:
    cache = make_cache([LENGTH, LENGTH], layout="contiguous")
    hot = HotUnits.allocate(cache.kv, 8, 6)
    wanted = torch.tensor([0, 3, 7, 9], dtype=torch.int32).expand(2, 2, -1)
    fetch_units(cache.kv, hot, Selection(wanted, torch.full((2, 2), 4), 8), LENGTH)
    hot.forget(7)
    assert_holds(hot, cache, wanted[:, :, :2], [LENGTH, LENGTH])
    assert (hot.table >= 0).sum() == 8
    fetch_units(cache.kv, hot, Selection(wanted, torch.full((2, 2), 4), 8), LENGTH)
    assert_holds(hot, cache, wanted, [LENGTH, LENGTH])
    assert hot.counts.tolist() == [32, 24, 24, 24, 0]


CONFIGS = {
    "bounds of pages": QuestConfig(32, PAGE_SIZE, metadata="bounds"),
    "moments of pages": QuestConfig(32, PAGE_SIZE, metadata="moments", group_reduction="mean"),
    "sketches of tokens": QuestConfig(24, PAGE_SIZE, metadata="sketch", selection_unit="token", candidate_factor=2),
    "estimates alone": QuestConfig(24, PAGE_SIZE, metadata="sketch", selection_unit="token", candidate_factor=0),
    "sketches of runs": QuestConfig(24, PAGE_SIZE, metadata="sketch", selection_unit=4, candidate_factor=2),
    "sketches of pages": QuestConfig(32, PAGE_SIZE, metadata="sketch", selection_unit="page", candidate_factor=0),
}


@pytest.mark.every_value
@pytest.mark.parametrize("name", ["bounds of pages", "moments of pages", "sketches of tokens", "sketches of runs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pool_of_a_cache_in_8_bits_has_its_scales(name: str, backend: Backend) -> None:
    config = replace(CONFIGS[name], backend=available(backend))
    cache = make_cache([LENGTH, LENGTH], layout="contiguous", form=form_of(config), scales="head")
    kv = cache.kv
    update_page_metadata(kv, LENGTH, LENGTH)
    hot = poisoned(HotUnits.allocate(kv, config.unit_size, 50 if config.unit_size == 1 else 14))
    attend = attend_to_cache if backend == "triton" and config.unit_size > 1 else None
    for seed in range(3):
        query = query_for(cache, 2, dtype=torch.bfloat16, seed=seed)
        expected = run_step(Step(query=query, kv=kv, seq_lens=LENGTH, config=config), attend=attend)
        step = quest_decode(query, kv, LENGTH, config, hot=hot)
        assert torch.equal(step.selected.units, expected.selected.units)
        assert torch.equal(step.output, expected.output)
        assert_holds(hot, cache, step.selected.units, [LENGTH, LENGTH])
    looked_up, fetched, *_ = hot.counts.tolist()
    assert 0 < fetched < looked_up
    others = replace(kv, key_scale=kv.key_scale.clone())
    with pytest.raises(QuestValueError, match=r"kv.key_scale, kv.value_scale: got 'others', expected those that the"):
        quest_decode(query, others, LENGTH, config, hot=hot)


def attend_to_cache(step: Step, selected: Selection) -> Tensor:
    """The verb of the Triton kernels."""
    output, _ = resolve_backend("triton", "cpu").verbs.sparse_decode_attention(step, selected)
    return output


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("lengths", ["host", "device"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_over_the_pool_is_that_over_the_cache_bit_by_bit(
    name: str, lengths: str, masked: bool, backend: Backend
) -> None:
    config = replace(CONFIGS[name], backend=available(backend))
    attend, same = None, torch.equal
    if backend == "triton" and config.unit_size > 1:  # a launch for all of a step would split its sums otherwise
        attend = attend_to_cache
    if backend == "triton" and name == "estimates alone":  # as it does here
        same = partial(torch.allclose, rtol=1e-5, atol=1e-6)
    cache = make_cache([LENGTH, LENGTH if lengths == "host" else 61], layout="contiguous", form=form_of(config))
    seq_lens = LENGTH if lengths == "host" else cache.seq_lens
    kv = cache.kv
    update_page_metadata(kv, seq_lens, seq_lens)
    mask = torch.arange(LENGTH).expand(2, -1) >= torch.tensor([[20], [3]]) if masked else None
    hot = poisoned(HotUnits.allocate(kv, config.unit_size, 50 if config.unit_size == 1 else 14))
    for seed in range(3):
        query = query_for(cache, 2, dtype=torch.float32, seed=seed)
        options = {} if seed != 1 else {"softcap": 5.0, "sinks": torch.linspace(-1, 1, query.shape[1])}
        given = Step(query=query, kv=kv, seq_lens=seq_lens, config=config, token_mask=mask, **options)
        expected = run_step(given, attend=attend)
        step = quest_decode(query, kv, seq_lens, config, token_mask=mask, hot=hot, **options)
        assert torch.equal(step.selected.units, expected.selected.units)
        assert same(step.output, expected.output)
    out = torch.empty_like(expected.output)
    assert quest_decode(query, kv, seq_lens, config, token_mask=mask, hot=hot, out=out, **options).output is out
    assert same(out, expected.output)
    looked_up, fetched, _, _, in_place = hot.counts.tolist()
    assert 0 < fetched < looked_up
    assert (in_place > 0) == (backend == "triton" and config.unit_size == 1), "of a sample"


@interpreted
def test_kernels_have_candidates_and_their_sample_in_the_pool_from_one_step_to_the_next() -> None:
    config = replace(CONFIGS["sketches of tokens"], backend=available("triton"))
    cache = make_cache([LENGTH], layout="contiguous", form=form_of(config))
    update_page_metadata(cache.kv, LENGTH, LENGTH)
    query = query_for(cache, 2)
    expected = quest_decode(query, cache.kv, LENGTH, config)
    hot = poisoned(HotUnits.allocate(cache.kv, 1, cache.kv.max_pages * PAGE_SIZE + 4 * 128))  # of both
    heads, counts = cache.kv.num_kv_heads, []
    for _ in range(2):
        step = quest_decode(query, cache.kv, LENGTH, config, hot=hot)
        assert torch.equal(step.selected.units, expected.selected.units)
        assert torch.equal(step.output, expected.output)
        counts.append(hot.counts.tolist())
        hot.counts.zero_()
    first, again = counts
    assert first[2] >= heads * LENGTH
    assert first[3] == heads * config.token_budget, "values of what was chosen"
    assert first[4] == heads * LENGTH, "so short a sequence is its own sample"
    assert again[0] == first[0] >= heads * config.token_budget
    assert again[1] == 0, "nothing is missing"
    assert again[2] == 2 * heads, "copied is the newest token, of the sample and of what was chosen"
    assert again[3] == heads, "and its value"
    assert again[4] == heads, "of the newest token the pool knows what it was"
    every = torch.arange(LENGTH, dtype=torch.int32).expand(1, heads, -1)
    assert_holds(hot, cache, every, [LENGTH], keys_only=True)


def test_pools_that_do_not_fit_are_refused() -> None:
    cache = make_cache([LENGTH], layout="contiguous")
    config, query, kv = QuestConfig(32, PAGE_SIZE, metadata="bounds"), query_for(cache, 2), cache.kv

    def run(hot: HotUnits, kv=kv, config: QuestConfig = config) -> None:
        quest_decode(query, kv, LENGTH, config, hot=hot)

    with pytest.raises(QuestValueError, match=r"hot.slots: got 4, expected at least 5, which a step wants together"):
        run(HotUnits.allocate(kv, 8, 4))
    with pytest.raises(QuestValueError, match=r"hot.unit_size: got 4, expected 8, as what is selected"):
        run(HotUnits.allocate(kv, 4, 9))
    with pytest.raises(QuestValueError, match=r"hot: got .* expected .*1, 2, 13"):
        run(HotUnits.allocate(make_cache([200], layout="contiguous").kv, 8, 9))
    with pytest.raises(QuestValueError, match=r"kv: got 'pages that lie apart', expected a contiguous"):
        run(HotUnits.allocate(kv, 8, 9), replace(kv, contiguous=None))
    for slots in (0, -1, 2.0, True):
        with pytest.raises(QuestValueError, match=r"slots: got .*, expected a positive integer"):
            HotUnits.allocate(kv, 8, slots)  # type: ignore[arg-type]
    for size in (0, 3, 16, "8"):
        with pytest.raises(QuestValueError, match=r"^unit_size: got .*, expected (a positive|tokens that divide)"):
            HotUnits.allocate(kv, size, 9)  # type: ignore[arg-type]
    ranked = QuestConfig(32, PAGE_SIZE, metadata="bounds", selection_unit="token")
    with pytest.raises(QuestValueError, match=r"config.selection_unit: got 'token', expected page for bounds beside"):
        run(HotUnits.allocate(kv, 1, 80), config=ranked)
    sketched = make_cache([LENGTH], layout="contiguous", form=Sketch(PAGE_SIZE)).kv
    with pytest.raises(QuestValueError, match=r"hot.slots: got 40, expected at least 48"):
        run(HotUnits.allocate(sketched, 1, 40), sketched, CONFIGS["sketches of tokens"])
    with pytest.raises(QuestValueError, match=r"hot: got 'a pool', expected None with several query tokens"):
        quest_decode(query[:, None], kv, LENGTH, config, hot=HotUnits.allocate(kv, 8, 9))

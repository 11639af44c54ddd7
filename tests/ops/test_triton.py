"""The Triton kernels against the oracle: in Triton's interpreter where there is no GPU, so on small shapes."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from caches import LAYOUTS, Cache, make_cache
from likeness import as_lists, assert_like_oracle, assert_scores_like_oracle, query_for
from quest_attention import (
    BackendError,
    QuestConfig,
    QuestValueError,
    quest_decode,
    score_pages,
    select_pages,
    sparse_decode_attention,
    update_page_metadata,
)
from quest_attention.forms import bounds
from quest_attention.ops import (
    DecodeWorkspace,
    Step,
    append_token,
    make_workspace,
    reference,
    resolve_backend,
    torch_backend,
)
from quest_attention.pages import PagedKV

triton = pytest.importorskip("triton", reason="Triton is for Linux")
tl = pytest.importorskip("triton.language")

from triton.runtime import interpreter  # noqa: E402

import quick_interpreter  # noqa: E402
from quest_attention.ops.triton import arithmetic, choice, decode, tuning, workspace  # noqa: E402 (needs triton)
from quest_attention.ops.triton.bounds import _round_up  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # the interpreter computes in NumPy
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def config(token_budget: int, page_size: int = 8, **options: object) -> QuestConfig:
    own = {"token_budget": token_budget, "page_size": page_size, "backend": "triton", "metadata": "bounds"}
    return QuestConfig.from_dict({**own, **options})


def step_of(cache: Cache, group: int, settings: QuestConfig, **options: object) -> Step:
    return Step(query=query_for(cache, group), kv=cache.kv, seq_lens=cache.seq_lens, config=settings, **options)


@triton.jit
def _wider(low, high, other_low, other_high):
    lower = tl.minimum(low, other_low, propagate_nan=tl.PropagateNan.ALL)
    return lower, tl.maximum(high, other_high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reduce_kernel(given, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr, KEEP: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    block = tl.load(given + row[:, None] * COLUMNS + column[None, :])
    low, high = tl.reduce((block, block), AXIS, _wider, keep_dims=KEEP)
    size: tl.constexpr = COLUMNS if AXIS == 0 else ROWS
    at = tl.arange(0, size)
    if KEEP:
        at = at[None, :] if AXIS == 0 else at[:, None]
    tl.store(out + at, low)
    tl.store(out + size + at, high)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("keep", [False, True])
def test_the_quick_interpreter_reduces_as_tritons_own(axis: int, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.randn(8, 4)
    given[3, 2] = float("nan")
    found = []
    for way in (quick_interpreter.one_by_one, quick_interpreter.by_halves):
        monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", way)
        found.append(torch.zeros(16))
        _reduce_kernel[(1,)](given, found[-1], ROWS=8, COLUMNS=4, AXIS=axis, KEEP=keep)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, equal_nan=True)
    size = (4, 8)[axis]
    assert found[0][: 2 * size].isnan().sum() == 2 and (found[0][:size] < found[0][size : 2 * size]).sum() == size - 1


@pytest.mark.every_value
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3])
def test_the_whole_step(layout: str, dtype: torch.dtype, group: int) -> None:
    cache = make_cache([150, 37, 0, 1, 32, 33], dtype=dtype, layout=layout)
    assert_like_oracle(cache, group, config(32))


@pytest.mark.parametrize("group", [1, 2])
def test_output_goes_where_it_is_asked_to(group: int) -> None:
    cache, query = make_cache([100, 37]), query_for(make_cache([100, 37]), group)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    expected = quest_decode(query, cache.kv, cache.seq_lens, config(32)).output
    out = torch.full_like(query, float("nan"))
    assert quest_decode(query, cache.kv, cache.seq_lens, config(32), out=out).output is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("group", [2, 4, 7, 8, 16])
def test_group_sizes(group: int) -> None:
    assert_like_oracle(make_cache([100, 40], heads=1), group, config(32))


@pytest.mark.parametrize(("page_size", "dim"), [(16, 64), (16, 80), (32, 96), (64, 128), (16, 256)])
@pytest.mark.parametrize("group", [1, 2])
def test_page_sizes_and_head_dims(page_size: int, dim: int, group: int) -> None:
    cache = make_cache([page_size * 5 + 1, 3], heads=1, dim=dim, page_size=page_size)
    assert_like_oracle(cache, group, config(3 * page_size, page_size))


@pytest.mark.parametrize("budget", [8, 30, 64, 65, 1000])
@pytest.mark.parametrize(("sinks", "recent", "reduction"), [(0, 0, "max"), (0, 1, "mean")])
def test_budgets_and_forced_pages(budget: int, sinks: int, recent: int, reduction: str) -> None:
    cache = make_cache([7, 64, 65, 200])
    options = {"num_sink_pages": sinks, "num_recent_pages": recent, "group_reduction": reduction}
    assert_like_oracle(cache, 2, config(budget, **options))


def test_many_forced_pages() -> None:
    cache = make_cache([130, 90, 17])
    assert_like_oracle(cache, 3, config(48, num_sink_pages=2, num_recent_pages=4))


@pytest.mark.parametrize("length", [1, 33, 100])
def test_length_known_to_the_host(length: int) -> None:
    cache = make_cache([length, length], layout="contiguous")
    assert_like_oracle(cache, 3, config(32), host_length=length)


@pytest.mark.every_value
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_metadata_in_8_bits(layout: str, dtype: torch.dtype) -> None:
    cache = make_cache([100, 37, 1], dtype=dtype, layout=layout, narrow=True)
    for first in (30, 0):  # the second time over what the first left
        by = {}
        for name in ("triton", "torch", "reference"):
            cache.kv.metadata.fill_(float("nan"))
            for lengths in (cache.seq_lens.clamp(max=first), cache.seq_lens):
                new = lengths if lengths is not cache.seq_lens else cache.seq_lens - cache.seq_lens.clamp(max=first)
                update_page_metadata(cache.kv, lengths, new, backend=name)
            by[name] = cache.kv.metadata.float()
        for name in ("triton", "torch"):
            torch.testing.assert_close(by[name], by["reference"], rtol=0, atol=0, equal_nan=True)
    assert_like_oracle(cache, 2, config(32))


def test_rounding_up_to_8_bits_is_exact() -> None:
    edges = [0.0, -0.0, 448, 449, -448, -449, 2**-6, -(2**-6), 2**-9, -(2**-9), 1e-9, -1e-9]
    others = [float("inf"), -float("inf"), float("nan"), 1.9463]  # the last rounds into the next power of two
    random_ones = torch.randn(240) * torch.tensor([1.0, 300.0, 1e-3]).repeat(80)
    values = torch.cat([random_ones, torch.tensor(edges + others)])
    bits = torch.zeros(256, dtype=torch.uint8)
    _round_up_kernel[(1,)](values, bits, N=256)
    expected = bounds._outward(values, torch.float8_e4m3fn, upward=True).float()
    torch.testing.assert_close(bits.view(torch.float8_e4m3fn).float(), expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _round_up_kernel(values, bits, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(bits + at, _round_up(tl.load(values + at)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conversions_from_and_to_8_bits_are_pytorchs(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    wide = torch.zeros(256, dtype=dtype)
    _convert_kernel[(1,)](every, wide, N=256)
    torch.testing.assert_close(wide, every.to(dtype), rtol=0, atol=0, equal_nan=True)
    numbers = every.float()[~every.float().isnan()].sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    random_ones = torch.randn(2792) * torch.tensor([1.0, 100.0, 300.0, 1e-2, 1e-3, 1e-9, 1e30, 0.1]).repeat(349)
    edges = torch.tensor([464.0, 465.0, 480.0, 448.0, float("inf"), -float("inf"), float("nan"), -0.0, 1e-40])
    given = [ties, ties.nextafter(torch.tensor(1e9)), ties.nextafter(torch.tensor(-1e9)), edges, random_ones]
    values = torch.cat([torch.cat(given), torch.zeros(4096)])[:4096].to(dtype)
    rounded = torch.zeros(4096, dtype=torch.float8_e4m3fn)
    _convert_kernel[(1,)](values, rounded, N=4096)
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    is_same = rounded.view(torch.uint8) == expected.view(torch.uint8)
    assert (is_same | values.isnan()).all() and torch.equal(rounded.float().isnan(), values.isnan())


@triton.jit
def _convert_kernel(given, out, N: tl.constexpr):
    at = tl.arange(0, N)
    wide = arithmetic.widen(tl.load(given + at), tl.float32)
    tl.store(out + at, arithmetic.round_to(wide, out.dtype.element_ty))


@triton.jit
def _choose_kernel(ranks, out, num_live, count, N: tl.constexpr):
    at = tl.arange(0, N)
    chosen, slot = choice.choose_pages(tl.load(ranks + at), num_live, count)
    tl.store(out + slot, at, mask=chosen)


@pytest.mark.parametrize("kind", ["normal", "ties", "huge", "equal", "denormal", "neighbours", "two signs"])
def test_choosing_among_all_kinds_of_ranks(kind: str) -> None:
    rng = random.Random(kind)
    torch.manual_seed(0)
    n = 64
    neighbours = torch.full((n,), 1.0).nextafter(torch.tensor(2.0))
    neighbours[::3] = 1.0
    make = {
        "normal": lambda: torch.randn(n),
        "ties": lambda: torch.randint(-2, 3, (n,)).float(),
        "huge": lambda: torch.randn(n) * 3e38,
        "equal": lambda: torch.full((n,), 1.5),
        "denormal": lambda: torch.randn(n) * 1e-44,
        "neighbours": neighbours.clone,
        "two signs": lambda: torch.randn(n) * torch.tensor([1e-3, 1e3]).repeat(n // 2),
    }[kind]
    largest = torch.finfo(torch.float32).max
    for _ in range(25):
        live = rng.randint(0, n)
        count = rng.randint(0, live)
        ranks = make().clamp(-largest, largest)
        ranks[torch.rand(n) < rng.choice([0, 0.2])] = largest  # pages that score +inf
        ranks[torch.randperm(live)[: rng.randint(0, min(count, 3))]] = float("inf")  # forced pages
        ranks[live:] = -float("inf")
        chosen = torch.full((n,), -1, dtype=torch.int32)
        _choose_kernel[(1,)](ranks, chosen, live, count, N=n)
        best = sorted(range(live), key=lambda page, ranks=ranks: (-float(ranks[page]), page))[:count]
        assert chosen.tolist() == sorted(best) + [-1] * (n - count)


def test_choosing_among_more_ranks_than_half_a_word_counts() -> None:
    torch.manual_seed(0)
    n, count = 32768, 20000
    ranks = torch.randint(-1, 2, (n,)).float()  # the cut falls among some 11,000 equals
    chosen = torch.full((n,), -1, dtype=torch.int32)
    _choose_kernel[(1,)](ranks, chosen, n, count, N=n)
    best = sorted(range(n), key=lambda page: (-float(ranks[page]), page))[:count]
    assert chosen.tolist() == sorted(best) + [-1] * (n - count)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("group", [1, 2])
def test_a_page_with_a_non_finite_key_is_read(bad: float, group: int) -> None:
    cache = make_cache([64], heads=1)
    cache.kv.keys[cache.kv.page_table[0, 2].long(), 3, 0, 1] = bad
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="triton")
    step = decode.quest_decode(step_of(cache, group, config(16)))
    assert step is not None
    assert as_lists(step[1].units) == [[[2, 7]]]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_sinks_and_lse(group: int, softcap: float | None, with_sinks: bool) -> None:
    cache = make_cache([70, 9, 0])
    kv, query, scale = cache.kv, query_for(cache, group), 0.2
    sinks = torch.randn(2 * group) if with_sinks else None
    update_page_metadata(kv, cache.seq_lens, cache.seq_lens, backend="triton")
    step = decode.quest_decode(step_of(cache, group, config(32), sm_scale=scale, softcap=softcap, sinks=sinks))
    assert step is not None
    exact, exact_lse = reference.sparse_decode_attention(
        query, kv, cache.lengths, as_lists(step[1].units), scale, softcap, sinks
    )
    torch.testing.assert_close(step[0].double(), exact, rtol=1e-5, atol=2e-6)
    output, lse = sparse_decode_attention(
        query, kv, cache.seq_lens, step[1], sm_scale=scale, softcap=softcap, sinks=sinks, return_lse=True,
        backend="triton",
    )  # fmt: skip
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=2e-6)
    assert lse is not None
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2])
def test_token_mask(group: int) -> None:
    cache = make_cache([90, 64])
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[0, :21] = False  # left padding, which ends inside a page
    mask[1, :3] = False
    kv, query, options = cache.kv, query_for(cache, group), {"token_mask": mask, "backend": "triton"}
    update_page_metadata(kv, cache.seq_lens, cache.seq_lens, backend="triton")
    scores = score_pages(query, kv, cache.seq_lens, **options)
    assert_scores_like_oracle(scores, query, cache, token_mask=mask)
    selected = select_pages(
        scores, cache.seq_lens, page_size=8, token_budget=40, num_sink_pages=1, num_recent_pages=2, **options
    )
    lists = reference.select_pages(scores, cache.lengths, 8, 40, 1, 2, mask)
    assert as_lists(selected.units) == lists
    output, _ = sparse_decode_attention(query, kv, cache.seq_lens, selected, sm_scale=0.25, **options)
    expected, _ = reference.sparse_decode_attention(query, kv, cache.lengths, lists, 0.25, token_mask=mask)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("lengths", [[300, 33, 0, 255], [129], [300, 100, 128, 65]])
def test_rows_in_sections(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more pages than one program holds: the pages of one piece, in the verb and in the fused kernel."""
    monkeypatch.setattr(choice, "_SECTION_UNITS", 8)
    monkeypatch.setattr(tuning, "_SECTION_PAGES", 16)
    cache = make_cache(lengths)
    for options in ({}, {"num_sink_pages": 2, "num_recent_pages": 3}):
        assert_like_oracle(cache, 2, config(64, **options))
        assert_like_oracle(cache, 1, config(64, **options))
    scores = torch.randint(0, 5, (len(lengths), 2, cache.kv.max_pages)).float()  # ties across sections
    found = select_pages(scores, cache.seq_lens, page_size=8, token_budget=80, backend="triton")
    assert as_lists(found.units) == reference.select_pages(scores, cache.lengths, 8, 80)
    mask = torch.rand(len(lengths), 300) < 0.9
    scores = score_pages(query_for(cache, 2), cache.kv, cache.seq_lens, token_mask=mask, backend="torch")
    for sinks in (0, 3):
        options = {"page_size": 8, "token_budget": 80, "num_sink_pages": sinks, "token_mask": mask}
        mine = select_pages(scores, cache.seq_lens, **options, backend="triton")
        theirs = select_pages(scores, cache.seq_lens, **options, backend="torch")
        assert as_lists(mine.units) == as_lists(theirs.units)
        assert mine.counts.tolist() == theirs.counts.tolist()


def test_what_the_fused_kernel_cannot_hold_takes_the_single_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_MOST_CANDIDATES", 8)
    monkeypatch.setattr(tuning, "_SECTION_PAGES", 8)
    monkeypatch.setattr(tuning, "_LONG_SECTION_PAGES", 8)
    cache = make_cache([200, 30])
    assert tuning.tune(cache.kv, 4, config(64)) is None
    assert_like_oracle(cache, 2, config(64))


def test_a_workspace_is_left_as_it_was_found() -> None:
    cache = make_cache([150, 20])
    settings = config(32)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="triton")
    memory = workspace.make_workspace(cache.kv, 4, settings)
    assert memory is not None
    assert memory.fits(cache.kv, 4, settings)
    assert not memory.fits(cache.kv, 8, settings)
    for tensor in memory[:-1]:
        tensor.fill_(float("nan") if tensor.is_floating_point() else -7)
    first, again = (decode.quest_decode(step_of(cache, 2, settings, workspace=memory)) for _ in range(2))
    assert not memory.counters.any()
    assert first is not None
    assert again is not None
    assert torch.equal(first[0], again[0])


def test_one_workspace_serves_batches_of_several_sizes() -> None:
    caches = {size: make_cache([150, 37, 90, 12, 61][:size]) for size in (1, 2, 5)}
    settings = config(32)
    memory = make_workspace(caches[1].kv, 4, settings, batch_sizes=range(1, 6))
    assert memory is not None
    for cache in (caches[5], caches[1], caches[2]):
        update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
        expected = quest_decode(query_for(cache, 2), cache.kv, cache.seq_lens, settings)
        shared = quest_decode(query_for(cache, 2), cache.kv, cache.seq_lens, settings, workspace=memory)
        assert torch.equal(shared.output, expected.output)
        assert torch.equal(shared.selected.units, expected.selected.units)
    assert not memory.fits(make_cache([150] * 6).kv, 4, settings)


def test_a_workspace_of_another_backend_is_refused() -> None:
    cache = make_cache([100])
    other = DecodeWorkspace.for_cache(cache.kv, 4, config(32))
    with pytest.raises(QuestValueError, match=r"workspace: got .DecodeWorkspace"):
        decode.quest_decode(step_of(cache, 2, config(32), workspace=other))


def test_metadata_in_pieces_equals_metadata_at_once() -> None:
    cache = make_cache([77, 30, 5])
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="reference")
    at_once = cache.kv.metadata.clone()
    cache.kv.metadata.fill_(float("nan"))
    for end in (3, 4, 5, 8, 9, 30, 31, 77):
        lengths = cache.seq_lens.clamp(max=end)
        before = cache.seq_lens.clamp(max={3: 0, 4: 3, 5: 4, 8: 5, 9: 8, 30: 9, 31: 30, 77: 31}[end])
        update_page_metadata(cache.kv, lengths, lengths - before, backend="triton")
    torch.testing.assert_close(cache.kv.metadata, at_once, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the assembler that Triton brings along is for x86-64")
@pytest.mark.timeout(900)  # a few minutes, on a machine that is busy more than most tests may take
@pytest.mark.parametrize("which", ["few", pytest.param("all", marks=pytest.mark.thorough)])
def test_every_kernel_compiles_for_a_hopper_gpu(which: str) -> None:
    """The interpreter takes what the compiler refuses: a variable that changes its type in a loop, for one."""
    script = Path(__file__).with_name("hopper.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), which],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert compiled == {
        "_append_kernel",
        "_attend_kernel",
        "_count_kernel",
        "_decode_kernel",
        "_estimate_kernel",
        "_fold_kernel",
        "_live_kernel",
        "_lse_kernel",
        "_mark_kernel",
        "_merge_sections_kernel",
        "_own_kernel",
        "_receive_kernel",
        "_score_kernel",
        "_select_kernel",
        "_slot_kernel",
        "_update_kernel",
        "attend_passing_kernel",
        "choose_kernel",
        "list_passing_kernel",
        "copy_kernel",
        "merge_kernel",
        "pick_kernel",
        "place_kernel",
        "prepare_kernel",
        "rank_kernel",
        "scan_kernel",
        "weigh_kernel",
    }


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("batch", "pages"), [(0, 4), (2, 0)])
def test_no_sequences_and_no_pages(batch: int, pages: int, group: int) -> None:
    kv = make_cache([40]).kv
    empty = PagedKV(kv.keys, kv.values, kv.metadata, torch.zeros(batch, pages, dtype=torch.int32))
    query, lengths = torch.randn(batch, 2 * group, 16), torch.zeros(batch, dtype=torch.int32)
    update_page_metadata(empty, lengths, lengths, backend="triton")
    step = quest_decode(query, empty, lengths, config(32))
    assert step.output.shape == query.shape
    assert not step.output.any()
    assert not step.selected.counts.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("narrow", [False, True])
def test_appending_tokens(layout: str, narrow: bool) -> None:
    """Token by token from three lengths, over page boundaries: keys, values and bounds as the oracle writes them."""
    caches = {name: make_cache([30, 7, 0], layout=layout, narrow=narrow) for name in ("triton", "torch", "reference")}
    for name, cache in caches.items():
        lengths = cache.seq_lens.clone()
        lengths[2] = -1  # stays empty for a step
        update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="reference")
        torch.manual_seed(5)
        for _ in range(10):
            lengths += 1
            keys, values = torch.randn(2, 3, 2, 16)
            append_token(cache.kv, keys, values, lengths, backend=name)
    for name in ("triton", "torch"):
        for part in ("keys", "values", "metadata"):
            mine, oracle = (getattr(caches[one].kv, part).float() for one in (name, "reference"))
            torch.testing.assert_close(mine, oracle, rtol=0, atol=0, equal_nan=True)


def test_float64_is_refused() -> None:
    cache = make_cache([20], dtype=torch.float64)
    with pytest.raises(QuestValueError, match="bfloat16, float16, float32 or float8_e4m3fn"):
        score_pages(query_for(cache, 1), cache.kv, cache.seq_lens, backend="triton")


def test_the_backend_is_chosen_by_device() -> None:
    assert resolve_backend("auto", "cpu").verbs is torch_backend
    assert resolve_backend("triton", "cpu").name == "triton"  # in the interpreter
    assert resolve_backend("auto", "cuda").name == "torch"
    assert "TRITON_INTERPRET" in resolve_backend("auto", "cuda").reason
    with pytest.raises(BackendError, match="NVIDIA"):
        resolve_backend("triton", "mps")

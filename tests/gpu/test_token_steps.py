"""The step over single tokens at real sizes: ranks by binary products, launches that start early, graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from caches import Cache
from quest_attention import QuestConfig, quest_decode, update_page_metadata
from quest_attention.bench.steps import launch_times, quest_steps
from quest_attention.forms import Sketch
from quest_attention.ops import Step, make_workspace
from quest_attention.pages import PagedKV, num_pages

pytest.importorskip("triton", reason="Triton is for Linux")
from quest_attention.ops.triton import token_decode, token_workspace
from quest_attention.ops.triton.tuning import filling_programs
from token_choice import assert_chosen

pytestmark = pytest.mark.gpu


def make_cache(lengths: list[int], heads: int, dim: int, dtype: torch.dtype, page_size: int = 16) -> Cache:
    """Pages in random order whose keys differ from page to page, as those of texts do."""
    torch.manual_seed(0)
    batch, pages, form = len(lengths), num_pages(max(lengths), page_size), Sketch(page_size)
    shape = (batch * pages, page_size, heads, dim)
    keys, values = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(2))
    keys += torch.randn(batch * pages, 1, heads, dim, dtype=dtype, device="cuda")
    kept = torch.full((batch * pages, heads, *form.shape(page_size, dim)), 255, dtype=torch.uint8, device="cuda")
    table = torch.randperm(batch * pages, device="cuda").to(torch.int32).view(batch, pages)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    kv = PagedKV.from_nhd(keys, values, kept, table, form=form)
    update_page_metadata(kv, seq_lens, seq_lens)
    return Cache(kv, seq_lens)


@pytest.mark.parametrize(("dim", "group", "dtype", "page_size"), [
    (128, 4, torch.bfloat16, 16), (128, 1, torch.bfloat16, 16), (128, 8, torch.float16, 16),
    (64, 7, torch.bfloat16, 16), (256, 4, torch.bfloat16, 16), (256, 6, torch.float32, 16),
    (80, 3, torch.bfloat16, 16), (128, 12, torch.bfloat16, 16), (128, 4, torch.bfloat16, 32),
    (128, 20, torch.bfloat16, 16), (64, 40, torch.bfloat16, 16),
])  # fmt: skip
def test_whom_it_chooses(dim: int, group: int, dtype: torch.dtype, page_size: int) -> None:
    cache = make_cache([20_000, 300, 4_321], 2, dim, dtype, page_size)
    scans = dim in {64, 128, 256} and group <= 8 and page_size == 16
    assert token_workspace.can_scan(cache.kv, group) == scans
    query = torch.randn(3, 2 * group, dim, device="cuda").to(dtype)
    config = QuestConfig(512, page_size, metadata="sketch", selection_unit="token")
    shares = assert_chosen(cache, query, config)
    assert min(shares) > 0.7, "most of the best tokens"


@pytest.mark.parametrize(
    ("dim", "group", "dtype"),
    [(128, 4, torch.bfloat16), (64, 1, torch.bfloat16), (256, 6, torch.float16), (80, 3, torch.bfloat16)],
)
def test_what_passes_is_read_where_estimates_alone_choose(dim: int, group: int, dtype: torch.dtype) -> None:
    cache = make_cache([20_000, 300, 4_321], 2, dim, dtype)
    query = torch.randn(3, 2 * group, dim, device="cuda").to(dtype)
    config = QuestConfig(1024, metadata="sketch", selection_unit="token", candidate_factor=0)
    assert min(assert_chosen(cache, query, config)) > 0.95, "those of the largest estimates"
    assert min(assert_chosen(cache, query, config, softcap=2.0)) > 0.95
    smaller = QuestConfig(256, metadata="sketch", selection_unit="token", candidate_factor=0)
    steps = quest_steps([query], [cache.kv], cache.seq_lens, smaller)
    names = [one.kernel for one in launch_times(steps, 3)]
    assert names[0] == "prepare_kernel" and names[-1] == "attend_passing_kernel" and len(names) == 4


@pytest.mark.parametrize("group", [1, 4])
def test_many_rows_are_shared_by_more_programs_than_run_at_once(group: int) -> None:
    """Of 200 rows five programs each, which read 400 tokens of each row's budget."""
    cache = make_cache([4_000 + 17 * nth for nth in range(25)], 8, 128, torch.bfloat16)
    query = torch.randn(25, 8 * group, 128, device="cuda").to(torch.bfloat16)
    config = QuestConfig(2048, metadata="sketch", selection_unit="token", candidate_factor=0)
    plan = token_workspace.plan_of(cache.kv, 8 * group, config)
    assert plan is not None and plan.attend.each * 200 > filling_programs(cache.kv.keys.device) > plan.attend.each * 100
    shares = assert_chosen(cache, query, config)
    assert len(shares) == 200 and min(shares) > 0.95


@pytest.mark.parametrize("factor", [0, 4])
@pytest.mark.parametrize(("sequences", "has"), [(8, 6), (32, 25), (300, 3)])
def test_what_pads_a_batch_changes_nothing(sequences: int, has: int, factor: int) -> None:
    """As a server pads one to the size of a graph: with sequences of no tokens behind the others."""
    lengths = [2_500 + 1_111 * nth % 4_000 for nth in range(has)]
    cache = make_cache(lengths, 8, 128, torch.bfloat16)
    query = torch.randn(sequences, 32, 128, device="cuda").to(torch.bfloat16)
    config = QuestConfig(1024, metadata="sketch", selection_unit="token", candidate_factor=factor)
    padding = (0, 0, 0, sequences - has)
    table = torch.nn.functional.pad(cache.kv.page_table, padding)
    padded = PagedKV(cache.kv.keys, cache.kv.values, cache.kv.metadata, table, form=cache.kv.form)
    seq_lens = torch.nn.functional.pad(cache.seq_lens, padding[2:])
    expected = quest_decode(query[:has], cache.kv, cache.seq_lens, config)
    for _ in range(30):  # so that what depends on which warp is first shows
        step = quest_decode(query, padded, seq_lens, config)
        assert torch.equal(step.selected.units[:has], expected.selected.units)
        assert torch.equal(step.selected.counts[:has], expected.selected.counts)
        torch.testing.assert_close(step.output[:has], expected.output, rtol=2e-2, atol=2e-3)
        assert not step.output[has:].any() and not step.selected.counts[has:].any()


@pytest.mark.parametrize(("dim", "group"), [(128, 1), (64, 1), (128, 4), (128, 8)])
def test_steps_that_follow_one_another_choose_the_same(dim: int, group: int) -> None:
    """Sixty of them, so that what depends on which warp is first shows."""
    cache = make_cache([20_000, 300, 4_321], 2, dim, torch.bfloat16)
    config = QuestConfig(512, metadata="sketch", selection_unit="token")
    workspace = token_workspace.make_token_workspace(cache.kv, 2 * group, config)
    for _ in range(8):
        query = torch.randn(3, 2 * group, dim, device="cuda").to(torch.bfloat16)
        step = Step(query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config, workspace=workspace)
        found = [token_decode.decode_tokens(step) for _ in range(60)]
        assert found[0] is not None
        output, selected = found[0]
        for one in found[1:]:
            assert one is not None
            assert torch.equal(one[1].units, selected.units)
            assert torch.equal(one[0], output)


def test_what_each_launch_takes_alone() -> None:
    cache = make_cache([20_000], 2, 128, torch.bfloat16)
    config = QuestConfig(512, metadata="sketch", selection_unit="token")
    query = torch.randn(1, 8, 128, dtype=torch.bfloat16, device="cuda")
    steps = quest_steps([query], [cache.kv], cache.seq_lens, config)
    launches = launch_times(steps, 3)
    names = ["prepare_kernel", "scan_kernel", "scan_kernel", "pick_kernel", "choose_kernel", "_attend_kernel"]
    assert [one.kernel for one in launches] == names
    assert all(0.5 < one.alone < 1000 for one in launches)


@pytest.mark.parametrize("group", [2, 7])
def test_lists_longer_than_are_held_at_once(group: int) -> None:
    """All pages have the same keys, so that 1,250 tokens or none reach a rank."""
    cache = make_cache([20_000, 4_321], 2, 64, torch.bfloat16)
    cache.kv.keys.copy_(cache.kv.keys[:1].expand_as(cache.kv.keys))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    query = torch.randn(2, 2 * group, 64, device="cuda").to(torch.bfloat16)
    config = QuestConfig(128, metadata="sketch", selection_unit="token", candidate_factor=4)
    plan = token_workspace.plan_of(cache.kv, 2 * group, config)
    assert plan is not None and plan.held < 20_000 // 16
    assert_chosen(cache, query, config)


@pytest.mark.parametrize(("dim", "group"), [(128, 4), (64, 1), (256, 8), (80, 4)])
def test_softcaps(dim: int, group: int) -> None:
    """A cap that most logits feel: `scan` caps estimates by an instruction of its own."""
    cache = make_cache([20_000, 300, 4_321], 2, dim, torch.bfloat16)
    query = torch.randn(3, 2 * group, dim, device="cuda").to(torch.bfloat16)
    config = QuestConfig(512, metadata="sketch", selection_unit="token")
    sinks = torch.linspace(-1, 2, 2 * group, device="cuda")
    assert min(assert_chosen(cache, query, config, softcap=2.0, sinks=sinks)) > 0.7


def masks(width: int) -> Tensor:
    """Left padding by odd numbers, holes of tokens and of pages, few tokens: `[6, width]` on the device."""
    token = torch.arange(width)
    generator = torch.Generator().manual_seed(0)
    few = torch.zeros(width, dtype=torch.bool)
    few[torch.randperm(width, generator=generator)[:400]] = True
    rows = [
        token >= 777,
        token >= width - 3001,
        torch.rand(width, generator=generator) < 0.5,
        token // 80 % 3 > 0,
        few,
        (token >= 1021) & (token < width - 1234),
    ]
    return torch.stack(rows).cuda()


def mask_out(cache: Cache, mask: Tensor) -> None:
    """Make keys and values of the dead NaN: whoever reads one, it shows."""
    kv = cache.kv
    for b in range(kv.batch_size):
        dead = torch.ones(kv.max_pages * kv.page_size, dtype=torch.bool, device=mask.device)
        dead[: mask.shape[1]] = ~mask[b]
        token = dead.nonzero().flatten()
        place = kv.page_table[b, token // kv.page_size].long(), token % kv.page_size
        kv.keys[place] = float("nan")
        kv.values[place] = float("nan")


@pytest.mark.parametrize(("dim", "group", "dtype", "page_size"), [
    (128, 4, torch.bfloat16, 16), (64, 1, torch.bfloat16, 16), (256, 8, torch.bfloat16, 16),
    (80, 4, torch.bfloat16, 16), (128, 4, torch.bfloat16, 32), (128, 12, torch.float16, 16),
])  # fmt: skip
@pytest.mark.parametrize(("softcap", "factor"), [(None, 4), (2.0, 4), (None, 0)])
def test_masks(dim: int, group: int, dtype: torch.dtype, page_size: int, softcap: float | None, factor: int) -> None:
    """Of less width than the cache has room for, and of more than the last row is long."""
    cache, mask = make_cache([9_001] * 5 + [7_654], 2, dim, dtype, page_size), masks(8_990)
    mask_out(cache, mask)
    query = torch.randn(6, 2 * group, dim, device="cuda").to(dtype)
    config = QuestConfig(
        512, page_size, metadata="sketch", selection_unit="token", num_sink_pages=2, num_recent_pages=3,
        candidate_factor=factor,
    )  # fmt: skip
    shares = assert_chosen(cache, query, config, token_mask=mask, softcap=softcap)
    assert len(shares) == 2 * 5, "one sequence has fewer live tokens than the budget"
    assert min(shares) > 0.7
    if not factor:
        step = Step(query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config, token_mask=mask, softcap=softcap)
        done, listed = token_decode.decode_tokens(step), token_decode.choose_tokens(step)
        assert done is not None and listed is not None
        assert torch.equal(done[1].units, listed.units), "whoever attends in a way of their own reads the same"
        assert torch.equal(done[1].counts, listed.counts)


def test_a_dead_key_that_is_not_finite_takes_the_sketch_of_its_page() -> None:
    """The live tokens of such a page are candidates, and ranked by their keys."""
    cache, mask = make_cache([20_000, 9_000], 2, 128, torch.bfloat16), masks(20_000)[[0, 2]]
    mask_out(cache, mask)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    query = torch.randn(2, 8, 128, device="cuda").to(torch.bfloat16)
    config = QuestConfig(512, metadata="sketch", selection_unit="token")
    step = Step(query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config, token_mask=mask)
    done = token_decode.decode_tokens(step)
    assert done is not None
    assert done[0].isfinite().all()
    assert (done[1].counts == 512).all()
    for b in range(2):
        assert mask[b, done[1].units[b].long()].all()


@pytest.mark.parametrize("factor", [4, 0])
def test_a_mask_of_everything_is_none(factor: int) -> None:
    cache = make_cache([20_000, 300], 2, 128, torch.bfloat16)
    query = torch.randn(2, 8, 128, device="cuda").to(torch.bfloat16)
    config = QuestConfig(512, metadata="sketch", selection_unit="token", candidate_factor=factor)
    everything = torch.ones(2, 20_000, dtype=torch.bool, device="cuda")
    masked, plain = (
        token_decode.decode_tokens(
            Step(query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config, token_mask=mask)
        )
        for mask in (everything, None)
    )
    assert masked is not None and plain is not None
    assert torch.equal(masked[1].units, plain[1].units)
    assert torch.equal(masked[0], plain[0])


@pytest.mark.parametrize("factor", [4, 0])
def test_a_captured_step_follows_its_mask(factor: int) -> None:
    cache = make_cache([30_000, 29_999], 4, 128, torch.bfloat16)
    config = QuestConfig(512, metadata="sketch", selection_unit="token", candidate_factor=factor)
    query = torch.randn(2, 16, 128, dtype=torch.bfloat16, device="cuda")
    mask = torch.ones(2, 30_000, dtype=torch.bool, device="cuda")
    workspace = make_workspace(cache.kv, 16, config)
    assert isinstance(workspace, token_workspace.TokenWorkspace)
    step = Step(
        query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config, token_mask=mask, workspace=workspace,
        out=torch.empty_like(query), softcap=20.0,
    )  # fmt: skip
    token_decode.decode_tokens(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_decode.decode_tokens(step)
    assert captured is not None
    every = masks(30_000)
    for pair in ([0, 1], [2, 3], [4, 5], [1, 4]):
        mask.copy_(every[pair])
        query.normal_()
        graph.replay()
        output, units = captured[0].clone(), captured[1].units.clone()
        again = token_decode.decode_tokens(step)
        assert again is not None
        assert torch.equal(output, again[0]) and torch.equal(units, again[1].units)
        assert not workspace.counters.any() and not workspace.found.any()
        for b in range(2):
            chosen = units[b][units[b] >= 0].long()
            assert mask[b, chosen].all()
            most = min(512, int(mask[b, : cache.lengths[b]].sum()))
            assert len(chosen) == 4 * most if factor else 4 * most / 2 < len(chosen) <= 4 * most


def test_a_captured_step_follows_lengths_and_queries() -> None:
    cache = make_cache([30_000, 9_000], 4, 128, torch.bfloat16)
    config = QuestConfig(512, metadata="sketch", selection_unit="token")
    query = torch.randn(2, 16, 128, dtype=torch.bfloat16, device="cuda")
    step = Step(
        query=query, kv=cache.kv, seq_lens=cache.seq_lens, config=config,
        workspace=make_workspace(cache.kv, 16, config), out=torch.empty_like(query),
    )  # fmt: skip
    token_decode.decode_tokens(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_decode.decode_tokens(step)
    assert captured is not None
    for lengths in ([30_000, 9_000], [511, 29_999], [12_345, 513]):
        cache.seq_lens.copy_(torch.tensor(lengths))
        query.normal_()
        update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
        graph.replay()
        output, units = captured[0].clone(), captured[1].units.clone()
        again = token_decode.decode_tokens(step)
        assert again is not None
        assert torch.equal(output, again[0]) and torch.equal(units, again[1].units)

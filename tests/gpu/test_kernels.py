"""The Triton kernels on a GPU at real sizes, against float64 on the same GPU; what they write is poisoned before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quest_attention import QuestConfig, score_pages, select_pages, sparse_decode_attention, update_page_metadata
from quest_attention.eval.observation import WINDOW, Observation, attention_weights
from quest_attention.forms import FP8, Bounds, MetadataForm, Moments
from quest_attention.ops import (
    Selection,
    append_slots,
    append_token,
    make_workspace,
    quest_decode,
    resolve_backend,
    update_slot_metadata,
)
from quest_attention.pages import PagedKV, num_pages

pytestmark = pytest.mark.gpu
LAYOUTS = ("nhd", "hnd", "contiguous")


def make_cache(
    lengths: list[int],
    *,
    heads: int = 8,
    dim: int = 128,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "nhd",
    narrow: bool = False,
    room: int = 0,
    form: MetadataForm = Bounds(),  # noqa: B008 - a frozen value
    in_8_bits: bool = False,
) -> tuple[PagedKV, Tensor]:
    """Random pages, perhaps in 8 bits, and lengths; what no sequence has written is NaN, metadata too."""
    batch, pages = len(lengths), num_pages(max(lengths) + room, page_size)
    stored = FP8 if in_8_bits else dtype
    metadata_dtype = FP8 if narrow else form.dtypes(stored)[0]
    others: dict[str, Any] = {"form": form}
    if in_8_bits:
        others["key_scale"] = torch.linspace(0.2, 0.4, heads, device="cuda")
        others["value_scale"] = torch.full((1,), 0.7, device="cuda")
    options: dict[str, Any] = {"dtype": dtype, "device": "cuda"}
    if layout == "contiguous":
        keys, values = (torch.randn(batch, heads, pages * page_size, dim, **options) for _ in range(2))
        for b, length in enumerate(lengths):
            keys[b, :, length:] = values[b, :, length:] = float("nan")
        bounds = torch.full((batch, heads, pages, 2, dim), float("nan"), **options).to(metadata_dtype)
        kv = PagedKV.from_contiguous(keys.to(stored), values.to(stored), bounds, **others)
    else:
        table = torch.randperm(batch * pages, device="cuda").to(torch.int32).view(batch, pages)
        shape = (batch * pages, page_size, heads, dim) if layout == "nhd" else (batch * pages, heads, page_size, dim)
        keys, values = (torch.randn(shape, **options).to(stored) for _ in range(2))
        bounds = torch.full((batch * pages, heads, 2, dim), float("nan"), **options).to(metadata_dtype)
        make = PagedKV.from_nhd if layout == "nhd" else PagedKV.from_hnd
        kv = make(keys, values, bounds, table, **others)
        for b, length in enumerate(lengths):
            position = torch.arange(length, pages * page_size, device="cuda")
            where = (kv.page_table[b, position // page_size].long(), position % page_size)
            kv.keys[where] = kv.values[where] = float("nan")
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    update_page_metadata(kv, seq_lens, seq_lens)
    return kv, seq_lens


def tokens_of(kv: PagedKV, b: int, h: int, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of some logical pages of one row."""
    used = pages[pages >= 0].long()
    position = (used[:, None] * kv.page_size + torch.arange(kv.page_size, device="cuda")).flatten()
    position = position[position < length]
    physical = kv.page_table[b, position // kv.page_size].long()
    keys, values = (stored[physical, position % kv.page_size, h] for stored in (kv.keys, kv.values))
    if kv.key_scale is None or kv.value_scale is None:
        return keys, values
    return tuple(
        one.float() * s.expand(kv.num_kv_heads)[h] for one, s in ((keys, kv.key_scale), (values, kv.value_scale))
    )


def assert_exact(query: Tensor, kv: PagedKV, seq_lens: Tensor, selected: Selection, output: Tensor) -> None:
    """At most twice as far from float64 as PyTorch's own attention over the same tokens in the same dtype."""
    group = query.shape[1] // kv.num_kv_heads
    ours = plain = 0.0
    for b, length in enumerate(seq_lens.tolist()):
        if length == 0:
            assert not output[b].any()
            continue
        for h in range(kv.num_kv_heads):
            keys, values = tokens_of(kv, b, h, selected.units[b, h], length)
            q = query[b, h * group : (h + 1) * group]
            weights = torch.softmax(q.double() @ keys.double().T * kv.head_dim**-0.5, -1)
            exact = weights @ values.double()
            keys, values = keys.to(q.dtype), values.to(q.dtype)
            torchs = F.scaled_dot_product_attention(q[None, None], keys[None, None], values[None, None])[0, 0]
            ours = max(ours, float((output[b, h * group : (h + 1) * group] - exact).abs().max()))
            plain = max(plain, float((torchs - exact).abs().max()))
    assert ours <= 2 * plain + torch.finfo(torch.float32).eps


def assert_step(kv: PagedKV, seq_lens: Tensor, query_heads: int, config: QuestConfig, *, fused: bool = True) -> None:
    """Bounds, scores, selection and attention, verb by verb and in one launch, over poisoned memory."""
    config = config.resolved("cuda", kv.form.name)
    assert resolve_backend("auto", "cuda").name == "triton"
    dtype = torch.bfloat16 if kv.is_quantised else kv.keys.dtype
    query = torch.randn(kv.batch_size, query_heads, kv.head_dim, dtype=dtype, device="cuda")
    written = kv.metadata.float()
    update_page_metadata(kv, seq_lens, seq_lens, backend="torch")
    # Sums of a few keys in float32, in another order, and one rounding to the dtype they are stored in.
    rounding = 0.0 if kv.form.is_bound else torch.finfo(kv.metadata.dtype).eps
    torch.testing.assert_close(written, kv.metadata.float(), rtol=rounding, atol=rounding / 64, equal_nan=True)
    scores = score_pages(query, kv, seq_lens, group_reduction=config.group_reduction)
    by_torch = score_pages(query, kv, seq_lens, group_reduction=config.group_reduction, backend="torch")
    torch.testing.assert_close(scores, by_torch, rtol=1e-5, atol=1e-3)
    options = {
        "page_size": config.page_size,
        "token_budget": config.token_budget,
        "num_sink_pages": config.num_sink_pages,
        "num_recent_pages": config.num_recent_pages,
    }
    selected = select_pages(scores, seq_lens, **options)
    assert torch.equal(selected.units, select_pages(scores, seq_lens, **options, backend="torch").units)
    output, _ = sparse_decode_attention(query, kv, seq_lens, selected)
    assert_exact(query, kv, seq_lens, selected, output)
    workspace: Any = make_workspace(kv, query_heads, config)
    assert (workspace is not None) == fused
    if fused:
        for tensor in workspace[:-1]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -7)
    for _ in range(2):
        step = quest_decode(query, kv, seq_lens, config, workspace=workspace)
        if fused:
            own = workspace.scores.view(scores.shape).nan_to_num(0)  # of rows that were scored
            expected = select_pages(own, seq_lens, **options, backend="torch")
            assert torch.equal(step.selected.units, expected.units)
            assert torch.equal(step.selected.counts, expected.counts)
            assert not workspace.counters.any()
        assert_exact(query, kv, seq_lens, step.selected, step.output)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("form", [Bounds(), Moments(0.7)], ids=str)
@pytest.mark.parametrize("in_8_bits", [False, True], ids=["16 bits", "8 bits"])
def test_forms_and_caches_in_8_bits(layout: str, group: int, form: MetadataForm, in_8_bits: bool) -> None:
    kv, seq_lens = make_cache([5000, 1000, 0, 2048, 70000], heads=4, layout=layout, form=form, in_8_bits=in_8_bits)
    others = {"moments_coefficient": form.coefficient} if form.coefficient else {}
    config = QuestConfig.from_dict({"metadata": form.name, **others})
    assert_step(kv, seq_lens, 4 * group, config)


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("form", [Bounds(), Moments(0.7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_written_to_a_cache_in_8_bits(layout: str, form: MetadataForm, dtype: torch.dtype) -> None:
    """As PyTorch writes it, bit for bit, what is beyond the range included."""
    caches = [make_cache([1000], layout=layout, form=form, in_8_bits=True)[0] for _ in range(2)]
    slots = torch.tensor([*range(16, 500), -1, 7, 8, 9, *range(700, 705), 640, -1], device="cuda")
    keys, values = torch.randn(2, len(slots), 8, 128, device="cuda") * 30
    keys, values = (keys * torch.randint(0, 9, keys.shape, device="cuda")).to(dtype), values.to(dtype)
    for part in ("keys", "values", "metadata"):
        getattr(caches[1], part).copy_(getattr(caches[0], part))
    for kv, backend in zip(caches, ("triton", "torch"), strict=True):
        append_slots(kv, keys, values, slots, backend=backend)
    for part in ("keys", "values", "metadata"):
        ours, theirs = (getattr(kv, part).float() for kv in caches)
        rounding = 0.0 if part != "metadata" or form.is_bound else torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_layouts_and_dtypes(layout: str, dtype: torch.dtype, group: int) -> None:
    kv, seq_lens = make_cache([5000, 1000, 0, 2048, 2049], layout=layout, dtype=dtype)
    assert_step(kv, seq_lens, 8 * group, QuestConfig(2048))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("stored", [{}, {"narrow": True}, {"in_8_bits": True}, {"form": Moments(1.0)}], ids=str)
def test_small_shapes(group: int, stored: dict[str, Any]) -> None:
    """What `make sanitize-gpu` runs under the memory and race checkers."""
    kv, seq_lens = make_cache([100, 33, 0], heads=2, dim=64, room=16, **stored)
    assert_step(kv, seq_lens, 2 * group, QuestConfig(48, metadata=kv.form.name, num_sink_pages=0))
    fresh = torch.randn(2, 3, 2, 64, dtype=torch.bfloat16, device="cuda")
    append_token(kv, fresh[0], fresh[1], seq_lens + 1)
    append_slots(kv, fresh[0], fresh[1], torch.tensor([14, 15, -1], device="cuda"))


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("narrow", [False, True])
def test_slots_of_prompts_and_single_tokens(layout: str, narrow: bool) -> None:
    """Prompts in pieces, single tokens and padding in one batch, as PyTorch writes them."""
    caches = [make_cache([1000], heads=8, layout=layout, narrow=narrow)[0] for _ in range(2)]
    slots = torch.tensor([*range(16, 500), -1, 7, 8, 9, *range(700, 705), 640, -1], device="cuda")
    keys, values = torch.randn(2, len(slots), 8, 128, dtype=torch.bfloat16, device="cuda")
    for kv, backend in zip(caches, ("triton", "torch"), strict=True):
        kv.metadata.copy_(caches[0].metadata)
        kv.keys.copy_(caches[0].keys)
        kv.values.copy_(caches[0].values)
        append_slots(kv, keys, values, slots, backend=backend)
    for part in ("keys", "values", "metadata"):
        ours, theirs = (getattr(kv, part).float() for kv in caches)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    before = caches[0].metadata.clone()
    update_slot_metadata(caches[0].metadata, keys, slots, page_size=16)  # the same tokens widen nothing
    assert torch.equal(before.view(torch.uint8), caches[0].metadata.view(torch.uint8))


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 16])
def test_group_sizes(group: int) -> None:
    kv, seq_lens = make_cache([9000, 100], heads=2)
    assert_step(kv, seq_lens, 2 * group, QuestConfig(1024))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("group", [1, 4])
def test_head_dims_and_page_sizes(dim: int, page_size: int, group: int) -> None:
    kv, seq_lens = make_cache([4001, 3000], heads=2, dim=dim, page_size=page_size)
    assert_step(kv, seq_lens, 2 * group, QuestConfig(512, page_size, num_sink_pages=1, num_recent_pages=2))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("narrow", [False, True])
def test_contexts_of_128k_and_ragged_batches(group: int, narrow: bool) -> None:
    kv, seq_lens = make_cache([131072, 70001, 100, 32768], heads=2, narrow=narrow)
    assert_step(kv, seq_lens, 2 * group, QuestConfig(2048, group_reduction="mean"))


def test_a_context_of_a_million_tokens() -> None:
    kv, seq_lens = make_cache([1 << 20], heads=2)
    assert_step(kv, seq_lens, 8, QuestConfig(4096))
    assert_step(kv, seq_lens, 8, QuestConfig(65536), fused=False)  # more than the fused kernel holds


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("narrow", [False, True])
def test_one_graph_while_sequences_grow(group: int, narrow: bool) -> None:
    """A captured step (append a token, score, select, attend) gives the eager result across a page boundary."""
    kv, seq_lens = make_cache([3000, 2040, 500], heads=4, layout="contiguous", narrow=narrow, room=64)
    query = torch.randn(3, 4 * group, 128, dtype=torch.bfloat16, device="cuda")
    config = QuestConfig.paper(2048)
    workspace = make_workspace(kv, 4 * group, config)
    fresh = torch.randn(2, 3, 4, 128, dtype=torch.bfloat16, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        append_token(kv, fresh[0], fresh[1], seq_lens)
        output, selected = quest_decode(query, kv, seq_lens, config, workspace=workspace)
        return output, selected.units

    seq_lens += 1
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, pages = step()
    for _ in range(40):
        query.normal_()
        output.fill_(float("nan"))
        pages.fill_(-7)
        graph.replay()
        replayed = output.clone(), pages.clone()
        eager = step()
        assert torch.equal(replayed[0], eager[0])
        assert torch.equal(replayed[1], eager[1])
        seq_lens += 1
        fresh.normal_()  # and not before: a key that is written over would leave the bounds wider
    expected = kv.metadata.float()
    lengths = seq_lens - 1
    update_page_metadata(kv, lengths, lengths, backend="torch")
    torch.testing.assert_close(expected, kv.metadata.float(), rtol=0, atol=0, equal_nan=True)


def test_the_pytorch_path_runs_on_a_gpu() -> None:
    kv, seq_lens = make_cache([5000, 1000], layout="contiguous")
    query = torch.randn(2, 32, 128, dtype=torch.bfloat16, device="cuda")
    step = quest_decode(query, kv, seq_lens, QuestConfig(1024, backend="torch"))
    assert_exact(query, kv, seq_lens, step.selected, step.output)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "length"), [(14, 2, 64, 4000), (4, 1, 256, 3000), (32, 8, 128, 2049)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_context_attended_to(
    heads: int, kv_heads: int, dim: int, length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation's kernels, by the way in which `quest eval` comes to them, in passes as it reads a prompt."""
    from quest_attention.ops.triton import received  # noqa: PLC0415 - needs triton

    calls, kernels = [], received.received_attention

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return kernels(*arguments)

    monkeypatch.setattr(received, "received_attention", counted)
    query = torch.randn(2, length, heads, dim, device="cuda", dtype=dtype).transpose(1, 2)
    key = torch.randn(2, length, kv_heads, dim, device="cuda", dtype=dtype).transpose(1, 2)
    observation = Observation()
    for start in range(0, length, 1024):
        stop = min(length, start + 1024)
        observation.observe(query[:, :, start:stop], key[:, :, :stop], scaling=dim**-0.5)
    assert len(calls) == -(-length // 1024)
    weights = attention_weights(query, key, first_position=0)
    assert observation.received is not None
    torch.testing.assert_close(observation.received, weights.sum((2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(observation.window, weights[:, :, :, -WINDOW:].mean(2))

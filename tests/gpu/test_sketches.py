"""Sketches on a GPU at real sizes: kernels against PyTorch on the same GPU, and a step in a CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quest_attention import QuestConfig, quest_decode, update_page_metadata
from quest_attention.config import SelectionUnit
from quest_attention.forms import Sketch, SketchLayout
from quest_attention.ops import Step, append_slots, append_token, resolve_backend
from quest_attention.pages import PagedKV, num_pages

pytestmark = pytest.mark.gpu
PAGE_SIZE = 16
CUDA = torch.device("cuda")


def make_cache(
    lengths: list[int], *, heads: int = 8, dim: int = 128, dtype: torch.dtype = torch.bfloat16, room: int = 0
) -> tuple[PagedKV, torch.Tensor]:
    """NHD pages in random order; sketches poisoned before they are made."""
    batch, pages = len(lengths), num_pages(max(lengths) + room, PAGE_SIZE)
    shape, form = (batch * pages, PAGE_SIZE, heads, dim), Sketch(PAGE_SIZE)
    keys, values = (torch.randn(shape, dtype=dtype, device=CUDA) for _ in range(2))
    keys += 2 * torch.randn(batch * pages, 1, heads, dim, dtype=dtype, device=CUDA)
    kept = torch.full((batch * pages, heads, *form.shape(PAGE_SIZE, dim)), 255, dtype=torch.uint8, device=CUDA)
    table = torch.randperm(batch * pages, device=CUDA).to(torch.int32).view(batch, pages)
    kv = PagedKV.from_nhd(keys, values, kept, table, form=form)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    update_page_metadata(kv, seq_lens, seq_lens, backend="triton")
    return kv, seq_lens


def scores_of(step: Step) -> torch.Tensor:
    return resolve_backend(step.config.backend, CUDA).verbs.score_pages(step, None)


@pytest.mark.parametrize(("dim", "group", "dtype"), [
    (128, 4, torch.bfloat16), (128, 1, torch.float16), (64, 7, torch.bfloat16), (256, 2, torch.float32),
    (80, 4, torch.bfloat16),
])  # fmt: skip
def test_kernels_sketch_and_estimate_as_pytorch_does(dim: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kv, seq_lens = make_cache([20_000, 4_321, 15], heads=4, dim=dim, dtype=dtype)
    by_torch, at = replace(kv, metadata=torch.zeros_like(kv.metadata)), SketchLayout.of(PAGE_SIZE, dim)
    update_page_metadata(by_torch, seq_lens, seq_lens, backend="torch")
    for b, length in enumerate(seq_lens.tolist()):
        whole = kv.page_table[b, : length // PAGE_SIZE].long()
        ours, expected = kv.metadata[whole, :, 0], by_torch.metadata[whole, :, 0]
        bits = ours[..., : at.scales] != expected[..., : at.scales]
        assert bits.float().mean() < 2e-3 or not len(whole), "the sign of a number near zero may fall either way"
        # A mean's code next to a boundary may fall either way too, and then all of the page is less another mean.
        is_alike = ~bits[..., at.mean :].any(-1)
        assert is_alike.float().mean() > 0.99 or not len(whole)
        scales = (one[..., at.scales : at.scales + 8].contiguous().view(torch.float32) for one in (ours, expected))
        torch.testing.assert_close(*(one[is_alike] for one in scales), rtol=1e-4, atol=0)
    query = torch.randn(3, 4 * group, dim, dtype=dtype, device=CUDA)
    for factor in (0, 4):
        config = QuestConfig(512, metadata="sketch", selection_unit="token", candidate_factor=factor, backend="triton")
        step = Step(query=query, kv=kv, seq_lens=seq_lens, config=config)
        found, expected = (
            scores_of(replace(step, config=replace(config, backend=name))) for name in ("triton", "torch")
        )
        is_both = (found > -1e30) & (expected > -1e30)
        assert torch.equal(found[~is_both] == -torch.inf, expected[~is_both] == -torch.inf)
        assert is_both.sum() > 0.99 * (expected > -1e30).sum()
        torch.testing.assert_close(found[is_both], expected[is_both], rtol=1e-4, atol=5e-3)


def test_tokens_by_slots_and_one_by_one() -> None:
    torch.manual_seed(1)
    kv, seq_lens = make_cache([100, 64])
    again = replace(kv, keys=torch.zeros_like(kv.keys), metadata=torch.zeros_like(kv.metadata))
    for b, length in enumerate(seq_lens.tolist()):
        token = torch.arange(length, device=CUDA)
        slots = kv.page_table[b, token // PAGE_SIZE].long() * PAGE_SIZE + token % PAGE_SIZE
        keys, values = (kept.flatten(0, 1)[slots] for kept in (kv.keys, kv.values))
        append_slots(again, keys[:50], values[:50], slots[:50], backend="triton")
        for position in range(50, length):
            lengths = torch.zeros(2, dtype=torch.int32, device=CUDA)
            lengths[b] = position + 1
            one = [kept[position].expand(2, -1, -1).contiguous() for kept in (keys, values)]
            append_token(again, *one, lengths, backend="triton")
        whole = kv.page_table[b, : length // PAGE_SIZE].long()
        assert torch.equal(again.metadata[whole], kv.metadata[whole])


@pytest.mark.parametrize("unit", ["token", 4, "page"])
def test_a_captured_step_grows_with_its_sequences(unit: SelectionUnit) -> None:
    torch.manual_seed(2)
    kv, seq_lens = make_cache([9_000, 3_000], room=64)
    query = torch.randn(2, 32, 128, dtype=torch.bfloat16, device=CUDA)
    token = torch.randn(2, 8, 128, dtype=torch.bfloat16, device=CUDA)
    config = QuestConfig(1024, metadata="sketch", selection_unit=unit)
    lengths = seq_lens.clone()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        append_token(kv, token, token, lengths)
        done = quest_decode(query, kv, lengths, config)
        return done.output, done.selected.units

    lengths += 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, units = step()
    for _ in range(33):
        lengths += 1
        graph.replay()
    eager = quest_decode(query, kv, lengths, config)
    assert torch.equal(eager.selected.units, units)
    torch.testing.assert_close(eager.output, output)
    assert eager.selected.counts.unique().tolist() == [config.unit_budget]

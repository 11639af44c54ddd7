"""The kernels of several query tokens beside what PyTorch has in their place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")

from backends import available, interpreted
from caches import make_cache
from quest_attention import QuestConfig, quest_decode, update_page_metadata
from quest_attention.forms import Sketch
from quest_attention.ops import Step, make_workspace, resolve_backend
from quest_attention.ops.query_tokens import QueryTokens
from test_query_tokens import PAGE, as_lists, causal, queries
from token_choice import assert_choice


@interpreted
@pytest.mark.parametrize(("group", "factor"), [(2, 4), (8, 4), (4, 0)])
def test_kernels_that_choose_single_tokens_choose_for_all_query_tokens(group: int, factor: int) -> None:
    cache = make_cache([300, 70, 20], page_size=16, dim=64, form=Sketch(16))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="reference")
    config = QuestConfig(
        64, 16, metadata="sketch", selection_unit="token", candidate_factor=factor, backend=available("triton")
    )
    query, lens = queries(cache, 3, group), torch.tensor([3, 1, 2], dtype=torch.int32)
    workspace = make_workspace(cache.kv, 3 * query.shape[2], config)
    given = {"seq_lens": cache.seq_lens, "workspace": workspace}
    output, selected = quest_decode(query, cache.kv, config=config, query_lens=lens, **given)
    tokens = QueryTokens(query, lens, cache.kv, cache.seq_lens)
    assert_choice(Step(query=tokens.folded(), kv=cache.kv, config=tokens.config(config), **given), selected)
    expected = causal(cache, query, lens.tolist(), as_lists(selected.units), 1)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=2e-6)


@interpreted
@pytest.mark.parametrize("pages", [384, 500, 900, 2000])
def test_a_workspace_fits_whatever_pages_query_tokens_force(pages: int) -> None:
    """Whether a sample says enough of a table, and which, does not depend on how many tokens ask."""
    cache = make_cache([300], page_size=16, dim=64, form=Sketch(16))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="reference")
    table = torch.zeros(1, pages, dtype=torch.int32)
    table[:, : cache.kv.max_pages] = cache.kv.page_table
    kv = replace(cache.kv, page_table=table)
    config = QuestConfig(
        64, 16, metadata="sketch", selection_unit="token", candidate_factor=0, backend=available("triton")
    )
    query = queries(cache, 3, 2)
    workspace = make_workspace(kv, 3 * query.shape[2], config)
    step = quest_decode(query, kv, cache.seq_lens, config, workspace=workspace)
    assert int(step.selected.counts.max()) <= 64


@interpreted
def test_kernels_fold_as_pytorch_does() -> None:
    cache = make_cache([40, 9], page_size=PAGE)
    query = queries(cache, 5, group=3).transpose(0, 1).contiguous().transpose(0, 1)
    lens = torch.tensor([2, 5])
    ours = resolve_backend(available("triton"), "cpu").query_tokens(query, lens, cache.kv, cache.seq_lens)
    assert torch.equal(ours.folded(), QueryTokens(query, lens, cache.kv, cache.seq_lens).folded())

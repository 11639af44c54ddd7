"""The step over single tokens by sketches: whom it chooses, and attention to those, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from backends import available, interpreted
from caches import make_cache
from likeness import query_for
from quest_attention import QuestConfig, QuestValueError, quest_decode, update_page_metadata
from quest_attention.forms import Sketch
from quest_attention.ops import Step, make_workspace

pytestmark = interpreted

available("triton")
from quest_attention.ops.triton import token_decode  # noqa: E402 - after what skips the file
from token_choice import assert_chosen  # noqa: E402


def config_of(budget: int = 64, page_size: int = 16, **options: Any) -> QuestConfig:
    return QuestConfig(
        budget, page_size, metadata="sketch", selection_unit="token", backend="triton", **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dim", "page_size", "group", "dtype", "scales", "layout"),
    [
        (16, 16, 4, torch.float32, None, "nhd"),
        (64, 8, 1, torch.bfloat16, None, "hnd"),
        (80, 32, 3, torch.float16, None, "contiguous"),
        (32, 16, 2, torch.bfloat16, "head", "nhd"),
        (32, 16, 12, torch.bfloat16, "tensor", "contiguous"),
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
    cache = make_cache([700, 60, 433], dim=16, page_size=16, form=Sketch(16))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    sinks = torch.linspace(-1, 2, 2 * group) if with_sinks else None
    query = query_for(cache, group)
    assert min(assert_chosen(cache, query, config_of(), softcap=softcap, sinks=sinks)) > 0.7
    capped, plain = (
        quest_decode(query, cache.kv, cache.seq_lens, config_of(), softcap=cap, sinks=sinks) for cap in (softcap, None)
    )
    assert not torch.allclose(capped.output, plain.output, rtol=1e-4, atol=1e-5)


def test_a_softcap_hides_no_key_that_is_not_finite() -> None:
    cache = make_cache([600], heads=1, dim=16, page_size=16, form=Sketch(16))
    cache.kv.keys[int(cache.kv.page_table[0, 20]), 3] = float("inf")
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    step = quest_decode(query_for(cache, 2), cache.kv, cache.seq_lens, config_of(48), softcap=5.0)
    assert 20 * 16 + 3 in step.selected.units[0, 0].tolist(), "its logit would be no more than the cap"


@pytest.mark.parametrize(
    "options", [{"group_reduction": "mass"}, {"candidate_factor": 0}, {"selection_unit": 4}], ids=str
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

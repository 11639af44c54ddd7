"""`Step` and the one composer: another score or another attention in the place of a backend's own."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, available
from caches import Cache, make_cache
from likeness import as_lists, query_for
from quest_attention import QuestConfig, QuestValueError, Selection, quest_decode, update_page_metadata
from quest_attention.config import Backend
from quest_attention.ops import Step, run_step, sparse_decode_attention


def made(backend: Backend) -> tuple[Cache, Step]:
    cache = make_cache([70, 33])
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="reference")
    config = QuestConfig(24, 8, backend=available(backend))
    return cache, Step(query=query_for(cache, 2), kv=cache.kv, seq_lens=cache.seq_lens, config=config)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_it_is_a_step_is_a_decode_step(backend: Backend) -> None:
    cache, step = made(backend)
    mine, theirs = run_step(step), quest_decode(step.query, cache.kv, cache.seq_lens, step.config)
    assert torch.equal(mine.output, theirs.output)
    assert torch.equal(mine.selected.units, theirs.selected.units)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_score_chooses_other_pages(backend: Backend) -> None:
    """Scores that prefer early pages, of as many pages as hold a token: fewer than the page table has."""
    cache, step = made(backend)
    early = -torch.arange(9.0).expand(2, 2, 9)
    assert early.shape[2] < cache.kv.max_pages
    mine = run_step(step, score=lambda asked: early if asked is step else early * math.nan)
    assert as_lists(mine.selected.units) == [[[0, 1, 8]] * 2, [[0, 1, 4]] * 2]
    output, _ = sparse_decode_attention(step.query, cache.kv, cache.seq_lens, mine.selected, backend=backend)
    torch.testing.assert_close(mine.output, output)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_attention_takes_the_pages_that_were_chosen(backend: Backend) -> None:
    cache, step = made(backend)
    seen: list[Selection] = []

    def attend(asked: Step, selected: Selection) -> Tensor:
        seen.append(selected)
        return asked.query + 1

    mine = run_step(step, attend=attend)
    assert torch.equal(mine.output, step.query + 1)
    assert len(seen) == 1 and seen[0] is mine.selected
    usual = quest_decode(step.query, cache.kv, cache.seq_lens, step.config).selected
    assert as_lists(mine.selected.units) == as_lists(usual.units)


@pytest.mark.parametrize(
    ("argument", "scores"),
    [
        ("scores.shape", torch.zeros(2, 9)),
        ("scores.shape", torch.zeros(2, 4, 9)),
        ("scores.dtype", torch.zeros(2, 2, 9, dtype=torch.float64)),
        ("seq_lens", torch.zeros(2, 2, 8)),
    ],
)
def test_scores_of_another_kind_are_refused(argument: str, scores: Tensor) -> None:
    _, step = made("torch")
    with pytest.raises(QuestValueError) as caught:
        run_step(step, score=lambda _: scores)
    assert caught.value.argument == argument


def test_a_step_stays_as_it_was_checked() -> None:
    _, step = made("torch")
    with pytest.raises(FrozenInstanceError):
        step.query = step.query[:1]  # type: ignore[misc]
    assert step.scale == 0.25

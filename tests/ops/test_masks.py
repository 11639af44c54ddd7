"""Masks of every kind, padding and holes, in every backend against the oracle: the pages chosen, and what is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, FAST_BACKENDS, available, interpreted
from caches import make_cache
from likeness import as_lists, assert_scores_like_oracle, query_for
from quest_attention import QuestConfig, QuestValueError, quest_decode, score_pages, select_pages, update_page_metadata
from quest_attention.config import Backend
from quest_attention.ops import reference
from quest_attention.pages import num_pages

LENGTH, PAGE_SIZE = 90, 8
TOKEN = torch.arange(LENGTH)
MASKS = {
    "left padding": TOKEN >= 21,
    "left padding of whole pages": TOKEN >= 64,
    "right padding": TOKEN < 50,
    "padding within the budget": TOKEN >= 70,
    "a token of each page": TOKEN % PAGE_SIZE == 3,  # 11 tokens in as many pages: all within the budget
    "two turns": (TOKEN < 9) | (TOKEN >= 81),
    "six pages within the budget": (TOKEN % 16 == 5) & (TOKEN < 96),
    "every second token": TOKEN % 2 == 0,
    "one token": TOKEN == 40,
    "nothing": TOKEN < 0,
    "everything": TOKEN >= 0,
    "narrower than the sequence": TOKEN[:60] >= 0,
    "wider than the cache": torch.arange(300) % 3 > 0,
}


def rows(name: str) -> Tensor:
    """The mask for one sequence, its mirror image for another."""
    return torch.stack([MASKS[name], MASKS[name].flip(0)])


def assert_chosen(mask: Tensor, seq_lens: Tensor | int, budget: int, sinks: int, recent: int, backend: Backend) -> None:
    """Scores of the caller's own, which say nothing of the mask."""
    scores = torch.randn(2, 2, 13)
    scores[:, :, [2, 5]] = float("inf")
    scores[:, :, [3, 6]] = -float("inf")
    options = {"num_sink_pages": sinks, "num_recent_pages": recent, "token_mask": mask}
    selected = select_pages(
        scores, seq_lens, page_size=PAGE_SIZE, token_budget=budget, **options, backend=available(backend)
    )
    expected = reference.select_pages(scores, [LENGTH] * 2, PAGE_SIZE, budget, **options)
    assert as_lists(selected.units) == expected
    assert selected.counts.tolist() == [[len(head) for head in row] for row in expected]
    assert selected.units.shape[2] <= num_pages(budget, PAGE_SIZE) + 1
    for row, chosen in zip(selected.units.tolist(), expected, strict=True):
        for head, pages in zip(row, chosen, strict=True):
            assert head == pages + [-1] * (len(head) - len(pages)), "unused slots come last"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("host", [False, True], ids=["", "host"])
@pytest.mark.parametrize(("budget", "sinks", "recent"), [(24, 0, 1), (24, 1, 2), (30, 0, 0), (8, 0, 1), (88, 2, 1)])
@pytest.mark.parametrize("name", MASKS)
def test_pages_are_chosen_among_those_with_a_token_to_attend_to(
    name: str, budget: int, sinks: int, recent: int, host: bool, backend: Backend
) -> None:
    assert_chosen(rows(name), LENGTH if host else torch.tensor([LENGTH] * 2), budget, sinks, recent, backend)


@interpreted
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("name", MASKS)
def test_rows_in_sections(name: str, sinks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more pages than one program holds."""
    triton_selection = pytest.importorskip("quest_attention.ops.triton.choice")
    monkeypatch.setattr(triton_selection, "_SECTION_UNITS", 4)
    assert_chosen(rows(name), torch.tensor([LENGTH] * 2), 24, sinks, 1, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("host", [False, True], ids=["", "host"])
@pytest.mark.parametrize("name", MASKS)
def test_a_masked_step_is_the_oracles(name: str, host: bool, backend: Backend) -> None:
    cache, mask = make_cache([LENGTH, LENGTH], layout="contiguous" if host else "nhd"), rows(name)
    config = QuestConfig(24, PAGE_SIZE, num_sink_pages=1, backend=available(backend))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    query, seq_lens = query_for(cache, 2), LENGTH if host else cache.seq_lens
    scores = score_pages(query, cache.kv, seq_lens, token_mask=mask, backend=backend)
    assert_scores_like_oracle(scores, query, cache, token_mask=mask)
    step = quest_decode(query, cache.kv, seq_lens, config, token_mask=mask)
    expected = reference.select_pages(scores, cache.lengths, PAGE_SIZE, 24, 1, 1, mask)
    assert as_lists(step.selected.units) == expected
    exact, _ = reference.sparse_decode_attention(query, cache.kv, cache.lengths, expected, 0.25, token_mask=mask)
    torch.testing.assert_close(step.output.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_few_tokens_in_many_pages_read_the_best_that_fit(backend: Backend) -> None:
    """Six pages hold the eleven tokens of a row within the budget of 24, of which four fit."""
    mask = rows("six pages within the budget")
    scores = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1]).expand(2, 1, -1)
    options = {"page_size": PAGE_SIZE, "token_budget": 24, "token_mask": mask, "backend": available(backend)}
    selected = select_pages(scores, LENGTH, **options)
    assert selected.counts.tolist() == [[4], [4]]
    assert selected.units[0].tolist() == [[4, 6, 8, 10]], "the last one, being written, and the best three"


def test_a_mask_without_tokens_is_refused() -> None:
    with pytest.raises(QuestValueError, match=r"token_mask\.shape"):
        select_pages(torch.zeros(1, 1, 4), 4, page_size=1, token_budget=2, token_mask=torch.ones(1, 0).bool())

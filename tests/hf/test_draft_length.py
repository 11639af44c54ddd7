"""How many tokens are drafted, by times that are given here and not measured."""

from __future__ import annotations

import random
from typing import Any

import pytest

from quest_attention.hf.draft_length import DraftLength
from quest_attention.hf.drafting import examined


def write(
    draft_tokens: Any, *, draft: float, more: float, agreement: float, tokens: int = 4000, switch: float | None = None,
    rows: int = 1,
) -> tuple[float, list[int]]:  # fmt: skip
    """Time for some tokens against plain steps of a second each, and the drafts of each round.

    A draft takes `draft` seconds, a check a second and `more` for each draft, and a draft stays with probability
    `agreement`, in the second half `switch`. Tokens are those of a row of `rows`.
    """
    chance = random.Random(0)
    length, seconds, written, rounds = DraftLength(draft_tokens), 0.0, 0.0, []
    while written < tokens:
        if switch is not None and written > tokens / 2:
            agreement = switch
        count, reason = length.next()
        rounds.append(count)
        if not count:
            assert reason in ("measuring", "drafting does not pay")
            length.tell_plain(1.0)
            seconds, written = seconds + 1, written + 1
            continue
        stayed = [next((n for n in range(count) if chance.random() >= agreement), count) for _ in range(rows)]
        took = count * draft, 1 + count * more
        length.tell_check(count, sum(stayed), sum(min(kept + 1, count) for kept in stayed), rows, took)
        seconds, written = seconds + sum(took), written + sum(stayed) / rows + 1
    return seconds / written, rounds


def test_it_drafts_where_that_pays() -> None:
    ratio, rounds = write(4, draft=0.2, more=0.05, agreement=0.9)
    assert ratio < 0.52  # 2 seconds for 4.1 tokens
    assert rounds[:6] == [0, 0, 0, 0, 1, 1]  # what a plain step and a draft take, after a first of each
    assert rounds.count(4) > 0.95 * len(rounds)


def test_a_first_draft_that_is_dear_is_not_held_against_the_others() -> None:
    """It chooses what they read."""
    length = DraftLength(8)
    for _ in range(4):
        length.tell_plain(1.0)
    for drafts in (1, 1, 8, 8):
        assert length.next()[0] == drafts
        length.tell_check(drafts, drafts, drafts, 1, (0.8 + 0.3 * (drafts - 1), 1.1))
    assert length._draft.mean == pytest.approx((0.8 + 7 * 0.3) / 8)


@pytest.mark.parametrize(
    ("draft", "agreement"), [(1.0, 0.9), (1.0, 0.0), (0.3, 0.1), (0.5, 0.5)], ids=["dear", "both", "wrong", "half"]
)
@pytest.mark.parametrize("draft_tokens", [1, 4, 15, "auto"])
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_it_never_costs_more_than_three_per_cent(rows: int, draft: float, agreement: float, draft_tokens: Any) -> None:
    ratio, rounds = write(draft_tokens, draft=draft, more=0.1, agreement=agreement, rows=rows)
    assert ratio < 1.03
    assert any(rounds[len(rounds) // 2 :])  # it is tried again, ever more seldom


@pytest.mark.parametrize("rows", [1, 4])
def test_it_stops_where_drafts_are_too_dear_though_all_stay(rows: int) -> None:
    ratio, rounds = write(4, draft=1.45, more=0.05, agreement=1.0, rows=rows)
    assert ratio < 1.03
    assert sum(count > 0 for count in rounds[-100:]) < 10


def test_it_goes_on_when_the_text_changes() -> None:
    _, rounds = write(4, draft=0.1, more=0.05, agreement=0.0, switch=0.95)
    late = rounds[-100:]
    assert sum(count > 0 for count in late) > 80
    _, rounds = write(4, draft=0.3, more=0.1, agreement=0.95, switch=0.0)
    assert sum(count > 0 for count in rounds[-100:]) < 10


@pytest.mark.parametrize(
    ("draft", "agreement", "least", "most"), [(0.05, 0.95, 6, 15), (0.3, 0.8, 1, 3)], ids=["cheap", "dear"]
)
def test_auto_finds_how_many(draft: float, agreement: float, least: int, most: int) -> None:
    ratio, rounds = write("auto", draft=draft, more=0.02, agreement=agreement)
    late = sorted(count for count in rounds[-200:] if count)
    assert least <= late[len(late) // 2] <= most
    fixed, _ = write(4, draft=draft, more=0.02, agreement=agreement)
    assert ratio < fixed * 1.02


def test_what_is_behind_the_end_of_a_row_was_neither_kept_nor_refused() -> None:
    for accepted, room, expected in ((4, 9, (4, 4)), (2, 9, (2, 3)), (0, 9, (0, 1)), (4, 3, (2, 2)), (1, 3, (1, 2)),
                                     (4, 1, (0, 0)), (2, 0, (0, 0))):  # fmt: skip
        assert examined([accepted], [room], 4) == expected
    assert examined([4, 1, 4], [9, 9, 1], 4) == (5, 6)

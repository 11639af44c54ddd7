"""Tables of results on a terminal: whole in any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from quest_attention.cli.table import print_table

HEADINGS = ("task", "method", "score\nof all", "share read")
ROWS = [("passkey", "quest:page_size=32", "100.0 % (20.7 to 100.0)", "6.3 %"), ("", "full", "0.0 %", "100.0 %")]


@pytest.mark.parametrize("width", [40, 60, 120])
def test_nothing_is_cut(width: int) -> None:
    file = io.StringIO()
    print_table(Console(file=file, width=width), HEADINGS, ROWS, numbers=(3,))
    shown = file.getvalue()
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown
    for value in (value for row in ROWS for value in row):
        assert value in shown
    is_table = width == 120
    assert ("score of all" in shown) is not is_table, "a heading is one line before its value"
    assert len(shown.splitlines()) == (4 if is_table else 8)

"""The report as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from quest_attention.eval.longbench import LONGBENCH_PREFIX
from quest_attention.eval.report.figures import Picture
from quest_attention.eval.report.results import Results
from quest_attention.eval.report.tables import (
    accuracy_row,
    accuracy_rows,
    continuation_rows,
    perplexity_rows,
    recall_rows,
)
from quest_attention.eval.tasks import CONTINUATION, GRID, PERPLEXITY, RECALL
from quest_attention.eval.wording import counted

__all__ = ["Section", "Table", "make_page"]

_TEMPLATE = "page.html.jinja"
_PLACES = 2
"""Columns of a table that name its row."""


@dataclass(frozen=True)
class Table:
    """Rows below their headings.

    Attributes:
        title: Shown where the table is folded away; empty for one that is always open.
        headings: Of the columns.
        rows: Strings as they are shown.
    """

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """A task with its figures and tables.

    Attributes:
        name: Of the task.
        note: What the numbers are.
        pictures: With their bytes in base64.
        tables: The first is the main one.
    """

    name: str
    note: str
    pictures: Sequence[tuple[Picture, str]]
    tables: Sequence[Table]


def make_page(results: Results, pictures: Sequence[Picture]) -> str:
    """HTML with every figure in it.

    Args:
        results: What to show.
        pictures: From `draw_pictures` of the same results.
    """
    loader = jinja2.FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text("utf-8"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(_TEMPLATE).render(
        results=results, sections=_sections(results, pictures), settings=_flat(results.settings), counted=counted
    )


def _sections(results: Results, pictures: Sequence[Picture]) -> list[Section]:
    found = [
        (task, _note(task), [_task_table(results, task), *([_needle_table(results)] if task == GRID else [])])
        for task in results.tasks
    ]
    for name, note, rows in (
        (PERPLEXITY, _PERPLEXITY_NOTE, perplexity_rows(results)),
        (CONTINUATION, _CONTINUATION_NOTE, continuation_rows(results)),
        (RECALL, _RECALL_NOTE, recall_rows(results)),
    ):
        if rows:
            found.append((name, note, [Table("", rows[0], rows[1:])]))
    return [
        Section(name, note, [(each, _base64(each)) for each in pictures if each.section == name], tables)
        for name, note, tables in found
    ]


_PERPLEXITY_NOTE = (
    "exp of the mean negative log-likelihood over all tokens of all books; lower is better. No interval is given: "
    "books differ from each other by far more than methods do on the same book, and every method reads the same books."
)
_CONTINUATION_NOTE = (
    "The last tokens of stretches of books, each predicted from what a method reads of all before it: perplexity "
    "against full attention's on the same stretches, and agreement, the share of next tokens that are those of full "
    "attention. Intervals are 95 % (1.96 standard errors over the stretches). Full attention read token by token "
    "differs a little from full attention read at once, by rounding: that is the most a method can agree."
)
_RECALL_NOTE = (
    "What full attention would weigh, and how much of it lies on the pages that were selected: mean over samples, "
    "layers and KV heads, with the 95 % interval over samples (1.96 standard errors)."
)


def _note(task: str) -> str:
    if task.startswith(LONGBENCH_PREFIX):
        return "Mean score with its 95 % interval (1.96 standard errors)."
    return "Share of right answers, matched exactly, with Wilson's 95 % interval."


def _task_table(results: Results, task: str) -> Table:
    headings, *found = accuracy_rows(results)
    rows = [
        (str(cell.length), *row[_PLACES:])
        for cell, row in zip(results.accuracy, found, strict=True)
        if cell.task == task
    ]
    return Table("", headings[1:], rows)


def _needle_table(results: Results) -> Table:
    headings = ("length", "depth", "method", "budget", "score", "n")
    rows = [(str(cell.length), f"{cell.depth} %", *accuracy_row(cell)) for cell in results.needle]
    return Table(f"All by depth: {counted(len(rows), 'cell')}", headings, rows)


def _base64(picture: Picture) -> str:
    return base64.b64encode(picture.png).decode("ascii")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as rows; those in groups behind the name of their group."""
    rows = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}: ")
        elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
            rows += _flat({str(number): each for number, each in enumerate(value, 1)}, f"{prefix}{name} ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
            rows.append((prefix + name, shown))
    return rows

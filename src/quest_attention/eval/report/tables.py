"""The rows of tables: cells of a run as plain strings, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterable

from quest_attention.eval.report.cells import AccuracyCell, NeedleCell
from quest_attention.eval.report.results import LEAST_TELLING, Results, tells_nothing

__all__ = ["accuracy_row", "accuracy_rows", "continuation_rows", "perplexity_rows", "recall_rows"]


def accuracy_rows(results: Results) -> list[tuple[str, ...]]:
    """The retrieval tasks as a table of plain strings: headings first, then a row for each method and budget.

    Task and length stand in the first row of their block alone. Without such tasks there are no rows, nor headings. A
    block in which full attention itself fails is said to tell nothing.
    """
    rows = []
    block: tuple[str, int] | None = None
    for cell in results.accuracy:
        is_first, block = block != (cell.task, cell.length), (cell.task, cell.length)
        remark = (
            f"tells nothing: full below {LEAST_TELLING:.0f} %" if tells_nothing(results, cell.task, cell.length) else ""
        )
        names = (cell.task if is_first else "", f"{cell.length}" if is_first else "")
        rows.append((*names, *accuracy_row(cell), remark))
    return _headed(("task", "length", "method", "budget", "score", "n", "share read", ""), rows)


def accuracy_row(cell: AccuracyCell | NeedleCell) -> tuple[str, ...]:
    """Method, budget, score with its interval, n and, for a cell that knows it, the share read."""
    start = (cell.method, _budget(cell.token_budget), _with_interval(cell.score, cell.low, cell.high), str(cell.n))
    return (*start, _share(cell.share_read)) if isinstance(cell, AccuracyCell) else start


def perplexity_rows(results: Results) -> list[tuple[str, ...]]:
    """Perplexity as a table of plain strings, headings first; the change is against full attention on as many books."""
    full = {cell.length: cell for cell in results.perplexity if cell.token_budget is None}
    rows = []
    for cell in results.perplexity:
        base = full.get(cell.length)
        is_known = base is not None and base is not cell and base.n == cell.n
        change = f"{100 * (cell.perplexity / base.perplexity - 1):+.2f} %" if is_known and base is not None else ""
        names = (str(cell.length), cell.method, _budget(cell.token_budget))
        rows.append((*names, f"{cell.perplexity:.4g}", change, str(cell.n), _share(cell.share_read)))
    return _headed(("length", "method", "budget", "perplexity", "against full", "books", "share read"), rows)


def continuation_rows(results: Results) -> list[tuple[str, ...]]:
    """Ends of stretches as a table of plain strings, headings first."""
    rows = [
        (
            str(cell.length),
            cell.method,
            _budget(cell.token_budget),
            f"{cell.perplexity:.4g}",
            "" if cell.more is None else _with_interval(cell.more, cell.more_low, cell.more_high, sign="+"),
            _with_interval(cell.agreement, cell.agreement_low, cell.agreement_high),
            str(cell.n),
            _share(cell.share_read),
        )
        for cell in results.continuation
    ]
    return _headed(
        ("length", "method", "budget", "perplexity", "against full", "agreement", "stretches", "share read"), rows
    )


def recall_rows(results: Results) -> list[tuple[str, ...]]:
    """Recall as a table of plain strings, headings first."""
    rows = [
        (
            str(cell.length),
            cell.method,
            _budget(cell.token_budget),
            _with_interval(cell.mass, cell.mass_low, cell.mass_high),
            _with_interval(cell.top10, cell.top10_low, cell.top10_high),
            str(cell.n),
        )
        for cell in results.recall
    ]
    return _headed(("length", "method", "budget", "attention mass", "top 10 tokens", "n"), rows)


def _headed(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    found = list(rows)
    return [headings, *found] if found else []


def _with_interval(mean: float, low: float | None, high: float | None, sign: str = "") -> str:
    shown = f"{mean:{sign}.1f} %"
    return shown if low is None or high is None else f"{shown} ({low:{sign}.1f} to {high:{sign}.1f})"


def _budget(token_budget: int | None) -> str:
    return "all" if token_budget is None else str(token_budget)


def _share(share: float | None) -> str:
    return "not counted" if share is None else f"{100 * share:.1f} %"

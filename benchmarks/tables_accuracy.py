"""Print the tables of docs/results.md from the committed summaries, and draw its figures from them.

    python benchmarks/tables_accuracy.py --figures docs/figures/accuracy

A summary holds the command that made it; `quest report` wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from quest_attention.eval.report import Results, read_results
from quest_attention.eval.report.figures import draw_pictures

RESULTS = Path(__file__).parent / "results" / "accuracy"
FIGURES = {
    "passkey": ("accuracy_passkey",),
    "ruler": ("accuracy_niah_multikey_1", "accuracy_niah_multikey_2"),
    "perplexity": ("perplexity",),
    "recall": ("recall_mass", "recall_top10_by_layer"),
}
"""Of each run, those that the page shows."""
Table = list[list[str]]
K = TypeVar("K")


def as_markdown(head: Sequence[str], rows: Table) -> str:
    """A table; numbers stand right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def in_order(values: Iterable[K]) -> list[K]:
    """Each once, as they first come."""
    return list(dict.fromkeys(values))


def tokens(count: int) -> str:
    """8192 as 8K."""
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def by_method_and_budget(methods: list[str], budgets: list[int], show: Callable[[str, int | None], str]) -> Table:
    """A row for each method, a column for each budget; full attention has one number for all of them."""
    return [[name, *(show(name, None if name == "full" else budget) for budget in budgets)] for name in methods]


def passkey_tables(results: Results) -> list[str]:
    """Share of right answers [%], a table for each length."""
    found = {(c.length, c.method, c.token_budget): c for c in results.accuracy}
    methods, lengths = in_order(key[1] for key in found), in_order(key[0] for key in found)
    budgets = sorted({key[2] for key in found if key[2]})

    def table(length: int) -> str:
        rows = by_method_and_budget(methods, budgets, lambda name, budget: f"{found[length, name, budget].score:.1f}")
        return as_markdown((f"{tokens(length)} tokens, budget", *map(str, budgets)), rows)

    return [table(length) for length in lengths]


def ruler_tables(results: Results) -> list[str]:
    """Share of right answers [%], a table for each length: full attention, then each method by share of the length."""
    found = {(c.task, c.length, c.method, c.token_budget): c for c in results.accuracy}
    arms = in_order((c.method, c.length // c.token_budget if c.token_budget else None) for c in results.accuracy)

    def show(task: str, length: int, method: str, share: int | None) -> str:
        cell = found.get((task, length, method, share and length // share))
        return "" if cell is None else f"{cell.score:.1f}"

    def table(length: int) -> str:
        head = [name if share is None else f"{name}, 1/{share}" for name, share in arms]
        rows = [[task, *(show(task, length, *arm) for arm in arms)] for task in results.tasks]
        return as_markdown((f"{tokens(length)} tokens", *head), rows)

    return [table(length) for length in sorted({c.length for c in results.accuracy})]


def perplexity_table(results: Results) -> str:
    """Perplexity, with what it is more than full attention's [%]."""
    found = {(c.method, c.token_budget): c.perplexity for c in results.perplexity}
    budgets = sorted({budget for _, budget in found if budget})
    base = found["full", None]

    def show(name: str, budget: int | None) -> str:
        more = "" if budget is None else f" ({100 * (found[name, budget] / base - 1):+.1f} %)"
        return f"{found[name, budget]:.2f}{more}"

    methods = in_order(name for name, _ in found)
    head = (f"{tokens(results.perplexity[0].length)} tokens, budget", *map(str, budgets))
    return as_markdown(head, by_method_and_budget(methods, budgets, show))


def recall_table(results: Results) -> str:
    """Shares of attention mass and of the ten largest weights on the pages read [%]."""
    found = {(c.method, c.token_budget): c for c in results.recall}
    budgets = sorted({budget for _, budget in found if budget})
    rows = [
        [f"{name}, {what}", *(f"{getattr(found[name, budget], field):.1f}" for budget in budgets)]
        for what, field in (("attention mass", "mass"), ("ten largest weights", "top10"))
        for name in in_order(name for name, _ in found)
    ]
    return as_markdown((f"{tokens(results.recall[0].length)} tokens, budget", *map(str, budgets)), rows)


def tables() -> list[str]:
    """All tables of docs/results.md, in order."""
    read = {name: read_results(RESULTS / name) for name in FIGURES}
    return [
        *passkey_tables(read["passkey"]),
        *ruler_tables(read["ruler"]),
        perplexity_table(read["perplexity"]),
        recall_table(read["recall"]),
    ]


def main(
    figures: Annotated[Path | None, typer.Option(help="Folder to draw the page's figures to.")] = None,
) -> None:
    """Print the tables, and draw the figures where a folder is given."""
    print("\n\n".join(tables()))
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        for name, shown in FIGURES.items():
            for picture in draw_pictures(read_results(RESULTS / name)):
                if picture.name in shown:
                    (figures / f"{picture.name}.png").write_bytes(picture.png)


if __name__ == "__main__":
    typer.run(main)

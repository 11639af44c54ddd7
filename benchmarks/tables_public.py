"""Print the tables of docs/results.md, on public models, and draw its figures.

    python benchmarks/tables_public.py --figures docs/figures/public

The runs are those of `benchmarks/eval_public.py`; each summary holds the commands that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from eval_public import BUDGETS, RUNS, Run
from tables_accuracy import RESULTS, as_markdown, in_order, origin, tokens

from quest_attention.config import QuestConfig
from quest_attention.eval.report import Results, read_results
from quest_attention.eval.report.figures import draw_pictures
from quest_attention.eval.report.results import LEAST_TELLING

NAMES = {
    "qwen": "Qwen2.5-Coder-0.5B-Instruct",
    "gemma": "Gemma-3-270m",
    "smollm2": "SmolLM2-135M-Instruct",
}
FIGURES = {
    "qwen_16k": ("continuation_more", "recall_mass_by_layer"),
    "gemma_16k": ("continuation_more",),
}
"""Of each run, those that the page shows."""


def by_budget(cells: Sequence[Any], show: Callable[[Any], str]) -> str:
    """A row for each method, a column for each budget, and how many samples each method took."""
    found = {(cell.method, cell.token_budget): cell for cell in cells}
    budgets = sorted({cell.token_budget for cell in cells if cell.token_budget})
    rows = []
    for name in in_order(cell.method for cell in cells):
        own = [found[name, budget if (name, budget) in found else None] for budget in budgets]
        assert len({cell.n for cell in own}) == 1, f"{name} took {[cell.n for cell in own]} samples"
        rows.append([name, *map(show, own), str(own[0].n)])
    return as_markdown((f"{tokens(cells[0].length)} tokens, budget", *map(str, budgets), "n"), rows)


def tables(run: Run, results: Results) -> list[str]:
    """The tables of one run: right answers, predictions and recall."""
    shown = [f"### {NAMES[run.model]}, {tokens(run.length)} tokens"]
    full = {cell.task: cell for cell in results.accuracy if cell.token_budget is None}
    asked = in_order(cell.task for cell in results.accuracy if cell.token_budget is not None)
    for task in asked:
        cells = [cell for cell in results.accuracy if cell.task == task]
        shown += [f"`{task}`, right answers [%]:", by_budget(cells, lambda cell: f"{cell.score:.1f}")]
    silent = [
        f"`{task}` {cell.score:.1f} ({cell.low:.1f} to {cell.high:.1f})"
        for task, cell in full.items()
        if cell.score < LEAST_TELLING and cell.low is not None
    ]
    if silent:
        share = f"less than {LEAST_TELLING:.0f} %"
        shown.append(f"Full attention is right in {share} [%]: {', '.join(silent)}. These tell nothing about methods.")
    if results.continuation:
        all_read = next(cell for cell in results.continuation if cell.token_budget is None)
        shown += [
            f"Perplexity above that of full attention, which is {all_read.perplexity:.1f} [%]:",
            by_budget(results.continuation, lambda cell: f"{cell.more:+.1f}"),
            "Agreement: next tokens that are those of full attention [%]:",
            by_budget(results.continuation, lambda cell: f"{cell.agreement:.1f}"),
        ]
    shown += ["Recall: attention mass on what is read [%]:", by_budget(results.recall, lambda cell: f"{cell.mass:.1f}")]
    return [*shown, widest(results)]


def budget_tables(runs: Sequence[tuple[Run, Results]]) -> list[str]:
    """What Quest with each budget found and lost, a row for each model and length: for people who choose a budget."""

    def table(title: str, cells_of: Callable[[Results], Sequence[Any]], show: Callable[[Any], str], full: bool) -> str:
        rows = []
        for run, results in runs:
            found = {cell.token_budget: cell for cell in cells_of(results) if cell.method in {"full", "quest"}}
            if not any(found):
                continue
            shown = [show(found[budget]) if budget in found else "" for budget in BUDGETS]
            rows.append([f"{NAMES[run.model]}, {tokens(run.length)}", *([show(found[None])] if full else []), *shown])
        return as_markdown((title, *(["full"] if full else []), *map(str, BUDGETS)), rows)

    def found(title: str, task: str) -> str:
        def cells(results: Results) -> Sequence[Any]:
            answers = [cell for cell in results.accuracy if cell.task == task]
            return answers if any(cell.token_budget for cell in answers) else []

        return table(f"{title} found by Quest [%], budget", cells, lambda cell: f"{cell.score:.1f}", full=True)

    return [
        found("pass key", "passkey"),
        found("one of 30 needles", "needle_of_30"),
        found("one of as many needles as fit", "niah_multikey_2"),
        table(
            "perplexity above full attention's [%], budget",
            lambda results: results.continuation,
            lambda cell: f"{cell.more:+.1f}",
            full=False,
        ),
    ]


def widest(results: Results) -> str:
    """How wide intervals are, over all tables of a run."""

    def span(cells: Sequence[Any], low: str, high: str, value: str) -> str:
        known = [cell for cell in cells if getattr(cell, low) is not None]
        cell = max(known, key=lambda cell: getattr(cell, high) - getattr(cell, low))
        return f"{getattr(cell, low):.1f} to {getattr(cell, high):.1f} for {getattr(cell, value):.1f}"

    parts = []
    if asked := [cell for cell in results.accuracy if cell.token_budget is not None]:
        parts.append(f"answers {span(asked, 'low', 'high', 'score')}")
    if results.continuation:
        parts.append(f"perplexity {span(results.continuation, 'more_low', 'more_high', 'more')}")
        parts.append(f"agreement {span(results.continuation, 'agreement_low', 'agreement_high', 'agreement')}")
    parts.append(f"recall {span(results.recall, 'mass_low', 'mass_high', 'mass')}")
    return f"The widest 95 % intervals: {'; '.join(parts)}.{_of_the_default(results)}"


def _of_the_default(results: Results) -> str:
    """The intervals of Quest with the default budget."""

    def is_it(cell: Any) -> bool:
        return bool((cell.method, cell.token_budget) == ("quest", QuestConfig.paper().token_budget))

    parts = [f"`{c.task}` {c.low:.1f} to {c.high:.1f}" for c in results.accuracy if is_it(c)]
    parts += [f"perplexity {c.more_low:+.1f} to {c.more_high:+.1f}" for c in results.continuation if is_it(c)]
    return f" Those of Quest with its default budget: {'; '.join(parts)}." if parts else ""


def main(
    figures: Annotated[Path | None, typer.Option(help="Folder to draw the page's figures to.")] = None,
) -> None:
    """Print the tables, and draw the figures where a folder is given."""
    runs = {run.name: (run, read_results(RESULTS / run.name)) for run in RUNS}
    for run, results in runs.values():
        print("\n\n".join(tables(run, results)), end="\n\n")
    print("\n\n".join(origin(results) for _, results in runs.values()), end="\n\n")
    print("\n\n".join(budget_tables(list(runs.values()))))
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        for name, wanted in FIGURES.items():
            for picture in draw_pictures(runs[name][1]):
                if picture.name in wanted:
                    (figures / f"{name}_{picture.name}.png").write_bytes(picture.png)


if __name__ == "__main__":
    typer.run(main)

"""Print the tables of docs/results_bundled.md from the committed summaries, and draw its figures from them.

    python benchmarks/tables_accuracy.py --figures docs/figures/accuracy

A summary holds the command that made it; `quest report` wrote it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, TypeVar

import typer

from quest_attention.eval.report import Results, read_results
from quest_attention.eval.report.cells import AccuracyCell, RecallCell
from quest_attention.eval.report.figures import draw_pictures
from quest_attention.eval.wilson import wilson_interval

RESULTS = Path(__file__).parent / "results" / "accuracy"
RUNS = (
    "passkey",
    "ruler",
    "ruler_more",
    "perplexity",
    "perplexity_oracle",
    "recall",
    "ablations",
    "ablations_passkey",
)
FIGURES = {
    "passkey": ("accuracy_passkey",),
    "ruler": ("accuracy_niah_multikey_2",),
    "perplexity": ("perplexity",),
    "recall": ("recall_mass_by_layer",),
}
"""Of each run, those that the page shows."""
ENOUGH = 95.0
"""A task says something about methods where full attention is right in at least this share of the answers [%]."""
ONE_EIGHTH = 8
"""The share of the context that recall is shown by layer for."""
SHOWN_BY_LAYER = ("quest", "quest:num_dense_layers=0", "quest:group_reduction=mean", "oracle")
"""Ablations that are."""
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


def origin(results: Results) -> str:
    """How a run was made: its commands, then model, devices, versions and seed."""
    settings = results.settings
    runs = [*settings.get("earlier", []), settings]
    commands = dict.fromkeys(run["command"] for run in runs)
    return "\n".join(("```sh", *commands, "```", place(results)))


def place(results: Results) -> str:
    """Where a run was made: model, devices, versions and seed; each machine once, with the commits that ran there."""
    settings = results.settings
    commits: dict[str, list[str]] = {}
    for run in (*settings.get("earlier", []), settings):
        machine = run["machine"]
        counted = Counter(machine["gpu"] or [machine["cpu"]])
        device = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counted.items())
        versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "triton"))
        made = commits.setdefault(f"{device}; {machine['python']}, {versions}", [])
        if (commit := machine["commit"][:7]) not in made:
            made.append(commit)
    where = "; ".join(f"{machine}; commit {', '.join(made)}" for machine, made in commits.items())
    model = ", ".join(settings["description"].split(", ")[:3])  # without the device of the last command
    return f"{model}; {where}; seed {settings['seed']}."


def counts(cells: Sequence[AccuracyCell]) -> str:
    """Samples of a cell, and how wide an interval may be."""
    least, most = min(cell.n for cell in cells), max(cell.n for cell in cells)
    span = {cell: cell.high - cell.low for cell in cells if cell.low is not None and cell.high is not None}
    widest = max(span, key=lambda cell: span[cell])
    how_many = f"{least}" if least == most else f"{least} to {most}"
    interval = f"{widest.low:.1f} to {widest.high:.1f} for {widest.score:.1f}"
    return f"n = {how_many} a cell; the widest 95 % interval (Wilson) is {interval}."


def pooled(one: Results, another: Results) -> Results:
    """The answers of two runs with samples of their own, as one. Exact match alone; shares read are the first's."""
    more = {(c.task, c.length, c.method, c.token_budget): c for c in another.accuracy}
    cells = []
    for cell in one.accuracy:
        other = more.pop((cell.task, cell.length, cell.method, cell.token_budget), None)
        if other is not None:
            n = cell.n + other.n
            right = sum(round(part.score * part.n / 100) for part in (cell, other))
            low, high = wilson_interval(right, n)
            cell = replace(cell, n=n, score=100 * right / n, low=low, high=high)  # noqa: PLW2901
        cells.append(cell)
    assert not more, "the second run went on with the first"
    return replace(one, accuracy=tuple(cells))


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
    """Share of right answers [%], a table for each length: full attention, then each method by share of the length.

    Tasks in which full attention falls short of `ENOUGH` are in italics.
    """
    found = {(c.task, c.length, c.method, c.token_budget): c for c in results.accuracy}
    arms = in_order((c.method, c.length // c.token_budget if c.token_budget else None) for c in results.accuracy)

    def show(task: str, length: int, method: str, share: int | None) -> str:
        cell = found.get((task, length, method, share and length // share))
        return "" if cell is None else f"{cell.score:.1f}"

    def table(length: int) -> str:
        head = [name if share is None else f"{name}, 1/{share}" for name, share in arms]
        rows = []
        for task in results.tasks:
            full = found[task, length, "full", None]
            name = task if full.score >= ENOUGH else f"*{task}*"
            rows.append([name, *(show(task, length, *arm) for arm in arms), str(full.n)])
        return as_markdown((f"{tokens(length)} tokens", *head, "n"), rows)

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


def layer_table(results: Results, wanted: Callable[[RecallCell], bool]) -> str:
    """Shares of attention mass on the pages read, by layer [%]."""
    cells = [cell for cell in results.recall if wanted(cell)]
    layers = in_order(layer for cell in cells for layer in cell.layers)
    rows = []
    for cell in cells:
        shares = dict(zip(cell.layers, cell.mass_by_layer, strict=True))
        rows.append([cell.method, *(f"{shares[layer]:.1f}" if layer in shares else "" for layer in sorted(layers))])
    head = f"{tokens(cells[0].length)} tokens, budget {cells[0].token_budget}"
    return as_markdown((head, *map("layer {}".format, sorted(layers))), rows)


def of_layers(cell: RecallCell, shares: Sequence[float], layers: Collection[int]) -> float:
    """Mean over some layers."""
    return fmean(share for layer, share in zip(cell.layers, shares, strict=True) if layer in layers)


def ablation_table(results: Results, passkey: Results) -> str:
    """A row for each way to read: right answers, and recall in the layers that are sparse in all rows [%]."""
    common = set.intersection(*(set(cell.layers) for cell in results.recall))
    columns: dict[str, dict[str, float]] = {}
    for part in (passkey, results):
        for cell in part.accuracy:
            for budget in sorted({each.token_budget for each in part.accuracy if each.token_budget}):
                if cell.token_budget in {None, budget}:
                    columns.setdefault(f"{cell.task}, {budget}", {})[cell.method] = cell.score
    for what, field in (("mass", "mass_by_layer"), ("top 10", "top10_by_layer")):
        for each in results.recall:
            share = of_layers(each, getattr(each, field), common)
            columns.setdefault(f"{what}, {each.token_budget}", {})[each.method] = share
    methods = in_order(cell.method for cell in results.accuracy)
    rows = [[name, *(f"{shown[name]:.1f}" if name in shown else "" for shown in columns.values())] for name in methods]
    return as_markdown((f"{tokens(results.accuracy[0].length)} tokens, budget", *columns), rows)


def is_one_eighth(cell: RecallCell) -> bool:
    """Whether a cell read one eighth of its context."""
    return cell.token_budget == cell.length // ONE_EIGHTH


def read_runs() -> dict[str, Results]:
    """The committed runs by name. One was cut short: what another measured in its stead is counted with it."""
    read = {name: read_results(RESULTS / name) for name in RUNS}
    return {**read, "ruler": pooled(read["ruler"], read["ruler_more"])}


def tables(read: dict[str, Results]) -> list[str]:
    """All tables of docs/results_bundled.md, in order, and how each run was made."""
    ablations = [read["ablations"], read["ablations_passkey"]]
    return [
        *passkey_tables(read["passkey"]),
        counts(read["passkey"].accuracy),
        origin(read["passkey"]),
        *ruler_tables(read["ruler"]),
        counts(read["ruler"].accuracy),
        origin(read["ruler"]),
        place(read["ruler_more"]),
        perplexity_table(read["perplexity"]),
        origin(read["perplexity"]),
        perplexity_table(read["perplexity_oracle"]),
        origin(read["perplexity_oracle"]),
        recall_table(read["recall"]),
        layer_table(read["recall"], is_one_eighth),
        origin(read["recall"]),
        ablation_table(*ablations),
        counts([cell for part in ablations for cell in part.accuracy]),
        layer_table(read["ablations"], lambda cell: is_one_eighth(cell) and cell.method in SHOWN_BY_LAYER),
        *map(origin, ablations),
    ]


def main(
    figures: Annotated[Path | None, typer.Option(help="Folder to draw the page's figures to.")] = None,
) -> None:
    """Print the tables, and draw the figures where a folder is given."""
    runs = read_runs()
    print("\n\n".join(tables(runs)))
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        for name, shown in FIGURES.items():
            for picture in draw_pictures(runs[name]):
                if picture.name in shown:
                    (figures / f"{picture.name}.png").write_bytes(picture.png)


if __name__ == "__main__":
    typer.run(main)

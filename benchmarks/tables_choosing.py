"""Print the tables of docs/choosing.md: what ways to choose keep, lose and take.

    python benchmarks/tables_choosing.py --fill

With `--fill` they go to the page, between their marks. The answers are those of `eval_public.py`, kept by
`keep_runs.py`; the times those of `attention_gpu.py`. A table whose measurements are not there yet is left out, and of
the others the columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import typer
from eval_public import (
    BOUNDS,
    CHOICE_RUNS,
    CHOICES,
    DEFAULT_RUNS,
    ESTIMATES,
    EXACT_PAGES,
    EXACT_TOKENS,
    MOMENTS,
    RESULTS,
    SKETCH,
    SKETCH_4,
)
from marks import DOCS, fill_page
from tables_accuracy import as_markdown, origin, tokens
from tables_gpu import fastest_read, load, sketch_run
from tables_gpu import origin as place

from quest_attention.config import QuestConfig, enough_candidates
from quest_attention.eval.report import Results, read_results
from quest_attention.forms import SketchLayout

PAGE = DOCS / "choosing.md"
PICTURE = DOCS / "figures" / "choosing.png"
CAPTION = """\
Down is better, and left is faster: go up from the time you have to the lowest line. The losses are those of
Qwen2.5-Coder-0.5B, the times those of a step with the heads of Llama-3.1-8B on random keys: how much a way loses does
not depend on the time it takes, nor the time on the model. The exact choice has no kernel. It stands at the least time
that its bytes allow, all keys and the chosen values, at the highest rate at which a dense read of the run went."""
TIMED_APART = """\
The table of [gpu.md](gpu.md#what-was-measured) has bounds timed apart in the same run, so the two differ by tenths."""
"""Stands below the times, which are not those of the other page to the last digit."""
LABELS = {
    "full": "everything is read",
    BOUNDS: "bounds, pages: the paper's Quest",
    MOMENTS: "moments, pages",
    SKETCH: "sketches, tokens, keys rank candidates",
    SKETCH_4: "the same, 4 times the budget as candidates",
    ESTIMATES: "sketches, tokens, by estimates alone (of the budget about 4/5)",
    EXACT_PAGES: "exact logits, pages (`oracle`)",
    EXACT_TOKENS: "exact weights, tokens (`token_oracle`)",
}
"""Of the ways to choose, as the page has them."""
BY_BUDGET = {BOUNDS: "bounds", MOMENTS: "moments", SKETCH: "sketch", ESTIMATES: "alone", EXACT_TOKENS: None}
"""Those of the picture, by the names that their times have; one that was not timed is left out."""
TASKS = {"needle_of_30": "one needle of 30", "niah_multikey_3": "long hexadecimal values", "niah_multikey_2": "needles"}
SHORT = {"qwen": "Qwen", "gemma": "Gemma", "smollm2": "SmolLM2", None: "bundled model"}
"""Of the models, in the order of columns."""
KEPT_DIM, KEPT_PAGE, KEPT_BYTES = 128, 16, 2
"""Channels, tokens of a page and bytes of a number in the cache, for the table of what is kept."""
DEFAULTS = (("full", None), (BOUNDS, 2048), (MOMENTS, 2048), (SKETCH, 512), (ESTIMATES, 2048))
"""Ways to choose, with the budgets that they have by default."""
DEFAULT_TEXTS = {
    "Qwen 31K: perplexity [%]": "choice_qwen_31k_text",
    "Gemma 31K: perplexity [%]": "default_gemma_31k_text",
}
DEFAULT_NEEDLES = {
    "Qwen 31K: one needle of 30 [%]": ("default_qwen_31k_needles", "needle_of_30"),
    "Qwen 8K: one needle of 30 [%]": ("default_qwen_8k_needles", "needle_of_30"),
    "Qwen 8K: long hexadecimal values [%]": ("default_qwen_8k_needles", "niah_multikey_3"),
}
"""Columns of their table: runs, and of which task."""
OF_4 = 4
"""Times the budget that are candidates where a way says so."""
HEAD_SUMS = {
    "qwen_text": ("Qwen 31K, 512: perplexity [%]", "+.1f"),
    "gemma_text": ("Gemma 31K, 256: perplexity [%]", "+.1f"),
    "qwen_needles": ("Qwen 8K, 128: needles [%]", ".1f"),
    "bundled": ("bundled 4K, 128: niah_multikey_2 [%]", ".1f"),
}
"""Columns of a table of experiments: heads, and formats of numbers."""
ALONE_SUMS = {
    "bundled_410": ("bundled 4K, 410: niah_multikey_2 [%]", ".1f"),
    "bundled_819": ("bundled 4K, 819: niah_multikey_2 [%]", ".1f"),
    "bundled_1640": ("bundled 4K, 1,640: niah_multikey_2 [%]", ".1f"),
    "smollm2_410": ("SmolLM2 4K, 410: perplexity [%]", "+.1f"),
}
"""Likewise."""
FINELY = 2.0
"""Losses up to this have two decimals in the record of the experiments [%]."""


class Column(NamedTuple):
    """A case of a table.

    Attributes:
        name: As its head says it.
        cells: Of each method that took it.
    """

    name: str
    cells: dict[str, Any]


def kept_runs() -> dict[str, Results]:
    """The runs whose answers are committed."""
    every = (*CHOICE_RUNS, *DEFAULT_RUNS)
    return {run.name: read_results(RESULTS / run.name) for run in every if (RESULTS / run.name).is_dir()}


def columns(runs: dict[str, Results], cells_of: Callable[[Results], Sequence[Any]]) -> list[Column]:
    """Cells by case: model, length, budget and task."""
    found: dict[tuple[int, int, str, int], dict[str, Any]] = {}
    models = list(SHORT)
    for run in CHOICE_RUNS:
        cells = cells_of(runs[run.name]) if run.name in runs else ()
        full = {getattr(cell, "task", ""): cell for cell in cells if cell.token_budget is None}
        for cell in cells:
            if cell.token_budget is None:
                continue
            task = getattr(cell, "task", "")
            place = (models.index(run.model), -run.length, task, cell.token_budget)
            found.setdefault(place, {"full": full[task]})[way_of(cell)] = cell
    named = {
        f"{SHORT[models[model]]} {tokens(-length)}, {budget:,}{f': {TASKS[task]}' if task else ''}": cells
        for (model, length, task, budget), cells in sorted(found.items(), key=lambda item: item[0])
    }
    return [Column(name, cells) for name, cells in named.items()]


def way_of(cell: Any) -> str:
    """The way to choose of a cell: what asks for four times the budget is no other where that is the default."""
    is_default = cell.method == SKETCH_4 and enough_candidates("sketch", cell.token_budget) == OF_4
    return SKETCH if is_default else str(cell.method)


def by_way(title: str, cases: list[Column], ways: Sequence[str], show: Callable[[Any], str]) -> str:
    """A row for each way to choose, a column for each case, and how many samples each case has."""
    rows = [
        [LABELS[way], *(show(case.cells[way]) if way in case.cells else "" for case in cases)]
        for way in ways
        if any(way in case.cells for case in cases)
    ]
    return as_markdown((title, *(case.name for case in cases)), [*rows, ["n", *map(count, cases)]])


def count(case: Column) -> str:
    """Samples of a case; a range where ways have taken different numbers."""
    numbers = {cell.n for way, cell in case.cells.items() if way != "full"}
    return "-".join(map(str, sorted({min(numbers), max(numbers)})))


def more(cell: Any) -> str:
    """Perplexity above full attention's with its interval [%]."""
    return f"{cell.more:+.1f} ({cell.more_low:+.1f} to {cell.more_high:+.1f})"


def right(cell: Any) -> str:
    """Right answers with their interval [%]."""
    return f"{cell.score:.1f} ({cell.low:.1f} to {cell.high:.1f})"


def kept_table() -> str:
    """What is kept of the keys of a page and KV head, and read of it to choose [bytes]."""
    vectors = 2 * KEPT_DIM * KEPT_BYTES
    sketch = SketchLayout.of(KEPT_PAGE, KEPT_DIM)
    factor = QuestConfig(512, metadata="sketch", selection_unit="token").candidate_factor
    enough = enough_candidates("sketch", 1)  # of one token
    rows = [
        ["bounds", "largest and smallest key of each channel", vectors, "a page"],
        ["moments", "mean and standard deviation of each channel", vectors, "a page"],
        ["sketches", "one bit of each channel of each key, the page's mean", sketch.total, "a token"],
    ]
    shown = [[name, what, str(total), f"{total / KEPT_PAGE:g}", unit] for name, what, total, unit in rows]
    head = ("form", "kept of a page", "bytes a page", "bytes a token", "chosen")
    said = (
        f"One KV head of {KEPT_DIM} channels, pages of {KEPT_PAGE} tokens, and a cache in 16 bits, whose keys and "
        f"values take {vectors} bytes a token.\n"
        "All of it is read to rank. Where keys rank candidates, those are read too, "
        f"{vectors // 2} bytes each:\n{factor} times as many as the budget has tokens, and of sketches "
        f"{enough:,} at least."
    )
    return f"{as_markdown(head, shown)}\n\n{said}"


def text_tables(runs: dict[str, Results]) -> dict[str, str]:
    """Perplexity, where stretches of text were read."""
    cases = columns(runs, lambda found: found.continuation)
    return {"text": by_way("perplexity above full attention's [%]", cases, CHOICES, more)} if cases else {}


def needle_tables(runs: dict[str, Results]) -> dict[str, str]:
    """Facts found, where some were asked for."""
    cases = columns(runs, lambda found: found.accuracy)
    return {"needles": by_way("right answers [%]", cases, tuple(LABELS), right)} if cases else {}


def default_table(runs: dict[str, Results]) -> dict[str, str]:
    """What ways to choose lose and take at the budgets that they have by default."""
    texts, needles = DEFAULT_TEXTS.items(), DEFAULT_NEEDLES.items()
    record = sketch_run()
    if record is None or not {*DEFAULT_TEXTS.values(), *(run for run, _ in DEFAULT_NEEDLES.values())} <= set(runs):
        return {}
    timed = load(record)
    row = next(row for row in timed if "choices_us" in row)

    def cell_of(cells: Sequence[Any], way: str, budget: int | None, task: str = "") -> Any:
        """The cell of a way, None where it was not asked."""
        found = (cell for cell in cells if cell.token_budget == budget and way_of(cell) == way)
        return next((cell for cell in found if getattr(cell, "task", "") == task), None)

    rows = []
    for way, budget in DEFAULTS:
        cells = [cell_of(runs[run].continuation, way, budget) for _, run in texts]
        losses = ["" if cell is None else more(cell) for cell in cells]
        cells = [cell_of(runs[run].accuracy, way, budget, task) for _, (run, task) in needles]
        scores = ["" if cell is None else right(cell) for cell in cells]
        if budget is None:
            rows.append([LABELS[way], "", *("" for _ in losses), *scores])
            continue
        time = row["choices_us"][BY_BUDGET[way]][str(budget)]["p50"]
        rows.append([f"{LABELS[way]}, {budget:,}", f"{time:.1f}", *losses, *scores])
    head = ("way, tokens", "us of a step, 1 x 32/8 x 32K", *DEFAULT_TEXTS, *DEFAULT_NEEDLES)
    return {"defaults": as_markdown(head, rows)}


def bundled_table(runs: dict[str, Results]) -> dict[str, str]:
    """Facts that the bundled model finds by candidates and by estimates alone, by budget."""
    names = ("choice_bundled_4k_needles", "default_bundled_4k_needles")
    if not set(names) <= set(runs):
        return {}
    cells = {
        (cell.method, cell.token_budget): cell
        for name in names
        for cell in runs[name].accuracy
        if cell.method in (SKETCH, ESTIMATES)
    }
    budgets = sorted({budget for _, budget in cells})
    head = ("bundled model 4K, needles, right answers [%]", *(f"{budget:,}" for budget in budgets))
    rows = [
        [LABELS[way], *(right(cells[way, budget]) if (way, budget) in cells else "" for budget in budgets)]
        for way in (SKETCH, ESTIMATES)
    ]
    return {"bundled": as_markdown(head, rows)}


class Point(NamedTuple):
    """A way to choose at a budget: a point of the picture.

    Attributes:
        token_budget: Tokens that a step reads [tokens].
        cell: What it loses.
        time: Of a step of one layer [us]; of the exact choice, which has no kernel, the least that its bytes allow.
    """

    token_budget: int
    cell: Any
    time: float


def points(runs: dict[str, Results]) -> dict[str, list[Point]]:
    """What each way of the picture loses and takes, by budget; nothing where one of the two was not measured."""
    run = sketch_run()
    rows = [] if run is None else load(run)
    row = next((row for row in rows if "choices_us" in row), None)
    names = ("choice_qwen_31k_text",)
    if row is None or not set(names) <= set(runs):
        return {}
    cells = [cell for name in names for cell in runs[name].continuation if cell.token_budget is not None]
    found: dict[str, list[Point]] = {}
    rate = fastest_read(rows)
    for way in BY_BUDGET:
        for cell in sorted((cell for cell in cells if way_of(cell) == way), key=lambda cell: cell.token_budget):
            found.setdefault(way, []).append(Point(cell.token_budget, cell, time_of(row, rate, way, cell.token_budget)))
    return found


def time_of(row: dict[str, Any], rate: float, way: str, token_budget: int) -> float:
    """Of a step with a way to choose and a budget [us]; of the exact choice, which has no kernel, at a read rate."""
    form = BY_BUDGET[way]
    if form is None:
        return float(row["bytes_exact"][str(token_budget)] / rate)
    return float(row["choices_us"][form][str(token_budget)]["p50"])


def time_table(runs: dict[str, Results]) -> dict[str, str]:
    """Times by budget, as in the picture."""
    found = points(runs)
    if not found:
        return {}
    run = sketch_run()
    assert run is not None, "there are points"
    timed = load(run)
    row, rate = next(row for row in timed if "choices_us" in row), fastest_read(timed)
    budgets = [point.token_budget for point in found[BOUNDS]]
    head = ("1 x 32/8 x 32K, microseconds of a step and layer, budget", *(f"{budget:,}" for budget in budgets))
    rows = [
        [
            LABELS[way] + (", at least" if form is None else ""),
            *(f"{time_of(row, rate, way, budget):.1f}" for budget in budgets),
        ]
        for way, form in BY_BUDGET.items()
        if form is None or form in row["choices_us"]
    ]
    return {"times": f"{as_markdown(head, rows)}\n\n{place(run)} ([JSON](../benchmarks/results/{run})). {TIMED_APART}"}


def tried_tables() -> dict[str, str]:
    """What forms lost in the experiments that decided which is kept."""
    record = json.loads((RESULTS.parent / "sketch_forms.json").read_text(encoding="utf-8"))

    def shown(loss: float) -> str:
        return f"{loss:+.1f}" if loss > FINELY else f"{loss:+.2f}"

    def table(group: str) -> str:
        rows = [
            [row["form"], *(shown(row[case]) if case in row else "" for case in ("qwen", "gemma"))]
            for row in record["rows"]
            if row["group"] == group
        ]
        return as_markdown((record["settings"]["title"], "Qwen 31K, 1,024", "Gemma 31K, 256"), rows)

    return {
        "tried": table("forms"),
        "tried-parts": table("parts"),
        "tried-sums": experiments("head_sums.json", "log-sum-exp: candidates by, ranks by", HEAD_SUMS),
        "alone-sums": experiments("alone_sums.json", "log-sum-exp of", ALONE_SUMS),
    }


def experiments(file: str, title: str, shown: dict[str, tuple[str, str]]) -> str:
    """What was kept by what is taken from each head's logits, in experiments on that.

    Args:
        file: Their record.
        title: Of the first column.
        shown: Of each other column the key in a row of the record: its head, and the format of its numbers.
    """
    record = json.loads((RESULTS.parent / file).read_text(encoding="utf-8"))
    rows = [
        [
            row["sums"] + (f" ({row['who']})" if row["who"] else ""),
            *("" if row[key] is None else f"{row[key]:{form}}" for key, (_, form) in shown.items()),
        ]
        for row in record["rows"]
    ]
    return as_markdown((title, *(head for head, _ in shown.values())), rows)


def alone_served_table(runs: dict[str, Results]) -> dict[str, str]:
    """What kernels by estimates alone kept before each head's sum left out the largest logits, and since."""
    record = json.loads((RESULTS.parent / "alone_sums.json").read_text(encoding="utf-8"))
    if not {case["run"] for case in record["before"]} <= set(runs):
        return {}
    models = {run.name: run for run in (*CHOICE_RUNS, *DEFAULT_RUNS)}
    rows = []
    for case in record["before"]:
        run, task, budget = models[case["run"]], case["task"], case["token_budget"]
        some = runs[run.name].accuracy if task in TASKS else runs[run.name].continuation
        cells = (cell for cell in some if cell.method == ESTIMATES and cell.token_budget == budget)
        cell = next(cell for cell in cells if task == getattr(cell, "task", task))
        name = f"{SHORT[run.model]} {tokens(run.length)}, {budget:,}: "
        if task in TASKS:
            rows.append([f"{name}{TASKS[task]}, right answers", f"{case['found']:.1f}", f"{cell.score:.1f}"])
        else:
            rows.append([f"{name}perplexity above full attention's", f"{case['found']:+.1f}", f"{cell.more:+.1f}"])
    return {"alone-served": as_markdown(("estimates alone [%]", "before", "since"), rows)}


def picture() -> dict[str, str]:
    """The picture, once it is drawn."""
    said = "Perplexity above full attention's against the time of a step, by way to choose and budget"
    return {"picture": f"![{said}](figures/{PICTURE.name})\n\n{CAPTION}"} if PICTURE.exists() else {}


def tables() -> dict[str, str]:
    """All tables of the page by name, in order; those that can be made."""
    runs = kept_runs()
    made = {"kept": kept_table(), **picture(), **time_table(runs), **text_tables(runs), **needle_tables(runs)}
    made |= {**default_table(runs), **bundled_table(runs)}
    origins = {"origin": "\n\n".join(origin(results) for results in runs.values())} if runs else {}
    return {**made, **tried_tables(), **alone_served_table(runs), **origins}


def main(
    fill: Annotated[
        bool, typer.Option("--fill", help="Put the tables between their marks in docs/choosing.md.")
    ] = False,
) -> None:
    """Print the tables, or put them on their page."""
    if fill:
        fill_page(PAGE, tables())
    else:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    typer.run(main)

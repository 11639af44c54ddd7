"""Print the tables of docs/speed.md on lossless decoding, from the results of `acceptance.py` and `decode_cpu.py`.

    python benchmarks/tables_lossless.py --fill

With `--fill` they go to the page, between their marks.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from marks import DOCS, fill_page
from tables_gpu import RESULTS, Rows, as_markdown, load

MEASURED = (
    "acceptance_smollm2.json", "acceptance_smollm2_no_dense_layers.json", "acceptance_smollm2_each_draft.json",
    "acceptance_qwen.json", "acceptance_qwen_code_chat.json",
)  # fmt: skip
CHOOSING = {"round": "the first", "draft": "each"}
DRAFTS = (1, 2, 4, 8)
TIMED = ("lossless_cpu.json", "lossless_cpu_chat.json")
ARMS = ("dynamic", "written", "lossless-2", "lossless-0")
HEAD = (
    "accepted as", "dtype", "context", "DynamicCache + sdpa", "ours, dense", "lossless, 2 dense layers",
    "lossless, none",
)  # fmt: skip


def acceptance_table(rows: Rows) -> str:
    """Tokens that a check gives, its own included, by the number of drafts, and what is said of these."""
    cells = []
    for row in rows:
        form, _, budget = row["arm"].partition("@")
        counts = [f"{row['tokens_a_check'][drafts - 1]:.2f}" for drafts in DRAFTS]
        of_text = (row["model"], f"{row['context']:,}", row["text"])
        what = (*of_text, form, f"{int(budget):,}", str(row["dense_layers"]), CHOOSING[row["choosing"]], row["drafts"])
        cells.append([*what, str(row["places"]), *counts])
    head = ("model", "context", "text", "chosen by", "budget", "dense layers", "chooses", "tokens are", "places")
    return as_markdown((*head, *(f"{drafts} draft{'s'[: drafts > 1]}" for drafts in DRAFTS)), cells)


def measured(name: str) -> Rows:
    """The rows of a measurement, each with the dense layers of its drafts, and which of these choose."""
    settings = json.loads((RESULTS / name).read_text(encoding="utf-8"))["settings"]
    # Older records do not say it: each draft chose then.
    said = {"dense_layers": settings["num_dense_layers"], "choosing": settings.get("choosing", "draft")}
    return [row | said for row in load(name)]


def timed(name: str) -> Rows:
    """The rows of a timing, each with the text whose acceptance it has."""
    text = json.loads((RESULTS / name).read_text(encoding="utf-8"))["settings"]["accepted_as"].split()[0]
    return [{"text": text, **row} for row in load(name)]


def cpu_table(rows: Rows) -> str:
    """Milliseconds a token, and how many times faster lossless decoding is, by the dense layers of its drafts."""
    ms = {(row["text"], row["dtype"], row["context"], row["arm"]): row["ms"]["p50"] for row in rows}
    cells = []
    for text, dtype, context in dict.fromkeys(case[:3] for case in ms):
        times = [ms[text, dtype, context, arm] for arm in ARMS]
        dynamic, dense, two, none = times
        ratios = (f"{dynamic / two:.1f}x", f"{dense / two:.2f}x", f"{dynamic / none:.1f}x", f"{dense / none:.2f}x")
        cells.append([text, dtype, f"{context:,}", *(f"{time:.1f}" for time in times), *ratios])
    to = ("2 layers to DynamicCache", "to ours, dense", "none to DynamicCache", "to ours, dense")
    return as_markdown((*HEAD, *to), cells)


def main(
    fill: Annotated[
        bool, typer.Option("--fill", help="Put the tables into docs/speed.md, between their marks.")
    ] = False,
) -> None:
    """Print the tables, or put them into the page."""
    tables = {
        "acceptance": acceptance_table([row for name in MEASURED for row in measured(name)]),
        "lossless": cpu_table([row for name in TIMED for row in timed(name)]),
    }
    if fill:
        fill_page(DOCS / "speed.md", tables)
    else:
        print("\n\n".join(tables.values()))


if __name__ == "__main__":
    typer.run(main)

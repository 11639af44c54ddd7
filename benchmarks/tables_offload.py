"""Print the tables of docs/offload.md, from the results of the benchmarks that the page names.

    python benchmarks/tables_offload.py --fill

With `--fill` they go to the page, between their marks.
"""

from __future__ import annotations

from typing import Annotated

import typer
from marks import DOCS, fill_page
from tables_gpu import Rows, as_markdown, load, origin

HIT_RATES = ("hit_rates_smollm2.json", "hit_rates_qwen.json")
CANDIDATES = "hit_rates_candidates_qwen.json"
AHEAD = ("layer_ahead_smollm2.json", "layer_ahead_qwen.json")
TIMES = (
    "offload_gpu.json", "offload_gpu_sketch_128k.json", "offload_gpu_256k.json", "offload_gpu_sketch_256k.json",
    "offload_gpu_sketch_512k.json", "offload_gpu_fp8_1m.json",
)  # fmt: skip
"""Of a context and what is read there the last record counts."""
TWO = {
    "2 x": "offload_gpu_fp8_512k_batch2.json",
    "first card,": "offload_gpu_fp8_512k_gpu0.json",
    "second card,": "offload_gpu_fp8_512k_gpu1.json",
}
"""Of two sequences, together and at the same time on two cards."""
PROMPTS = "prompt_gpu.json"

ARMS = {
    "quest": "on the card",
    "offload": "in host memory",
    "all": "in host memory, everything read",
    "stock-offload": "transformers' offloaded cache",
}
PROMPT_ARMS = {"stock": "transformers'", "quest": "Quest's, on the card", "offload": "Quest's, in host memory"}


def what_of(row: dict[str, object]) -> tuple[str, ...]:
    """Model, context, text, form and budget of a row; the form also says where candidates are counted too."""
    form, budget = chosen_of(str(row["arm"]))
    form += ", with candidates" if row.get("counted") == "candidates" else ""
    return str(row["model"]), f"{row['context']:,}", str(row["text"]), form, budget


def chosen_of(arm: str) -> tuple[str, str]:
    """Form and budget of an arm."""
    form, _, budget = arm.partition("@")
    unit = "tokens" if "unit=token" in form else "pages"
    return f"{form.split(',')[0]}, {unit}", f"{int(budget):,}"


def hits_table(rows: Rows) -> str:
    """How much of what steps read was hot, by the size of the pool."""
    sizes = sorted({row["hot_tokens"] for row in rows})
    rates = {(what_of(row), row["hot_tokens"]): row["hit_rate"] for row in rows}
    cells = [
        [*what, *(f"{100 * rates[what, size]:.1f} %" if (what, size) in rates else "" for size in sizes)]
        for what in dict.fromkeys(what_of(row) for row in rows)
    ]
    head = ("model", "context", "text", "chosen by", "budget", *(f"{size:,} hot" for size in sizes))
    return as_markdown(head, cells)


def ahead_table(rows: Rows) -> str:
    """How much of what a layer reads is found by what is there a layer ahead."""
    cells = []
    for row in rows:
        shares = [row[f"{which}_found_{way}"] for which in ("all", "new") for way in ("projected", "neighbour's")]
        cells.append([*what_of(row), *(f"{100 * share:.1f} %" for share in shares)])
    ways = ("all, by its own projection", "all, by the neighbour's query", "new, by its own", "new, by the neighbour's")
    return as_markdown(("model", "context", "text", "chosen by", "budget", *ways), cells)


def last_times() -> Rows:
    """Rows of the records, of each context and what is read there those of the last one, by context."""
    last: dict[tuple[int, str, str], Rows] = {}
    for name in TIMES:
        found: dict[tuple[int, str, str], Rows] = {}
        for row in load(name):
            found.setdefault((row["context"], row["stored"], row["reads"]), []).append(row)
        last |= found
    return [row for case in sorted(last) for row in last[case]]


def times_table(rows: Rows, place: str = "") -> str:
    """Milliseconds of a token of each arm, by the hits that came, and what the bus brought for it.

    Args:
        rows: Of records.
        place: What stands before the context.
    """
    on_card = {(row["context"], row["stored"], row["reads"]): row["ms"]["p50"] for row in rows if row["arm"] == "quest"}
    cells = []
    for row in rows:
        what = chosen_of(row["reads"]) if row["arm"] in ("quest", "offload") else ("", "")
        hits = f"{100 * row['fetches']['hit_rate']:.0f} %" if "fetches" in row else ""
        moved = f"{row['mib_a_token']:.1f}" if "mib_a_token" in row else ""
        hot = f"{row['hot_tokens']:,}" if "hot_tokens" in row else ""
        ms = row["ms"]["p50"]
        times = f"{ms:.2f}", f"{ms / on_card[row['context'], row['stored'], row['reads']]:.2f}x"
        where = f"{place} {row['context'] // 1024}K".strip() + {"auto": "", "fp8": " in 8 bits"}[row["stored"]]
        cells.append([where, *what, ARMS[row["arm"]], hot, hits, moved, *times])
    head = ("context", "chosen by", "budget", "arm", "hot tokens", "hits", "MiB a token", "ms a token", "to Quest's")
    return as_markdown(head, cells)


def two_table() -> str:
    """The same for two sequences, record by record."""
    first, *others = (times_table(load(name), place) for place, name in TWO.items())
    return "\n".join([first, *(line for table in others for line in table.splitlines()[2:])])


def prompts_table(rows: Rows) -> str:
    """Seconds to the first token, and memory of the card at the peak above the weights."""
    cells = [
        [
            f"{row['context'] // 1024}K", f"{row['chunk']:,}", PROMPT_ARMS[row["arm"]],
            f"{row['seconds']['p50']:.1f}", f"{row['peak_bytes'] / 2**30:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    return as_markdown(("prompt", "chunks of", "cache", "seconds to the first token", "GiB at the peak"), cells)


def main(
    fill: Annotated[
        bool, typer.Option("--fill", help="Put the tables into docs/offload.md, between their marks.")
    ] = False,
) -> None:
    """Print the tables, or put them into the page."""
    tables = {
        "hits": hits_table([row for name in (*HIT_RATES, CANDIDATES) for row in load(name)]),
        "times": f"{times_table(last_times())}\n\n{'; '.join(map(origin, TIMES))}.",
        "two": f"{two_table()}\n\n{origin(next(iter(TWO.values())))}.",
        "prompts": f"{prompts_table(load(PROMPTS))}\n\n{origin(PROMPTS)}.",
        "ahead": ahead_table([row for name in AHEAD for row in load(name)]),
    }
    if fill:
        fill_page(DOCS / "offload.md", tables)
    else:
        print("\n\n".join(tables.values()))


if __name__ == "__main__":
    typer.run(main)

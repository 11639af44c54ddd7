"""Print the tables of docs/gpu.md from the results of `attention_gpu.py`, `layers_gpu.py` and others.

    python benchmarks/tables_gpu.py --fill

With `--fill` they go to the page, between their marks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from marks import DOCS, fill_page

from quest_attention.bench.shapes import SHAPES

PAGE = DOCS / "gpu.md"
SKETCH_INTRO = """\
**Sketches that choose single tokens**, beside bounds and dense attention in the same run, microseconds (median). Each
form has its floor, the time that reading its bytes takes at the highest rate of a dense read of the run: of sketches
those of all pages, the keys of the candidates, and the values of what is selected ([choosing.md](choosing.md)
explains the form). In the columns of 512 and 2,048 the keys of candidates rank them. In the last ones estimates alone
choose, with the budget of the row's bounds. `benchmarks/attention_gpu.py --no-break-even --repeats 11` made it."""
"""Stands above the table of sketches, where there is one."""
LAUNCHES_INTRO = """\
**Launch by launch**, each alone, without its early start, microseconds (median). In a step the end of one overlaps the
beginning of the next. The last column is the rate at which the second scan moves its bytes, those of the sketches that
it reads and two bits a token, against the highest rate of a dense read."""
"""Stands above the table of launches, where they were timed."""
ALONE_INTRO = "The same where estimates alone choose:"
"""Stands above theirs."""
SMALLER_INTRO = """\
**Estimates alone with smaller budgets**, beside bounds with all of it; and both with all of it over keys of which
queries look at the newest sixteenth most, as in texts. The last column is the share of that sixteenth among what
estimates read. Microseconds (median), of the same run. A quarter of the last row's budget, less than one in 800 of its
tokens, is not for these kernels."""
"""Stands above the table of smaller budgets and clustered keys."""

NUM_DENSE_LAYERS = 2
"""Of both arms in `decode_gpu.py`."""
RESULTS = Path(__file__).parent / "results"
LOSSLESS = ("lossless_gpu_c8.json", "lossless_gpu_c4.json")
SPREAD = ("spread_qwen.json", "spread_smollm2.json")
ATTENTION_RUNS = ("attention_gpu.json", "attention_sketch_gpu.json")
Rows = list[dict[str, Any]]


def load(name: str) -> Rows:
    """Rows of a result file."""
    rows: Rows = json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]
    return rows


def sketch_run() -> str | None:
    """The result file of `attention_gpu.py` that has sketches, where one was made.

    A run on another GPU than that of the older tables, which are put together, stands in a file of its own.
    """
    found = (name for name in ATTENTION_RUNS if (RESULTS / name).exists())
    return next((name for name in found if all("sketch_us" in row for row in load(name))), None)


def origin(name: str) -> str:
    """GPU, versions and commit of a result file."""
    machine = json.loads((RESULTS / name).read_text(encoding="utf-8"))["machine"]
    versions = ", ".join(f"{package} {machine[package]}" for package in ("torch", "triton"))
    return f"{device(name)}, {versions}, commit {machine['commit'][:7]}"


def device(name: str) -> str:
    """The GPU of a result file, without its memory: `NVIDIA H200`."""
    record = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return str(record["machine"]["gpu"][0].split(",")[0])


def as_markdown(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def fastest_read(rows: Rows) -> float:
    """The most bytes per microsecond that dense attention read in the run: what the GPU has shown it can read."""
    return max(row["bytes_dense"] / dense_time(row) for row in rows)


def dense_time(row: dict[str, Any]) -> float:
    """FlashInfer's better form [us]."""
    return min(float(form["p50"]) for form in row["dense_us"].values())


def attention_table(rows: Rows) -> str:
    """Times of one layer and step, with the floor: the bytes Quest must read at the rate of the fastest dense read."""
    rate = fastest_read(rows)
    head = ("B x HQ/HKV x context, budget", "dense", "Quest", "", "Quest, fp8 bounds", "", "score", "select", "attend")
    cells = []
    for row in rows:
        batch, heads, kv_heads, context, budget = row["shape"]
        verbs = row["verbs_us"]
        cells.append(
            [
                f"{batch} x {heads}/{kv_heads} x {context // 1024}K, {budget}",
                f"{dense_time(row):.1f}",
                f"{row['quest_us']['p50']:.1f}",
                f"{row['ratio']:.1f}x",
                f"{row['quest_fp8_us']['p50']:.1f}",
                f"{row['ratio_fp8']:.1f}x",
                *(f"{verbs[verb]:.1f}" for verb in ("score", "select", "attend")),
                f"{row['bytes_quest'] / rate:.1f}",
                f"{row['bytes_quest_fp8'] / rate:.1f}",
            ]
        )
    return as_markdown((*head, "floor", "floor, fp8"), cells)


def sketch_table(rows: Rows) -> str:
    """Sketches that choose tokens beside bounds that choose pages, both with their floors, and dense attention."""
    rate = fastest_read(rows)
    budgets = list(rows[0]["sketch_us"])
    head = ["B x HQ/HKV x context", "dense", "bounds", "floor"]
    for budget in budgets:
        head += [f"sketch, {int(budget):,}", "to dense", "to bounds", "floor"]
    if has_alone := all("alone_us" in row for row in rows):
        head += ["estimates alone", "to dense", "to bounds", "floor", "tokens read"]
    cells = []
    for row in rows:
        batch, heads, kv_heads, context, token_budget = row["shape"]
        dense, bounds = dense_time(row), row["quest_us"]["p50"]
        name = f"{batch} x {heads}/{kv_heads} x {context // 1024}K, bounds {token_budget:,}"
        line = [name, f"{dense:.1f}", f"{bounds:.1f}", f"{row['bytes_quest'] / rate:.1f}"]
        for budget in budgets:
            time = row["sketch_us"][budget]["p50"]
            line += [f"{time:.1f}", f"{dense / time:.2f}x", f"{bounds / time:.2f}x"]
            line.append(f"{row['bytes_sketch'][budget] / rate:.1f}")
        if has_alone:
            time = row["alone_us"][str(token_budget)]["p50"]
            line += [f"{time:.1f}", f"{dense / time:.2f}x", f"{bounds / time:.2f}x"]
            line += [f"{row['bytes_alone'] / rate:.1f}", f"{row['tokens_alone']:,.0f}"]
        cells.append(line)
    return as_markdown(tuple(head), cells)


def smaller_table(rows: Rows) -> str:
    """Estimates alone with parts of the budget, and over clustered keys, beside bounds with all of it."""
    called = {4: "a quarter of it", 2: "half of it", 1: "all of it"}
    head = ["B x HQ/HKV x context, budget", "bounds"]
    head += [cell for name in called.values() for cell in (name, "to bounds")]
    cells = []
    for row in rows:
        batch, heads, kv_heads, context, budget = row["shape"]
        bounds, times = row["quest_us"]["p50"], {budget / int(tokens): us for tokens, us in row["alone_us"].items()}
        if not set(times) <= set(called):
            raise RuntimeError(f"timed with {row['alone_us'].keys()} of {budget} tokens, expected parts by {[*called]}")
        line = [f"{batch} x {heads}/{kv_heads} x {context // 1024}K, {budget:,}", f"{bounds:.1f}"]
        for part in called:
            found = times.get(part)  # none of a budget that the kernels do not hold
            line += ["", ""] if found is None else [f"{found['p50']:.1f}", f"{bounds / found['p50']:.2f}x"]
        clustered = row["clustered_us"]
        line += [f"{clustered[name]['p50']:.1f}" for name in ("bounds", "alone")]
        cells.append([*line, f"{100 * row['newest_share']:.0f} %"])
    return as_markdown((*head, "clustered keys: bounds", "estimates alone", "of the newest"), cells)


def launches_line(rows: Rows) -> str:
    """The kernels of a step with sketches, one after the other, and the read rate behind the floors."""
    kernels = {tuple(row["launches_sketch"].items()) for row in rows}
    said = "; or ".join(", ".join(f"`{name}`" + (f" x {n}" if n > 1 else "") for name, n in some) for some in kernels)
    return f"A step with sketches runs {said}. Floors are at {fastest_read(rows) / 1e6:.2f} TB/s."


def launches_table(rows: Rows, timed: str, steps: list[float]) -> str:
    """The launches of a step with sketches, each alone, and at which share of the read rate its scan runs.

    Args:
        rows: Of a run.
        timed: Under which name they have the launches.
        steps: Times of the whole steps [us].
    """
    rate = fastest_read(rows)
    names = [name.strip("_").removesuffix("_kernel").replace("_", " ") for name, _ in rows[0][timed]]
    scan = len(names) - 1 - names[::-1].index("scan")  # the first of the two ranks a sample
    cells = []
    for row, step in zip(rows, steps, strict=True):
        batch, heads, kv_heads, context, _ = row["shape"]
        times = [time for _, time in row[timed]]
        cells.append(
            [
                f"{batch} x {heads}/{kv_heads} x {context // 1024}K",
                *(f"{time:.1f}" for time in times),
                f"{sum(times):.1f}",
                f"{step:.1f}",
                f"{100 * row['bytes_scan'] / times[scan] / rate:.0f} %",
            ]
        )
    return as_markdown(("B x HQ/HKV x context", *names, "together", "the step", "scan, of the read rate"), cells)


def spread_table(names: tuple[str, ...]) -> str:
    """The fullest of some parts of a sequence, in times of the mean of what is read of all, by what chooses."""
    rows = [row for name in names for row in load(name)]
    arms = {"bounds@2048": "bounds", "sketch,selection_unit=token,candidate_factor=0@2048": "estimates alone"}
    cells: dict[str, list[str]] = {}
    for row in rows:
        line = cells.setdefault(f"{row['model']}, {row['text']}, {row['context']:,} tokens", [])
        line.append(f"{row['fullest_to_mean']['p50']:.1f}")
    parts = dict.fromkeys(row["parts"] for row in rows)
    head = ("the fullest of", *(f"{number} parts, {called}" for called in arms.values() for number in parts))
    if list(dict.fromkeys(row["arm"] for row in rows)) != list(arms):
        raise RuntimeError(f"{names} have other arms than {', '.join(arms)}")
    return as_markdown(head, [[name, *line] for name, line in cells.items()])


def break_even_table(rows: Rows) -> str:
    """From which context a step is no slower than dense attention, by batch and heads."""
    cells = [
        [f"{row['shape'][0]} x {row['shape'][1]}/{row['shape'][2]}", f"{row['break_even_context']:,}"]
        for row in rows
        if row["break_even_context"]
    ]
    return as_markdown(("B x HQ/HKV", "tokens"), cells)


def layers_table(rows: Rows) -> str:
    """The step alone and among matrix products, by what chooses."""
    cells: dict[str, list[str]] = {}
    for row in rows:
        line = cells.setdefault(f"{row['batch']} x {row['context'] // 1024}K", [])
        line += [f"{row[name]['p50']:.1f}" for name in ("alone_us", "among_us")]
    arms = dict.fromkeys(row["arm"] for row in rows)
    head = ("sequences x context", *(cell for arm in arms for cell in (arm, "among products")))
    return as_markdown(head, [[name, *line] for name, line in cells.items()])


def decode_table(rows: Rows) -> str:
    """Milliseconds per token of every arm, a line for each model, batch and context."""
    timed = [row for row in rows if "ms" in row]
    arms = list(dict.fromkeys(row["arm"] for row in timed))
    cases = dict.fromkeys((row["model"], row["batch"], row["context"]) for row in timed)
    cells = []
    for model, batch, context in cases:
        of_case = {
            row["arm"]: row for row in timed if (row["model"], row["batch"], row["context"]) == (model, batch, context)
        }
        line = [f"{model}, {batch} x {context // 1024}K"]
        for arm in arms:
            row = of_case.get(arm)
            if row is None:
                line.append("")
            else:
                ratio = f" ({row['ratio_to_dense']:.2f}x)" if arm.startswith("quest") else ""
                line.append(f"{row['ms']['p50']:.1f}{ratio}")
        cells.append(line)
    return as_markdown(("model, batch x context", *arms), cells)


def lossless_table(names: tuple[str, ...]) -> str:
    """Milliseconds per token and tokens a round of lossless arms beside dense; what they wrote without drafts."""
    cells = [cell for name in names for cell in lossless_cells(name)]
    head = (
        "accepted as", "drafts", "layers", "batch x context", "budget", "dense", "lossless", "", "tokens a check",
        "ms a round", "stopped drafting",
    )  # fmt: skip
    return as_markdown(head, cells)


def lossless_cells(name: str) -> list[list[str]]:
    """The cells of one run: whose acceptance was imposed, and what it wrote."""
    settings = json.loads((RESULTS / name).read_text(encoding="utf-8"))["settings"]
    text = settings["accepted_as"].split()[0]
    of_run = [text, str(settings["draft_tokens"]), "compiled" if settings["compiled"] else "eager"]
    cells = []
    dense: dict[tuple[int, int], float] = {}
    for row in load(name):
        case, ms = (row["batch"], row["context"]), row["ms"]["p50"]
        if row["arm"] == "dense":
            dense[case] = ms
            continue
        drafts = row["drafts"]
        stopped = sum(count for reason, count in drafts["plain_steps"].items() if reason.startswith("drafting"))
        where = f"{row['batch']} x {row['context'] // 1024}K"
        times = f"{dense[case]:.1f}", f"{ms:.1f}", f"{row['ratio_to_dense']:.2f}x"
        checks = f"{drafts['tokens_a_check']:.2f}", f"{row['round_ms']['p50']:.1f}"
        cells.append([*of_run, where, row["arm"].split("-")[1], *times, *checks, "yes" if stopped else "no"])
    return cells


def against_flashinfer_table(attention: Rows, runs: dict[str, Rows]) -> str:
    """Ratios to dense, as measured and with FlashInfer's time in the dense arm: Quest's token and what it spares."""
    spared = {tuple(row["shape"]): dense_time(row) - row["quest_us"]["p50"] for row in attention}  # [us], a layer
    cells = []
    for name, rows in runs.items():
        for row in rows:
            model = SHAPES.get(row["model"])
            if model is None or row["arm"] != "quest-2048":
                continue
            heads = (model["num_attention_heads"], model["num_key_value_heads"])
            more = spared.get((row["batch"], *heads, row["context"], 2048))
            if more is not None:
                sparse_layers, ms = model["num_hidden_layers"] - NUM_DENSE_LAYERS, row["ms"]["p50"]
                ratio = (ms + sparse_layers * more / 1e3) / ms
                case = f"{row['model']}, {row['batch']} x {row['context'] // 1024}K, {name}"
                cells.append([case, f"{row['ratio_to_dense']:.2f}x", f"{ratio:.2f}x"])
    return as_markdown(("budget 2,048", "to our dense kernel", "to FlashInfer's"), cells)


def prefill_table(rows: Rows) -> str:
    """Seconds of a prompt, without Quest, with bounds, and with sketches."""
    arms = {"quest": "with bounds", "sketch": "with sketches"}
    cells = []
    for row in rows:
        seconds = row["seconds"]
        line = [f"{row['model']}, {row['context'] // 1024}K", f"{seconds['stock']:.3f}"]
        for arm in arms:
            line += [f"{seconds[arm]:.3f}", f"{100 * (seconds[arm] / seconds['stock'] - 1):+.1f} %"]
        cells.append(line)
    head = ["model, prompt", "without Quest", *(cell for name in arms.values() for cell in (name, ""))]
    return as_markdown(tuple(head), cells)


def tables() -> dict[str, str]:
    """All tables of docs/gpu.md by name, in order; that of sketches where they were timed."""
    attention, decode, compiled = map(load, ("attention_gpu.json", "decode_gpu.json", "decode_gpu_compiled.json"))
    made = {"attention": attention_table(attention)}
    if (run := sketch_run()) is not None:
        rows = load(run)
        json_file = f"{origin(run)} ([JSON](../benchmarks/results/{run}))."
        made |= {"sketch": f"{SKETCH_INTRO}\n\n{sketch_table(rows)}\n\n{launches_line(rows)} {json_file}"}
        if all("launch_times_us" in row for row in rows):
            steps = [next(iter(row["sketch_us"].values()))["p50"] for row in rows]
            made["sketch"] += f"\n\n{LAUNCHES_INTRO}\n\n{launches_table(rows, 'launch_times_us', steps)}"
        if all("launch_times_alone_us" in row for row in rows):
            steps = [row["alone_us"][str(row["shape"][-1])]["p50"] for row in rows]
            made["sketch"] += f"\n\n{ALONE_INTRO}\n\n{launches_table(rows, 'launch_times_alone_us', steps)}"
        if all("clustered_us" in row for row in rows):
            made["sketch"] += f"\n\n{SMALLER_INTRO}\n\n{smaller_table(rows)}"
    return made | {
        "spread": spread_table(SPREAD),
        "break-even": break_even_table(attention),
        "layers": f"{layers_table(load('layers_gpu.json'))}\n\n{origin('layers_gpu.json')}.",
        "decode": decode_table(decode),
        "decode-compiled": decode_table(compiled),
        "flashinfer": against_flashinfer_table(attention, {"eager layers": decode, "compiled layers": compiled}),
        "lossless": f"{lossless_table(LOSSLESS)}\n\n{origin(LOSSLESS[0])}; of books {origin(LOSSLESS[1])}.",
        "prefill": f"{prefill_table(load('prefill_gpu.json'))}\n\n{origin('prefill_gpu.json')}.",
    }


def main(
    fill: Annotated[bool, typer.Option("--fill", help="Put the tables between their marks in docs/gpu.md.")] = False,
) -> None:
    """Print the tables, or put them on their page."""
    if fill:
        fill_page(PAGE, tables())
    else:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    typer.run(main)

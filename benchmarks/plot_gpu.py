"""Draw docs/figures/gpu.png from the results of `attention_gpu.py` and `decode_gpu.py`; needs matplotlib.

python benchmarks/plot_gpu.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import typer

mpl.use("Agg")  # no display is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from tables_gpu import Rows, dense_time, device, fastest_read, load

TARGET = Path(__file__).resolve().parent.parent / "docs" / "figures" / "gpu.png"
DENSE, QUEST, NARROW, SKETCHES = "#9aa5b1", "#2a6f97", "#61a5c2", "#d55e00"
SKETCHED = "512"
"""The budget of sketches that is drawn, where they were timed [tokens]."""


def draw_attention(axes: Axes, rows: Rows) -> None:
    """How many times faster than FlashInfer one step of one layer is, with the ceiling that the bytes set."""
    rate = fastest_read(rows)
    has_sketches = all("sketch_us" in row for row in rows)
    names = []
    for place, row in enumerate(rows):
        batch, heads, kv_heads, context, _ = row["shape"]
        names.append(f"{batch} x {heads}/{kv_heads}\n{context // 1024}K")
        dense = dense_time(row)
        bars = [
            (row["quest_us"]["p50"], row["bytes_quest"], QUEST),
            (row["quest_fp8_us"]["p50"], row["bytes_quest_fp8"], NARROW),
        ]
        if has_sketches:
            bars.append((row["sketch_us"][SKETCHED]["p50"], row["bytes_sketch"][SKETCHED], SKETCHES))
        width = 0.8 / len(bars)
        for number, (time, size, colour) in enumerate(bars):
            middle = place + width * (number - (len(bars) - 1) / 2)
            axes.bar(middle, dense / time, 0.95 * width, color=colour)
            ceiling = dense / (size / rate)
            edges = [middle - 0.475 * width, middle + 0.475 * width]
            axes.plot(edges, [ceiling, ceiling], color="black", linewidth=1)
    axes.axhline(1, color=DENSE, linewidth=1)
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_ylabel("times faster than FlashInfer")
    where = device("attention_gpu.json")
    axes.set_title(
        f"Attention of one step and layer, {where}, bfloat16\nsequences x query/KV heads, context", fontsize=9
    )
    labels = [(QUEST, "bounds as the keys"), (NARROW, "bounds in 8 bits")]
    labels += [(SKETCHES, f"sketches, {SKETCHED} tokens")] if has_sketches else []
    for colour, label in labels:
        axes.bar(0, 0, color=colour, label=label)
    axes.plot([], [], color="black", linewidth=1, label="what the bytes allow")
    axes.legend(fontsize=7, frameon=False, loc="upper left")


def draw_decode(axes: Axes, rows: Rows) -> None:
    """Milliseconds per token by budget, as the paper's Figure 10."""
    timed = [row for row in rows if row["model"] == "llama-2-7b" and row["batch"] == 1 and "ms" in row]
    contexts = [context for context in sorted({row["context"] for row in timed}) if context <= 32768]
    arms = ("dense", "quest-4096", "quest-2048", "quest-1024", "quest-512")
    shades = (DENSE, "#1b4965", QUEST, NARROW, "#a9d6e5")
    for index, (arm, colour) in enumerate(zip(arms, shades, strict=True)):
        times = [next(row["ms"]["p50"] for row in timed if row["context"] == c and row["arm"] == arm) for c in contexts]
        places = [place + 0.16 * (index - 2) for place in range(len(contexts))]
        axes.bar(places, times, 0.15, color=colour, label=arm.replace("quest-", "Quest, budget "))
    axes.set_xticks(range(len(contexts)), [f"{context // 1024}K" for context in contexts])
    axes.set_ylabel("ms per token")
    where = device("decode_gpu.json")
    axes.set_title(
        f"generate(), Llama-2-7B shape, random weights, {where}\nboth arms in CUDA graphs; dense is our kernel",
        fontsize=9,
    )
    axes.legend(fontsize=7, frameon=False, loc="upper left")


def main(output: Annotated[Path, typer.Option(help="PNG file to write.")] = TARGET) -> None:
    """Draw both panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1.6, 1))
    draw_attention(left, load("attention_gpu.json"))
    draw_decode(right, load("decode_gpu.json"))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    typer.run(main)

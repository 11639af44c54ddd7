"""Draw docs/figures/hit_rates.png from the results of `hit_rates.py`; needs matplotlib.

python benchmarks/plot_offload.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import typer

mpl.use("Agg")  # no display is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from tables_gpu import Rows, load
from tables_offload import HIT_RATES, what_of

TARGET = Path(__file__).resolve().parent.parent / "docs" / "figures" / "hit_rates.png"
COLOURS = {"bounds": "#2a6f97", "sketch": "#d55e00"}
MARKERS = {"book": ("o", "-"), "code": ("s", "--"), "chat": ("^", ":")}


def draw(axes: Axes, rows: Rows) -> None:
    """What has to be fetched, by how much is hot; a line for each text and way to choose."""
    for what in dict.fromkeys(what_of(row) for row in rows):
        _, _, text, form, budget = what
        of_line = [row for row in rows if what_of(row) == what]
        marker, line = MARKERS[text]
        axes.plot(
            [row["hot_tokens"] for row in of_line], [1 - row["hit_rate"] for row in of_line], marker=marker,
            linestyle=line, markersize=4, color=COLOURS[form.partition(",")[0]], label=f"{form}, {budget}: {text}",
        )  # fmt: skip
    sizes = sorted({row["hot_tokens"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_yscale("log")
    ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2]
    axes.set_yticks(ticks, [f"{100 * tick:.1f} %" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("hot tokens of a layer and KV head")
    axes.set_ylabel("of the units a step reads, fetched")
    axes.set_title(f"{rows[0]['model']}, {rows[0]['context']:,} tokens", fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def main(output: Annotated[Path, typer.Option(help="PNG file to write.")] = TARGET) -> None:
    """Draw a panel for each model."""
    results = [load(name) for name in HIT_RATES]
    figure, panels = plt.subplots(1, len(results), figsize=(11, 3.8), sharey=True)
    for axes, rows in zip(panels, results, strict=True):
        draw(axes, rows)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    typer.run(main)

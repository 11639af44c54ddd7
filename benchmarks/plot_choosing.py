"""Draw docs/figures/choosing.png: what ways to choose lose against what a step takes; needs matplotlib.

    python benchmarks/plot_choosing.py

From the answers of `eval_public.py` and the times of `attention_gpu.py`, as `tables_choosing.py` prints them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import typer

mpl.use("Agg")  # no display is needed

from eval_public import BOUNDS, ESTIMATES, EXACT_TOKENS, MOMENTS, SKETCH
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from tables_choosing import LABELS, PICTURE, Point, kept_runs, points
from tables_gpu import dense_time, device, load, sketch_run

STYLES = {
    BOUNDS: ("#2a6f97", "o", "-"),
    MOMENTS: ("#e69f00", "s", "-"),
    SKETCH: ("#d55e00", "D", "-"),
    ESTIMATES: ("#8e6bbf", "^", "-"),
    EXACT_TOKENS: ("#5c8a00", "x", "--"),
}
"""Colour, marker and line."""
LINEAR = 2.0
"""Losses up to this, of either sign, are drawn to scale; larger ones by their logarithm [%]."""


def draw(axes: Axes, found: dict[str, list[Point]], dense: float) -> None:
    """A line for each way to choose, a point for each budget, with the interval of its loss."""
    for way, some in found.items():
        colour, marker, line = STYLES[way]
        times, losses = [point.time for point in some], [point.cell.more for point in some]
        spans = (
            [point.cell.more - point.cell.more_low for point in some],
            [point.cell.more_high - point.cell.more for point in some],
        )
        label = LABELS[way].replace("`", "") + (
            ", at the least time that its bytes allow" if way == EXACT_TOKENS else ""
        )
        axes.errorbar(
            times, losses, spans, color=colour, marker=marker, linestyle=line, markersize=5, elinewidth=0.8, label=label
        )
        side = -1 if way == MOMENTS else 1  # its points lie close to those of bounds
        for point in some:
            axes.annotate(
                f"{point.token_budget:,}", (point.time, point.cell.more), (4 * side, 4), textcoords="offset points",
                fontsize=6, color=colour, horizontalalignment="right" if side < 0 else "left",
            )  # fmt: skip
    axes.axvline(dense, color="#9aa5b1", linewidth=1, label="everything is read (FlashInfer)")
    axes.axhline(0, color="#9aa5b1", linewidth=0.6)
    axes.set_yscale("symlog", linthresh=LINEAR)
    ticks = [-2, -1, 0, 1, 2, 5, 10, 20, 50, 100]
    axes.set_yticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(left=0)
    axes.set_xlabel("microseconds of a step's attention, one layer")
    axes.set_ylabel("perplexity above full attention's [%]")
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def main(output: Annotated[Path, typer.Option(help="PNG file to write.")] = PICTURE) -> None:
    """Draw the picture.

    Raises:
        Exit: One of the two was not measured yet.
    """
    found = points(kept_runs())
    if not found:
        print("not drawn: it needs the kept runs of Qwen at 31K, and a row of attention_gpu.json with all forms")
        raise typer.Exit(1)
    run = sketch_run()
    assert run is not None, "there are points"
    row = next(row for row in load(run) if "choices_us" in row)
    figure, axes = plt.subplots(figsize=(7.5, 5.2))
    draw(axes, found, dense_time(row))
    axes.set_title(
        "Loss: Qwen2.5-Coder-0.5B, 31K tokens. Time: 1 x 32/8 heads x 32K tokens, head_dim 128,\n"
        f"{device(run)}. Numbers at the points: budgets in tokens",
        fontsize=8,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    typer.run(main)

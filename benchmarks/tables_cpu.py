"""Print the tables of docs/speed.md from the results of `decode_cpu.py` and `choice_cpu.py`.

python benchmarks/tables_cpu.py
"""

from __future__ import annotations

from tables_gpu import Rows, as_markdown, load

ARMS = ("dynamic", "dense", "quest-2", "quest-0")
HEAD = ("dtype", "context", "DynamicCache + sdpa", "ours, dense", "Quest, 2 dense layers", "Quest, none")
RATIOS = ("to DynamicCache", "to ours, dense")
CHOICE_BASE = "bounds@2048"
"""To which other choices are compared: the paper's, at its budget."""


def decode_table(rows: Rows) -> str:
    """Milliseconds per token of every arm; the ratios are those of Quest with two dense layers."""
    ms = {(row["dtype"], row["context"], row["arm"]): row["ms"]["p50"] for row in rows}
    cells = []
    for dtype, context in dict.fromkeys((row["dtype"], row["context"]) for row in rows):
        times = [ms[dtype, context, arm] for arm in ARMS]
        dynamic, dense, quest, _ = times
        ratios = (f"{dynamic / quest:.1f}x", f"{dense / quest:.2f}x")
        cells.append([dtype, f"{context:,}", *(f"{time:.1f}" for time in times), *ratios])
    return as_markdown((*HEAD, *RATIOS), cells)


def choice_table(rows: Rows) -> str:
    """What each choice loses and takes, and how many times faster it is than bounds at the largest budget."""
    losses = {(row["context"], row["arm"]): row["loss_percent"] for row in rows if "loss_percent" in row}
    ms = {(row["context"], row["batch"], row["arm"]): row["ms"]["p50"] for row in rows if "ms" in row}
    batches = list(dict.fromkeys(batch for _, batch, _ in ms))
    cells = []
    for (context, arm), loss in losses.items():
        form, _, budget = arm.partition("@")
        times = [ms[context, batch, arm] for batch in batches]
        bases = [ms[context, batch, CHOICE_BASE] for batch in batches]
        ratios = [f"{base / time:.2f}x" for base, time in zip(bases, times, strict=True)]
        both = [cell for pair in zip((f"{time:.1f}" for time in times), ratios, strict=True) for cell in pair]
        cells.append([f"{context:,}", form, f"{int(budget):,}", f"+{loss:.1f}", *both])
    head = ["context", "chosen by", "budget", "perplexity above full attention's [%]"]
    for batch in batches:
        sequences = "1 sequence" if batch == 1 else f"{batch} sequences"
        head += [f"ms, {sequences}", f"to bounds of {int(CHOICE_BASE.partition('@')[2]):,}"]
    return as_markdown(tuple(head), cells)


if __name__ == "__main__":
    print(decode_table(load("decode_cpu.json")))
    print()
    print(choice_table(load("choice_cpu.json")))

"""Print the table of docs/speed.md from the results of `decode_cpu.py`.

python benchmarks/tables_cpu.py
"""

from __future__ import annotations

from tables_gpu import Rows, as_markdown, load

ARMS = ("dynamic", "dense", "quest-2", "quest-0")
HEAD = ("dtype", "context", "DynamicCache + sdpa", "ours, dense", "Quest, 2 dense layers", "Quest, none")
RATIOS = ("to DynamicCache", "to ours, dense")


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


if __name__ == "__main__":
    print(decode_table(load("decode_cpu.json")))

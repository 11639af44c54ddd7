"""Print the tables of docs/vllm.md from the results of `serve_vllm.py` and `stock_gpu.py`.

python benchmarks/tables_vllm.py
"""

from __future__ import annotations

from typing import Any

from tables_gpu import Rows, as_markdown, load

STOCK = "stock"
CALLED = {"quest": "bounds", "sketch": "sketch", "estimates": "estimates alone"}
"""What an arm keeps or goes by, by what its name begins with."""


def case(row: dict[str, Any]) -> str:
    """Context and sequences of a row."""
    context = row["context"]
    return f"{context // 1024}K x {row['batch']}" if context % 1024 == 0 else f"{context} x {row['batch']}"


def headings(arms: list[str]) -> list[str]:
    """What columns of arms are called: Quest where it is one, else by what is kept and the budget."""
    if len(arms) == 1 and arms[0].startswith("quest"):
        return ["Quest"]
    called = []
    for arm in arms:
        kind, budget, *more = arm.split("-")
        kept = CALLED[kind] + (" in 8 bits" if more == ["fp8"] else "")
        called.append(f"{kept}, {int(budget):,}" + (f", {more[1]} drafts" if more[:1] == ["lossless"] else ""))
    return called


def latency_table(rows: Rows) -> str:
    """Milliseconds between two tokens of a sequence, and tokens a second of all, by arm.

    The arms are compared with stock or, in a run without it, with the first of them.
    """
    base, *arms = sorted(dict.fromkeys(row["arm"] for row in rows), key=lambda arm: arm != STOCK)
    of_case: dict[str, dict[str, Any]] = {}
    for row in rows:
        of_case.setdefault(case(row), {})[row["arm"]] = row
    first = base if base == STOCK else headings([base, *arms])[0]
    called = [cell for name in headings(arms) for cell in (name, "")]
    cells = []
    for name, found in of_case.items():
        least, rate = found[base]["ms_between_tokens"]["p50"], found[base]["tokens_per_second"]
        times, rates = [f"{least:.2f}"], [f"{rate:,.0f}"]
        for row in (found[arm] for arm in arms):
            times += [f"{row['ms_between_tokens']['p50']:.2f}", f"{least / row['ms_between_tokens']['p50']:.2f}x"]
            rates += [f"{row['tokens_per_second']:,.0f}", f"{row['tokens_per_second'] / rate:.2f}x"]
        cells.append([name, *times, *rates])
    return as_markdown(("context, sequences", first, *called, f"tokens/s, {first}", *called), cells)


def stock_table(rows: Rows) -> str:
    """Microseconds of stock attention by sequences, as vLLM calls it inside of graphs, and its rate of reading."""
    most = max(row["splits"] for row in rows)
    exact = [row for row in rows if row["rows"] == row["sequences"] and row["splits"] == most]
    times = ["microseconds", *(f"{row['us']['p50']:,.0f}" for row in exact)]
    rates = ["TB/s", *(f"{row['tb_per_second']:.2f}" for row in exact)]
    return as_markdown(("sequences", *(f"{row['sequences']}" for row in exact)), [times, rates])


def tables() -> list[str]:
    """All tables of docs/vllm.md, in order."""
    newest = ("_fp8_weights", "_fp8_kv", "_tp2", "_gpt_oss", "_qwen3_next", "_lossless")
    before = ("", "_fp8_bounds", "_cpu")
    rows = load("serve_vllm_estimates.json")
    default, half = (
        latency_table([row for row in rows if row["arm"] in arms])
        for arms in ((STOCK, "quest-2048", "estimates-2048"), ("quest-2048", "estimates-1024"))
    )
    quarter, *others = (latency_table(load(f"serve_vllm{name}.json")) for name in ("_512", *newest, *before))
    return [default, half, quarter, stock_table(load("stock_gpu.json")), *others]


if __name__ == "__main__":
    print("\n\n".join(tables()))

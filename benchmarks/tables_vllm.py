"""Print the tables of docs/vllm.md from the results of `serve_vllm.py`.

python benchmarks/tables_vllm.py
"""

from __future__ import annotations

from typing import Any

from tables_gpu import Rows, as_markdown, load

STOCK = "stock"
HEAD = ("context, sequences", "stock", "Quest", "", "tokens/s, stock", "Quest", "")


def case(row: dict[str, Any]) -> str:
    """Context and sequences of a row."""
    context = row["context"]
    return f"{context // 1024}K x {row['batch']}" if context % 1024 == 0 else f"{context} x {row['batch']}"


def latency_table(rows: Rows) -> str:
    """Milliseconds between two tokens of a sequence, and tokens a second of all, without and with Quest."""
    stock = {case(row): row for row in rows if row["arm"] == STOCK}
    quest = [row for row in rows if row["arm"] != STOCK]
    is_one_arm = len({row["arm"] for row in quest}) == 1
    cells = []
    for row in quest:
        base = stock[case(row)]
        cells.append(
            [
                case(row) if is_one_arm else f"{case(row)}, {row['arm']}",
                *(f"{one['ms_between_tokens']['p50']:.2f}" for one in (base, row)),
                f"{row['ratio_to_stock']:.2f}x",
                *(f"{one['tokens_per_second']:,.0f}" for one in (base, row)),
                f"{row['tokens_per_second'] / base['tokens_per_second']:.2f}x",
            ]
        )
    return as_markdown(HEAD, cells)


def tables() -> list[str]:
    """All tables of docs/vllm.md, in order."""
    names = ("", "_fp8_bounds", "_fp8_weights", "_tp2", "_cpu")
    return [latency_table(load(f"serve_vllm{name}.json")) for name in names]


if __name__ == "__main__":
    print("\n\n".join(tables()))

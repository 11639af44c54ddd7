"""Time the attention of vLLM's own backend alone: FlashAttention 3 over a paged cache, as a decode step calls it.

    python benchmarks/stock_gpu.py --output benchmarks/results/stock_gpu.json

It answers why the stock backend's step grows by more than its cache from 4 to 6 sequences of 128K tokens. Each number
of sequences is timed with as many rows and padded to 8 with rows of length 0, as vLLM pads a batch of which it has
captured no graph; with the splits that vLLM allows inside of graphs, and with those that FlashAttention chooses.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from quest_attention.bench.record import write_record
from quest_attention.bench.timing import percentiles, time_graphs

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
IN_GRAPHS = 32
"""Splits that vLLM allows inside of graphs: `flash_attn_max_num_splits_for_cuda_graph`."""
BY_HEURISTIC = 0
"""FlashAttention's own choice."""
PADDED = 8
"""Rows of a captured graph."""


def attend(query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, splits: int) -> Any:
    """A call as vLLM makes it; the first makes what the scheduler says, which a graph replays."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata  # noqa: PLC0415

    rows, longest = query.shape[0], table.shape[1] * BLOCK
    starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    scheduled = get_scheduler_metadata(
        batch_size=rows, max_seqlen_q=1, max_seqlen_k=longest, num_heads_q=HEADS, num_heads_kv=KV_HEADS, headdim=DIM,
        cache_seqlens=lengths, qkv_dtype=query.dtype, cu_seqlens_q=starts, page_size=BLOCK, causal=True,
        num_splits=splits,
    )  # fmt: skip
    out = torch.empty_like(query)
    return partial(
        flash_attn_varlen_func, query, cache[:, 0], cache[:, 1], max_seqlen_q=1, cu_seqlens_q=starts,
        max_seqlen_k=longest, seqused_k=lengths, causal=True, block_table=table, out=out, fa_version=3,
        scheduler_metadata=scheduled, num_splits=splits,
    )  # fmt: skip


def main(
    context: Annotated[int, typer.Option(help="Tokens of a sequence.", min=BLOCK)] = 131072,
    repeats: Annotated[int, typer.Option(help="Timed replays.", min=1)] = 20,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time it for 1 to 8 sequences."""
    torch.manual_seed(0)
    pages = context // BLOCK
    cache = torch.randn(PADDED * pages, 2, BLOCK, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    table = torch.randperm(PADDED * pages, device="cuda").to(torch.int32).view(PADDED, pages)
    query = torch.randn(PADDED, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    cases = [
        (sequences, rows, splits)
        for sequences in range(1, PADDED + 1)
        for rows in sorted({sequences, PADDED})
        for splits in (IN_GRAPHS, BY_HEURISTIC)
    ]
    calls = []
    for sequences, rows, splits in cases:
        lengths = torch.zeros(rows, dtype=torch.int32, device="cuda")
        lengths[:sequences] = context
        calls.append([attend(query[:rows], cache, table[:rows], lengths, splits)])
    found = time_graphs(calls, repeats)
    rows_of = []
    shown = Table("sequences", "rows", "splits", "us", "TB/s")
    for (sequences, rows, splits), times in zip(cases, found, strict=True):
        read = sequences * context * 2 * KV_HEADS * DIM * cache.element_size()
        us = percentiles(times)
        rate = read / us["p50"] / 1e6
        rows_of.append({"sequences": sequences, "rows": rows, "splits": splits, "us": us, "tb_per_second": rate})
        shown.add_row(f"{sequences}", f"{rows}", f"{splits or 'own'}", f"{us['p50']:.1f}", f"{rate:.2f}")
    if output is not None:
        import vllm  # noqa: PLC0415

        settings = {
            "vllm": vllm.__version__, "context": context, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM,
            "block": BLOCK, "repeats": repeats, "seed": 0,
        }  # fmt: skip
        write_record(output, settings, rows_of)
    Console(width=100).print(shown)


if __name__ == "__main__":
    typer.run(main)

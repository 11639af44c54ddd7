"""Time Quest's decode step where a model meets it: among the matrix products of its layers, on an NVIDIA GPU.

    python benchmarks/layers_gpu.py --output benchmarks/results/layers_gpu.json

Among matrix products the weights have passed through the caches since the launch before, and a launch shape that wins
alone, launch after launch, may lose. A graph holds layers of a Llama, each with its own weights and cache: the four
matrix products with the step in its place between them. "Among" is the time of such a graph without that of one of the
products only, a layer, the two taking turns; "alone" is the step by itself, as in `attention_gpu.py`. The page tables
have room for the longest context, as a server's have. Bounds and estimates alone have the budget, sketches whose
candidates are ranked by their keys a quarter of it. The run fails when a step ran other kernels than those that are
made for it, or read another number of pages or tokens than its budget gives.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quest_attention import QuestConfig
from quest_attention.bench.caches import make_caches, with_metadata
from quest_attention.bench.gpu import check_gpu
from quest_attention.bench.record import write_record
from quest_attention.bench.shapes import SHAPES, check_shape
from quest_attention.bench.steps import check_kernels, quest_steps
from quest_attention.bench.timing import percentiles, time_graphs
from quest_attention.cli.app import integers
from quest_attention.config import enough_candidates
from quest_attention.errors import QuestValueError

DTYPE = torch.bfloat16
CASES = "1x8192,4x8192,98x8192,1x32768,4x32768,25x32768,1x131072,4x131072,6x131072"


class Layers:
    """Layers of a model, as far as their weights are read in a decode step of one device."""

    def __init__(self, model: str, layers: int) -> None:
        shape = SHAPES[model]
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        self.query_heads, self.kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        self.head_dim = hidden // self.query_heads
        width = (self.query_heads + 2 * self.kv_heads) * self.head_dim
        sizes = ((width, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner))
        self.weights = [[torch.randn(size, dtype=DTYPE, device="cuda") for size in sizes] for _ in range(layers)]

    def steps(self, batch: int, attention: list[Callable[[], object]] | None) -> list[Callable[[], object]]:
        """A call for each layer, with or without its attention."""
        inputs = [torch.randn(batch, weight.shape[1], dtype=DTYPE, device="cuda") for weight in self.weights[0]]
        outputs = [torch.empty(batch, weight.shape[0], dtype=DTYPE, device="cuda") for weight in self.weights[0]]

        def step(weights: list[Tensor], attend: Callable[[], object] | None) -> None:
            for place, (x, weight, out) in enumerate(zip(inputs, weights, outputs, strict=True)):
                torch.mm(x, weight.T, out=out)
                if place == 0 and attend is not None:
                    attend()

        calls = attention or [None] * len(self.weights)
        return [lambda w=w, c=c: step(w, c) for w, c in zip(self.weights, calls, strict=True)]


def arms_of(budget: int) -> dict[str, QuestConfig]:
    """What is timed, by name."""
    tokens: dict[str, Any] = {"metadata": "sketch", "selection_unit": "token"}
    return {
        "bounds": QuestConfig.paper(budget),
        "fp8 bounds": QuestConfig.paper(budget, metadata_dtype="fp8"),
        "sketch": QuestConfig(budget // 4, candidate_factor=enough_candidates("sketch", budget // 4), **tokens),
        "estimates": QuestConfig(budget, candidate_factor=0, **tokens),
    }


def parse_cases(text: str) -> list[tuple[int, int]]:
    """Sequences and tokens of each, from "1x8192,4x8192".

    Raises:
        QuestValueError: It is not a list of such pairs.
    """
    cases = []
    for case in text.split(","):
        numbers = integers("cases", case.strip().replace("x", ","))
        if len(numbers) != 2:
            raise QuestValueError("cases", text, "pairs of sequences and tokens, like 1x8192,4x131072")
        cases.append((numbers[0], numbers[1]))
    return cases


def main(
    model: Annotated[str, typer.Option(help="Shape.")] = "llama-3.1-8b",
    cases: Annotated[str, typer.Option(help="Sequences x tokens of each, comma-separated.")] = CASES,
    budget: Annotated[int, typer.Option(help="Token budget.", min=512)] = 2048,
    layers: Annotated[int, typer.Option(help="Layers in a graph.", min=2)] = 8,
    repeats: Annotated[int, typer.Option(help="Replays per timing.", min=1)] = 25,
    seed: Annotated[int, typer.Option(help="Seed of weights, caches and queries.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time the step alone and among matrix products."""
    pairs, shape = parse_cases(cases), check_shape(model)
    check_gpu()
    torch.manual_seed(seed)
    weights = Layers(shape, layers)
    capacity = max(context for _, context in pairs)
    table = Table("sequences x context", "arm", "alone", "among products", title="us per layer and step (p50)")
    rows: list[dict[str, Any]] = []
    for batch, context in pairs:
        caches, lengths = make_caches(
            layers, batch, context, weights.kv_heads, capacity=capacity, head_dim=weights.head_dim, dtype=DTYPE
        )
        heads = (batch, weights.query_heads, weights.head_dim)
        queries = [torch.randn(heads, dtype=DTYPE, device="cuda") for _ in caches]
        for arm, config in arms_of(budget).items():
            kept = [with_metadata(kv, lengths, config) for kv in caches]
            calls = quest_steps(queries, kept, lengths, config)
            check_kernels(calls[0], config)
            alone, products, both = time_graphs(
                [calls, weights.steps(batch, None), weights.steps(batch, calls)], repeats
            )
            times = {
                "alone_us": percentiles(alone),
                "products_us": percentiles(products),
                "among_us": percentiles(
                    [with_step - without for with_step, without in zip(both, products, strict=True)]
                ),
            }
            rows.append({"batch": batch, "context": context, "arm": arm, **times})
            alone_p50, among_p50 = (f"{times[name]['p50']:.1f}" for name in ("alone_us", "among_us"))
            table.add_row(f"{batch} x {context // 1024}K", arm, alone_p50, among_p50)
            del kept, calls
        del caches
        torch.cuda.empty_cache()
        if output is not None:
            settings = {"model": model, "token_budget": budget, "capacity": capacity, "layers": layers}
            settings |= {"dtype": str(DTYPE), "repeats": repeats, "seed": seed}
            write_record(output, settings, rows)
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)

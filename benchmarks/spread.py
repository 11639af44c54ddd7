"""Measure how evenly what a public model's decode steps read lies over a sequence: kernels may share it by where it is.

    python benchmarks/spread.py --model qwen.gguf --books books --context 16000 --output spread.json

A text is read by dense attention up to a place, then goes on by its own tokens, one decode step with Quest each, as in
`hit_rates.py`. The sequence is cut into as many parts as programs attend to a row. Of each step, layer and KV head the
part of which most is read is compared with the mean: 1 is even, and with random keys it is little more.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch
import typer
from acceptance import config_of
from rich.console import Console
from rich.table import Table
from texts import (
    ALL_KINDS,
    BooksOption,
    DeviceOption,
    DtypeOption,
    KindsOption,
    ModelOption,
    NameOption,
    going_on,
    kinds_of,
    read_text,
    step_on,
)
from torch import Tensor

from quest_attention import QuestConfig, Selection
from quest_attention.bench.record import write_record
from quest_attention.bench.timing import percentiles
from quest_attention.cli.app import integers, split_list
from quest_attention.cli.loading import load_model
from quest_attention.errors import QuestValueError


def fullest_to_mean(selection: Selection, length: int, parts: int) -> list[float]:
    """Of each KV head of one sequence, what is read of the fullest of so many parts, in times of the mean.

    Args:
        selection: Of a step.
        length: Of the sequence [tokens].
        parts: Into which it is cut.
    """
    units = selection.units[0]  # [HKV, K]
    size = selection.unit_size
    part = units.clamp(min=0) * size * parts // length
    counts = torch.zeros(units.shape[0], parts, device=units.device)
    counts.scatter_add_(1, part.long(), (units >= 0).float())
    ratios: list[float] = (counts.amax(1) / counts.mean(1)).tolist()
    return ratios


def spread_of(
    model: Any, source: Any, text: list[int], config: QuestConfig, parts: list[int]
) -> dict[int, list[float]]:
    """What `fullest_to_mean` says of the steps of a text, by the number of parts."""
    found: dict[int, list[float]] = {number: [] for number in parts}

    def look(_layer: int, selection: Selection, _pages: Tensor) -> None:
        for number in parts:
            found[number].extend(fullest_to_mean(selection, cache.get_seq_length(), number))

    with going_on(model, source, len(text), config, look) as cache:
        for token in text:
            step_on(model, cache, token)
    return found


def main(
    model: ModelOption = "",
    name: NameOption = "",
    books: BooksOption = None,
    context: Annotated[int, typer.Option(help="Tokens read before the first step.", min=64)] = 7680,
    arms: Annotated[str, typer.Option(help="Metadata and budget, comma-separated.")] = (
        "bounds@2048,sketch,selection_unit=token,candidate_factor=0@2048"
    ),
    parts: Annotated[str, typer.Option(help="Into which a sequence is cut, comma-separated.")] = "16,32",
    kinds: KindsOption = ALL_KINDS,
    steps: Annotated[int, typer.Option(help="Decode steps of each text.", min=1)] = 16,
    dense_layers: Annotated[int, typer.Option(help="Leading layers that are read whole.", min=0)] = 2,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Of the texts.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure how evenly what steps read lies over a sequence."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    numbers = integers("parts", parts)
    if min(numbers) < 2:
        raise QuestValueError("parts", parts, "numbers from 2 on")
    configs = {arm: config_of(arm, dense_layers) for arm in split_list(arms)}
    loaded = load_model(model or None, device=device, dtype=dtype)
    runner: Any = loaded.model
    table = Table("text", "arm", *map(str, numbers), title="the fullest of so many parts, in times of the mean (p50)")
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for kind in kinds_of(kinds, loaded.tokenizer):
            source, text = read_text(loaded, kind, books, context, steps, seed)
            for arm, config in configs.items():
                found = spread_of(runner, source, text, config, numbers)
                shared = {"model": name or loaded.name, "context": context, "text": kind, "arm": arm}
                of_arm = [
                    {"parts": number, "fullest_to_mean": percentiles(ratios), "n": len(ratios)}
                    for number, ratios in found.items()
                ]
                rows.extend(shared | row for row in of_arm)
                table.add_row(kind, arm, *(f"{percentiles(ratios)['p50']:.1f}" for ratios in found.values()))
            del source
            if output is not None:
                settings = {"steps": steps, "num_dense_layers": dense_layers, "dtype": str(runner.dtype), "seed": seed}
                write_record(output, settings, rows)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)

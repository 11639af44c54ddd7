"""Time decoding with keys and values in host memory on an NVIDIA GPU, with random weights and caches.

    python benchmarks/offload_gpu.py --contexts 131072,524288 --output benchmarks/results/offload_gpu.json

Arms, each over the same random keys and values:

    quest           Quest with the whole cache on the card, in CUDA graphs
    offload         keys and values in host memory, what is hot in a pool, in CUDA graphs; hits as they come
    offload-N       the same with N of a hundred units hot: imposed, and in the record
    all             keys and values in host memory, and every step reads all of them over the bus, eagerly
    stock-offload   transformers without us: its cache that offloads layers to host memory, eager

Random queries choose what no model would, so hits as they come say little: `hit_rates.py` has those of models. To
impose them, the kernel that places units runs as ever, and of the units of a list as many are then copied as are no
hits, evenly apart; what attention reads is in the pool's slots all the same, and takes as long to read. The keys of
candidates, of sketches, are hot as they come.

The time of a token is that between two calls of a logits processor, as in `decode_gpu.py`. The run fails when an arm
did not take the path it is named for. Host memory must hold the cache: 128 GiB for a million tokens of llama-3.1-8b.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from acceptance import config_of
from decode_gpu import WARMUP, fill, make_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.cache_utils import DynamicCache

from quest_attention import QuestCache, QuestConfig, enable_quest
from quest_attention.bench.gpu import check_gpu
from quest_attention.bench.record import write_record
from quest_attention.bench.shapes import check_shape
from quest_attention.bench.timing import percentiles
from quest_attention.bench.written import time_written
from quest_attention.cli.app import integers, split_list
from quest_attention.errors import QuestValueError
from quest_attention.hf.offload import Offload

NUM_DENSE_LAYERS = 2
ARMS = "quest,offload,offload-100,offload-95,offload-90,offload-75,offload-50,offload-0,all,stock-offload"
WHOLE = ("all", "stock-offload")
"""Arms that read everything."""
COPIED = 6
"""Which argument of the kernel that copies says of each unit whether it is copied."""


def hits_of(arm: str) -> int | None:
    """Hits of a hundred that an arm imposes, or None.

    Raises:
        QuestValueError: There is no such arm.
    """
    name, _, hits = arm.partition("-")
    if arm in ("quest", "offload", *WHOLE):
        return None
    if name != "offload" or not hits.isdecimal() or int(hits) > 100:
        raise QuestValueError("arms", arm, "quest, offload, offload-0 to offload-100, all or stock-offload")
    return int(hits)


def copied_of(count: int, hits: int) -> Tensor:
    """Which of `count` units are copied where so many of a hundred are hits, evenly apart: `[count]` int32.

    >>> copied_of(8, 75).tolist()
    [0, 0, 0, 1, 0, 0, 0, 1]
    """
    misses = 100 - hits
    nth = torch.arange(1, count + 1)
    return (nth * misses // 100 - (nth - 1) * misses // 100).to(torch.int32)


@contextlib.contextmanager
def imposed_hits(hits: int | None, device: torch.device) -> Iterator[list[float]]:
    """Have so many of a hundred wanted units be hits, as far as copying goes; None leaves it.

    Yields:
        The share that was copied of each list, once for each launch that the host made.
    """
    seen: list[float] = []
    if hits is None:
        yield seen
        return
    from quest_attention.ops.triton import fetch  # noqa: PLC0415 - needs triton

    launch = fetch.launch
    masks: dict[int, Tensor] = {}

    def imposing(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        if kernel is fetch.copy_kernel:
            copied = arguments[COPIED]
            count = copied.shape[2]
            if count not in masks:
                masks[count] = copied_of(count, hits).to(device)
            copied.copy_(masks[count].expand_as(copied))
            seen.append(1 - hits / 100)
        launch(kernel, grid, *arguments, **options)

    fetch.launch = imposing  # type: ignore[assignment]
    try:
        yield seen
    finally:
        fetch.launch = launch


def make_cache(
    model: Any, arm: str, config: QuestConfig, batch: int, context: int, room: int, hot: int, seed: int
) -> Any:
    """A cache of random tokens for an arm, and for the others with the same `kind_of`."""
    if arm == "stock-offload":
        cache: Any = DynamicCache(config=model.config, offloading=True)
    else:
        offload = {"quest": None, "all": Offload()}.get(arm, Offload(hot))
        cache = QuestCache(model.config, config_for(arm, config, room), max_length=room, offload=offload)
    fill(cache, model, batch, context, seed)
    return cache


def kind_of(arm: str) -> str:
    """Arms of a kind share a cache, which takes a while to lock where it lies in host memory."""
    return "offload" if arm.startswith("offload") else arm


def config_for(arm: str, config: QuestConfig, room: int) -> QuestConfig:
    """What an arm reads."""
    if arm != "all":
        return config
    budget = room + config.page_size  # within it a step reads everything
    return QuestConfig(budget, config.page_size, metadata="bounds", num_dense_layers=NUM_DENSE_LAYERS)


def time_arm(model: Any, cache: Any, arm: str, batch: int, context: int, tokens: int) -> dict[str, Any]:
    """Time per token of one arm, and what came over the bus; the cache holds what it held.

    Raises:
        RuntimeError: The arm did not take its path.
    """
    steps = WARMUP + tokens
    if arm == "stock-offload":
        return {"ms": percentiles(time_written(model, cache, batch, context, tokens, WARMUP))}
    hits = hits_of(arm)
    cache.counters.reset()
    with imposed_hits(hits, model.device) as seen, enable_quest(model, cache.quest) as handle:
        ms = time_written(model, cache, batch, context, tokens, WARMUP)
        graphs = handle.graphs
    cache.keep(context)
    counters = cache.counters
    sparse = sum(layer.kind == "quest" for layer in counters.layers)
    expected = 0 if arm == "all" else sparse * steps
    if counters.sparse_steps != expected or not sparse:
        raise RuntimeError(f"{arm}: took {counters.sparse_steps} sparse layer steps, expected {expected}")
    if arm not in ("quest", "all") and (counters.fetches is None or not counters.fetches.units_looked_up):
        raise RuntimeError(f"{arm}: fetched nothing")
    if hits is not None and not seen:
        raise RuntimeError(f"{arm}: nobody imposed anything")
    is_replayed = graphs is not None and graphs.replayed_steps == steps and not graphs.eager_steps
    if model.device.type == "cuda" and arm != "all" and not is_replayed:
        raise RuntimeError(f"{arm}: not all steps replayed a graph: {graphs and graphs.eager_steps}")
    row: dict[str, Any] = {"ms": percentiles(ms), "share_read": counters.share_read}
    if arm not in ("quest", "all") and counters.fetches is not None:
        row["fetches"] = counters.fetches.to_dict()
        row["mib_a_token"] = counters.fetches.bytes_fetched / steps / 2**20
    if hits is not None:  # what the kernel that places units counted is not what was copied
        text, config = model.config, cache.quest
        unit_bytes = config.unit_size * 2 * text.head_dim * model.dtype.itemsize
        units = sparse * batch * text.num_key_value_heads * int(copied_of(config.unit_budget, hits).sum())
        row |= {"imposed_hit_rate": hits / 100, "mib_a_token": units * unit_bytes / 2**20}
        del row["fetches"]
    return row


def main(
    model: Annotated[str, typer.Option(help="A shape.")] = "llama-3.1-8b",
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, comma-separated.")] = "131072,262144,524288",
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 1,
    reads: Annotated[str, typer.Option(help="Metadata and budget, comma-separated, as acceptance.py has them.")] = (
        "bounds@2048,sketch,selection_unit=token@512"
    ),
    arms: Annotated[str, typer.Option(help="What is timed, comma-separated.")] = ARMS,
    hot_tokens: Annotated[int, typer.Option(help="Of each layer and KV head.", min=1)] = 16384,
    tokens: Annotated[int, typer.Option(help="Counted tokens of an arm.", min=1)] = 24,
    device: Annotated[str, typer.Option(help="Where to run; cpu tries the script out.")] = "cuda",
    seed: Annotated[int, typer.Option(help="Of weights and caches.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time decoding with keys and values in host memory."""
    check_shape(model)
    names = split_list(arms)
    for arm in names:
        hits_of(arm)
    lengths, configs = (
        integers("contexts", contexts),
        {one: config_of(one, NUM_DENSE_LAYERS) for one in split_list(reads)},
    )
    where = torch.device(device)
    if where.type == "cuda":
        check_gpu()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    table = Table("context", "reads", "arm", "ms per token (p50)", "to quest", "MiB over the bus", "hits")
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        runner = make_model(model, where, dtype, seed)
        for context in lengths:
            for reads_what, config in configs.items():
                near: float | None = None
                room, cache, kind = context + WARMUP + tokens + 2, None, ""
                for arm in names:
                    if arm in WHOLE and reads_what != next(iter(configs)):
                        continue  # nothing is chosen: timed once
                    if kind != kind_of(arm):
                        del cache  # before the next one needs the room
                        gc.collect()
                        if where.type == "cuda":
                            torch.cuda.empty_cache()
                        began, kind = time.perf_counter(), kind_of(arm)
                        cache = make_cache(runner, arm, config, batch, context, room, hot_tokens, seed)
                        print(
                            f"{context} {reads_what} {kind}: filled in {time.perf_counter() - began:.0f} s", flush=True
                        )
                    row = time_arm(runner, cache, arm, batch, context, tokens)
                    middle = row["ms"]["p50"]
                    near = middle if arm == "quest" else near
                    row["ratio_to_quest"] = None if near is None else middle / near
                    shape = {"model": model, "batch": batch, "context": context, "reads": reads_what, "arm": arm}
                    rows.append(shape | row)
                    hits = row.get("imposed_hit_rate", row.get("fetches", {}).get("hit_rate"))
                    ratio = f"{middle / near:.2f}x" if near else ""
                    moved = f"{row['mib_a_token']:.1f}" if "mib_a_token" in row else ""
                    shown = "" if hits is None else f"{hits:.0%}"
                    table.add_row(str(context), reads_what, arm, f"{middle:.2f}", ratio, moved, shown)
                    print(f"  {arm}: {middle:.2f} ms {ratio}", flush=True)
                    if output is not None:
                        settings = {
                            "num_dense_layers": NUM_DENSE_LAYERS,
                            "dtype": str(dtype),
                            "hot_tokens": hot_tokens,
                            "tokens": tokens,
                            "warmup": WARMUP,
                            "seed": seed,
                        }
                        write_record(output, f"python {' '.join(sys.argv)}", settings, rows)
                del cache
                gc.collect()
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)

"""Time decoding with keys and values in host memory on an NVIDIA GPU, with random weights and caches.

    python benchmarks/offload_gpu.py --contexts 131072,524288 --output benchmarks/results/offload_gpu.json

Arms, each over the same random keys and values:

    quest           Quest with the whole cache on the card, in CUDA graphs
    offload         keys and values in host memory, what is hot in a pool, in CUDA graphs
    all             keys and values in host memory, and every step reads all of them over the bus, eagerly
    stock-offload   transformers without us: its cache that offloads layers to host memory, eager

How much is hot is a matter of how much the queries of one step are like those of the next. So the embeddings of all
tokens are one and the same vector but for a share of their own, and the tokens that are written are random: `offload`
is timed for each of `--own`, hits are those that come, and rows say how many. With a share of 1 nothing is alike;
`hit_rates.py` says which rates models have. All else is what a model does: candidates, too, are hot or not.

The time of a token is that between two calls of a logits processor, as in `decode_gpu.py`. The run fails when an arm
did not take the path it is named for. Host memory must hold the cache: 128 GiB for a million tokens of llama-3.1-8b.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from acceptance import config_of
from decode_gpu import WARMUP, fill, make_model
from rich.console import Console
from rich.table import Table
from transformers.cache_utils import DynamicCache

from quest_attention import QuestCache, QuestConfig, enable_quest
from quest_attention.bench.gpu import check_gpu
from quest_attention.bench.record import write_record
from quest_attention.bench.shapes import check_shape
from quest_attention.bench.timing import percentiles
from quest_attention.bench.written import time_written
from quest_attention.cli.app import integers, split_list
from quest_attention.errors import QuestValueError
from quest_attention.hf.cache_dtype import check_cache_dtype
from quest_attention.hf.offload import Offload

NUM_DENSE_LAYERS = 2
ARMS = "quest,offload,all,stock-offload"
WHOLE = ("all", "stock-offload")
"""Arms that read everything."""
MOST_WHOLE = 6
"""Counted tokens of those at most: each takes seconds."""
FILLING = 64
"""Steps that fill the pool and are not counted."""


def check_arms(names: list[str]) -> None:
    """Refuse what is no arm.

    Raises:
        QuestValueError: As said.
    """
    for name in names:
        if name not in ARMS.split(","):
            raise QuestValueError("arms", name, f"some of {ARMS}")


def shares_of(own: str) -> list[float]:
    """Shares of the embeddings, comma-separated.

    Raises:
        QuestValueError: One is no number from 0 to 1.
    """
    shares = []
    for one in split_list(own):
        try:
            share = float(one)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise QuestValueError("own", one, "a number from 0 to 1")
        shares.append(share)
    return shares


class Embeddings:
    """The embeddings of a model, of which a share is a token's own and the rest the same for all."""

    def __init__(self, model: Any) -> None:
        self._weight = model.get_input_embeddings().weight
        self._random = self._weight.clone()

    def share(self, own: float) -> None:
        """Have so much of each embedding be its own: two of them have a cosine of `1 - own ** 2`."""
        self._weight.copy_(self._random * own + self._random[:1] * (1 - own**2) ** 0.5)


def make_cache(
    model: Any, arm: str, config: QuestConfig, batch: int, context: int, room: int, hot: int, dtype: str, seed: int
) -> Any:
    """A cache of random tokens for an arm."""
    cache: Any
    if arm == "stock-offload":
        cache = DynamicCache(config=model.config, offloading=True)
    else:
        offload = {"quest": None, "all": Offload()}.get(arm, Offload(hot))
        options: dict[str, Any] = {"max_length": room, "offload": offload, "kv_cache_dtype": dtype}
        cache = QuestCache(model.config, config_for(arm, config, room), **options)
    fill(cache, model, batch, context, seed)
    return cache


def config_for(arm: str, config: QuestConfig, room: int) -> QuestConfig:
    """What an arm reads."""
    if arm != "all":
        return config
    budget = room + config.page_size  # within it a step reads everything
    return QuestConfig(budget, config.page_size, metadata="bounds", num_dense_layers=NUM_DENSE_LAYERS)


def time_arm(
    model: Any, cache: Any, arm: str, batch: int, context: int, tokens: int, generator: torch.Generator
) -> dict[str, Any]:
    """Time per token of one arm, and what came over the bus; the cache holds what it held.

    Raises:
        RuntimeError: The arm did not take its path.
    """
    steps = WARMUP + tokens
    follow = torch.randint(model.config.vocab_size, (FILLING + 1 + steps,), generator=generator).tolist()
    if arm == "stock-offload":
        return {"ms": percentiles(time_written(model, cache, batch, context, tokens, WARMUP, follow=follow))}
    with enable_quest(model, cache.quest) as handle:
        if arm == "offload":
            time_written(model, cache, batch, context, 1, FILLING, follow=follow)
            cache.keep(context)
        cache.counters.reset()
        before = 0 if handle.graphs is None else handle.graphs.replayed_steps
        ms = time_written(model, cache, batch, context, tokens, WARMUP, follow=follow[FILLING + 1 :])
        graphs = handle.graphs
    cache.keep(context)
    counters = cache.counters
    sparse = sum(layer.kind == "quest" for layer in counters.layers)
    expected = 0 if arm == "all" else sparse * steps
    if counters.sparse_steps != expected or not sparse:
        raise RuntimeError(f"{arm}: took {counters.sparse_steps} sparse layer steps, expected {expected}")
    is_replayed = graphs is not None and graphs.replayed_steps - before == steps and not graphs.eager_steps
    if model.device.type == "cuda" and arm != "all" and not is_replayed:
        raise RuntimeError(f"{arm}: not all steps replayed a graph: {graphs and graphs.eager_steps}")
    row: dict[str, Any] = {"ms": percentiles(ms), "share_read": counters.share_read}
    if arm == "offload":
        if counters.fetches is None or not counters.fetches.units_looked_up:
            raise RuntimeError(f"{arm}: fetched nothing")
        fetches = counters.fetches
        row["fetches"] = fetches.to_dict()
        row["mib_a_token"] = (fetches.bytes_fetched + fetches.bytes_in_place) / steps / 2**20
    return row


def check_stock(arms: list[str], kv_cache_dtype: str, device: str) -> None:
    """Refuse transformers' own offloaded cache where it has nothing to do.

    Raises:
        QuestValueError: It stores no 8 bits, or the device is the one that it offloads to; or there is no such dtype.
    """
    check_cache_dtype(kv_cache_dtype)
    if "stock-offload" in arms and kv_cache_dtype != "auto":
        raise QuestValueError("arms", "stock-offload", "arms that store in 8 bits, beside --kv-cache-dtype")
    if "stock-offload" in arms and device == "cpu":
        raise QuestValueError("arms", "stock-offload", "others on a CPU, to which transformers offloads")


def check_pools(arms: list[str], configs: list[QuestConfig], hot_tokens: int) -> None:
    """Refuse pools that hold less than a step reads together.

    Raises:
        QuestValueError: As said.
    """
    for config in configs if "offload" in arms else ():
        Offload(hot_tokens).check(config)


def main(
    model: Annotated[str, typer.Option(help="A shape.")] = "llama-3.1-8b",
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, comma-separated.")] = "131072,262144,524288",
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 1,
    reads: Annotated[str, typer.Option(help="Metadata and budget, comma-separated, as acceptance.py has them.")] = (
        "bounds@2048,sketch,selection_unit=token@512"
    ),
    arms: Annotated[str, typer.Option(help="What is timed, comma-separated.")] = ARMS,
    own: Annotated[str, typer.Option(help="Shares of an embedding that are a token's own, comma-separated.")] = (
        "0.05,0.1,0.2,0.4,1"
    ),
    hot_share: Annotated[float, typer.Option(help="Share of the context that the pool holds.", min=0, max=1)] = 0.25,
    kv_cache_dtype: Annotated[str, typer.Option(help="How keys and values are stored: auto or fp8.")] = "auto",
    tokens: Annotated[int, typer.Option(help="Counted tokens of an arm.", min=1)] = 24,
    device: Annotated[str, typer.Option(help="Where to run; cpu tries the script out.")] = "cuda",
    seed: Annotated[int, typer.Option(help="Of weights and caches.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time decoding with keys and values in host memory."""
    check_shape(model)
    names, shares = split_list(arms), shares_of(own)
    check_arms(names)
    check_stock(names, kv_cache_dtype, device)
    lengths = integers("contexts", contexts)
    configs = {one: config_of(one, NUM_DENSE_LAYERS) for one in split_list(reads)}
    check_pools(names, list(configs.values()), int(hot_share * min(lengths)))
    generator = torch.Generator().manual_seed(seed)
    where = torch.device(device)
    if where.type == "cuda":
        check_gpu()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    table = Table("context", "reads", "arm", "ms per token (p50)", "to quest", "MiB over the bus", "hits")
    rows: list[dict[str, Any]] = []
    settings = {
        "num_dense_layers": NUM_DENSE_LAYERS,
        "dtype": str(dtype),
        "hot_share": hot_share,
        "kv_cache_dtype": kv_cache_dtype,
        "tokens": tokens,
        "warmup": WARMUP,
        "filling": FILLING,
        "seed": seed,
    }
    with torch.inference_mode():
        runner = make_model(model, where, dtype, seed)
        embeddings = Embeddings(runner)
        for context in lengths:
            for reads_what, config in configs.items():
                near: float | None = None
                room, hot = context + FILLING + WARMUP + tokens + 2, int(hot_share * context)
                for arm in names:
                    if arm in WHOLE and reads_what != next(iter(configs)):
                        continue  # nothing is chosen: timed once
                    began = time.perf_counter()
                    cache = make_cache(runner, arm, config, batch, context, room, hot, kv_cache_dtype, seed)
                    print(f"{context} {reads_what} {arm}: filled in {time.perf_counter() - began:.0f} s", flush=True)
                    for share in shares if arm == "offload" else shares[:1]:
                        embeddings.share(share)
                        counted = min(tokens, MOST_WHOLE) if arm in WHOLE else tokens
                        row = time_arm(runner, cache, arm, batch, context, counted, generator)
                        middle = row["ms"]["p50"]
                        near = middle if arm == "quest" else near
                        row["ratio_to_quest"] = None if near is None else middle / near
                        shape = {"model": model, "batch": batch, "context": context, "stored": kv_cache_dtype}
                        shape |= {"reads": reads_what, "arm": arm}
                        if arm == "offload":
                            shape |= {"own": share, "hot_tokens": hot}
                        rows.append(shape | row)
                        ratio = f"{middle / near:.2f}x" if near else ""
                        moved = f"{row['mib_a_token']:.1f}" if "mib_a_token" in row else ""
                        hits = f"{row['fetches']['hit_rate']:.1%}" if "fetches" in row else ""
                        table.add_row(str(context), reads_what, arm, f"{middle:.2f}", ratio, moved, hits)
                        print(f"  {arm}: {middle:.2f} ms {ratio} {hits}", flush=True)
                        if output is not None:
                            write_record(output, settings, rows)
                    del cache  # before the next one needs the room
                    gc.collect()
                    if where.type == "cuda":
                        torch.cuda.empty_cache()
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)

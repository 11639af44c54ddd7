"""Time to the first token of a prompt in chunks, and the memory that it takes at its peak, on an NVIDIA GPU.

    python benchmarks/prompt_gpu.py --contexts 131072 --output benchmarks/results/prompt_gpu.json

Arms, each `generate()` of one token after the same random prompt, over a model of random weights:

    stock           transformers without us, a DynamicCache
    quest           Quest enabled, the cache on the card
    offload         the same with keys and values in host memory

The time is that of the whole call: host memory is locked in it. The peak is what PyTorch's allocator gave out above the
weights: the cache on the card, and what a chunk needs beside it. Prompts hold no token that means padding, or chunks
would have masks.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from acceptance import config_of
from decode_gpu import make_model
from rich.console import Console
from rich.table import Table
from transformers.cache_utils import DynamicCache

from quest_attention import QuestConfig, enable_quest
from quest_attention.bench.gpu import check_gpu
from quest_attention.bench.record import write_record
from quest_attention.bench.shapes import check_shape
from quest_attention.bench.timing import percentiles
from quest_attention.cli.app import integers, split_list
from quest_attention.errors import QuestValueError
from quest_attention.hf import cache_argument

ARMS = ("stock", "quest", "offload")
PADDING = 0


def check_arms(names: list[str]) -> None:
    """Refuse what is no arm.

    Raises:
        QuestValueError: As said.
    """
    for name in names:
        if name not in ARMS:
            raise QuestValueError("arms", name, f"some of {', '.join(ARMS)}")


def read_prompt(model: Any, arm: str, config: QuestConfig, hot: int, ids: torch.Tensor, chunk: int) -> None:
    """One token after a prompt, as an arm writes it; the cache is gone afterwards.

    Raises:
        RuntimeError: The cache is not where the arm has it.
    """
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": PADDING, "prefill_chunk_size": chunk}
    if arm == "stock":
        model.generate(ids, **cache_argument(DynamicCache(config=model.config)), **options)
        return
    where: dict[str, Any] = {"offload": "host", "hot_tokens": hot} if arm == "offload" else {}
    with enable_quest(model, config, **where) as quest:
        cache = quest.make_cache(ids.shape[1] + 2)
        model.generate(ids, **cache_argument(cache), **options)
        if (cache.memory.host > 0) != (arm == "offload"):
            raise RuntimeError(f"{arm}: {cache.memory.host} bytes of the cache are on the host")


def time_arm(
    model: Any, arm: str, config: QuestConfig, hot: int, ids: torch.Tensor, chunk: int, repeats: int
) -> dict[str, Any]:
    """Seconds to the first token, and bytes at the peak above what was held before."""
    on_gpu = model.device.type == "cuda"
    seconds, peaks = [], []
    for _ in range(repeats):
        gc.collect()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        began = time.perf_counter()
        read_prompt(model, arm, config, hot, ids, chunk)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        peaks.append(torch.cuda.max_memory_allocated() - before if on_gpu else 0)
    return {"seconds": percentiles(seconds), "peak_bytes": max(peaks)}


def main(
    model: Annotated[str, typer.Option(help="A shape.")] = "llama-3.1-8b",
    contexts: Annotated[str, typer.Option(help="Tokens of the prompt, comma-separated.")] = "32768,131072",
    chunks: Annotated[str, typer.Option(help="Tokens of a chunk, comma-separated.")] = "2048,8192",
    arms: Annotated[str, typer.Option(help="What is timed, comma-separated.")] = ",".join(ARMS),
    reads: Annotated[str, typer.Option(help="Metadata and budget, as acceptance.py has them.")] = "bounds@2048",
    hot_tokens: Annotated[int, typer.Option(help="Of the pool in host memory's arm.", min=1)] = 16384,
    repeats: Annotated[int, typer.Option(help="Prompts of each arm.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="Where to run; cpu tries the script out.")] = "cuda",
    seed: Annotated[int, typer.Option(help="Of weights and prompts.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time prompts."""
    check_shape(model)
    names, lengths, sizes = split_list(arms), integers("contexts", contexts), integers("chunks", chunks)
    check_arms(names)
    config, where = config_of(reads, 2), torch.device(device)
    if where.type == "cuda":
        check_gpu()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    settings = {"reads": reads, "hot_tokens": hot_tokens, "repeats": repeats, "dtype": str(dtype), "seed": seed}
    table = Table("context", "chunk", "arm", "seconds (p50)", "GiB at the peak")
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        runner = make_model(model, where, dtype, seed)
        for context in lengths:
            generator = torch.Generator(where).manual_seed(seed)
            ids = torch.randint(PADDING + 1, runner.config.vocab_size, (1, context), generator=generator, device=where)
            for chunk in sizes:
                for arm in names:
                    read_prompt(runner, arm, config, hot_tokens, ids[:, : min(context, 2 * chunk)], chunk)  # compiles
                    row = time_arm(runner, arm, config, hot_tokens, ids, chunk, repeats)
                    rows.append({"model": model, "context": context, "chunk": chunk, "arm": arm} | row)
                    peak = f"{row['peak_bytes'] / 2**30:.1f}"
                    table.add_row(str(context), str(chunk), arm, f"{row['seconds']['p50']:.2f}", peak)
                    print(f"{context} by {chunk}, {arm}: {row['seconds']['p50']:.2f} s, {peak} GiB", flush=True)
                    if output is not None:
                        write_record(output, settings, rows)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)

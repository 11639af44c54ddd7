"""Time a decode step on one CPU thread: what users have today, our storage read whole, and Quest.

    taskset -c 0 python benchmarks/decode_cpu.py --repeats 31 --output benchmarks/results/decode_cpu.json

Four arms in one run over the same keys and values, each a forward pass of one token through the same random model:

    dynamic   DynamicCache and sdpa, as transformers decodes without us
    dense     our storage, every layer reading everything
    quest-2   Quest, the first two layers dense, as in the paper
    quest-0   Quest in every layer

With `--acceptance`, a result of `acceptance.py`, two more, and with another `--acceptance` another:

    written                  `generate()` with our storage, every layer reading everything
    lossless-2, lossless-0   `generate()` whose tokens these draft and the model checks, by the dense layers measured

These take turns, as what a machine's neighbours do changes its pace; the time of each is the median of its turns.

Random weights seldom agree with themselves, so as many drafts are accepted as that measurement has; all else runs as it
does with any model. The time of a token is that of drafts, check and all that `generate()` does. Drafts are chosen by
moments, as auto does on a CPU; the others keep to the paper's bounds.

Run it on a machine that does nothing else. The run fails if an arm did not take the path it is named for.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache

from quest_attention import QuestConfig, QuestWarning, enable_quest
from quest_attention.bench.drafts import Acceptance, imposed_acceptance, measured_acceptance, time_rounds
from quest_attention.bench.record import write_record
from quest_attention.bench.shapes import SHAPES
from quest_attention.bench.timing import percentiles, time_calls
from quest_attention.bench.written import time_written
from quest_attention.hf import QuestLayer, cache_argument

SHAPE = SHAPES["small"]
LAYERS, KV_HEADS = SHAPE["num_hidden_layers"], SHAPE["num_key_value_heads"]
HEAD_DIM = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
PAGE_SIZE, TOKEN_BUDGET = 16, 1024
WARMUP = 3
TURNS = 3
"""Tokens of a turn without drafts [tokens]."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ARMS = {"dynamic": None, "dense": LAYERS, "quest-2": 2, "quest-0": 0}  # number of dense layers


def make_model(dtype: torch.dtype, seed: int) -> LlamaForCausalLM:
    """A random Llama of 8 layers."""
    torch.manual_seed(seed)
    no_ends = {"bos_token_id": None, "eos_token_id": None}
    config = LlamaConfig(**SHAPE, head_dim=HEAD_DIM, max_position_embeddings=1 << 20, **no_ends)
    return LlamaForCausalLM(config).to(dtype).eval()


def fill(cache: Cache, length: int, dtype: torch.dtype, seed: int) -> None:
    """Write the same random tokens to every layer of a cache, as a prefill would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        keys, values = torch.randn(2, 1, KV_HEADS, length, HEAD_DIM, generator=generator).to(dtype)
        cache.update(keys, values, layer)


def time_arm(
    model: LlamaForCausalLM, arm: str, length: int, repeats: int, seed: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Milliseconds per token of one arm, and what it read."""
    token = torch.zeros(1, 1, dtype=torch.long)

    def step(cache: Cache) -> None:
        model(input_ids=token, **cache_argument(cache), use_cache=True)

    num_dense_layers = ARMS[arm]
    with torch.inference_mode():
        if num_dense_layers is None:
            cache: Cache = DynamicCache(config=model.config)
            fill(cache, length, model.dtype, seed)
            return {"ms": percentiles(time_calls(lambda: step(cache), repeats, WARMUP, clock)), "share_read": 1.0}
        config = QuestConfig.paper(TOKEN_BUDGET, page_size=PAGE_SIZE, num_dense_layers=num_dense_layers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QuestWarning)  # every layer dense is what one arm is for
            handle = enable_quest(model, config)
        with handle:
            quest_cache = handle.make_cache(length + repeats + WARMUP)
            fill(quest_cache, length, model.dtype, seed)
            times = time_calls(lambda: step(quest_cache), repeats, WARMUP, clock)
            steps = repeats + WARMUP
            taken = (handle.counters.sparse_steps, handle.counters.dense_steps)
            expected = ((LAYERS - num_dense_layers) * steps, num_dense_layers * steps)
            if taken != expected:
                raise RuntimeError(f"{arm}: took {taken} sparse and dense steps, expected {expected}")
            row = {"ms": percentiles(times), "share_read": handle.counters.share_read}
            sparse = [layer for layer in quest_cache.layers if isinstance(layer, QuestLayer) and not layer.is_dense]
            if sparse:
                paged = sparse[0].paged
                stored = paged.contiguous
                assert stored is not None
                row["metadata_to_kv_bytes"] = stored.metadata.nbytes / (stored.keys.nbytes + stored.values.nbytes)
            return row


def time_lossless(
    model: LlamaForCausalLM, length: int, tokens: int, drafts: int, measured: Acceptance, seed: int,
    clock: Callable[[], float],
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds per token of a lossless arm, and what became of its drafts."""
    config = QuestConfig(TOKEN_BUDGET, PAGE_SIZE, num_dense_layers=measured.dense_layers, metadata="moments")
    with (
        torch.inference_mode(),
        imposed_acceptance(measured.at_least, seed),
        enable_quest(model, config, lossless=True, draft_tokens=drafts) as handle,
    ):
        cache = handle.make_cache(length + tokens + 32)
        fill(cache, length, model.dtype, seed)
        row = time_rounds(model, cache, 1, length, tokens, clock)
        return {"ms": {"p50": row.pop("ms_per_token")}, **row, "drafts": handle.counters.to_dict()["drafts"]}


def time_plain(
    model: LlamaForCausalLM, length: int, tokens: int, seed: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Milliseconds per token of `generate()` in which every layer reads everything: as many as a lossless arm writes.

    Time over tokens is that of all of them together, as there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuestWarning)
        handle = enable_quest(model, QuestConfig.paper(TOKEN_BUDGET, page_size=PAGE_SIZE, num_dense_layers=LAYERS))
    with torch.inference_mode(), handle:
        cache = handle.make_cache(length + tokens + 2)
        fill(cache, length, model.dtype, seed)
        times = time_written(model, cache, 1, length, tokens - WARMUP, WARMUP, clock)
        return {"ms": {"p50": sum(times) / len(times)}, "token_ms": percentiles(times)}


def time_in_turn(arms: dict[str, Callable[[int], dict[str, Any]]], seed: int) -> dict[str, dict[str, Any]]:
    """The turn of each arm that took the median time, and the times of all of its turns.

    Args:
        arms: Each by its name; what a turn draws is of a seed of its own.
        seed: Of the first turn.
    """
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for turn in range(TURNS):
        for arm, run in arms.items():
            found[arm].append(run(seed + turn))
    rows = {}
    for arm, turns in found.items():
        turns.sort(key=lambda row: float(row["ms"]["p50"]))
        rows[arm] = {**turns[TURNS // 2], "turns_ms": [row["ms"]["p50"] for row in turns]}
    return rows


def main(
    lengths: Annotated[str, typer.Option(help="Contexts, comma-separated [tokens].")] = "4096,8192,32768,65536",
    dtypes: Annotated[str, typer.Option(help="bf16, fp32 or both, comma-separated.")] = "bf16,fp32",
    repeats: Annotated[int, typer.Option(help="Counted steps per arm.")] = 15,
    seed: Annotated[int, typer.Option(help="Seed of the model and the cache.")] = 0,
    acceptance: Annotated[
        list[Path] | None, typer.Option(help="JSON of acceptance.py: a lossless arm too; for more, once more.")
    ] = None,
    accepted_as: Annotated[str, typer.Option(help="Its text and arm.")] = "book moments@1024",
    drafts: Annotated[int, typer.Option(help="Before a check [tokens].")] = 4,
    tokens: Annotated[int, typer.Option(help="That a lossless arm writes [tokens].")] = 160,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="Of the process, where others use the machine.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time a decode step on one CPU thread."""
    clock = time.process_time if cpu_time else time.perf_counter
    torch.set_num_threads(1)
    text, _, chosen_by = accepted_as.partition(" ")
    measured = [measured_acceptance(file, text=text, arm=chosen_by) for file in acceptance or ()]
    lossless = {f"lossless-{one.dense_layers}": one for one in measured}
    arms = [*ARMS, *(("written", *lossless) if lossless else ())]
    table = Table("dtype", "context", *arms, "quest-2 to dynamic", "quest-2 to dense", title="ms per token (p50)")
    rows = []
    for dtype in dtypes.split(","):
        model = make_model(DTYPES[dtype], seed)
        for length in map(int, lengths.split(",")):
            ms = {}
            found = {arm: time_arm(model, arm, length, repeats, seed, clock) for arm in ARMS}
            if lossless:
                turns = {
                    arm: partial(time_lossless, model, length, tokens, drafts, one, clock=clock)
                    for arm, one in lossless.items()
                }
                found |= time_in_turn(
                    {"written": partial(time_plain, model, length, tokens, clock=clock), **turns}, seed
                )
            for arm, row in found.items():
                rows.append({"dtype": dtype, "context": length, "arm": arm, **row})
                ms[arm] = row["ms"]["p50"]
            ratios = [f"{ms[arm] / ms['quest-2']:.2f}x" for arm in ("dynamic", "dense")]
            table.add_row(dtype, str(length), *(f"{ms[arm]:.1f}" for arm in arms), *ratios)
    Console(width=140).print(table)
    if output is not None:
        settings = {
            "layers": LAYERS,
            "hidden": SHAPE["hidden_size"],
            "query_heads": SHAPE["num_attention_heads"],
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "page_size": PAGE_SIZE,
            "token_budget": TOKEN_BUDGET,
            "repeats": repeats,
            "warmup": WARMUP,
            "turns": TURNS,
            "seed": seed,
            "clock": clock.__name__,
            "load_average": os.getloadavg()[0],
        }
        if lossless:
            settings |= {
                "accepted_at_least": {
                    arm: one.at_least for arm, one in lossless.items()
                },  # imposed: random weights seldom agree
                "accepted_as": accepted_as,
                "draft_tokens": drafts,
                "lossless_tokens": tokens,
            }
        write_record(output, settings, rows)


if __name__ == "__main__":
    typer.run(main)

"""Weigh what a choice loses against what it costs, on a CPU: perplexity and milliseconds a token of each.

    python benchmarks/choice_cpu.py --model smollm2.gguf --books books --output benchmarks/results/choice_cpu.json

Loss: the last tokens of stretches of books, each predicted by a decode step, against full attention over the same text.
Time: a step of the same model over a cache of that length, all choices in turn, so that they meet the same moments of
the machine; the time is that of the process on the CPU, which others on the machine disturb less than a clock's. The
arm "nothing" attends to one page in every layer: what a step takes whatever is chosen.
The record says how busy the machine was.
"""

from __future__ import annotations

import math
import os
import random
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from quest_attention import QuestCache, QuestConfig, QuestWarning, enable_quest
from quest_attention.bench.record import write_record
from quest_attention.bench.timing import percentiles
from quest_attention.cli.loading import load_model
from quest_attention.eval.context import Context, copy_cache, read_context
from quest_attention.eval.continuation import follow_text
from quest_attention.eval.methods import make_method
from quest_attention.eval.texts import load_texts
from quest_attention.hf import cache_argument

DENSE_LAYERS = 2
WARMUP = 2
ARMS = (
    "bounds@256", "bounds@512", "bounds@1024", "bounds@2048",
    "moments@512", "moments@1024",
    "moments,selection_unit=token@128", "moments,selection_unit=token@256", "moments,selection_unit=token@512",
    "moments,selection_unit=token,candidate_factor=2@256", "bounds,selection_unit=token@256",
)  # fmt: skip


def config_of(arm: str) -> QuestConfig:
    """What an arm reads: metadata and options as `quest eval` takes them, and the budget behind an @."""
    options, _, budget = arm.partition("@")
    method = make_method(f"quest:metadata={options}", token_budget=int(budget), num_dense_layers=DENSE_LAYERS)
    config: QuestConfig = getattr(method, "config")  # noqa: B009 - of the methods that take pages
    return config


def dense_loss(model: PreTrainedModel, context: Context, following: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each text's last tokens with full attention, `[B]` [nats]."""
    cache = DynamicCache(config=model.config)
    copy_cache(context.cache, cache)
    with torch.inference_mode():
        logits = model(following[:, :-1], **cache_argument(cache), use_cache=True).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), following[:, 1:], reduction="none").double().mean(1)


def losses(
    model: PreTrainedModel, tokens: torch.Tensor, predicted: int, arms: list[str], say: Console
) -> dict[str, dict[str, Any]]:
    """How much likelier full attention finds the texts than each arm does: perplexity above it [%]."""
    context = read_context(model, tokens[:, : -predicted - 1])
    following = tokens[:, -predicted - 1 :]
    full = dense_loss(model, context, following)
    rows: dict[str, dict[str, Any]] = {"full": {"perplexity": math.exp(float(full.mean()))}}
    unknown = torch.zeros_like(following[:, 1:])
    for arm in arms:
        options, _, budget = arm.partition("@")
        method = make_method(f"quest:metadata={options}", token_budget=int(budget), num_dense_layers=DENSE_LAYERS)
        done = follow_text(model, method, context, following, unknown)
        above = torch.tensor(done.nll, dtype=torch.float64) / done.count - full
        rows[arm] = {"loss_percent": 100 * math.expm1(float(above.mean())), "loss_of_each_nats": above.tolist()}
        say.print(f"{arm}: +{rows[arm]['loss_percent']:.2f} %")
    return rows


def fill(cache: Cache, model: PreTrainedModel, batch: int, length: int, seed: int) -> None:
    """Write the same random tokens to every layer of a cache, as a prefill would."""
    generator = torch.Generator().manual_seed(seed)
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    for layer in range(model.config.num_hidden_layers):
        keys, values = torch.randn(2, batch, heads, length, dim, generator=generator).to(model.dtype)
        cache.update(keys, values, layer)


def share(cache: QuestCache, other: QuestCache) -> None:
    """Have a cache read and write the keys and values of another, which are the same: so that many fit the memory."""
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        ours.storage.keys, ours.storage.values = theirs.storage.keys, theirs.storage.values
        ours.storage._paged = None  # noqa: SLF001 - made anew of them, with the metadata that this one has


def times(
    model: PreTrainedModel, batch: int, length: int, arms: list[str], repeats: int, seed: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of a decode step of each arm, of "dense", our storage read whole, and of "nothing"."""
    layers = model.config.num_hidden_layers
    configs = {
        arm: QuestConfig.paper(16, num_dense_layers=dense) for arm, dense in {"nothing": 0, "dense": layers}.items()
    }
    configs |= {arm: config_of(arm) for arm in arms}
    token = torch.zeros(batch, 1, dtype=torch.long)
    taken: dict[str, list[float]] = {arm: [] for arm in configs}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", QuestWarning)  # every layer dense is what one arm is for
        with enable_quest(model, configs["nothing"]):  # its attention asks each cache what to read
            caches = {}
            for arm, config in configs.items():
                caches[arm] = QuestCache(model.config, config, max_length=length + repeats + WARMUP)
                fill(caches[arm], model, batch, length, seed)
                share(caches[arm], next(iter(caches.values())))
            for turn in range(repeats + WARMUP):
                order = list(configs) if turn % 2 else list(configs)[::-1]
                for arm in order:
                    start = time.process_time()
                    model(input_ids=token, **cache_argument(caches[arm]), use_cache=True)
                    if turn >= WARMUP:
                        taken[arm].append((time.process_time() - start) * 1e3)
            for arm, cache in caches.items():
                counted, steps = cache.counters, repeats + WARMUP
                dense = configs[arm].num_dense_layers
                if (counted.sparse_steps, counted.dense_steps) != ((layers - dense) * steps, dense * steps):
                    raise RuntimeError(f"{arm}: took {counted.sparse_steps} sparse, {counted.dense_steps} dense steps")
    return {arm: percentiles(each) for arm, each in taken.items()}


def main(
    model: Annotated[
        str | None, typer.Option(help="A folder, a GGUF file or an id; the bundled one by default.")
    ] = None,
    books: Annotated[Path | None, typer.Option(help="Folder of long *.txt files; an excerpt by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    lengths: Annotated[str, typer.Option(help="Contexts, comma-separated [tokens].")] = "4096,8192",
    batches: Annotated[str, typer.Option(help="Sequences of a step, comma-separated.")] = "1",
    dtypes: Annotated[str, typer.Option(help="Of the times: float32, bfloat16 or both.")] = "float32",
    stretches: Annotated[int, typer.Option(help="Texts; 0 measures times alone.")] = 8,
    predicted: Annotated[int, typer.Option(help="Last tokens of each that are predicted [tokens].")] = 128,
    repeats: Annotated[int, typer.Option(help="Counted steps per arm; 0 measures losses alone.")] = 15,
    arms: Annotated[str, typer.Option(help="Choices, parted by spaces.")] = " ".join(ARMS),
    seed: Annotated[int, typer.Option(help="Of the texts and the cache.")] = 0,
) -> None:
    """Measure loss and time of every choice."""
    console, named, rows, load = Console(), arms.split(), [], os.getloadavg()
    if stretches:
        loaded = load_model(model, device="cpu", dtype="float32")
        texts = load_texts(books, lambda text: loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
        for length in map(int, lengths.split(",")):
            enough = texts.at_least(length)
            drawn = [enough.stretch(index, length, random.Random(seed + index)) for index in range(stretches)]
            found = losses(loaded.model, torch.tensor(drawn), predicted, named, console)
            rows += [{"context": length, "arm": arm, **row} for arm, row in found.items()]
    if repeats:
        for dtype in dtypes.split(","):
            loaded = load_model(model, device="cpu", dtype=dtype)
            for length in map(int, lengths.split(",")):
                for batch in map(int, batches.split(",")):
                    taken = times(loaded.model, batch, length, named, repeats, seed)
                    table = Table("arm", "ms", title=f"{dtype}, {batch} x {length} tokens")
                    for arm, ms in taken.items():
                        table.add_row(arm, f"{ms['p50']:.1f}")
                        rows.append({"context": length, "dtype": dtype, "batch": batch, "arm": arm, "ms": ms})
                    console.print(table)
    if output is not None:
        settings = {
            "model": model and Path(model).name, "dense_layers": DENSE_LAYERS,
            "stretches": stretches, "predicted": predicted,
            "repeats": repeats, "warmup": WARMUP, "seed": seed, "threads": torch.get_num_threads(),
            "load_average": [load, os.getloadavg()],
        }  # fmt: skip
        write_record(output, settings, rows)


if __name__ == "__main__":
    typer.run(main)

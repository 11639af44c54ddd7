"""Record what a public model's decode steps read, step by step, and how much of it a pool of hot tokens would hold.

    python benchmarks/hit_rates.py --model qwen.gguf --books books --context 30000 --output hit_rates.json

A text is read by dense attention up to a place, then goes on by its own tokens, one decode step with Quest each: texts
that people wrote, or the model's own answer (`texts.py`). What each step of a layer reads is fetched into pools of
several sizes, by the verb that serves (`ops.fetch_units`), over a cache of one channel: what is there and what makes
room for it does not depend on what the keys are. A hit is a unit that was there before the step wanted it. What is
looked up are the units that are read; candidates that are not chosen are none of them.

With `--served` the same steps also run over a cache with `offload="host"` for each size, which looks up, and makes room
for, the candidates too, as a step on a GPU does. Such rows have `"counted": "candidates"`. On a CPU the pool is memory
like any other: what is hot is the same.

With `--traces` the units themselves are kept too, as tensors `[steps, HKV, K]` by text, arm and layer.
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

from quest_attention import QuestConfig, Selection, enable_quest
from quest_attention.bench.record import write_record
from quest_attention.cli.app import integers, split_list
from quest_attention.cli.loading import load_model
from quest_attention.errors import QuestValueError
from quest_attention.eval.context import copy_cache
from quest_attention.hf import QuestCache
from quest_attention.hf.offload import Offload
from quest_attention.ops import HotUnits, fetch_units
from quest_attention.pages import PagedKV, num_pages


class Pools:
    """Pools of several sizes for each layer, to which what a step reads is fetched; called after each step of a layer.

    Args:
        sizes: Hot tokens of each KV head [tokens].
        config: What steps read.
        heads: KV heads of a layer.
        length: Tokens there is room for [tokens].
        device: Where steps run.

    Attributes:
        units: What the steps of each layer read, `[HKV, K]` int32 each, if asked for.
    """

    def __init__(
        self, sizes: list[int], config: QuestConfig, heads: int, length: int, device: torch.device, *, keeps: bool
    ) -> None:
        pages = num_pages(length, config.page_size)
        tokens = torch.zeros(1, heads, pages * config.page_size, 1, device=device)
        self._kv = PagedKV.from_contiguous(tokens, tokens, torch.zeros(1, heads, pages, 2, 1, device=device))
        self._config, self._sizes, self._keeps = config, sizes, keeps
        self._pools: dict[int, list[HotUnits]] = {}
        self._before: dict[int, list[list[int]]] = {}
        self.units: dict[int, list[Tensor]] = {}

    def __call__(self, layer: int, selection: Selection, pages: int) -> None:
        """Fetch what a step read."""
        size = selection.unit_size
        if layer not in self._pools:
            self._pools[layer] = [HotUnits.allocate(self._kv, size, tokens // size) for tokens in self._sizes]
        for pool in self._pools[layer]:
            fetch_units(self._kv, pool, selection, pages * self._config.page_size)
        if self._keeps:
            self.units.setdefault(layer, []).append(selection.units[0].cpu())

    def start_counting(self) -> None:
        """What came so far filled the pools, and counts for nothing."""
        self._before = {layer: [pool.counts.tolist() for pool in pools] for layer, pools in self._pools.items()}

    def found(self, place: int) -> dict[int, tuple[int, int]]:
        """Of the pools of one size: units looked up and units fetched since, by layer."""
        counted = {}
        for layer, pools in self._pools.items():
            now, then = pools[place].counts.tolist(), self._before[layer][place]
            counted[layer] = (now[0] - then[0], now[1] - then[1])
        return counted


def trace(
    model: Any, source: Any, text: list[int], config: QuestConfig, sizes: list[int], *, warmup: int, keeps: bool
) -> Pools:
    """The pools after the steps of a text that goes on after what `source` holds."""
    length = source.get_seq_length() + len(text) + 1
    heads = model.config.get_text_config(decoder=True).num_key_value_heads
    pools = Pools(sizes, config, heads, length, model.device, keeps=keeps)
    with going_on(model, source, len(text), config, pools) as cache:
        for step, token in enumerate(text):
            if step == warmup:
                pools.start_counting()
            step_on(model, cache, token)
    return pools


def serve(
    model: Any, source: Any, text: list[int], config: QuestConfig, hot_tokens: int, *, warmup: int
) -> tuple[int, int]:
    """Decode a text over host memory: units looked up in the pool, candidates included, and those that were fetched.

    Args:
        model: A public one.
        source: What it has read.
        text: What comes then.
        config: What steps read.
        hot_tokens: Of each KV head [tokens].
        warmup: Steps that fill the pool and are not counted.
    """
    length = source.get_seq_length() + len(text) + 1
    with enable_quest(model, config):
        cache = QuestCache(model.config, config, max_length=length, offload=Offload(hot_tokens))
        copy_cache(source, cache)
        for step, token in enumerate(text):
            if step == warmup:
                cache.counters.reset()
            step_on(model, cache, token)
    fetches = cache.counters.fetches
    assert fetches is not None and fetches.units_looked_up, "every step is sparse"
    return fetches.units_looked_up, fetches.units_fetched


def rows_of(found: list[dict[int, tuple[int, int]]], tokens: int) -> dict[str, Any]:
    """Hit rates of some texts' pools of one size, together and by layer."""
    by_layer = {}
    for layer in found[0]:
        looked_up, fetched = (sum(one[layer][nth] for one in found) for nth in range(2))
        by_layer[layer] = 1 - fetched / looked_up
    looked_up, fetched = (sum(counts[nth] for one in found for counts in one.values()) for nth in range(2))
    return hits_of(looked_up, fetched, tokens) | {"hit_rate_by_layer": by_layer}


def hits_of(looked_up: int, fetched: int, tokens: int) -> dict[str, Any]:
    """What a row says of the units that steps looked up in pools of a size [tokens], and of those that were fetched."""
    return {
        "hot_tokens": tokens,
        "units_looked_up": looked_up,
        "units_fetched": fetched,
        "hit_rate": 1 - fetched / looked_up,
    }


def candidates_row(counted: list[tuple[int, int]], tokens: int) -> dict[str, Any]:
    """The hit rate of some texts' steps in pools of one size, candidates included."""
    looked_up, fetched = (sum(one[nth] for one in counted) for nth in range(2))
    return hits_of(looked_up, fetched, tokens) | {"counted": "candidates"}


def check_sizes(sizes: list[int], configs: list[QuestConfig]) -> None:
    """Refuse pools that hold less than a step reads.

    Raises:
        QuestValueError: As said.
    """
    least = max(config.token_budget + config.unit_size for config in configs)
    if min(sizes) < least:
        raise QuestValueError("sizes", min(sizes), f"at least {least}: what a step reads")


def main(
    model: ModelOption = "",
    name: NameOption = "",
    books: BooksOption = None,
    context: Annotated[int, typer.Option(help="Tokens read before the first step.", min=64)] = 7680,
    arms: Annotated[str, typer.Option(help="Metadata and budget, comma-separated.")] = (
        "bounds@2048,sketch,selection_unit=token@512"
    ),
    sizes: Annotated[str, typer.Option(help="Hot tokens of a KV head, comma-separated.")] = "2304,4096,8192,16384",
    kinds: KindsOption = ALL_KINDS,
    texts: Annotated[int, typer.Option(help="Texts of each kind.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Decode steps of each text.", min=2)] = 256,
    warmup: Annotated[int, typer.Option(help="Steps that fill the pools and are not counted.", min=1)] = 32,
    dense_layers: Annotated[int, typer.Option(help="Leading layers that are read whole.", min=0)] = 2,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Of the texts.")] = 0,
    served: Annotated[bool, typer.Option("--served", help="Count candidates too, as serving does.")] = False,
    traces: Annotated[Path | None, typer.Option(help="File of tensors to write: the units themselves.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure how much of what steps read is hot, by the size of the pool."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    names, hot = split_list(arms), integers("sizes", sizes)
    if warmup >= steps:
        raise QuestValueError("warmup", warmup, f"less than {steps} steps")
    configs = {arm: config_of(arm, dense_layers) for arm in names}
    check_sizes(hot, list(configs.values()))
    loaded = load_model(model or None, device=device, dtype=dtype)
    runner: Any = loaded.model
    table = Table("text", "arm", *map(str, hot), title="hit rate, by hot tokens of a KV head")
    rows: list[dict[str, Any]] = []
    kept: dict[str, Tensor] = {}
    with torch.inference_mode():
        for kind in kinds_of(kinds, loaded.tokenizer):
            found: dict[str, list[Pools]] = {}
            looked_up: dict[tuple[str, int], list[tuple[int, int]]] = {}
            for number in range(texts):
                source, text = read_text(loaded, kind, books, context, steps, seed + number)
                for arm, config in configs.items():
                    pools = trace(runner, source, text, config, hot, warmup=warmup, keeps=traces is not None)
                    found.setdefault(arm, []).append(pools)
                    for size in hot if served and config.candidate_budget else ():
                        counted = serve(runner, source, text, config, size, warmup=warmup)
                        looked_up.setdefault((arm, size), []).append(counted)
                    for layer, units in pools.units.items():
                        kept[f"{kind} {number} {arm} layer {layer}"] = torch.stack(units)
                del source
            for arm, pools_of_texts in found.items():
                shared = {"model": name or loaded.name, "context": context, "text": kind, "arm": arm}
                of_arm = [
                    rows_of([pools.found(place) for pools in pools_of_texts], size) for place, size in enumerate(hot)
                ]
                rows.extend(shared | row for row in of_arm)
                table.add_row(kind, arm, *(f"{row['hit_rate']:.1%}" for row in of_arm))
                of_arm = [candidates_row(looked_up[arm, size], size) for size in hot if (arm, size) in looked_up]
                if of_arm:
                    rows.extend(shared | row for row in of_arm)
                    table.add_row(kind, f"{arm}, candidates", *(f"{row['hit_rate']:.1%}" for row in of_arm))
            if output is not None:
                settings = {
                    "texts": texts,
                    "steps": steps,
                    "warmup": warmup,
                    "num_dense_layers": dense_layers,
                    "dtype": str(runner.dtype),
                    "seed": seed,
                }
                write_record(output, settings, rows)
    if traces is not None:
        torch.save(kept, traces)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)

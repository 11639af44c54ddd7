"""Measure how many of the tokens that Quest drafts the whole model accepts, by how many are drafted.

    python benchmarks/acceptance.py --model smollm2.gguf --books books --context 7680 --output acceptance.json

A text is read by dense attention up to a place. From there Quest drafts eight tokens by sparse steps, and the model
checks them in one dense pass, as lossless decoding does; how many it accepts is noted. Then drafts and check are taken
back, the text goes on by some of its own tokens, and the next eight are drafted. So the text before a draft is always
one that people, or the model itself, wrote (`texts.py`), and not what a small model repeats when it is left alone. All
drafts of a place read what the first of them chose, as in `generate()`; with `--choosing draft` each chooses, as in
vLLM.

Drafts are taken twice from each place: the likeliest tokens, and tokens drawn at temperature 1, which are accepted by
speculative sampling. Drafted lengths from 1 to 8 come from the same eight drafts: the first k of them are what would
have been drafted.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch
import typer
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
    kinds_of,
    read_text,
)
from torch import Tensor

from quest_attention import QuestCache, QuestConfig, enable_quest
from quest_attention.bench.record import write_record
from quest_attention.cli.app import split_list
from quest_attention.cli.loading import load_model
from quest_attention.errors import QuestValueError
from quest_attention.eval.context import copy_cache
from quest_attention.eval.methods import make_method
from quest_attention.hf import cache_argument
from quest_attention.hf.rejection import accept_likeliest, accept_sampled, draw

DRAFTS = 8
STRIDE = 6
"""Tokens of the text from one place to the next, at least two: a single one would be a sparse step [tokens]."""
CHOOSING = ("round", "draft")


def config_of(arm: str, dense_layers: int) -> QuestConfig:
    """What an arm reads: metadata as `quest eval` takes it, and the budget behind an @."""
    options, _, budget = arm.partition("@")
    method = make_method(f"quest:metadata={options}", token_budget=int(budget), num_dense_layers=dense_layers)
    config: QuestConfig = getattr(method, "config")  # noqa: B009 - of the methods that take pages
    return config


def accepted_from(model: Any, cache: QuestCache, token: int, *, does_sample: bool, chooses_once: bool) -> int:
    """Draft from the newest token, which the cache does not hold, check, and take both back [tokens]."""
    length, rows = cache.get_seq_length(), cache.rows
    assert rows is not None, "a lossless cache"
    fed, drafts, drafted_by = torch.tensor([[token]], device=model.device), [], []
    for nth in range(DRAFTS):
        start = length + nth
        end = torch.tensor([start + 1], device=model.device)
        rows.begin([start], end, is_drafting=True, nth=nth if chooses_once else 0)
        scores = model(fed, **cache_argument(cache), use_cache=True).logits[:, -1].float()
        if does_sample:
            drafted_by.append(scores.softmax(-1))
            fed = draw(drafted_by[-1])[:, None]
        else:
            fed = scores.argmax(-1, keepdim=True)
        drafts.append(fed)
    rows.end()
    cache.crop(length - cache.get_seq_length())
    found = torch.cat(drafts, dim=1)  # [1, DRAFTS]
    first = torch.tensor([[token]], device=model.device)
    checked: Tensor = model(torch.cat([first, found], dim=1), **cache_argument(cache), use_cache=True).logits.float()
    cache.crop(length - cache.get_seq_length())
    if does_sample:
        return int(accept_sampled(found, torch.stack(drafted_by, dim=1), checked)[0])
    return int(accept_likeliest(found, checked)[0])


def measure(
    model: Any, source: Any, text: list[int], config: QuestConfig, starts: int, *, chooses_once: bool
) -> dict[str, list[int]]:
    """Drafts accepted from each place of a text that goes on after what `source` holds, greedy and sampled."""
    found: dict[str, list[int]] = {"greedy": [], "sampled": []}
    with enable_quest(model, config, lossless=True) as quest:
        cache = quest.make_cache(source.get_seq_length() + len(text) + DRAFTS + 1)
        copy_cache(source, cache)
        for place in range(0, starts * STRIDE, STRIDE):
            for mode, accepted in found.items():
                is_drawn = mode == "sampled"
                count = accepted_from(model, cache, text[place], does_sample=is_drawn, chooses_once=chooses_once)
                accepted.append(count)
            ahead = torch.tensor([text[place : place + STRIDE]], device=model.device)
            model(ahead, **cache_argument(cache), use_cache=True, logits_to_keep=1)
        assert quest.counters.sparse_steps > 0, "drafts are sparse steps"
    return found


def row_of(accepted: list[int]) -> dict[str, Any]:
    """Shares and tokens a check for each drafted length, of the drafts accepted from each place."""
    reached = [sum(count >= k for count in accepted) / len(accepted) for k in range(1, DRAFTS + 1)]
    return {
        "places": len(accepted),
        "accepted": accepted,
        "accepted_at_least": reached,
        "tokens_a_check": [1 + sum(reached[:k]) for k in range(1, DRAFTS + 1)],
    }


def main(
    model: ModelOption = "",
    name: NameOption = "",
    books: BooksOption = None,
    context: Annotated[int, typer.Option(help="Tokens read before the first draft.", min=64)] = 7680,
    arms: Annotated[
        str, typer.Option(help="Metadata and budget, comma-separated.")
    ] = "bounds@512,moments@512,sketch@512",
    kinds: KindsOption = ALL_KINDS,
    texts: Annotated[int, typer.Option(help="Texts of each kind.", min=1)] = 1,
    places: Annotated[int, typer.Option(help="Places of each text to draft from.", min=1)] = 32,
    dense_layers: Annotated[int, typer.Option(help="Leading layers that drafts read whole.", min=0)] = 2,
    choosing: Annotated[str, typer.Option(help="What chooses: each round once, or each draft.")] = CHOOSING[0],
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Of texts and draws.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure the acceptance of drafted tokens."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if choosing not in CHOOSING:
        raise QuestValueError("choosing", choosing, f"one of {', '.join(CHOOSING)}")
    loaded = load_model(model or None, device=device, dtype=dtype)
    runner: Any = loaded.model
    names = split_list(arms)
    table = Table("text", "arm", "drafts", *map(str, range(1, DRAFTS + 1)), title="tokens a check, by drafts")
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for kind in kinds_of(kinds, loaded.tokenizer):
            found: dict[tuple[str, str], list[int]] = {}
            for number in range(texts):
                torch.manual_seed(seed + number)
                source, text = read_text(loaded, kind, books, context, places * STRIDE, seed + number)
                for arm in names:
                    config = config_of(arm, dense_layers)
                    counts = measure(runner, source, text, config, places, chooses_once=choosing == "round")
                    for mode, accepted in counts.items():
                        found.setdefault((arm, mode), []).extend(accepted)
                del source
            for (arm, mode), accepted in found.items():
                row = {"model": name or loaded.name, "context": context, "text": kind, "arm": arm, "drafts": mode}
                rows.append(row | row_of(accepted))
                table.add_row(kind, arm, mode, *(f"{tokens:.2f}" for tokens in rows[-1]["tokens_a_check"]))
            if output is not None:
                settings = {
                    "drafts": DRAFTS,
                    "stride": STRIDE,
                    "texts": texts,
                    "places": places,
                    "num_dense_layers": dense_layers,
                    "choosing": choosing,
                    "dtype": str(runner.dtype),
                    "temperature": 1.0,
                    "seed": seed,
                }
                write_record(output, settings, rows)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)

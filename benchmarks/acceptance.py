"""Measure how many of the tokens that Quest drafts the whole model accepts, by how many are drafted.

    python benchmarks/acceptance.py --model smollm2.gguf --books books --context 7680 --output acceptance.json

A text is read by dense attention up to a place. From there Quest drafts eight tokens by sparse steps, and the model
checks them in one dense pass, as lossless decoding does; how many it accepts is noted. Then drafts and check are taken
back, the text goes on by some of its own tokens, and the next eight are drafted. So the text before a draft is always
one that people, or the model itself, wrote, and not what a small model repeats when it is left alone. All drafts of a
place read what the first of them chose, as in `generate()`; with `--choosing draft` each chooses, as in vLLM.

    book    held-out books, `--books`
    code    the source of Python's standard library, of the Python that runs this
    chat    the model's own greedy answer to a question about a book, where the tokenizer has a chat template

Drafts are taken twice from each place: the likeliest tokens, and tokens drawn at temperature 1, which are accepted by
speculative sampling. Drafted lengths from 1 to 8 come from the same eight drafts: the first k of them are what would
have been drafted.
"""

from __future__ import annotations

import os
import random
import sys
import sysconfig
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quest_attention import QuestCache, QuestConfig, enable_quest
from quest_attention.bench.record import write_record
from quest_attention.cli.app import split_list
from quest_attention.cli.loading import LoadedModel, load_model
from quest_attention.errors import QuestValueError
from quest_attention.eval.context import copy_cache, read_context
from quest_attention.eval.frame import chat_frame, start_tokens
from quest_attention.eval.methods import make_method
from quest_attention.eval.texts import load_texts
from quest_attention.hf import cache_argument
from quest_attention.hf.rejection import accept_likeliest, accept_sampled, draw

DRAFTS = 8
STRIDE = 6
"""Tokens of the text from one place to the next, at least two: a single one would be a sparse step [tokens]."""
KINDS = ("book", "code", "chat")
CHOOSING = ("round", "draft")
QUESTION = "\n\nTell me what happens in this part of the book, and who is in it.\n"


def config_of(arm: str, dense_layers: int) -> QuestConfig:
    """What an arm reads: metadata as `quest eval` takes it, and the budget behind an @."""
    options, _, budget = arm.partition("@")
    method = make_method(f"quest:metadata={options}", token_budget=int(budget), num_dense_layers=dense_layers)
    config: QuestConfig = getattr(method, "config")  # noqa: B009 - of the methods that take pages
    return config


def source_of_library() -> str:
    """Python's own library, file after file in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.glob("*.py")))


def make_text(
    kind: str, tokenizer: PreTrainedTokenizerBase, books: Path | None, context: int, length: int, seed: int
) -> tuple[list[int], list[int] | None]:
    """The tokens to read, and those that the text goes on with; None where the model is to write them."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    rng = random.Random(seed)
    start = list(start_tokens(tokenizer))
    if kind == "code":
        found = encode(source_of_library()[: 8 * (context + length) * (seed + 2)])
        at = rng.randrange(len(found) - context - length)
        tokens = start + found[at : at + context + length]
        return tokens[:context], tokens[context : context + length]
    texts = load_texts(books, encode).at_least(context + length)
    book = list(texts.stretch(seed, context + length, rng))
    if kind == "book":
        tokens = start + book
        return tokens[:context], tokens[context : context + length]
    frame = chat_frame(tokenizer, "yes")
    end = [*encode(QUESTION), *frame.tail]
    return [*frame.head, *book[: context - len(frame.head) - len(end)], *end], None


def write_on(model: Any, cache: Any, context: list[int], length: int) -> list[int]:
    """The model's own greedy answer, dense; `cache` holds the context, and again when this returns."""
    written, token = [], torch.tensor([context[-1:]], device=model.device)
    cache.crop(-1)
    for _ in range(length):
        token = model(token, **cache_argument(cache), use_cache=True).logits[:, -1:].argmax(-1)
        written.append(int(token))
    cache.crop(len(context) - cache.get_seq_length())
    return written


def kinds_of(kinds: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that are asked for, comma-separated; no chat where the tokenizer has no template for one."""
    return [kind for kind in split_list(kinds) if kind != "chat" or tokenizer.chat_template is not None]


def read_text(
    loaded: LoadedModel, kind: str, books: Path | None, context: int, length: int, seed: int
) -> tuple[Any, list[int]]:
    """A cache that holds the first `context` tokens of a text, read densely, and the `length` that it goes on with."""
    began = time.perf_counter()
    read, text = make_text(kind, loaded.tokenizer, books, context, length, seed)
    source = read_context(loaded.model, read).cache
    print(f"{kind}, seed {seed}: read {len(read)} tokens in {time.perf_counter() - began:.0f} s", flush=True)
    return source, write_on(loaded.model, source, read, length) if text is None else text


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
    model: Annotated[str, typer.Option(help="A GGUF file, a folder or a name; the bundled model if left out.")] = "",
    name: Annotated[str, typer.Option(help="What the record calls it; the model's own name if left out.")] = "",
    books: Annotated[
        Path | None, typer.Option(help="Folder with *.txt; the excerpt of the package if left out.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens read before the first draft.", min=64)] = 7680,
    arms: Annotated[
        str, typer.Option(help="Metadata and budget, comma-separated.")
    ] = "bounds@512,moments@512,sketch@512",
    kinds: Annotated[str, typer.Option(help="Texts, comma-separated.")] = ",".join(KINDS),
    texts: Annotated[int, typer.Option(help="Texts of each kind.", min=1)] = 1,
    places: Annotated[int, typer.Option(help="Places of each text to draft from.", min=1)] = 32,
    dense_layers: Annotated[int, typer.Option(help="Leading layers that drafts read whole.", min=0)] = 2,
    choosing: Annotated[str, typer.Option(help="What chooses: each round once, or each draft.")] = CHOOSING[0],
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to run.")] = "auto",
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
                write_record(output, f"python {' '.join(sys.argv)}", settings, rows)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)

"""Texts that a public model reads and goes on with, step by step: what benchmarks of its decode steps have in common.

book    held-out books, `--books`
code    the source of Python's standard library, of the Python that runs this
chat    the model's own greedy answer to a question about a book, where the tokenizer has a chat template
"""

from __future__ import annotations

import random
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedTokenizerBase

from quest_attention import QuestCache, QuestConfig, enable_quest
from quest_attention.cli.app import split_list
from quest_attention.cli.loading import LoadedModel
from quest_attention.eval.context import copy_cache, read_context
from quest_attention.eval.frame import chat_frame, start_tokens
from quest_attention.eval.texts import load_texts
from quest_attention.hf import cache_argument

ALL_KINDS = "book,code,chat"
"""Comma-separated."""
QUESTION = "\n\nTell me what happens in this part of the book, and who is in it.\n"

ModelOption = Annotated[str, typer.Option(help="A GGUF file, a folder or a name; the bundled model if left out.")]
NameOption = Annotated[str, typer.Option(help="What the record calls it; the model's own name if left out.")]
BooksOption = Annotated[Path | None, typer.Option(help="Folder with *.txt; the excerpt of the package if left out.")]
KindsOption = Annotated[str, typer.Option(help="Texts, comma-separated.")]
DtypeOption = Annotated[str, typer.Option(help="Of the weights.")]
DeviceOption = Annotated[str, typer.Option(help="Where to run.")]


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


@contextmanager
def going_on(model: Any, source: Any, length: int, config: QuestConfig, on_select: Any = None) -> Iterator[QuestCache]:
    """A cache with Quest that holds what `source` does, for `length` decode steps.

    Args:
        model: A public one.
        source: A cache that holds what it has read.
        length: Steps that follow [tokens].
        config: What they read.
        on_select: See `enable_quest`.

    Raises:
        RuntimeError: Afterwards, if not every step of the layers that choose was sparse.
    """
    with enable_quest(model, config, on_select=on_select) as quest:
        cache = quest.make_cache(source.get_seq_length() + length + 1)
        copy_cache(source, cache)
        yield cache
        expected = length * sum(layer.kind == "quest" for layer in quest.counters.layers)
        if quest.counters.sparse_steps != expected:
            raise RuntimeError(f"{quest.counters.sparse_steps} sparse steps of layers, expected {expected}")


def step_on(model: Any, cache: QuestCache, token: int) -> None:
    """One decode step: the model takes a token of a text."""
    model(torch.tensor([[token]], device=model.device), **cache_argument(cache), use_cache=True)

"""Passkey retrieval by the bundled model: full attention, Quest and a sliding window that read as much.

    python benchmarks/passkey.py --books HELDOUT --length 8192 --token-budget 64 \
        --output benchmarks/results/accuracy/passkey_8k.json

Each sample is one held-out book with one pass key at a random depth. The context is prefilled once; then every method
gets the question token by token and answers greedily. The run fails if Quest did not take its sparse path.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from quest_attention import QuestConfig
from quest_attention.bench.record import write_record
from quest_attention.eval.context import read_context
from quest_attention.eval.decode import decode_answer
from quest_attention.eval.methods import Full, Method, Quest, SlidingWindow
from quest_attention.eval.tasks import is_correct, make_sample
from quest_attention.eval.wilson import wilson_interval
from quest_attention.models import bundled_model_path

TASK = "passkey"


def main(
    books: Annotated[Path, typer.Option(help="Folder of held-out books; those named test-* are used.")],
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    length: Annotated[int, typer.Option(help="Context, question and answer together [tokens].")] = 8192,
    token_budget: Annotated[int, typer.Option(help="Tokens a step may read in a sparse layer.")] = 64,
    dense_layers: Annotated[int, typer.Option(help="Leading layers that read everything, for every method.")] = 2,
    metadata_dtype: Annotated[str, typer.Option(help="Page bounds as the keys (kv) or in 8 bits (fp8).")] = "kv",
    n: Annotated[int, typer.Option(help="Samples.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    device: Annotated[str, typer.Option(help="Device to run on.")] = "cpu",
) -> None:
    """Measure passkey retrieval by method."""
    path = bundled_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    texts = [book.read_text(encoding="utf-8") for book in sorted(books.rglob("test-*.txt"))]
    haystacks = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    options = {"token_budget": token_budget, "num_dense_layers": dense_layers, "metadata_dtype": metadata_dtype}
    config = QuestConfig.from_dict(options)
    methods: list[Method] = [Full(), Quest(config), SlidingWindow(token_budget, dense_layers)]
    right = dict.fromkeys((method.name for method in methods), 0)
    read, held = dict(right), dict(right)
    for number in track(range(n), description=TASK, console=Console(stderr=True)):
        rng = random.Random(f"{seed}/{length}/{number}")
        haystack = haystacks[number % len(haystacks)]
        start = rng.randrange(max(1, len(haystack) - length))
        sample = make_sample(TASK, encode, haystack[start : start + length], length, rng.getrandbits(32))
        context = read_context(model, sample.context_ids)
        for method in methods:
            with method.session(model) as session:
                session.load(context)
                answer = decode_answer(model, session.cache, sample.question_ids, sample.max_new_tokens)
                reads = [layer for layer in session.reads() if layer.layer >= dense_layers]
                if isinstance(method, Quest) and not all(layer.is_sparse for layer in reads):
                    raise RuntimeError(f"sample {number}: Quest did not take its sparse path in every layer")
                right[method.name] += is_correct(sample, tokenizer.decode(answer.tokens))
                read[method.name] += sum(layer.tokens_read for layer in reads)
                held[method.name] += sum(layer.tokens_held for layer in reads)

    table = Table(
        "method", "right", "95 % interval", "read in sparse layers", title=f"{TASK}, {length} tokens, n = {n}"
    )
    rows: list[dict[str, Any]] = []
    for name, count in right.items():
        low, high = wilson_interval(count, n)
        share = read[name] / held[name]
        table.add_row(name, f"{100 * count / n:.1f} %", f"{low:.1f} to {high:.1f}", f"{100 * share:.2f} %")
        rows.append({"method": name, "right": count, "n": n, "interval_percent": [low, high], "share_read": share})
    Console().print(table)
    if output is not None:
        settings = {
            "task": TASK,
            "model": "bundled",
            "device": device,
            "dtype": str(dtype),
            "length": length,
            "token_budget": token_budget,
            "page_size": config.page_size,
            "dense_layers": dense_layers,
            "metadata_dtype": metadata_dtype,
            "seed": seed,
        }
        write_record(output, f"python {' '.join(sys.argv)}", settings, rows)


if __name__ == "__main__":
    typer.run(main)

"""Measure a trained model with full attention, and write the numbers of its card.

    python training/measure.py --books HELDOUT --model src/quest_attention/models/tiny --output benchmarks/results/model

Retrieval is generated greedily (never teacher-forced) on books that no training saw, with key words that no training
saw. One process per GPU, or one on the CPU.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import transformers
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from quest_attention.bench.record import command_line
from quest_attention.eval.tasks import TASKS, Sample, is_correct, make_sample
from quest_attention.eval.wilson import wilson_interval

TOKENS_IN_FLIGHT = 1 << 18
"""Rows of a batch times their length: what fits beside a prefill's activations."""
PERPLEXITY_LENGTHS = (2048, 8192, 32768)


class Measurer:
    """One model on one device, and the test books as token ids."""

    def __init__(self, model: Path, books: Path, device: str, seed: int) -> None:
        self.device, self.seed = device, seed
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
        paths = sorted(books.rglob("test-*.txt"))
        self.books = [self.tokenizer.encode(path.read_text(encoding="utf-8")) for path in paths]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def sample(self, task: str, length: int, number: int) -> Sample:
        """Sample `number` of a cell: a held-out book from a random place, facts at random depths."""
        rng = random.Random(f"{self.seed}/{task}/{length}/{number}")
        book = self.books[number % len(self.books)]
        start = rng.randrange(max(1, len(book) - length))
        return make_sample(task, self.encode, book[start : start + length], length, rng.getrandbits(32))

    def accuracy(self, task: str, length: int, n: int) -> dict[str, Any]:
        """Share of right answers in percent, with its interval, and two wrong ones to look at."""
        samples = [self.sample(task, length, number) for number in range(n)]
        # Rows of equal length need no padding.
        samples.sort(key=lambda sample: len(sample.context_ids) + len(sample.question_ids))
        right, wrong, at = 0, [], 0
        while at < n:
            width = len(samples[at].context_ids) + len(samples[at].question_ids)
            most = max(1, TOKENS_IN_FLIGHT // length)
            batch = [s for s in samples[at : at + most] if len(s.context_ids) + len(s.question_ids) == width]
            at += len(batch)
            ids = torch.tensor([s.context_ids + s.question_ids for s in batch], device=self.device)
            new = max(sample.max_new_tokens for sample in batch)
            with torch.inference_mode():
                made = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
                )
            for sample, row in zip(batch, made[:, ids.shape[1] :], strict=True):
                text = self.tokenizer.decode(row)
                if is_correct(sample, text):
                    right += 1
                else:
                    wrong.append({"answers": sample.answers, "generated": text, "depths": sample.depths})
        return {
            "task": task,
            "length": length,
            "n": n,
            "percent": round(100 * right / n, 2),
            "interval": [round(bound, 2) for bound in wilson_interval(right, n)],
            "wrong": wrong[:2],
        }

    def perplexity(self) -> dict[str, Any]:
        """Perplexity of the same tokens, the first 32K of every test book, with at most 2K, 8K or 32K tokens before."""
        longest = max(PERPLEXITY_LENGTHS)
        books = [torch.tensor(book[: longest + 1], device=self.device) for book in self.books if len(book) > longest]
        row: dict[str, Any] = {"books": len(books)}
        for length in PERPLEXITY_LENGTHS:
            total = 0.0
            for book in books:
                for start in range(0, longest, length):
                    ids = book[start : start + length + 1]
                    with torch.inference_mode():
                        logits = self.model(ids[None, :-1], use_cache=False).logits[0].float()
                    total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
            row[f"perplexity_{length}"] = round(math.exp(total / (len(books) * longest)), 3)
        return row


@cache
def load_measurer(model: Path, books: Path, device: str, seed: int) -> Measurer:
    """The measurer of this process, made once."""
    return Measurer(model, books, device, seed)


def measure_cell(job: tuple[Path, Path, str, int, str, int, int]) -> dict[str, Any]:
    """One cell, in a process that keeps its model."""
    model, books, device, seed, task, length, n = job
    measurer = load_measurer(model, books, device, seed)
    began = time.monotonic()
    row = measurer.perplexity() if task == "perplexity" else measurer.accuracy(task, length, n)
    return row | {"seconds": round(time.monotonic() - began, 1)}


def main(
    books: Annotated[Path, typer.Option(help="Folder of held-out books; those named test-* are used.")],
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    output: Annotated[Path, typer.Option(help="Folder to write card.json to.")],
    tasks: Annotated[str, typer.Option(help="Tasks, comma-separated.")] = ",".join(TASKS),
    lengths: Annotated[str, typer.Option(help="Lengths, comma-separated [tokens].")] = "2048,8192,32768",
    n: Annotated[int, typer.Option(help="Samples per cell.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    perplexity: Annotated[bool, typer.Option(help="Measure perplexity too.")] = True,
) -> None:
    """Measure and write card.json."""
    cuda = torch.cuda.device_count()
    devices = [f"cuda:{i}" for i in range(cuda)] or ["cpu"]
    cells = [(task, int(length)) for length in reversed(lengths.split(",")) for task in tasks.split(",")]
    if perplexity:
        cells.insert(0, ("perplexity", 0))
    rows, context = [], get_context("spawn")
    pools = [ProcessPoolExecutor(1, mp_context=context) for _ in devices]
    waiting = [
        pools[i % len(pools)].submit(measure_cell, (model, books, devices[i % len(pools)], seed, task, length, n))
        for i, (task, length) in enumerate(cells)
    ]
    machine = {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "devices": len(devices),
        "dtype": "bfloat16" if cuda else "float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    record = {"command": command_line(), "machine": machine, "seed": seed, "n": n, "rows": rows}
    output.mkdir(parents=True, exist_ok=True)
    for future in waiting:
        row = future.result()
        rows.append(row)
        shown = f"{row['task']:18} {row['length']:6} {row['percent']:6.2f} %" if "task" in row else json.dumps(row)
        typer.echo(f"{shown}  [{row['seconds']} s]")
        (output / "card.json").write_text(json.dumps(record, indent=1) + "\n")  # a run cut short keeps its cells


if __name__ == "__main__":
    typer.run(main)

"""Measure methods on public models with `quest eval`: the runs behind docs/results.md and docs/choosing.md.

    make real-models MODELS="smollm2 qwen gemma"
    python benchmarks/eval_public.py --books books --output runs

Each model and length is a run in a folder of its own. Where full attention cannot do a task, the other methods are not
asked. An interrupted run goes on with the same command, and a new one from the answers that are committed beside the
summaries. Written for NVIDIA GPUs: all of it takes about an hour of one H100. `keep_runs.py` then puts summaries and
answers among the committed results.
"""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from quest_attention.errors import QuestValueError

TASKS = ("passkey", "needle_of_30", "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "variable_tracking")
METHODS = "full,quest,quest:group_reduction=mean,oracle,token_oracle,streaming_llm,h2o,tova,snapkv"
RESULTS = Path(__file__).parent / "results" / "accuracy"
SAMPLES = "samples.jsonl.xz"
BUDGETS = (128, 512, 1024, 2048, 4096)
LEAST_FULL = 60
"""Where full attention is right in fewer of the answers, other methods are not asked [%]."""


BOUNDS = "quest:metadata=bounds,selection_unit=page"
MOMENTS = "quest:metadata=moments,selection_unit=page"
SKETCH = "quest:metadata=sketch,selection_unit=token"
SKETCH_4 = f"{SKETCH},candidate_factor=4"
ESTIMATES = f"{SKETCH},candidate_factor=0"
EXACT_PAGES = "oracle:metadata=bounds,selection_unit=page"
EXACT_TOKENS = "token_oracle"
CHOICES = (BOUNDS, MOMENTS, SKETCH, SKETCH_4, ESTIMATES, EXACT_PAGES, EXACT_TOKENS)
"""Ways to choose what is read, named in full, so that they mean the same whatever the defaults become.

But for the third, whose candidates are as many as by default: it is asked for budgets below 2,048 alone, where there
are some.
"""


@dataclass(frozen=True)
class Ask:
    """One command of a run.

    Attributes:
        tasks: Names of tasks.
        methods: As `quest eval` takes them, parted by commas.
        budgets: Most tokens that a step reads [tokens].
        samples: For each task.
        least_full: Where full attention is right in fewer of the answers, other methods are not asked [%].
    """

    tasks: tuple[str, ...]
    methods: str
    budgets: tuple[int, ...]
    samples: int
    least_full: int = 0


@dataclass(frozen=True)
class Run:
    """A model at a length: what is asked of it goes to one folder.

    Attributes:
        name: Of its folder.
        model: Name of its file; None is the bundled model.
        length: Context, question and answer together [tokens].
        asks: What is asked, one after the other.
        dense_layers: Leading full-attention layers that read everything: Gemma has three in all.
        workers: Processes.
    """

    name: str
    model: str | None
    length: int
    asks: tuple[Ask, ...]
    dense_layers: int = 2
    workers: int = 1


def all_of(name: str, model: str, length: int, samples: int, stretches: int, recalls: int = 32, **options: int) -> Run:
    """Every task and every method, with so many samples of a task, of `continuation` and of `recall`."""
    budgets = tuple(budget for budget in BUDGETS if budget < length)
    asks = (
        Ask(TASKS, METHODS, budgets, samples, LEAST_FULL),
        Ask(("continuation",), METHODS, budgets, stretches, LEAST_FULL),
        Ask(("recall",), METHODS, budgets, recalls, LEAST_FULL),  # its table has the mean of them all
    )
    return Run(name, model, length, asks, **options)


def choosing(*methods: str) -> str:
    """Full attention and some ways to choose."""
    return ",".join(("full", *methods))


RUNS = (
    all_of("qwen_31k", "qwen", 31 * 1024, 56, 56, recalls=16),
    all_of("qwen_16k", "qwen", 16 * 1024, 100, 200, workers=2),
    all_of("qwen_8k", "qwen", 8 * 1024, 100, 200),
    all_of("smollm2_4k", "smollm2", 4 * 1024, 100, 200, recalls=64),
    all_of("smollm2_8k", "smollm2", 8 * 1024, 100, 200),
    all_of("gemma_16k", "gemma", 16 * 1024, 100, 200, dense_layers=0),
    all_of("gemma_31k", "gemma", 31 * 1024, 56, 56, recalls=8, dense_layers=0),
)
"""Of docs/results.md."""
_TEXT, _NEEDLES = ("continuation",), ("needle_of_30",)
_ALL = choosing(*CHOICES)
_FIVE = choosing(BOUNDS, MOMENTS, SKETCH, ESTIMATES, EXACT_TOKENS)
_FIVE_OF_4 = choosing(BOUNDS, MOMENTS, SKETCH_4, ESTIMATES, EXACT_TOKENS)
_SIX = choosing(BOUNDS, MOMENTS, SKETCH, SKETCH_4, ESTIMATES, EXACT_TOKENS)
CHOICE_RUNS = (
    Run("choice_qwen_31k_needles", "qwen", 31 * 1024, (Ask(_NEEDLES, _FIVE, (1024,), 96),), workers=6),
    Run("choice_qwen_31k_text", "qwen", 31 * 1024, (Ask(_TEXT, _FIVE_OF_4, (512, 1024, 2048), 12),), workers=4),
    Run(
        "choice_qwen_8k_needles",
        "qwen",
        8 * 1024,
        (Ask((*_NEEDLES, "niah_multikey_3"), _SIX, (128,), 96),),
        workers=6,
    ),
    Run("choice_gemma_31k_text", "gemma", 31 * 1024, (Ask(_TEXT, _FIVE, (256, 1024), 12),), dense_layers=0),
    Run("choice_smollm2_4k_text", "smollm2", 4 * 1024, (Ask(_TEXT, _FIVE, (512,), 12),)),
    Run("choice_bundled_4k_needles", None, 4 * 1024, (Ask(("niah_multikey_2",), _ALL, (128,), 40),)),
)
"""Of docs/choosing.md. They fit side by side on an H100, the longest first."""
_LARGE, _SMALL = (2048,), (512,)
DEFAULT_RUNS = (
    Run(
        "default_qwen_31k_needles",
        "qwen",
        31 * 1024,
        (Ask(_NEEDLES, choosing(SKETCH), _SMALL, 96), Ask(_NEEDLES, choosing(ESTIMATES, BOUNDS), _LARGE, 96)),
        workers=6,
    ),
    Run(
        "default_qwen_8k_needles",
        "qwen",
        8 * 1024,
        (
            Ask((*_NEEDLES, "niah_multikey_3"), choosing(ESTIMATES, BOUNDS), _LARGE, 96),
            Ask((*_NEEDLES, "niah_multikey_3"), choosing(SKETCH, ESTIMATES), _SMALL, 96),
        ),
        workers=4,
    ),
    Run(
        "default_gemma_31k_text",
        "gemma",
        31 * 1024,
        (Ask(_TEXT, choosing(ESTIMATES, BOUNDS, MOMENTS), _LARGE, 12), Ask(_TEXT, choosing(SKETCH), _SMALL, 12)),
        dense_layers=0,
    ),
    Run(
        "default_bundled_4k_needles",
        None,
        4 * 1024,
        (
            Ask(("niah_multikey_2",), choosing(ESTIMATES, SKETCH), _SMALL, 40),
            Ask(("niah_multikey_2",), choosing(ESTIMATES), (1024,), 40),
        ),
    ),
)
"""Of the same page: at the budgets that ways to choose have by default, and estimates alone at smaller ones."""


def evaluate(run: Run, number: int, models: Path, books: Path, output: Path) -> None:
    """Do one run."""
    folder = output / run.name
    begin_from_committed(folder)
    gpus = torch.cuda.device_count()
    # The processes of a run take the GPUs in turn; runs begin at different ones.
    order = [str((number + index) % gpus) for index in range(gpus)]
    shared = ["--books", str(books), "--length", str(run.length), "--workers", str(run.workers)]
    shared += ["--dense-layers", str(run.dense_layers), "-o", str(folder)]
    if run.model is not None:
        shared += ["--model", str(models / f"{run.model}.gguf")]
    for ask in run.asks:
        options = ["--method", ask.methods, "-b", ",".join(map(str, ask.budgets)), "-n", str(ask.samples)]
        if ask.least_full:
            options += ["--least-full", str(ask.least_full)]
        with (output / f"{run.name}.log").open("a") as log:
            subprocess.run(
                [sys.executable, "-m", "quest_attention", "eval", *ask.tasks, *options, *shared],
                check=True,
                stdout=log,
                stderr=log,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(order)},
            )


def begin_from_committed(folder: Path) -> None:
    """Fill the folder of a run with the answers that the repository has of it; one that was begun stays as it is."""
    committed = RESULTS / folder.name
    if folder.exists() or not (committed / SAMPLES).exists():
        return
    folder.mkdir(parents=True)
    settings = json.loads((committed / "summary.json").read_text(encoding="utf-8"))["settings"]
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "samples.jsonl").write_bytes(lzma.decompress((committed / SAMPLES).read_bytes()))


def main(
    books: Annotated[Path, typer.Option(help="Folder of long *.txt files.")],
    output: Annotated[Path, typer.Option(help="Folder for the runs.")],
    models: Annotated[Path, typer.Option(help="Folder of the GGUF files.")] = Path(".models"),
    only: Annotated[str, typer.Option(help="Names of runs, parted by commas; all by default.")] = "",
    at_once: Annotated[int, typer.Option(help="Runs side by side: five keep an H100 busy and fit.")] = 5,
) -> None:
    """Do all runs, some side by side."""
    every = (*RUNS, *CHOICE_RUNS, *DEFAULT_RUNS)
    names = tuple(run.name for run in every) if not only else tuple(only.split(","))
    if unknown := set(names) - {run.name for run in every}:
        raise QuestValueError("only", ", ".join(sorted(unknown)), f"some of {', '.join(run.name for run in every)}")
    wanted = [run for run in every if run.name in names]
    output.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(at_once) as pool:
        for done in [pool.submit(evaluate, run, number, models, books, output) for number, run in enumerate(wanted)]:
            done.result()


if __name__ == "__main__":
    typer.run(main)

"""Measure methods on public models with `quest eval`: the runs behind docs/results.md.

    make real-models MODELS="smollm2 qwen gemma"
    python benchmarks/eval_public.py --books books --output runs

Each model and length is a run in a folder of its own. Where full attention cannot do a task, the other methods are not
asked. An interrupted run goes on with the same command, and a new one from the answers that are committed beside the
summaries. Written for NVIDIA GPUs: all of it takes about an hour of one H100. `quest report FOLDER` then writes the
summary of a run.
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

TASKS = ("passkey", "needle_of_30", "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "variable_tracking")
METHODS = "full,quest,quest:group_reduction=mean,oracle,token_oracle,streaming_llm,h2o,tova,snapkv"
RESULTS = Path(__file__).parent / "results" / "accuracy"
SAMPLES = "samples.jsonl.xz"
BUDGETS = (128, 512, 1024, 2048, 4096)
LEAST_FULL = 60
"""Where full attention is right in fewer of the answers, other methods are not asked [%]."""


@dataclass(frozen=True)
class Run:
    """A model at a length.

    Attributes:
        name: Of its folder.
        model: Name of its file.
        length: Context, question and answer together [tokens].
        samples: For each task.
        stretches: For `continuation`.
        recalls: Stretches for `recall`, whose table has the mean of them all.
        dense_layers: Leading full-attention layers that read everything: Gemma has three in all.
        workers: Processes.
    """

    name: str
    model: str
    length: int
    samples: int
    stretches: int
    recalls: int = 32
    dense_layers: int = 2
    workers: int = 1


RUNS = (
    Run("qwen_31k", "qwen", 31 * 1024, 56, 56, recalls=16),
    Run("qwen_16k", "qwen", 16 * 1024, 100, 200, workers=2),
    Run("qwen_8k", "qwen", 8 * 1024, 100, 200),
    Run("smollm2_4k", "smollm2", 4 * 1024, 100, 200, recalls=64),
    Run("smollm2_8k", "smollm2", 8 * 1024, 100, 200),
    Run("gemma_16k", "gemma", 16 * 1024, 100, 200, dense_layers=0),
    Run("gemma_31k", "gemma", 31 * 1024, 56, 56, recalls=8, dense_layers=0),
)


def evaluate(run: Run, number: int, models: Path, books: Path, output: Path) -> None:
    """Do one run."""
    folder = output / run.name
    begin_from_committed(folder)

    def quest_eval(*arguments: str) -> None:
        gpus = torch.cuda.device_count()
        # The processes of a run take the GPUs in turn; runs begin at different ones.
        order = [str((number + index) % gpus) for index in range(gpus)]
        shared = ["--model", str(models / f"{run.model}.gguf"), "--books", str(books), "--length", str(run.length)]
        shared += ["--workers", str(run.workers)]
        with (output / f"{run.name}.log").open("a") as log:
            subprocess.run(
                [sys.executable, "-m", "quest_attention", "eval", *arguments, "-o", str(folder), *shared],
                check=True,
                stdout=log,
                stderr=log,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(order)},
            )

    budgets = ",".join(str(budget) for budget in BUDGETS if budget < run.length)
    options = ["--method", METHODS, "-b", budgets, "--least-full", str(LEAST_FULL)]
    options += ["--dense-layers", str(run.dense_layers)]
    quest_eval(*TASKS, *options, "-n", str(run.samples))
    quest_eval("continuation", *options, "-n", str(run.stretches))
    quest_eval("recall", *options, "-n", str(run.recalls))


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
    wanted = [run for run in RUNS if not only or run.name in only.split(",")]
    output.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(at_once) as pool:
        for done in [pool.submit(evaluate, run, number, models, books, output) for number, run in enumerate(wanted)]:
            done.result()


if __name__ == "__main__":
    typer.run(main)

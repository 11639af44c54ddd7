"""Put runs of `quest eval` among the committed results: the summary of each, and its answers packed beside it.

    python benchmarks/keep_runs.py runs/choice_qwen_31k_text runs/choice_gemma_31k_text

The summary is what `quest report` writes. Folders from another machine need `settings.json` and `samples.jsonl` alone.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Annotated

import typer
from eval_public import RESULTS, SAMPLES

from quest_attention.eval.report import read_results


def keep(folder: Path, results: Path) -> Path:
    """Write what is kept of one run, and give the folder where it lies.

    Raises:
        QuestValueError: It is no folder of a run.
    """
    found = read_results(folder)
    kept = results / folder.name
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "summary.json").write_text(json.dumps(found.summary(), indent=1) + "\n", encoding="utf-8")
    packed = lzma.compress((folder / "samples.jsonl").read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    (kept / SAMPLES).write_bytes(packed)
    return kept


def main(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    results: Annotated[Path, typer.Option(help="Folder of the committed results.")] = RESULTS,
) -> None:
    """Keep some runs."""
    for folder in folders:
        print(keep(folder, results))


if __name__ == "__main__":
    typer.run(main)

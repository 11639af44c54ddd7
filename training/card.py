"""Write the model card from the committed measurements.

    python training/card.py

Every number in the card comes from `benchmarks/results/model/`; a test checks that the card is what this makes of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "model"
CARD = ROOT / "src" / "quest_attention" / "models" / "tiny" / "README.md"

TEXT = """\
# The bundled model

A small language model that comes with quest-attention so that everything runs without a download: {parameters:.1f}M
parameters in the shape of Llama (6 layers, hidden size 384, 6 query heads and 2 KV heads of 64, tied embeddings,
byte-level BPE of 4,096 tokens with every digit a token of its own), bfloat16, contexts up to 32,768 tokens. It really
retrieves facts over its whole context, which is what the demonstration and the tests need of it. It is no chat model
and knows nothing: beyond finding what a prompt says, its text is that of a very small model of old English novels.

Load it with `AutoModelForCausalLM.from_pretrained(quest_attention.models.bundled_model_path())`; no custom code.

## Measured, with full attention

Greedy, generated (not teacher-forced), on the 17 held-out test books, with key words that training never saw;
n = {n} a cell, 95 % Wilson intervals in brackets, one seed ({seed}), in {dtype} on {devices} {device}.
`training/measure.py` makes these numbers, `benchmarks/results/model/card.json` holds them.

| task | {heads} |
|---|{rules}|
{rows}

The templates (Mohtashami and Jaggi's pass key, RULER's needles and variable tracking) were seen in training with other
keys, values and books, so this says what the model can look up, not what it can generalise to. An empty cell was not
measured. Variable tracking, several values of one key, and UUIDs among UUIDs at 32K are beyond it: do not judge a cache
method by them.

Perplexity of the first 32,768 tokens of each of {books} books, by how much text a prediction could see: {perplexities}.

## How it was made

{stages}

The data are English books in the public domain, {tokens} in the first stage; no author of a test or validation book is
among them. About half of the training tokens are plain text; the others are the same books with facts in them and
questions about the facts (`training/sequences.py`). One seed, and one model that was measured: nothing here says how
much another would differ. `training/README.md` has the commands, a first stage that was thrown away, and how the cells
were chosen.
"""


def make_card() -> str:
    """The text of the card."""
    card = json.loads((RESULTS / "card.json").read_text(encoding="utf-8"))
    stages = json.loads((RESULTS / "training.json").read_text(encoding="utf-8"))["stages"]
    cells = {(row["task"], row["length"]): row for row in card["rows"] if "task" in row}
    (perplexity,) = (row for row in card["rows"] if "books" in row)
    lengths = sorted({length for _, length in cells})
    tasks = sorted({task for task, _ in cells})
    heads = [f"{length:,} tokens" for length in lengths]
    table = [
        f"| {task} | " + " | ".join(_cell(cells.get((task, length))) for length in lengths) + " |" for task in tasks
    ]
    seen = {int(name.split("_")[1]): value for name, value in perplexity.items() if name.startswith("perplexity")}
    return TEXT.format(
        parameters=stages[-1]["parameters"] / 1e6,
        n=card["n"],
        seed=card["seed"],
        dtype=card["machine"]["dtype"],
        devices=card["machine"]["devices"],
        device=card["machine"]["device"],
        heads=" | ".join(heads),
        rules="|".join("---" for _ in heads),
        rows="\n".join(table),
        books=perplexity["books"],
        perplexities=", ".join(f"{value:.2f} with {length:,} tokens" for length, value in sorted(seen.items())),
        stages="\n".join(f"{number}. {_stage(stage)}" for number, stage in enumerate(stages, 1)),
        tokens=f"{stages[0]['trained']['books']} of them",
    )


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['percent']:.0f} % ({row['interval'][0]:.1f} to {row['interval'][1]:.1f})"


def _stage(stage: dict[str, Any]) -> str:
    trained = stage["trained"]
    machine = f"{stage['devices']} {stage['device']}, torch {stage['torch']}"
    return (
        f"{trained['step']:,} steps, {trained['tokens'] / 1e6:,.0f}M tokens, {trained['books']} books, {machine}; "
        f"the clock of the schedule stood at {trained['trained']:.0f} s of {stage['seconds']:.0f} s when it ended."
    )


if __name__ == "__main__":
    CARD.write_text(make_card(), encoding="utf-8")

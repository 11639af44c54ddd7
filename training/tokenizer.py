"""Train the bundled model's tokenizer: byte-level BPE, every digit a token of its own.

python training/tokenizer.py --books BOOKS --output src/quest_attention/models/tiny
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quest_attention.eval.tasks import make_facts

VOCAB_SIZE = 4096
TEMPLATE_SAMPLES = 20_000
END_OF_TEXT = "<|endoftext|>"
MAX_LENGTH = 32768
SAMPLE_STRIDE = 4
"""Every fourth book: pair counts settle long before all 212 MB are read."""


def train_tokenizer(books: list[Path]) -> Tokenizer:
    """A tokenizer fitted to some of the books. Digits stay apart, so that a number is as long as it looks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for book in books[::SAMPLE_STRIDE]:
            yield book.read_text(encoding="utf-8")
        rng = random.Random(0)
        for _ in range(TEMPLATE_SAMPLES):  # so that the words of the templates are whole tokens
            fact, _ = make_facts(rng, "train", rng.choice(("passkey", "needle", "variable_tracking")))
            yield "".join(fact.texts) + fact.question

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def main(
    books: Annotated[Path, typer.Option(help="Folder of training books, *.txt.")],
    output: Annotated[Path, typer.Option(help="Folder of the model to write tokenizer.json to.")],
) -> None:
    """Train the tokenizer and write it in transformers' format."""
    tokenizer = train_tokenizer(sorted(books.rglob("*.txt")))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(output)
    sample = "The pass key is 40317. One of the special magic numbers for lantern is: 8270915."
    typer.echo(" | ".join(fast.convert_ids_to_tokens(fast.encode(sample))))


if __name__ == "__main__":
    typer.run(main)

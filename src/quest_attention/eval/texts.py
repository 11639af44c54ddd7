"""`Texts`: books as token ids, to hide facts in and to predict."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quest_attention.errors import QuestValueError
from quest_attention.eval.excerpt import SOUTH
from quest_attention.eval.tasks import Encode

__all__ = ["Texts", "book_files", "load_texts"]

_MOST_THREADS = 8
"""That read books side by side: a tokenizer takes seconds for one."""


@dataclass(frozen=True)
class Texts:
    """Books as token ids.

    Attributes:
        names: Where each is from.
        tokens: Its token ids.
    """

    names: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]

    def stretch(self, index: int, length: int, rng: random.Random) -> tuple[int, ...]:
        """`length` tokens of the book of that index, counted round, from a place drawn at random; fewer if it ends."""
        book = self.tokens[index % len(self.tokens)]
        start = rng.randrange(max(1, len(book) - length))
        return book[start : start + length]

    def at_least(self, length: int) -> Texts:
        """Those books that are long enough.

        Raises:
            QuestValueError: None is.
        """
        enough = [index for index, book in enumerate(self.tokens) if len(book) >= length]
        if not enough:
            longest = max(map(len, self.tokens))
            raise QuestValueError("length", length, f"at most {longest}, the tokens of the longest text")
        return Texts(tuple(self.names[index] for index in enough), tuple(self.tokens[index] for index in enough))


def load_texts(folder: Path | None, encode: Encode) -> Texts:
    """The books of a folder, `*.txt` at any depth in the order of their names; the excerpt of the package by default.

    Raises:
        QuestValueError: The folder does not exist or holds no text, or a file is not UTF-8.
    """
    if folder is None:
        return Texts((str(SOUTH),), (tuple(encode(SOUTH.text())),))
    files = book_files(folder)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:  # tokenizers let other threads run
        tokens = pool.map(lambda file: tuple(encode(_read(file))), files)
        return Texts(tuple(file.stem for file in files), tuple(tokens))


def book_files(folder: Path) -> list[Path]:
    """The files of `load_texts`.

    Raises:
        QuestValueError: There is none.
    """
    files = sorted(folder.rglob("*.txt")) if folder.is_dir() else []
    if not files:
        raise QuestValueError("books", str(folder), "a folder with *.txt files in UTF-8")
    return files


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = f"{file}, byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise QuestValueError("books", found, "text in UTF-8") from None

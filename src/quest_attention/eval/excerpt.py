"""A stretch of a real book that ships with the package: the haystack of the demonstration."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

__all__ = ["SOUTH", "Excerpt"]


@dataclass(frozen=True)
class Excerpt:
    """Text from a book, held out from the training of the bundled model.

    Attributes:
        title: Title of the book.
        author: Its author.
        year: Of first publication; the text is in the public domain.
        part: Which part of the book the text is.
        file: Its name beside this module, under `books/`.
    """

    title: str
    author: str
    year: int
    part: str
    file: str

    def text(self) -> str:
        """The text, paragraphs parted by empty lines."""
        return (resources.files("quest_attention.eval") / "books" / self.file).read_text(encoding="utf-8")

    def __str__(self) -> str:
        return f"{self.title} ({self.author}, {self.year})"


SOUTH = Excerpt("South", "Sir Ernest Shackleton", 1919, "chapters I to IV", "south.txt")

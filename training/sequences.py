"""Training sequences: book text, repeated spans, and facts with questions about them.

A recall sequence is dense: dozens of facts and questions in one context, so that nearly every step teaches retrieval.
The loss of a token is weighted: answers count most, and what cannot be known (a fact's random key and value, the key a
question asks about) counts nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from quest_attention.eval.tasks import TASKS, Fact, key_words, make_facts, needles, noise, word

ANSWER_WEIGHT = 8.0
REPEAT_SPANS = (24, 400)
"""Shortest and longest copied span [tokens]."""
TOKENS_PER_FACT = 90
"""A context has room for about one fact and its question in so many tokens."""
MOST_FACTS = 160

KINDS = {
    "passkey": 0.5,  # at most one in a sequence, or the question would have two answers
    "needle": 5.0,
    "niah_single_3": 1.0,
    "niah_multikey_3": 1.0,
    "niah_multivalue": 0.8,
    "niah_multiquery": 0.8,
    "variable_tracking": 0.6,
    "needle_word": 0.5,
}
"""How often each kind of fact comes; one sequence mixes a few of them."""


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of sequence; the rest is book text."""

    recall: float
    repeat: float


@dataclass(frozen=True)
class Books:
    """All training text as one run of token ids, and where each book begins."""

    ids: np.ndarray  # uint16
    starts: np.ndarray  # int64

    @classmethod
    def load(cls, folder: Path) -> Books:
        """Read what `training/train.py` wrote."""
        return cls(np.load(folder / "books.npy", mmap_mode="r"), np.load(folder / "starts.npy"))

    def cut(self, rng: random.Random, length: int) -> list[int]:
        """`length` tokens from anywhere; a cut may run on into the next book."""
        start = rng.randrange(len(self.ids) - length)
        cut: list[int] = self.ids[start : start + length].tolist()
        return cut


def book_sequence(rng: random.Random, books: Books, length: int) -> tuple[list[int], list[float]]:
    """Plain text."""
    return books.cut(rng, length), [1.0] * length


def repeat_sequence(rng: random.Random, books: Books, length: int) -> tuple[list[int], list[float]]:
    """Plain text in which spans come again later: what teaches a model to look back and copy."""
    ids = books.cut(rng, length)
    at = rng.randint(64, 256)
    while True:
        span = int(math.exp(rng.uniform(*map(math.log, REPEAT_SPANS))))
        if at + span > length:
            break
        source = rng.randint(0, max(0, at - span))
        ids[at : at + span] = ids[source : source + span]
        at += span + rng.randint(32, 600)
    return ids, [1.0] * length


def recall_sequence(
    rng: random.Random, books: Books, length: int, encode: Callable[[str], list[int]]
) -> tuple[list[int], list[float]]:
    """Facts in a haystack and questions about them, in between or all at the end as an evaluation has them."""
    most = min(MOST_FACTS, max(2, length // TOKENS_PER_FACT))
    wanted = int(math.exp(rng.uniform(0, math.log(most + 1))))
    weights = {kind: weight * rng.random() ** 2 for kind, weight in KINDS.items()}
    if rng.random() < 0.3:  # many like needles, nothing else
        weights, wanted = {"needle": 1.0}, rng.randint(max(1, most // 3), most)
    facts: list[Fact] = []
    if rng.random() < KINDS["passkey"]:
        facts.append(make_facts(rng, "train", "passkey")[0])
    weights.pop("passkey", None)
    if not facts or wanted > 1:
        facts += [make_kind(rng, kind) for kind in rng.choices(list(weights), list(weights.values()), k=wanted)]
    rng.shuffle(facts)
    facts = without_ambiguity(facts)

    pieces: list[tuple[float, float, list[int], float, int]] = []  # place, order, ids, weight, first weighted token
    at_end = rng.random() < 0.4
    budget = length - 8
    for fact in facts:
        hidden = [encode(text) for text in fact.texts]
        question, reply = encode(fact.question), encode(fact.reply)
        cost = sum(map(len, hidden)) + len(question) + len(reply)
        if cost > budget:
            break
        budget -= cost
        asked = 1.0 if at_end else rng.random() ** 0.5
        limit = 0.999 if at_end else asked
        for place, ids in zip(sorted(rng.uniform(0, limit) for _ in hidden), hidden, strict=True):
            pieces.append((place, 0, ids, 0.0, len(ids)))
        pieces.append((asked, 1 + rng.random(), question + reply, ANSWER_WEIGHT, len(question)))
    pieces.sort(key=lambda piece: piece[:2])

    head = encode(TASKS["passkey" if rng.random() < 0.3 else "needle"].preamble) if rng.random() < 0.5 else []
    room = max(0, length - sum(len(ids) for _, _, ids, _, _ in pieces) - len(head))
    filler = noise(encode, room) if rng.random() < 0.2 else books.cut(rng, room)
    ids_out, weights_out, done = list(head), [0.0] * len(head), 0
    filler_weight = 1.0 if rng.random() < 0.5 else 0.3
    for place, _, ids, weight, first in pieces:
        until = min(room, max(done, int(place * room)))
        ids_out += filler[done:until]
        weights_out += [filler_weight] * (until - done)
        done = until
        ids_out += ids
        weights_out += [0.0] * first + [weight] * (len(ids) - first)
    ids_out += filler[done:]
    weights_out += [filler_weight] * (room - done)
    return ids_out[:length], weights_out[:length]


def make_kind(rng: random.Random, kind: str) -> Fact:
    """One fact of a kind, with a train key."""
    if kind == "needle_word":
        return needles(rng, key_words("train"), keys=word, values=word, per_key=1, queries=1)
    return make_facts(rng, "train", kind)[0]


def without_ambiguity(facts: list[Fact]) -> list[Fact]:
    """Drop facts whose key another one has."""
    seen: set[str] = set()
    kept = []
    for fact in facts:
        heads = {text.split(" is")[0].split(" =")[0] for text in fact.texts}
        if not heads & seen:
            seen |= heads
            kept.append(fact)
    return kept


class Sequences(IterableDataset[tuple[Tensor, Tensor]]):
    """An endless stream of batches: ids `[rows, length + 1]` int64 and loss weights `[rows, length]` float32.

    Args:
        folder: Where the tokenised books and tokenizer.json are.
        length: Tokens per sequence.
        rows: Sequences per batch.
        mix: Shares of the kinds of sequence.
        seed: Everything random follows from it, the worker and the rank.
    """

    def __init__(self, folder: Path, length: int, rows: int, mix: Mix, seed: str) -> None:
        self.folder, self.length, self.rows, self.mix, self.seed = folder, length, rows, mix, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        books = Books.load(self.folder)
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
            return ids

        length = self.length + 1
        while True:
            batch = []
            for _ in range(self.rows):
                kind = rng.random()
                if kind < self.mix.recall:
                    batch.append(recall_sequence(rng, books, length, encode))
                elif kind < self.mix.recall + self.mix.repeat:
                    batch.append(repeat_sequence(rng, books, length))
                else:
                    batch.append(book_sequence(rng, books, length))
            ids = torch.from_numpy(np.array([ids for ids, _ in batch], dtype=np.int64))
            weights = torch.from_numpy(np.array([weights[1:] for _, weights in batch], dtype=np.float32))
            yield ids, weights

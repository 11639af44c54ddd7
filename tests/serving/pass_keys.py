"""Pass keys in a book, and a server that clients ask for them: the same ones stock and with Quest."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quest_attention.eval.excerpt import SOUTH
from server import serving

QUESTIONS = 8
TOKENS = 16
"""Of an answer at most: it repeats some words of the question before the key."""


@dataclass(frozen=True)
class Asked:
    """What a server said.

    Attributes:
        answers: By the key that was hidden.
        prompt_tokens: Of the shortest prompt.
        answer_tokens: Of all answers together.
        counters: Quest's, with none in a stock server.
    """

    answers: dict[str, str]
    prompt_tokens: int
    answer_tokens: int
    counters: dict[str, int]

    @property
    def found(self) -> list[str]:
        """Keys that were answered."""
        return [key for key, answer in self.answers.items() if key in answer]


def questions(characters: int) -> dict[str, str]:
    """By the key in it, from the last place in so much of the book to the first.

    So the prefix cache has what stands before it.
    """
    book, draw, made = SOUTH.text()[:characters], random.Random(0), {}
    for index in reversed(range(QUESTIONS)):
        key, place = str(draw.randrange(10_000, 100_000)), (2 * index + 1) * len(book) // (2 * QUESTIONS)
        fact = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
        made[key] = f"{book[:place]}{fact}{book[place:]}\n\nWhat is the pass key? Answer with the number."
    assert len(made) == QUESTIONS
    return made


def ask(model: Path, quest: dict[str, Any] | None, characters: int, *options: str, chats: bool = True) -> Asked:
    """All questions, one after another, to a server of its own.

    Args:
        model: Its folder.
        quest: Options of Quest; stock without.
        characters: Of the book.
        options: Of vLLM.
        chats: Whether it is a model for chats. Else the answer is begun for it.
    """
    worker = ("--worker-extension-cls", "quest_attention.vllm.worker.QuestWorkerExtension")
    with serving(quest, *worker, *options, model=model, VLLM_CPU_OMP_THREADS_BIND="auto") as server:  # all cores
        if quest is not None:
            server.rpc("quest_reset")
        asked = questions(characters).items()
        if chats:
            done = {key: server.chat(text, TOKENS) for key, text in asked}
            answers = {key: one.choices[0].message.content for key, one in done.items()}
        else:
            done = {key: server.complete(f"{text}\nThe pass key is", TOKENS) for key, text in asked}
            answers = {key: one.choices[0].text for key, one in done.items()}
        counters = {} if quest is None else server.rpc("quest_counters")[0]
    return Asked(
        answers,
        min(one.usage.prompt_tokens for one in done.values()),
        sum(one.usage.completion_tokens for one in done.values()),
        counters,
    )


def assert_as_found(asked: Asked, stock: Asked, budget: int, margin: int) -> None:
    """Quest misses at most so many keys of those that stock finds, and reads no more than the budget in each step."""
    assert asked.prompt_tokens == stock.prompt_tokens > 2.5 * budget
    missed = set(stock.found) - set(asked.found)
    assert len(missed) <= margin, (asked, stock)
    counters, written = asked.counters, asked.answer_tokens - QUESTIONS  # an answer's first token is the prompt's
    rows = counters["sparse_rows"]
    # On a GPU a step has begun when it is seen that the one before it ended an answer.
    assert 0 < written <= rows <= written + QUESTIONS and counters["dense_rows"] == 0, asked
    assert counters["tokens_read"] <= budget * rows
    assert counters["tokens_held"] >= asked.prompt_tokens * rows

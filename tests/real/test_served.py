"""A real model behind vLLM's OpenAI server, stock and with Quest: the same client asks both for the same pass keys."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="runs with make test-real-vllm, in the environment that has vLLM")

import scenario
from quest_attention.eval.excerpt import SOUTH
from server import serving

CHARACTERS = 12_000
"""Of the book in which a key is hidden: with SmolLM2's tokenizer some 2,700 tokens, at which stock finds every key."""
QUESTIONS = 8
TOKENS = 16
"""Of an answer at most: it repeats some words of the question before the key."""
MARGIN = 1
"""Keys that Quest may miss and stock finds: an eighth of them."""
ARMS = {"moments": {"token_budget": 1024}, "sketch": {"token_budget": 512, **scenario.SKETCH}}
"""What is the default on a CPU, and what is it on a GPU. Budgets are a third and a sixth of the context."""
MINUTES = 10
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * MINUTES)]


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


def questions() -> dict[str, str]:
    """By the key in it, from the last place in the book to the first: so the prefix cache has what stands before it."""
    book, draw, made = SOUTH.text()[:CHARACTERS], random.Random(0), {}
    for index in reversed(range(QUESTIONS)):
        key, place = str(draw.randrange(10_000, 100_000)), (2 * index + 1) * len(book) // (2 * QUESTIONS)
        fact = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
        made[key] = f"{book[:place]}{fact}{book[place:]}\n\nWhat is the pass key? Answer with the number."
    assert len(made) == QUESTIONS
    return made


def ask(model: Path, quest: dict[str, Any] | None, *more: str) -> Asked:
    """All questions, one after another, to a server of its own with more options."""
    options = ["--dtype", "float32", "--block-size", str(scenario.BLOCK)]
    options += ["--worker-extension-cls", "quest_attention.vllm.worker.QuestWorkerExtension"]
    with serving(quest, *options, *more, model=model) as server:
        if quest is not None:
            server.rpc("quest_reset")
        done = {key: server.chat(text, TOKENS) for key, text in questions().items()}
        counters = {} if quest is None else server.rpc("quest_counters")[0]
    return Asked(
        {key: one.choices[0].message.content for key, one in done.items()},
        min(one.usage.prompt_tokens for one in done.values()),
        sum(one.usage.completion_tokens for one in done.values()),
        counters,
    )


@pytest.fixture(scope="module")
def stock(model_folder: Path) -> Asked:
    return ask(model_folder, None)


def test_stock_finds_the_pass_keys(stock: Asked) -> None:
    """Else the others show nothing."""
    assert len(stock.found) == QUESTIONS, stock


@pytest.mark.parametrize("name", ARMS)
def test_quest_finds_the_pass_keys_that_stock_finds(name: str, stock: Asked, model_folder: Path) -> None:
    budget = ARMS[name]["token_budget"]
    asked = ask(model_folder, ARMS[name])
    assert asked.prompt_tokens == stock.prompt_tokens > 2.5 * budget
    missed = set(stock.found) - set(asked.found)
    assert len(missed) <= MARGIN, asked
    rows, counters = asked.answer_tokens - QUESTIONS, asked.counters  # an answer's first token is the prompt's
    assert counters["sparse_rows"] == rows > 0 == counters["dense_rows"]
    assert counters["tokens_read"] <= budget * rows
    assert counters["tokens_held"] >= asked.prompt_tokens * rows


def test_a_model_that_drafts_with_quest_answers_as_stock_does(stock: Asked, model_folder: Path) -> None:
    """Character by character, though Quest reads a sixth of the context where it drafts."""
    asked = ask(model_folder, ARMS["sketch"], "--speculative-config", json.dumps(scenario.DRAFTED))
    assert asked.answers == stock.answers
    counters = asked.counters
    assert counters["verified_sparse_rows"] == 0 < counters["verified_rows"] < stock.answer_tokens - QUESTIONS
    assert counters["sparse_rows"] > counters["verified_rows"]

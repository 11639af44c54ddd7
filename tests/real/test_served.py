"""A real model behind vLLM's OpenAI server, stock and with Quest: the same client asks both for the same pass keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="runs with make test-real-vllm, in the environment that has vLLM")

import scenario
from pass_keys import QUESTIONS, Asked, ask, assert_as_found

CHARACTERS = 12_000
"""Of the book in which a key is hidden: with SmolLM2's tokenizer some 2,700 tokens, at which stock finds every key."""
MARGIN = 1
"""Keys that Quest may miss and stock finds: an eighth of them."""
ARMS = {"moments": {"token_budget": 1024}, "sketch": {"token_budget": 512, **scenario.SKETCH}}
"""What is the default on a CPU, and what is it on a GPU. Budgets are a third and a sixth of the context."""
OPTIONS = ("--dtype", "float32", "--block-size", str(scenario.BLOCK))
MINUTES = 10
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * MINUTES)]


@pytest.fixture(scope="module")
def stock(model_folder: Path) -> Asked:
    return ask(model_folder, None, CHARACTERS, *OPTIONS)


def test_stock_finds_the_pass_keys(stock: Asked) -> None:
    """Else the others show nothing."""
    assert len(stock.found) == QUESTIONS, stock


@pytest.mark.parametrize("name", ARMS)
def test_quest_finds_the_pass_keys_that_stock_finds(name: str, stock: Asked, model_folder: Path) -> None:
    asked = ask(model_folder, ARMS[name], CHARACTERS, *OPTIONS)
    assert_as_found(asked, stock, ARMS[name]["token_budget"], MARGIN)


def test_a_model_that_drafts_with_quest_answers_as_stock_does(stock: Asked, model_folder: Path) -> None:
    """Character by character, though Quest reads a sixth of the context where it drafts."""
    drafting = ("--speculative-config", json.dumps(scenario.DRAFTED))
    asked = ask(model_folder, ARMS["sketch"], CHARACTERS, *OPTIONS, *drafting)
    assert asked.answers == stock.answers
    counters = asked.counters
    assert counters["verified_sparse_rows"] == 0 < counters["verified_rows"] < stock.answer_tokens - QUESTIONS
    assert counters["sparse_rows"] > counters["verified_rows"]

"""Public models behind vLLM's OpenAI server on a GPU, stock and with Quest: as tests/real has them on a CPU.

tools/unpack_gguf.py .models/qwen.gguf .models/qwen  # and gemma, both fetched by tools/real_models.py
QUEST_REAL_MODELS=.models python -m pytest -m gpu tests/gpu/test_served_models.py
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pass_keys import QUESTIONS, ask, assert_as_found

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif("QUEST_REAL_MODELS" not in os.environ, reason="QUEST_REAL_MODELS names no folder of models"),
]


@dataclass(frozen=True)
class Served:
    """A model and what it is asked.

    Attributes:
        chats: Whether it was trained for chats.
        characters: Of the book.
        quest: Options of Quest: its defaults, sketches at 512 tokens, but for what such a model wants.
        least: Keys that stock finds at least, of `QUESTIONS`; else Quest's answers show nothing.
    """

    chats: bool
    characters: int
    quest: dict[str, Any]
    least: int = QUESTIONS - 2


MODELS = {
    "qwen": Served(True, 110_000, {"token_budget": 512}),
    "gemma": Served(False, 32_000, {"token_budget": 512, "num_dense_layers": 0}),  # of three layers with full attention
}
OPTIONS = (
    "--dtype", "bfloat16", "--block-size", "16", "--max-model-len", "32768", "--kv-cache-memory-bytes", "4G",
    "--gpu-memory-utilization", "0.2",
)  # fmt: skip
MARGIN = 1
"""Keys that Quest may miss and stock finds."""


@pytest.mark.parametrize("name", MODELS)
def test_quest_finds_the_pass_keys_that_stock_finds(name: str, record_property: Callable[[str, object], None]) -> None:
    folder, served = Path(os.environ["QUEST_REAL_MODELS"]) / name, MODELS[name]
    assert (folder / "config.json").is_file(), f"{folder} holds no model: tools/unpack_gguf.py makes one"
    stock = ask(folder, None, served.characters, *OPTIONS, chats=served.chats)
    record_property("stock", str(stock))  # in the report that --junitxml writes
    assert len(stock.found) >= served.least, stock
    asked = ask(folder, served.quest, served.characters, *OPTIONS, chats=served.chats)
    record_property("Quest", str(asked))
    assert_as_found(asked, stock, served.quest["token_budget"], MARGIN)

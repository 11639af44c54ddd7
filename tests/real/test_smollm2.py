"""A real model, end to end, as a user runs it: `generate()` and the commands, with the file that they are given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quest_attention import QuestConfig, enable_quest
from quest_attention.cli.loading import LoadedModel
from quest_attention.eval.excerpt import SOUTH

LAYERS, DENSE_LAYERS = 30, 2
KEY = "48213"
BOOK_TOKENS = 2100
"""Of the book in which the key is hidden: twice the budget, and well within what the model was trained on."""


def quest(*arguments: str) -> str:
    """What a command writes to standard output."""
    command = [sys.executable, "-m", "quest_attention.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def generate(loaded: LoadedModel, ids: Tensor, new: int, **options: Any) -> Any:
    model: Any = loaded.model
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )


def book(loaded: LoadedModel, start: int, stop: int) -> str:
    return str(loaded.tokenizer.decode(loaded.tokenizer(SOUTH.text()).input_ids[start:stop]))


@pytest.fixture(scope="module")
def text(loaded: LoadedModel) -> Tensor:
    return torch.tensor([loaded.tokenizer(book(loaded, 0, 400)).input_ids])


def test_a_budget_that_holds_everything_gives_what_transformers_gives(loaded: LoadedModel, text: Tensor) -> None:
    options = {"min_new_tokens": 16, "output_logits": True, "return_dict_in_generate": True}
    theirs = generate(loaded, text, 16, **options)
    with enable_quest(loaded.model, QuestConfig(token_budget=1024)) as handle:
        ours = generate(loaded, text, 16, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-3)
    assert handle.counters.sparse_steps == 0 and handle.counters.dense_steps == 15 * LAYERS


def test_a_small_budget_reads_only_so_much(loaded: LoadedModel, text: Tensor) -> None:
    with enable_quest(loaded.model, QuestConfig(token_budget=128)) as handle:
        generate(loaded, text, 16, min_new_tokens=16)
    counters = handle.counters
    assert counters.sparse_steps == 15 * (LAYERS - DENSE_LAYERS), "the prefill gives the first token"
    assert counters.dense_steps == 15 * DENSE_LAYERS and counters.bypassed_steps == 0
    for layer in counters.layers[DENSE_LAYERS:]:
        assert layer.pages_read == 15 * 128 // 16 < layer.pages_held


def test_the_tokenizer_is_that_of_the_model(loaded: LoadedModel) -> None:
    tokenizer = loaded.tokenizer
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(turn, add_special_tokens=False).input_ids
    start, end, newline = 1, 2, 198
    assert ids[-9:] == [start, 4093, newline, 26843, end, newline, start, 520, 9531, newline][-9:]
    assert tokenizer("").input_ids == [] and tokenizer.eos_token_id == end
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n1  23").input_ids) == ["a", "ĊĊ", "1", "ĠĠ", "2", "3"]
    assert loaded.model.generation_config.eos_token_id == [0, end]


def test_a_pass_key_is_found_with_half_of_the_cache(loaded: LoadedModel) -> None:
    middle = BOOK_TOKENS // 2
    content = (
        f"{book(loaded, 0, middle)}\nThe pass key is {KEY}. Remember it: {KEY} is the pass key.\n"
        f"{book(loaded, middle, BOOK_TOKENS)}\n\nWhat is the pass key? Answer with the number."
    )
    turn = [{"role": "user", "content": content}]
    ids = loaded.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    answers = [generate(loaded, ids, 24)]
    with enable_quest(loaded.model, QuestConfig(token_budget=1024)) as handle:
        answers.append(generate(loaded, ids, 24))
    for answer in answers:
        assert KEY in loaded.tokenizer.decode(answer[0, ids.shape[1] :])
        assert answer[0, -1] == loaded.tokenizer.eos_token_id, "the answer ends with its turn"
    steps = answers[1].shape[1] - ids.shape[1] - 1
    assert handle.counters.sparse_steps == steps * (LAYERS - DENSE_LAYERS)
    assert handle.counters.share_read < 0.6


def test_a_chat_is_answered_and_ends(model_file: Path) -> None:
    question = "What is the capital of France?"
    said = json.loads(quest("generate", "--model", str(model_file), "--chat", "-p", question, "-n", "64", "--json"))
    assert said["model"] == "smollm2.gguf"
    assert "Paris" in said["text"] and "<|" not in said["text"]
    assert said["new_tokens"] < 64


def test_eval_measures_it(model_file: Path, tmp_path: Path) -> None:
    plan = ["passkey", "--method", "full,quest", "-b", "128", "-l", "768", "-n", "1", "-o", str(tmp_path / "run")]
    assert "quest" in quest("eval", *plan, "--model", str(model_file))
    settings = json.loads((tmp_path / "run" / "settings.json").read_text(encoding="utf-8"))
    assert settings["model"] == "smollm2.gguf" and settings["dtype"] == "float32"
    assert "--model smollm2.gguf" in settings["command"]


def test_the_demo_shows_it(model_file: Path) -> None:
    report = json.loads(quest("demo", "--model", str(model_file), "--length", "768", "-b", "128", "--json"))
    assert report["model"].startswith("smollm2.gguf, 134.5M parameters, float32, cpu")
    full, sparse, window, lossless = report["results"]
    assert [sparse["tokens_per_step"], window["tokens_per_step"]] == [128, 128]
    assert sparse["sparse_layer_steps"] > 0
    assert lossless["answer"] == full["answer"], "though Quest drafts"

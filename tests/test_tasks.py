"""The task generators, with the bundled tokenizer and words for a haystack."""

from __future__ import annotations

import collections
import functools
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quest_attention import QuestValueError
from quest_attention.eval.tasks import TASKS, Sample, is_correct, key_words, make_facts, make_sample
from quest_attention.models import bundled_model_path

LENGTH = 2048


@functools.cache
def tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(bundled_model_path())


def encode(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


@functools.cache
def haystack() -> tuple[int, ...]:
    rng = random.Random(0)
    return tuple(encode(" ".join(rng.choices(key_words("train"), k=LENGTH)))[:LENGTH])


def sample(task: str, seed: int = 0, **options: object) -> Sample:
    return make_sample(task, encode, haystack(), LENGTH, seed, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_holds_its_facts_and_fits_its_length(task: str) -> None:
    made = sample(task)
    assert made == sample(task), "a function of its seed"
    assert made.context_ids != sample(task, seed=1).context_ids
    used = len(made.context_ids) + len(made.question_ids) + made.max_new_tokens
    assert used == LENGTH
    text = tokenizer().decode(made.context_ids)
    for fact in made.facts:
        assert text.count(fact) == 1
    for position, fact, depth in zip(made.fact_positions, made.facts, made.depths, strict=True):
        ids = encode(fact)
        assert list(made.context_ids[position : position + len(ids)]) == ids
        assert depth == position / len(made.context_ids)
    assert tokenizer().decode(made.question_ids) == made.question


@pytest.mark.parametrize("task", TASKS)
def test_scoring(task: str) -> None:
    made = sample(task)
    reply = " " + ", ".join(made.answers) + "."
    assert is_correct(made, reply + " and whatever comes after it, 12345.")
    assert not is_correct(made, "")
    assert not is_correct(made, " " + ", ".join(answer[:-1] for answer in made.answers))
    assert not is_correct(made, " " + ", ".join(answer + "0" for answer in made.answers))
    if len(made.answers) > 1:
        assert not is_correct(made, " " + ", ".join(made.answers[1:]))
    elif made.answers[0].isdecimal():
        assert not is_correct(made, f" 999, {made.answers[0]}")


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_depth_asked_for(depth: float) -> None:
    assert sample("passkey", depth=depth).depths[0] == pytest.approx(depth, abs=0.05)


@pytest.mark.parametrize("task", ["niah_multikey_1", "niah_multikey_2", "needle_of_30"])
def test_no_distractor_answers_the_question(task: str) -> None:
    for seed in range(5):
        made = sample(task, seed=seed)
        head = made.facts[0].strip().split(" is: ")[0]
        assert tokenizer().decode(made.context_ids).count(head + " is: ") == 1


def test_key_words_of_training_and_evaluation_are_apart() -> None:
    assert not set(key_words("train")) & set(key_words("eval"))
    assert len(key_words("eval")) == 800
    fact, _ = make_facts(random.Random(3), "eval", "needle")
    assert any(word in fact.question for word in key_words("eval"))


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"task": "nothing"}, "task"),
        ({"length": 20}, "length"),
        ({"length": 4096}, "haystack"),
        ({"depth": 1.5}, "depth"),
        ({"depth": -0.1}, "depth"),
    ],
)
def test_bad_arguments(options: dict[str, object], argument: str) -> None:
    arguments: dict[str, object] = {"task": "passkey", "length": LENGTH, "depth": None} | options
    with pytest.raises(QuestValueError) as caught:
        make_sample(  # type: ignore[call-overload]
            arguments["task"], encode, haystack(), arguments["length"], 0, depth=arguments["depth"]
        )
    assert caught.value.argument == argument


def test_the_model_card_is_what_its_measurements_make_of_it() -> None:
    root = Path(__file__).resolve().parent.parent
    namespace: dict[str, object] = {"__file__": str(root / "training" / "card.py"), "__name__": "card"}
    exec((root / "training" / "card.py").read_text(encoding="utf-8"), namespace)
    make_card = namespace["make_card"]
    assert callable(make_card)
    assert make_card() == (bundled_model_path() / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("task", "count", "repeats"), [("common_words", 10, 10), ("frequent_words", 3, 30)])
def test_word_lists_hold_their_answers_most_often(task: str, count: int, repeats: int) -> None:
    made = sample(task)
    said = collections.Counter(tokenizer().decode(made.context_ids).split())
    others = max(said[word] for word in key_words("eval") if word not in made.answers)
    assert len(made.answers) == count
    assert min(said[word] for word in made.answers) > max(0.8 * repeats * 1, 2 * others)


def test_word_lists_need_room() -> None:
    with pytest.raises(QuestValueError, match="most are to be others"):
        make_sample("common_words", encode, haystack(), 256, 0)

"""Retrieval tasks made offline: facts hidden in a haystack, and a question that comes after it.

Passkey is close to the template of Mohtashami and Jaggi (arXiv:2305.16300), used by the Quest paper; the needle tasks
and variable tracking hide and ask what RULER's do (Hsieh et al., arXiv:2404.06654), in wording of our own: other
preambles, single words as keys, books where RULER has essays under copyright. Figures compare methods here, not with
theirs. Every sample is a function of its seed. The question is kept apart from the context, since an evaluation must
feed it as decode steps: a method that compresses the prompt would otherwise know what is asked.
"""

from __future__ import annotations

import itertools
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from quest_attention.errors import QuestValueError
from quest_attention.eval.frame import NO_FRAME, Frame

__all__ = [
    "CONTINUATION",
    "GRID",
    "PERPLEXITY",
    "RECALL",
    "TASKS",
    "Encode",
    "Fact",
    "Sample",
    "Split",
    "Task",
    "Value",
    "frequent_words",
    "identifier",
    "is_correct",
    "key_words",
    "make_facts",
    "make_sample",
    "needle_text",
    "needles",
    "noise",
    "number",
    "passkey",
    "variable_chain",
    "word",
]

Split = Literal["train", "eval"]
Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens."""

PERPLEXITY = "perplexity"
"""Whole books, token by token."""
CONTINUATION = "continuation"
"""The last tokens of stretches of books."""
RECALL = "recall"
"""What of the attention is read."""
GRID = "needle_grid"
"""One needle at fixed depths, for a picture of depth by length."""

_HELD_OUT_STRIDE = 5
"""Every fifth key word is kept from training."""
_PASSKEY_MAX = 50_000
_NUMBER_DIGITS = 7
"""RULER's magic numbers have seven digits."""
_ANSWER_RESERVE = 8
"""Tokens left free after question and answer, so that a sample of the longest context still fits the model."""

_ANSWER_STEP = 8
"""Room for an answer is a multiple of this, so that samples of a task are of one length more often [tokens]."""

_PASSKEY_PREAMBLE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
_NEEDLE_PREAMBLE = (
    "Some special magic values are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the values afterwards.\n"
)
_WORDS_PREAMBLE = (
    "Below is a list of words. Some of them come up far more often than the others. Memorize which ones.\n"
)
_CHAIN_PREAMBLE = "Memorize and track the chains of variable assignment hidden in the following text.\n"
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


@dataclass(frozen=True)
class Fact:
    """What is hidden, what is asked, and what counts as an answer.

    Attributes:
        texts: Sentences to hide, each at a place of its own.
        asked: The question.
        lead: How the answer begins: given, so that what follows is the answer itself.
        answers: All of these must be in the answer.
        reply: The answer in the form the bundled model was trained on.
    """

    texts: tuple[str, ...]
    asked: str
    lead: str
    answers: tuple[str, ...]
    reply: str

    @property
    def question(self) -> str:
        """Question and lead as plain text: ends where the model goes on."""
        return f"{self.asked} {self.lead}"


@dataclass(frozen=True)
class Sample:
    """One question about one context.

    Attributes:
        task: Name in `TASKS`.
        context_ids: Token ids of the context.
        question_ids: Token ids of the question, to be fed after the context.
        question: The question as text.
        facts: The sentences that hold the answer.
        fact_positions: Token index in the context where each of them begins.
        depths: The same as a share of the context, 0 to 1.
        answers: What the answer must hold.
        max_new_tokens: How many tokens the answer may take.
    """

    task: str
    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    question: str
    facts: tuple[str, ...]
    fact_positions: tuple[int, ...]
    depths: tuple[float, ...]
    answers: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        make: Makes the fact asked about and the facts that distract, from a source of randomness and the key words.
        preamble: What a context begins with.
        haystack: `"book"`, `"noise"`, `"needles"`: nothing but distracting facts, or `"words"`: a list that holds each
            answer `repeats` times as often as any other word.
        repeats: See there.
    """

    make: Callable[[random.Random, Sequence[str]], tuple[Fact, list[Fact]]]
    preamble: str
    haystack: Literal["book", "noise", "needles", "words"] = "book"
    repeats: int = 0


@cache
def key_words(split: Split) -> tuple[str, ...]:
    """Words to make keys and values from; those of `"eval"` are never seen in training."""
    words = resources.files("quest_attention.eval").joinpath("key-words.txt").read_text(encoding="utf-8").split()
    return tuple(word for i, word in enumerate(words) if (i % _HELD_OUT_STRIDE == 0) == (split == "eval"))


def noise(encode: Encode, length: int) -> list[int]:
    """`length` tokens of the passkey task's original filler."""
    one = encode(_NOISE)
    return (one * (length // len(one) + 1))[:length]


def passkey(rng: random.Random) -> Fact:
    """A number from 1 to 50000 that the text says is the pass key."""
    key = str(rng.randint(1, _PASSKEY_MAX))
    text = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    return Fact((text,), "\nWhat is the pass key?", "The pass key is", (key,), f" {key}.")


def number(rng: random.Random, words: Sequence[str]) -> str:
    """A magic number of seven digits."""
    return str(rng.randrange(10 ** (_NUMBER_DIGITS - 1), 10**_NUMBER_DIGITS))


def word(rng: random.Random, words: Sequence[str]) -> str:
    """A key word."""
    return rng.choice(words)


def identifier(rng: random.Random, words: Sequence[str]) -> str:
    """A UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


Value = Callable[[random.Random, Sequence[str]], str]
"""Makes a key or a value from a source of randomness and the key words."""
_KINDS: dict[Value, str] = {number: "number", word: "word", identifier: "uuid"}


def needle_text(key: str, value: str, kind: str) -> str:
    """One of RULER's needles."""
    return f"\nOne of the special magic {kind}s for {key} is: {value}.\n"


def needles(
    rng: random.Random, words: Sequence[str], *, keys: Value, values: Value, per_key: int, queries: int
) -> Fact:
    """`queries` keys of `per_key` values each, all asked for.

    Args:
        rng: Source of randomness.
        words: Key words.
        keys: Makes a key.
        values: Makes a value.
        per_key: Values of each key.
        queries: Keys asked for.
    """
    kind = _KINDS[values]
    asked: dict[str, list[str]] = {}
    while len(asked) < queries:
        asked[keys(rng, words)] = [values(rng, words) for _ in range(per_key)]
    texts = tuple(needle_text(key, value, kind) for key, held in asked.items() for value in held)
    answers = tuple(value for held in asked.values() for value in held)
    names = list(asked)
    joined = names[0] if len(names) == 1 else ", ".join(names[:-1]) + f", and {names[-1]}"
    if len(answers) == 1:
        start, verb, what = "What is the", "is", f"special magic {kind}"
    else:
        start, verb, what = "What are all the", "are", f"special magic {kind}s"
    where = f"{what} for {joined} mentioned in the provided text"
    return Fact(texts, f"\n{start} {where}?", f"The {where} {verb}", answers, " " + ", ".join(answers) + ".")


def variable_chain(rng: random.Random, words: Sequence[str], hops: int = 4) -> Fact:
    """RULER's variable tracking: a value handed from variable to variable; all its holders are asked for."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(rng.choices(letters, k=5))
        if name not in names:
            names.append(name)
    value = str(rng.randrange(10_000, 100_000))
    texts = [f"\nVAR {names[0]} = {value}\n"]
    texts += [f"\nVAR {new} = VAR {old}\n" for old, new in itertools.pairwise(names)]
    asked = f"\nFind all variables that are assigned the value {value} in the text above."
    return Fact(tuple(texts), asked, "They are:", tuple(names), " " + ", ".join(names) + ".")


def frequent_words(rng: random.Random, words: Sequence[str], count: int) -> Fact:
    """RULER's word counting: the words that a list holds most often; the list itself is the haystack."""
    answers = tuple(rng.sample(list(words), count))
    asked = f"\nWhat are the {count} most frequent words in the list above?"
    return Fact((), asked, "The most frequent words are", answers, " " + ", ".join(answers) + ".")


def _single(keys: Value, values: Value, distractors: int = 0, **shape: int) -> Callable[..., tuple[Fact, list[Fact]]]:
    sizes = {"per_key": 1, "queries": 1} | shape

    def make(rng: random.Random, words: Sequence[str]) -> tuple[Fact, list[Fact]]:
        fact = needles(rng, words, keys=keys, values=values, **sizes)
        others = [needles(rng, words, keys=keys, values=values, per_key=1, queries=1) for _ in range(distractors)]
        return fact, [other for other in others if not _same_key(fact, other)]

    return make


def _same_key(fact: Fact, other: Fact) -> bool:
    """Whether a distracting needle would be a second answer to the question."""
    head = other.texts[0].split(" is: ")[0]
    return any(text.startswith(head + " is: ") for text in fact.texts)


TASKS: dict[str, Task] = {
    "passkey": Task(lambda rng, words: (passkey(rng), []), _PASSKEY_PREAMBLE),
    "passkey_noise": Task(lambda rng, words: (passkey(rng), []), _PASSKEY_PREAMBLE, "noise"),
    "needle": Task(_single(word, number), _NEEDLE_PREAMBLE),
    "needle_of_30": Task(_single(word, number, distractors=29), _NEEDLE_PREAMBLE),
    "niah_single_1": Task(_single(word, number), _NEEDLE_PREAMBLE, "noise"),
    "niah_single_2": Task(_single(word, number), _NEEDLE_PREAMBLE),
    "niah_single_3": Task(_single(word, identifier), _NEEDLE_PREAMBLE),
    "niah_multikey_1": Task(_single(word, number, distractors=3), _NEEDLE_PREAMBLE),
    "niah_multikey_2": Task(_single(word, number), _NEEDLE_PREAMBLE, "needles"),
    "niah_multikey_3": Task(_single(identifier, identifier), _NEEDLE_PREAMBLE, "needles"),
    "niah_multivalue": Task(_single(word, number, per_key=4), _NEEDLE_PREAMBLE),
    "niah_multiquery": Task(_single(word, number, queries=4), _NEEDLE_PREAMBLE),
    "variable_tracking": Task(lambda rng, words: (variable_chain(rng, words), []), _CHAIN_PREAMBLE, "noise"),
    "common_words": Task(lambda rng, words: (frequent_words(rng, words, 10), []), _WORDS_PREAMBLE, "words", 10),
    "frequent_words": Task(lambda rng, words: (frequent_words(rng, words, 3), []), _WORDS_PREAMBLE, "words", 30),
}
"""Every task by name. The `niah_*` names and what they hide are RULER's; the wording is not. So are the two that count
words, but for their lists: RULER numbers its common words, and draws frequent ones, of letters, from a zeta law."""


def make_facts(rng: random.Random, split: Split, task: str) -> tuple[Fact, list[Fact]]:
    """The fact asked about and the facts that distract, of one sample of a task.

    Raises:
        QuestValueError: The task is unknown.
    """
    return _task(task).make(rng, key_words(split))


def make_sample(
    task: str,
    encode: Encode,
    haystack: Sequence[int],
    length: int,
    seed: int,
    *,
    depth: float | None = None,
    split: Split = "eval",
    frame: Frame = NO_FRAME,
) -> Sample:
    """Hide the facts of a task in a haystack, so that context, question and answer together have `length` tokens.

    Args:
        task: Name in `TASKS`.
        encode: Text to token ids, without special tokens.
        haystack: Token ids of the text to hide in, at least `length` of them; not used where a task brings its own.
        length: Tokens of context, question and room for the answer together [tokens].
        seed: Everything random follows from it.
        depth: Where the first fact begins, as a share of the filler text around the facts, 0 to 1; drawn from the seed
            by default.
        split: Whose key words.
        frame: What stands around context and question; it counts in the length. In a chat the question is the user's
            and its lead the beginning of the model's turn, as in RULER.

    Raises:
        QuestValueError: The task is unknown, the depth is not from 0 to 1, or the length or haystack is too short.
    """
    kind = _task(task)
    if depth is not None and not 0 <= depth <= 1:
        raise QuestValueError("depth", depth, "a share from 0 to 1")
    rng = random.Random(f"{task}/{seed}")
    words = key_words(split)
    fact, distractors = kind.make(rng, words)
    in_turns = [*encode(fact.asked), *frame.tail, *encode(fact.lead)]
    question_ids = in_turns if frame.is_chat else encode(fact.question)
    preamble = [*frame.head, *encode(kind.preamble)]
    hidden = [encode(text) for text in fact.texts]
    others = [encode(text) for other in distractors for text in other.texts]
    max_new_tokens = -(-(len(encode(fact.reply)) + _ANSWER_RESERVE) // _ANSWER_STEP) * _ANSWER_STEP
    room = length - len(question_ids) - max_new_tokens - len(preamble) - sum(map(len, hidden)) - sum(map(len, others))
    if room < 0:
        raise QuestValueError("length", length, f"at least {length - room} tokens for {task}")
    if kind.haystack == "needles":
        filler = _needle_haystack(rng, words, encode, kind, fact, room)
    elif kind.haystack == "words":
        filler = _word_haystack(rng, words, encode, fact, kind.repeats, room)
    elif kind.haystack == "noise":
        filler = noise(encode, room)
    else:
        filler = list(haystack[:room])
    if len(filler) < room:
        raise QuestValueError("haystack", f"{len(filler)} tokens", f"at least {room}")
    places = sorted(rng.randint(0, room) for _ in hidden)
    if depth is not None and places:
        places[0] = min(round(depth * room), *places[1:], room)
    pieces = [(place, True, ids) for place, ids in zip(places, hidden, strict=True)]
    pieces += [(rng.randint(0, room), False, ids) for ids in others]
    context, positions, done = list(preamble), [], 0
    for place, is_fact, ids in sorted(pieces, key=lambda piece: piece[0]):
        context += filler[done:place]
        done = place
        if is_fact:
            positions.append(len(context))
        context += ids
    context += filler[done:]
    return Sample(
        task=task,
        context_ids=tuple(context),
        question_ids=tuple(question_ids),
        question=fact.question,
        facts=fact.texts,
        fact_positions=tuple(positions),
        depths=tuple(position / len(context) for position in positions),
        answers=fact.answers,
        max_new_tokens=max_new_tokens,
    )


def _needle_haystack(
    rng: random.Random, words: Sequence[str], encode: Encode, kind: Task, fact: Fact, room: int
) -> list[int]:
    """`room` tokens of needles like the one asked for, none with its key."""
    filler: list[int] = []
    while len(filler) < room:
        other, _ = kind.make(rng, words)
        if not _same_key(fact, other):
            filler += encode(other.texts[0])
    return filler[:room]


def _word_haystack(
    rng: random.Random, words: Sequence[str], encode: Encode, fact: Fact, repeats: int, room: int
) -> list[int]:
    """`room` tokens of words in random order: each answer about `repeats` times as often as any other.

    Raises:
        QuestValueError: There is too little room for the answers.
    """
    others = [other for other in words if other not in fact.answers]
    rng.shuffle(others)
    sizes = {one: len(encode(f" {one}")) for one in (*others, *fact.answers)}
    answers = repeats * sum(sizes[one] for one in fact.answers)  # tokens they take for each round of others
    if answers > room // 2:
        raise QuestValueError("length", f"{room} tokens for words", f"at least {2 * answers}: most are to be others")
    rounds = max(1, room // (answers + sum(sizes[one] for one in others)))
    chosen, size = list(fact.answers) * (repeats * rounds), rounds * answers
    for number in itertools.count():
        if size >= room:
            break
        chosen.append(others[number % len(others)])
        size += sizes[chosen[-1]]
    rng.shuffle(chosen)
    return [token for one in chosen for token in encode(f" {one}")][:room]


def is_correct(sample: Sample, generated: str) -> bool:
    """Whether an answer is right: every expected value is in it as a word, and for one number it is the first.

    Words, UUIDs and lists may stand among others, as in RULER; `max_new_tokens` leaves little room for that.

    Args:
        sample: What was asked.
        generated: The text that the model produced after the question.

    >>> sample = Sample("passkey", (), (), "", (), (), (), ("4031",), 8)
    >>> is_correct(sample, " 4031."), is_correct(sample, " 40317."), is_correct(sample, " 7, 4031.")
    (True, False, False)
    """
    if len(sample.answers) == 1 and sample.answers[0].isdecimal():
        found = re.search(r"\d+", generated)
        return found is not None and found.group() == sample.answers[0]
    said = set(re.findall(r"[\w-]+", generated))
    return said.issuperset(sample.answers)


def _task(name: str) -> Task:
    if name not in TASKS:
        raise QuestValueError("task", name, f"one of {', '.join(TASKS)}")
    return TASKS[name]


# Longer than 250 lines: tasks, facts and samples are made of one another, and training takes them from one place.

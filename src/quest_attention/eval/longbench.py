"""LongBench from a local copy of its data: the six tasks of the Quest paper.

Source: Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding", ACL 2024,
arXiv:2308.14508. Files, lengths of answers, cutting in the middle and metrics are LongBench's; the wording of the
prompts is our own, so figures compare methods with each other, not with published ones. The question is kept apart
from the context, since an evaluation feeds it as decode steps; so that it stays short, the passage that a question of
TriviaQA brings along goes to the end of the context. Further deviations: only the context is cut, never the
instruction; no chat template is put around a prompt; ROUGE-L is one longest common subsequence over lowercased words,
without a union over sentences.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quest_attention.errors import QuestValueError
from quest_attention.eval.frame import NO_FRAME, Frame
from quest_attention.eval.tasks import Encode

__all__ = ["LONGBENCH", "LONGBENCH_PREFIX", "Document", "LongBenchTask", "document_file", "load_documents", "score"]

LONGBENCH_PREFIX = "longbench_"
"""Of the names of its tasks."""


@dataclass(frozen=True)
class LongBenchTask:
    """One of LongBench's tasks.

    Attributes:
        head: What comes before the context.
        question: What comes after it; `{input}` stands for the document's own question.
        max_new_tokens: Of the answer, as in LongBench [tokens].
        metric: F1 over words, or ROUGE-L.
        is_first_line: Whether the answer ends at the first line break.
        asks_last: Whether `input` holds a passage of its own before its last "Question:".
    """

    head: str
    question: str
    max_new_tokens: int
    metric: Literal["f1", "rouge_l"] = "f1"
    is_first_line: bool = False
    asks_last: bool = False


_SHORT = "\n\nAnswer the question from the text above, in a few words.\nQuestion: {input}\nAnswer:"
LONGBENCH: dict[str, LongBenchTask] = {
    f"{LONGBENCH_PREFIX}narrativeqa": LongBenchTask("A story follows, and a question about it.\n\n", _SHORT, 128),
    f"{LONGBENCH_PREFIX}qasper": LongBenchTask(
        "A scientific article follows, and a question about it.\n\n",
        "\n\nAnswer the question from the article above, in a few words, with yes or no where that is asked, or with "
        '"unanswerable" where the article does not say.\nQuestion: {input}\nAnswer:',
        128,
    ),
    f"{LONGBENCH_PREFIX}multifieldqa_en": LongBenchTask("A text follows, and a question about it.\n\n", _SHORT, 64),
    f"{LONGBENCH_PREFIX}hotpotqa": LongBenchTask("Some passages follow, and a question about them.\n\n", _SHORT, 32),
    f"{LONGBENCH_PREFIX}gov_report": LongBenchTask(
        "A report of a government agency follows.\n\n",
        "\n\nSummarize the report on one page.\nSummary:",
        512,
        "rouge_l",
    ),
    f"{LONGBENCH_PREFIX}triviaqa": LongBenchTask(
        "Passages with questions and their answers follow.\n\n", "\n{input}", 32, is_first_line=True, asks_last=True
    ),
}
"""The tasks by name; the file of a task is its name without the prefix, with `.jsonl`."""


@dataclass(frozen=True)
class Document:
    """One question about one document.

    Attributes:
        task: Name in `LONGBENCH`.
        context_ids: Token ids of the context.
        question_ids: Token ids of the question, to be fed after it.
        answers: Each of them is right.
        max_new_tokens: Of the answer [tokens].
    """

    task: str
    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    answers: tuple[str, ...]
    max_new_tokens: int


def load_documents(task: str, folder: Path, encode: Encode, length: int, *, frame: Frame = NO_FRAME) -> list[Document]:
    """Every document of a task, cut in the middle where it is too long.

    Args:
        task: Name in `LONGBENCH`.
        folder: With LongBench's files.
        encode: Text to token ids, without special tokens.
        length: Most tokens of context, question and answer together [tokens].
        frame: What stands around context and question; it counts in the length.

    Raises:
        QuestValueError: The task is unknown, its file is missing or broken, or a question leaves no room.
    """
    kind = _task(task)
    file = document_file(task, folder)
    documents = []
    # Bytes, since text would also break at the line separators that JSON allows within a string.
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        row = _parse(line, f"{file.name}, line {number}")
        passage, asked, question_text = (
            row["input"].rpartition("Question:") if kind.asks_last else ("", "", row["input"])
        )
        question = [*encode(kind.question.format(input=asked + question_text)), *frame.tail]
        head = [*frame.head, *encode(kind.head)]
        room = length - len(question) - len(head) - kind.max_new_tokens
        if room < 1:
            raise QuestValueError("length", length, f"more than {length - room}, for {file.name}, line {number}")
        context = encode(f"{row['context']}\n\n{passage}" if passage.strip() else row["context"])
        if len(context) > room:
            context = [*context[: room - room // 2], *context[len(context) - room // 2 :]]
        documents.append(Document(task, (*head, *context), tuple(question), tuple(row["answers"]), kind.max_new_tokens))
    if not documents:
        raise QuestValueError("longbench", file.name, "a file with at least one line")
    return documents


def document_file(task: str, folder: Path) -> Path:
    """The file of a task.

    Raises:
        QuestValueError: It is missing.
    """
    file = folder / f"{task.removeprefix(LONGBENCH_PREFIX)}.jsonl"
    if not file.is_file():
        raise QuestValueError("longbench", str(folder), f"a folder with {file.name}")
    return file


def score(task: str, generated: str, answers: Sequence[str]) -> float:
    """How good an answer is, 0 to 1: the best over the right ones.

    Raises:
        QuestValueError: The task is unknown.

    >>> score("longbench_hotpotqa", " The Nile.", ["Nile", "Amazon"])
    1.0
    >>> round(score("longbench_gov_report", "a b x", ["a b c d"]), 3)
    0.571
    """
    kind = _task(task)
    if kind.is_first_line:
        generated = generated.lstrip("\n").split("\n", 1)[0]
    if kind.metric == "rouge_l":
        return max((_rouge_l(generated.lower().split(), answer.lower().split()) for answer in answers), default=0.0)
    return max((_f1(_words(generated), _words(answer)) for answer in answers), default=0.0)


def _words(text: str) -> list[str]:
    """Words without case, punctuation and articles, as SQuAD compares them."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(found: list[str], expected: list[str]) -> float:
    common = sum((Counter(found) & Counter(expected)).values())
    return _balance(common, len(found), len(expected)) if found or expected else 1.0


def _rouge_l(found: list[str], expected: list[str]) -> float:
    """F-measure of the longest common subsequence of words."""
    before = [0] * (len(expected) + 1)
    for one in found:
        row = [0]
        for index, other in enumerate(expected):
            row.append(before[index] + 1 if one == other else max(before[index + 1], row[index]))
        before = row
    return _balance(before[-1], len(found), len(expected)) if found or expected else 1.0


def _balance(common: int, found: int, expected: int) -> float:
    """Harmonic mean of precision and recall."""
    return 2 * common / (found + expected) if common else 0.0


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:
        raise QuestValueError("longbench", place, "a JSON object in UTF-8") from None
    for name, kind in (("input", str), ("context", str), ("answers", list)):
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise QuestValueError("longbench", place, f"a JSON object with {name!r}, a {kind.__name__}")
    if not row["answers"] or not all(isinstance(answer, str) for answer in row["answers"]):
        raise QuestValueError("longbench", place, "at least one answer, each of them text")
    return dict(row)


def _task(name: str) -> LongBenchTask:
    if name not in LONGBENCH:
        raise QuestValueError("task", name, f"one of {', '.join(LONGBENCH)}")
    return LONGBENCH[name]

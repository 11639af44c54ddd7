"""LongBench from a few documents made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest_attention import QuestValueError
from quest_attention.eval.longbench import LONGBENCH, load_documents, score

WORDS = st.lists(st.sampled_from(["river", "hill", "boat", "seven", "the", "a"]), max_size=12).map(" ".join)


def encode(text: str) -> list[int]:
    """A token for each character: what is cut where shows."""
    return [ord(letter) for letter in text]


def write(folder: Path, name: str, *rows: object) -> None:
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def row(context: str = "A long text.", **more: object) -> dict[str, object]:
    return {"input": "Which boat?", "context": context, "answers": ["the red one"], "length": 3, "_id": "0", **more}


@pytest.mark.parametrize("task", LONGBENCH)
def test_question_comes_after_the_context(tmp_path: Path, task: str) -> None:
    write(tmp_path, task.removeprefix("longbench_"), row(), row(context="Another."))
    first, second = load_documents(task, tmp_path, encode, 4096)
    assert "".join(map(chr, first.context_ids)) == LONGBENCH[task].head + "A long text."
    asked = "".join(map(chr, second.question_ids))
    assert asked == LONGBENCH[task].question.format(input="Which boat?")
    assert first.answers == ("the red one",)
    assert first.max_new_tokens == LONGBENCH[task].max_new_tokens


@pytest.mark.parametrize("length", [400, 401])
def test_long_documents_lose_their_middle(tmp_path: Path, length: int) -> None:
    text = "".join(chr(0x4E00 + index) for index in range(3000))
    write(tmp_path, "hotpotqa", row(context=text))
    (document,) = load_documents("longbench_hotpotqa", tmp_path, encode, length)
    kept = "".join(map(chr, document.context_ids)).removeprefix(LONGBENCH["longbench_hotpotqa"].head)
    assert len(document.context_ids) + len(document.question_ids) + document.max_new_tokens == length
    start = next(index for index in range(len(kept)) if kept[index] != text[index])
    assert kept == text[:start] + text[start - len(kept) :]
    assert abs(2 * start - len(kept)) <= 1


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuestValueError, match="one of longbench_narrativeqa"):
        load_documents("longbench_nothing", tmp_path, encode, 100)
    with pytest.raises(QuestValueError, match=r"a folder with qasper\.jsonl"):
        load_documents("longbench_qasper", tmp_path, encode, 100)
    write(tmp_path, "qasper", row(), {"input": "x", "context": "y"})
    with pytest.raises(
        QuestValueError, match=r"'qasper\.jsonl, line 2', expected a JSON object with 'answers', a list"
    ):
        load_documents("longbench_qasper", tmp_path, encode, 4096)
    with pytest.raises(QuestValueError, match="length: got 100, expected more than"):
        load_documents("longbench_qasper", tmp_path, encode, 100)
    for answers in ([], [1]):
        write(tmp_path, "qasper", row(answers=answers))
        with pytest.raises(QuestValueError, match="at least one answer"):
            load_documents("longbench_qasper", tmp_path, encode, 4096)
    (tmp_path / "qasper.jsonl").write_bytes(b'{"input": "\xff"}\n')
    with pytest.raises(QuestValueError, match="line 1', expected a JSON object in UTF-8"):
        load_documents("longbench_qasper", tmp_path, encode, 4096)
    (tmp_path / "qasper.jsonl").write_text("\n")
    with pytest.raises(QuestValueError, match="at least one line"):
        load_documents("longbench_qasper", tmp_path, encode, 4096)
    (tmp_path / "qasper.jsonl").write_text("{\n")
    with pytest.raises(QuestValueError, match="line 1', expected a JSON object"):
        load_documents("longbench_qasper", tmp_path, encode, 4096)


def test_line_separators_within_a_text(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\u0085four"
    line = json.dumps(row(context=text), ensure_ascii=False)
    (tmp_path / "hotpotqa.jsonl").write_text(line + "\r\n", encoding="utf-8", newline="")
    (document,) = load_documents("longbench_hotpotqa", tmp_path, encode, 4096)
    assert "".join(map(chr, document.context_ids)).endswith(text)


def test_a_passage_before_the_question_is_context(tmp_path: Path) -> None:
    asked = "Passage:\nA long one.\nQuestion:\nWho?\nAnswer:"
    write(tmp_path, "triviaqa", row(input=asked))
    (document,) = load_documents("longbench_triviaqa", tmp_path, encode, 4096)
    assert "".join(map(chr, document.question_ids)) == "\nQuestion:\nWho?\nAnswer:"
    assert "".join(map(chr, document.context_ids)).endswith("A long text.\n\nPassage:\nA long one.\n")


def test_scores_by_hand() -> None:
    assert score("longbench_hotpotqa", "The boat, a red boat!", ["red boat"]) == pytest.approx(2 * 2 / 5)
    assert score("longbench_hotpotqa", "nothing", ["red boat", "green"]) == 0
    assert score("longbench_triviaqa", " Paris\nQuestion: more", ["paris"]) == 1
    assert score("longbench_gov_report", "one two three four", ["one three five"]) == pytest.approx(2 * 2 / 7)
    assert score("longbench_qasper", "", ["yes"]) == 0


@given(WORDS, WORDS)
@pytest.mark.parametrize("task", ["longbench_qasper", "longbench_gov_report"])
def test_properties_of_scores(task: str, one: str, other: str) -> None:
    assert 0 <= score(task, one, [other]) <= 1
    assert score(task, one, [one]) == 1
    assert score(task, one, [other]) == pytest.approx(score(task, other, [one]))
    assert score(task, one, [other, one]) == 1

"""The folder of a run: one process writes to it, and nothing that goes wrong there costs an answer."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quest_attention import QuestStateError, QuestValueError, QuestWarning
from quest_attention.cli import run
from quest_attention.eval import run_folder
from quest_attention.eval.journal import SAMPLES, SETTINGS, Journal
from quest_attention.eval.plan import Arm, Job
from quest_attention.eval.report import write_report
from quest_attention.eval.report.samples import read_samples
from quest_attention.eval.rows import parse_rows
from quest_attention.eval.run_folder import hold_folder, write_whole

SETTINGS_OF = {"model": "m", "dtype": "float32", "page_size": 16, "seed": 0, "command": "quest eval", "machine": {}}
ROW = {"task": "passkey", "length": 1024, "index": 0, "method": "quest", "token_budget": 64, "score": 1.0}
ANSWER = {**ROW, "tokens_read": 1, "tokens_held": 2, "seconds": 0.5}
HOLDER = """
import sys, time
from pathlib import Path
from quest_attention.eval.run_folder import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
NO_ROOM = OSError(28, "No space left on device")


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".lock")}


@contextmanager
def another_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes to the folder until it is killed."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


# ----------------------------------------------------------------------------------------------------------------- lock


def test_a_second_run_is_told_of_the_first_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    Journal(folder, SETTINGS_OF).add([ROW])
    before = snapshot(folder)
    with another_run(folder) as other:
        assert run(["eval", "passkey", "-o", str(folder), "-l", "1024", "-b", "64", "-n", "1"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"quest: error: --output: got {str(folder)!r}, expected a folder that no other run")
        assert f"process {other.pid} on {socket.gethostname()} has done so since 2" in line
        assert snapshot(folder) == before


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with another_run(folder) as other:
        with pytest.raises(QuestValueError, match="no other run"), hold_folder(folder):
            pass
        other.kill()
        other.wait()
        with hold_folder(folder):
            Journal(folder, SETTINGS_OF)
    assert snapshot(folder).keys() == {SETTINGS}
    assert not (folder / ".lock.json").exists()


def test_a_run_that_came_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    with hold_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with hold_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_held(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cases = {
        tmp_path / "file": "a folder, not a file",
        tmp_path / "file" / "below": "a folder that can be written: Not a directory",
        tmp_path: "a new or empty folder, or one of a run before",
    }
    for folder, message in cases.items():
        with pytest.raises(QuestValueError, match=message), hold_folder(folder):
            pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


# ----------------------------------------------------------------------------------------------------------- duplicates


def test_equal_answers_are_one(tmp_path: Path) -> None:
    again = {**ANSWER, "seconds": 9.0}
    folder = tmp_path / "run"
    Journal(folder, SETTINGS_OF).add([ANSWER, {**ANSWER, "index": 1}, again])
    (kept,) = [each for each in parse_rows(SAMPLES, (folder / SAMPLES).read_bytes()).values() if each.number != 2]
    assert kept.fields == ANSWER
    assert len(read_samples(folder / SAMPLES)) == 2
    assert Journal(folder, SETTINGS_OF).missing(Job("passkey", 1024, 0), [Arm("quest", 64)]) == []


def test_answers_that_differ_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Journal(folder, SETTINGS_OF).add([ANSWER, {**ANSWER, "index": 1}, {**ANSWER, "score": 0.0}])
    before = snapshot(folder)
    message = r"samples\.jsonl, lines 1 and 3: got 'sample 0 of passkey by quest twice, and not alike'"
    with pytest.raises(QuestValueError, match=message):
        Journal(folder, SETTINGS_OF)
    with pytest.raises(QuestValueError, match=message):
        read_samples(folder / SAMPLES)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"task": "S\xfcd"}\n',
            r"samples\.jsonl, line 2: got 'byte 0xfc at offset 11 of the line', expected text in",
        ),
        (b"\n", r"samples\.jsonl, line 2: got '', expected a JSON object"),
        (b'{"task": "passkey"}\n', r"samples\.jsonl, line 2, length: got 'nothing'"),
        (lines({**ROW, "index": [1]}), r"samples\.jsonl, line 2, index: got \[1\]"),
    ],
)
def test_broken_lines_are_named_and_left(tmp_path: Path, line: bytes, message: str) -> None:
    folder = tmp_path / "run"
    Journal(folder, SETTINGS_OF)
    (folder / SAMPLES).write_bytes(lines(ANSWER) + line + b'{"torn')
    before = snapshot(folder)
    with pytest.raises(QuestValueError, match=message):
        Journal(folder, {**SETTINGS_OF, "num_samples": 9})
    with pytest.raises(QuestValueError, match=message):
        read_samples(folder / SAMPLES)
    assert snapshot(folder) == before


# ------------------------------------------------------------------------------------------------------------- settings


def test_settings_cut_short_say_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Journal(folder, SETTINGS_OF).add([ROW])
    for content in (b"", b'{"model": "m', b"\xff\xfe"):
        (folder / SETTINGS).write_bytes(content)
        with pytest.raises(QuestValueError, match=r"settings\.json'.* of this very command, delete settings\.json and"):
            Journal(folder, SETTINGS_OF)
        assert (folder / SETTINGS).read_bytes() == content
    (folder / SETTINGS).unlink()
    with pytest.warns(QuestWarning, match=r"1 answers? and no settings\.json: what it has is taken for this run's"):
        journal = Journal(folder, SETTINGS_OF)
    assert journal.missing(Job("passkey", 1024, 0), [Arm("quest", 64)]) == []
    settings = json.loads((folder / SETTINGS).read_text())
    assert settings["earlier"][0]["command"].startswith("not known")


def test_empty_settings_without_answers_are_no_loss(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).touch()
    Journal(tmp_path, SETTINGS_OF)
    assert json.loads((tmp_path / SETTINGS).read_text()) == SETTINGS_OF


def test_a_report_names_empty_settings(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).touch()
    (tmp_path / SAMPLES).write_bytes(lines(ANSWER))
    with pytest.raises(QuestValueError, match=r"settings\.json: got 'an empty file', expected the settings of a run"):
        write_report(tmp_path)


# ------------------------------------------------------------------------------------------------------------ full disk


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / SETTINGS
    write_whole(file, "before")

    def fail(_: int) -> None:
        raise NO_ROOM

    monkeypatch.setattr(run_folder.os, "fsync", fail)
    with pytest.raises(
        QuestStateError, match=r"settings\.json could not be written: No space left on device; it is as"
    ):
        write_whole(file, "after")
    assert snapshot(tmp_path) == {SETTINGS: b"before"}


def test_a_full_disk_says_what_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, SETTINGS_OF)
    journal.add([ROW])
    before = snapshot(tmp_path)
    whole = Path.open

    def half(self: Path, mode: str = "r", **options: Any) -> Any:
        """What is written gets to the disk in part, then the disk is full."""
        file = whole(self, mode, **options)

        def write(text: str) -> None:
            type(file).write(file, text[: len(text) // 2])
            file.flush()
            raise NO_ROOM

        class Half:
            def __enter__(self) -> Half:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

        given = Half()
        given.write = write  # type: ignore[attr-defined]
        return given

    monkeypatch.setattr(Path, "open", half)
    with pytest.raises(
        QuestStateError, match=r"No space left on device; what it holds \(1 answer\) is safe, and the same"
    ):
        journal.add([{**ROW, "index": 1}])
    monkeypatch.setattr(Path, "open", whole)
    assert snapshot(tmp_path) == before
    journal.add([{**ROW, "index": 1}])
    assert len(parse_rows(SAMPLES, (tmp_path / SAMPLES).read_bytes())) == 2


def test_the_torn_end_is_cut_without_writing_the_rest_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path, SETTINGS_OF).add([ROW])
    whole = (tmp_path / SAMPLES).read_bytes()
    (tmp_path / SAMPLES).write_bytes(whole + b'{"task')
    inode = (tmp_path / SAMPLES).stat().st_ino

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a disk may be full, and what is there is all there is")

    monkeypatch.setattr(Path, "write_text", never)
    monkeypatch.setattr(Path, "write_bytes", never)
    Journal(tmp_path, SETTINGS_OF)
    assert (tmp_path / SAMPLES).read_bytes() == whole and (tmp_path / SAMPLES).stat().st_ino == inode

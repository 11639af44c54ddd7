"""`Journal`: the folder of a run, a line for each answer, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from quest_attention.errors import QuestStateError, QuestValueError, QuestWarning
from quest_attention.eval.plan import Arm, Job
from quest_attention.eval.rows import Key, key_of, parse_rows
from quest_attention.eval.run_folder import SAMPLES, SETTINGS, check_folder, write_whole
from quest_attention.eval.wording import counted

__all__ = ["SAMPLES", "SETTINGS", "Journal"]

_FIXED = ("model", "dtype", "page_size", "num_dense_layers", "question", "chat", "seed", "books")
"""Settings that every line of a folder shares: a run with others goes elsewhere."""
_MAKING = ("command", "machine")
"""Settings that say how lines were made."""
_LOST = {"command": f"not known: the folder had answers and no {SETTINGS}", "machine": None}


class Journal:
    """Settings and answers of a run, on disk. One process writes to a folder: see `hold_folder`.

    Args:
        folder: Made where it is missing.
        settings: Of this run, ready for JSON. Tasks, methods, budgets, lengths and the number of samples may differ
            from those of the run before: what is there stays, and so do its command and machine, as `earlier`.

    Raises:
        QuestValueError: The folder is of a run with another model, seed or the like, or holds something else, or a
            file of it is broken. Nothing was changed then.
        QuestStateError: The settings could not be written.

    Warns:
        QuestWarning: There are answers without settings, which are taken for answers of this run.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._path = folder / SAMPLES
        check_folder(folder)
        data = self._path.read_bytes() if self._path.exists() else b""
        before = _read_settings(folder / SETTINGS, has_answers=bool(data))
        if before is not None:
            for name in _FIXED:
                if before.get(name) != settings.get(name):
                    found = f"{name}={settings.get(name)!r}"
                    raise QuestValueError(
                        "output", str(folder), f"a folder of a run with {found}: this has {before.get(name)!r}"
                    )
        whole = data[: data.rfind(b"\n") + 1]
        self._done: set[Key] = set(parse_rows(SAMPLES, whole))
        if before is None and self._done:
            before = _LOST
            found = f"{counted(len(self._done), 'answer')} and no {SETTINGS}"
            message = f"{self._path} has {found}: what it has is taken for this run's"
            warnings.warn(message, QuestWarning, stacklevel=2)
        if asked := {**_samples(before or {}), **_samples(settings)}:
            settings = {**settings, "samples": asked}
        if before is not None:
            settings = {**settings, "earlier": _earlier(before, settings)}
        folder.mkdir(parents=True, exist_ok=True)
        if whole != data:
            os.truncate(self._path, len(whole))  # a line that an interruption cut short
        write_whole(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")

    def missing(self, job: Job, arms: Iterable[Arm]) -> list[Arm]:
        """The arms that have not answered a sample yet."""
        return [arm for arm in arms if (*_key_of(job), arm.method, arm.token_budget) not in self._done]

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write answers; the system has them when this returns.

        Raises:
            QuestStateError: They could not be written, as on a full disk; the answers before are safe.
        """
        lines = [json.dumps(row) + "\n" for row in rows]
        before = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8", newline="\n") as file:
                file.write("".join(lines))
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._path, before)
            raise QuestStateError(
                f"{self._path} could not be written: {error.strerror}; what it holds "
                f"({counted(len(self._done), 'answer')}) is safe, and the same command goes on from there"
            ) from None
        self._done.update(key_of(json.loads(line)) for line in lines)


def _read_settings(path: Path, *, has_answers: bool) -> dict[str, Any] | None:
    """Settings of the run before; None where there was none, or an empty file and no answer, so that nothing is lost.

    Raises:
        QuestValueError: It is something else.
    """
    if not path.exists():
        return None
    data = path.read_bytes()
    if not data.strip() and not has_answers:
        return None
    try:
        settings = json.loads(data.decode("utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        expected = "the settings of a run as JSON"
        if has_answers:
            expected += f"; if the answers in {SAMPLES} are of this very command, delete {path.name} and run it again"
        raise QuestValueError("output", str(path), expected)
    return settings


def _samples(settings: Mapping[str, Any]) -> dict[str, int]:
    """How many samples of each task were asked for, at last: commands that fill a folder may ask for different ones."""
    known: dict[str, int] = settings.get("samples", {})
    return known or dict.fromkeys(settings.get("tasks", ()), settings.get("num_samples", 0))


def _earlier(before: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Commands and machines of the runs that filled the folder so far, other than this one's."""
    runs = [*before.get("earlier", []), {name: before.get(name) for name in _MAKING}]
    this = {name: settings.get(name) for name in _MAKING}
    return [run for index, run in enumerate(runs) if run != this and run not in runs[:index]]


def _key_of(job: Job) -> Key:
    return (job.task, job.length, job.index)

"""`Journal`: the folder of a run, a line for each answer, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quest_attention.errors import QuestValueError
from quest_attention.eval.plan import Arm, Job

__all__ = ["SAMPLES", "SETTINGS", "Journal"]

SETTINGS = "settings.json"
SAMPLES = "samples.jsonl"
_FIXED = ("model", "dtype", "page_size", "num_dense_layers", "question", "chat", "seed", "books")
"""Settings that every line of a folder shares: a run with others goes elsewhere."""
_MAKING = ("command", "machine")
"""Settings that say how lines were made."""


class Journal:
    """Settings and answers of a run, on disk.

    Args:
        folder: Made where it is missing.
        settings: Of this run, ready for JSON. Tasks, methods, budgets, lengths and the number of samples may differ
            from those of the run before: what is there stays, and so do its command and machine, as `earlier`.

    Raises:
        QuestValueError: The folder is of a run with another model, seed or the like, or holds something else.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._done: set[tuple[object, ...]] = set()
        if folder.exists() and not folder.is_dir():
            raise QuestValueError("output", str(folder), "a folder, not a file")
        known = folder / SETTINGS
        if known.exists():
            before = _read_settings(known)
            for name in _FIXED:
                if before.get(name) != settings.get(name):
                    found = f"{name}={settings.get(name)!r}"
                    raise QuestValueError(
                        "output", str(folder), f"a folder of a run with {found}: this has {before.get(name)!r}"
                    )
            settings = {**settings, "earlier": _earlier(before, settings)}
        elif folder.exists() and any(folder.iterdir()):
            raise QuestValueError("output", str(folder), "a new or empty folder, or one of a run before")
        folder.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        self._path = folder / SAMPLES
        if self._path.exists():
            self._load()

    def missing(self, job: Job, arms: Iterable[Arm]) -> list[Arm]:
        """The arms that have not answered a sample yet."""
        return [arm for arm in arms if (*_key_of(job), arm.method, arm.token_budget) not in self._done]

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write answers; they are on disk when this returns."""
        lines = [json.dumps(row) + "\n" for row in rows]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        self._done.update(_key(json.loads(line)) for line in lines)

    def _load(self) -> None:
        """Take note of what is there; a last line that an interruption cut short is taken away."""
        text = self._path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._path.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), 1):
            self._done.add(_read_key(line, f"{self._path.name}, line {number}"))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise QuestValueError("output", str(path), "the settings of a run as JSON")
    return settings


def _earlier(before: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Commands and machines of the runs that filled the folder so far, other than this one's."""
    runs = [*before.get("earlier", []), {name: before.get(name) for name in _MAKING}]
    this = {name: settings.get(name) for name in _MAKING}
    return [run for index, run in enumerate(runs) if run != this and run not in runs[:index]]


def _read_key(line: str, place: str) -> tuple[object, ...]:
    try:
        return _key(json.loads(line))
    except (ValueError, KeyError, TypeError):
        raise QuestValueError("output", place, "an answer as JSON") from None


def _key_of(job: Job) -> tuple[object, ...]:
    return (job.task, job.length, job.index)


def _key(row: Mapping[str, Any]) -> tuple[object, ...]:
    return (row["task"], row["length"], row["index"], row["method"], row["token_budget"])

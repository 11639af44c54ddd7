"""The folder of a run: whether it is one, who may write to it, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from quest_attention.errors import QuestStateError, QuestValueError

__all__ = ["SAMPLES", "SETTINGS", "check_folder", "hold_folder", "write_whole"]

SETTINGS = "settings.json"
SAMPLES = "samples.jsonl"
_LOCK = ".lock"
"""Locked by the run that writes. It stays: who removes a lock may remove the one that another has just taken."""
_HOLDER = ".lock.json"
"""Who holds the lock, beside it, since on Windows nobody else can read a locked file. Gone with the run."""
_PART = ".quest-part"
"""How the name of a file ends that is being written. One may stay where a process was killed."""


def check_folder(folder: Path) -> None:
    """Refuse what no run can be written to, without a change to it.

    Raises:
        QuestValueError: It is a file, or a folder with something other than a run in it.
    """
    if folder.exists() and not folder.is_dir():
        raise QuestValueError("output", str(folder), "a folder, not a file")
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    foreign = {name for name in names - {_LOCK, _HOLDER} if not name.endswith(_PART)}
    if foreign and not names & {SETTINGS, SAMPLES}:
        raise QuestValueError("output", str(folder), "a new or empty folder, or one of a run before")


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make the folder of a run, and keep other runs out of it until the block ends or this process dies.

    A folder that was made here and stays empty is taken away again.

    Raises:
        QuestValueError: Another run writes to it (the message says which), it cannot be written, or
            `check_folder` refuses it.
    """
    made: list[Path] = []
    lock = FileLock(folder / _LOCK)
    try:
        check_folder(folder)
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        expected = f"a folder that no other run writes to: {_holder(folder)}"
        raise QuestValueError("output", str(folder), expected) from None
    except OSError as error:
        _take_away(made)
        raise QuestValueError("output", str(folder), f"a folder that can be written: {error.strerror}") from None
    try:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        write_whole(folder / _HOLDER, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        yield
    finally:
        with suppress(OSError):  # somebody may have removed the folder meanwhile
            (folder / _HOLDER).unlink()
            if [entry.name for entry in folder.iterdir()] == [_LOCK]:  # nothing came of the run
                (folder / _LOCK).unlink()
        lock.release()
        _take_away(made)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is never seen, or left, half written: beside it first, then in its place.

    Raises:
        QuestStateError: It could not be written, as on a full disk; what was there is there still.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    try:
        with beside.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else a crash may leave the new name with nothing in it
        beside.replace(path)
    except OSError as error:
        raise QuestStateError(f"{path} could not be written: {error.strerror}; it is as it was before") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} has done so since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process does, and has not said which"  # it took the lock a moment ago


def _take_away(made: list[Path]) -> None:
    """Remove the folders that were made, from the inside out, as far as they are empty."""
    with suppress(OSError):
        for path in made:
            path.rmdir()

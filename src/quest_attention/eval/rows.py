"""The lines of a run: one JSON object for each sample and the arm that took it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quest_attention.errors import QuestValueError

__all__ = ["Key", "Row", "key_of", "parse_rows"]

Key = tuple[object, ...]
"""What names a sample and the arm that took it: the values of `_NAMES`."""
_NAMES = ("task", "length", "index", "method", "token_budget")
_TIMING = frozenset({"seconds"})
"""Fields in which two measurements of the same may differ."""
_SHOWN = 60
"""Characters of a broken line that a message shows."""


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        number: Of the line, from 1.
        place: File and line, for messages.
        fields: What the line holds.
    """

    number: int
    place: str
    fields: dict[str, Any]


def key_of(fields: Mapping[str, Any]) -> Key:
    """What names a line's sample and arm; every field of the name is there."""
    return tuple(fields[name] for name in _NAMES)


def parse_rows(file: str, data: bytes) -> dict[Key, Row]:
    """Every line by its key. Two runs in one folder once wrote samples twice: of equal ones the first is kept.

    Args:
        file: Its name, for messages.
        data: What it holds.

    Raises:
        QuestValueError: A line is not UTF-8, is no JSON object or lacks a part of its key, or two lines have one key
            and differ in more than their timing; the message names the lines.
    """
    found: dict[Key, Row] = {}
    # Bytes, since text would also break at the line separators that JSON allows within a string.
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], 1):
        row = Row(number, f"{file}, line {number}", _parse(f"{file}, line {number}", line))
        for name in _NAMES:
            if name not in row.fields:
                raise QuestValueError(f"{row.place}, {name}", "nothing", "a field of that name")
            if isinstance(row.fields[name], list | dict):
                raise QuestValueError(f"{row.place}, {name}", row.fields[name], "one value")
        key = key_of(row.fields)
        first = found.setdefault(key, row)
        if _without_timing(first) != _without_timing(row):
            task, _, index, method, _ = key
            raise QuestValueError(
                f"{file}, lines {first.number} and {number}",
                f"sample {index} of {task} by {method} twice, and not alike",
                "one line for each: delete the one that is wrong",
            )
    return found


def _parse(place: str, line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        got = f"byte 0x{line[error.start]:02x} at offset {error.start} of the line"
        raise QuestValueError(place, got, "text in UTF-8") from None
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        text = line.decode("utf-8")
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise QuestValueError(place, shown, "a JSON object; a run that goes on takes an unfinished last line away")
    return fields


def _without_timing(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.fields.items() if name not in _TIMING}

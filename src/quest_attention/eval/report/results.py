"""`Results`: a run as it lies in its folder, summed up in cells."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from quest_attention.errors import QuestValueError
from quest_attention.eval.longbench import LONGBENCH_PREFIX
from quest_attention.eval.report.cells import (
    AccuracyCell,
    ContinuationCell,
    NeedleCell,
    PerplexityCell,
    RecallCell,
    accuracy_cells,
    continuation_cells,
    needle_cells,
    perplexity_cells,
    recall_cells,
)
from quest_attention.eval.report.samples import Answer, Continued, Prediction, Recollection, read_samples
from quest_attention.eval.run_folder import SAMPLES, SETTINGS
from quest_attention.eval.tasks import CONTINUATION, GRID, RECALL

__all__ = [
    "LEAST_TELLING",
    "METHOD_ORDER",
    "SUMMARY",
    "Results",
    "from_summary",
    "method_rank",
    "read_results",
    "tells_nothing",
]

METHOD_ORDER = ("full", "quest", "oracle", "token_oracle", "streaming_llm", "h2o", "tova", "snapkv")
"""Of tables and legends; what is not named here comes last, by name."""
SUMMARY = "summary.json"
"""Cells and settings, without the samples."""
_NEEDED = ("model", "description", "seed", "num_samples", "command", "machine")
"""Settings without which a report cannot say what was measured."""
LEAST_TELLING = 60.0
"""Where full attention is right in a smaller share of the answers, a cell tells nothing about other methods [%]."""
_DECIMALS = 4
"""Of numbers in a summary: far finer than any interval here."""
_C = TypeVar("_C", AccuracyCell, NeedleCell, PerplexityCell, ContinuationCell, RecallCell)


@dataclass(frozen=True)
class Results:
    """What a run found.

    Attributes:
        settings: As they lie in the folder.
        num_lines: Samples times the arms that took them.
        accuracy: Cells of retrieval tasks, by task, length, method and budget.
        needle: Cells of `GRID` by depth.
        perplexity: Cells by length, method and budget.
        recall: Likewise.
        continuation: Likewise.
    """

    settings: dict[str, Any]
    num_lines: int
    accuracy: tuple[AccuracyCell, ...]
    needle: tuple[NeedleCell, ...]
    perplexity: tuple[PerplexityCell, ...]
    recall: tuple[RecallCell, ...]
    continuation: tuple[ContinuationCell, ...] = ()

    @property
    def tasks(self) -> list[str]:
        """Retrieval tasks, in the order of the tables."""
        return list(dict.fromkeys(cell.task for cell in self.accuracy))

    @property
    def is_uneven(self) -> bool:
        """Whether some method has taken fewer samples than another: a run that was interrupted."""
        counts: dict[tuple[object, ...], set[int]] = {}
        kinds: tuple[tuple[Any, ...], ...] = (self.accuracy, self.perplexity, self.continuation, self.recall)
        for cell in itertools.chain(*kinds):
            counts.setdefault((getattr(cell, "task", type(cell)), cell.length), set()).add(cell.n)
        return any(len(found) > 1 for found in counts.values())

    @property
    def is_short(self) -> bool:
        """Whether some cell has fewer samples than were asked for, where tasks can make as many as are asked."""
        counts = [(cell.task, cell.n) for cell in self.accuracy if not cell.task.startswith(LONGBENCH_PREFIX)]
        counts += [(RECALL, cell.n) for cell in self.recall] + [(CONTINUATION, cell.n) for cell in self.continuation]
        asked = self.settings.get("samples", {})  # which older runs lack
        return any(count < asked.get(task, self.settings["num_samples"]) for task, count in counts)

    def summary(self) -> dict[str, Any]:
        """Settings and cells, rounded, ready for JSON."""
        kinds: dict[str, tuple[Any, ...]] = {
            "accuracy": self.accuracy,
            "needle": self.needle,
            "perplexity": self.perplexity,
            "recall": self.recall,
            "continuation": self.continuation,
        }
        cells = {name: [_rounded(asdict(cell)) for cell in found] for name, found in kinds.items()}
        return {"settings": self.settings, **cells}


def read_results(folder: Path) -> Results:
    """Read a run and sum it up.

    Args:
        folder: With `settings.json` and `samples.jsonl`; or with `summary.json` alone, where the samples were left out.

    Raises:
        QuestValueError: The folder or a file of it is missing, or a line of it is broken; the message names the line.
    """
    if not folder.is_dir():
        raise QuestValueError("folder", str(folder), "the folder of a run")
    if (folder / SUMMARY).is_file() and not (folder / SAMPLES).exists():
        return _read_summary(folder / SUMMARY)
    for name in (SETTINGS, SAMPLES):
        if not (folder / name).is_file():
            raise QuestValueError("folder", str(folder), f"the folder of a run, with {name} in it, or {SUMMARY}")
    settings = _checked(folder / SETTINGS, _read_object(folder / SETTINGS, "the settings of a run"))
    samples = read_samples(folder / SAMPLES)
    if not samples:
        raise QuestValueError(SAMPLES, "an empty file", "at least one line")
    asked = settings.get("tasks")
    tasks = [str(task) for task in asked] if isinstance(asked, list) else []
    answers = [each for each in samples if isinstance(each, Answer)]

    def place(cell: AccuracyCell | NeedleCell | PerplexityCell | ContinuationCell | RecallCell) -> tuple[object, ...]:
        task = cell.task if isinstance(cell, AccuracyCell | NeedleCell) else ""
        rank = tasks.index(task) if task in tasks else len(tasks)
        depth = cell.depth if isinstance(cell, NeedleCell) else 0
        return (rank, task, cell.length, method_rank(cell.method), cell.token_budget or 0, depth)

    return Results(
        settings=settings,
        num_lines=len(samples),
        accuracy=tuple(sorted(accuracy_cells(answers), key=place)),
        needle=tuple(sorted(needle_cells(each for each in answers if each.task == GRID), key=place)),
        perplexity=tuple(sorted(perplexity_cells(each for each in samples if isinstance(each, Prediction)), key=place)),
        recall=tuple(sorted(recall_cells(each for each in samples if isinstance(each, Recollection)), key=place)),
        continuation=tuple(
            sorted(continuation_cells(each for each in samples if isinstance(each, Continued)), key=place)
        ),
    )


def method_rank(method: str) -> tuple[int, tuple[int | str, ...]]:
    """Sorts methods: those of `METHOD_ORDER` first, each with its options behind it, numbers by size.

    >>> sorted(["h2o", "quest:page_size=32", "quest:page_size=8", "new", "quest", "full"], key=method_rank)
    ['full', 'quest', 'quest:page_size=8', 'quest:page_size=32', 'h2o', 'new']
    """
    name = method.partition(":")[0]
    parts = tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", method))
    return (METHOD_ORDER.index(name) if name in METHOD_ORDER else len(METHOD_ORDER), parts)


def tells_nothing(results: Results, task: str, length: int) -> bool:
    """Whether full attention finds too few answers for a cell of this task and length to say what a method loses."""
    full = (cell for cell in results.accuracy if cell.token_budget is None)
    return any(cell.score < LEAST_TELLING for cell in full if (cell.task, cell.length) == (task, length))


def _read_summary(path: Path) -> Results:
    return from_summary(_read_object(path, "the summary of a run"), path)


def from_summary(found: Mapping[str, Any], path: Path) -> Results:
    """Results with the numbers of a summary, rounded as they are there.

    Args:
        found: What `Results.summary` gave.
        path: Its file, for messages.

    Raises:
        QuestValueError: It is something else.
    """
    settings = _checked(path, found.get("settings"))

    def cells(name: str, kind: type[_C]) -> tuple[_C, ...]:
        hints = get_type_hints(kind)
        made = []
        for cell in found[name] if isinstance(found.get(name), list) else [None]:
            values = cell if isinstance(cell, dict) else {}
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            if values.keys() != hints.keys() or not all(_is_a(hint, values[key]) for key, hint in hints.items()):
                raise QuestValueError(f"{path.name}, {name}", cell, "cells as quest report writes them")
            made.append(kind(**values))
        return tuple(made)

    accuracy, needle = cells("accuracy", AccuracyCell), cells("needle", NeedleCell)
    perplexity, recall = cells("perplexity", PerplexityCell), cells("recall", RecallCell)
    continuation = cells("continuation", ContinuationCell) if "continuation" in found else ()  # older ones have none
    lines = sum(cell.n for kind in (accuracy, perplexity, recall, continuation) for cell in kind)
    return Results(settings, lines, accuracy, needle, perplexity, recall, continuation)


def _read_object(path: Path, what: str) -> dict[str, Any]:
    data = path.read_bytes()
    try:
        found = json.loads(data.decode("utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        got = "something else" if data.strip() else "an empty file"
        raise QuestValueError(path.name, got, f"{what} as a JSON object")
    return found


def _checked(path: Path, settings: Any) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise QuestValueError(f"{path.name}, settings", settings, "the settings of a run as a JSON object")
    for name in _NEEDED:
        if name not in settings:
            raise QuestValueError(f"{path.name}, {name}", "nothing", "a setting of that name")
    if not isinstance(settings["num_samples"], int):
        raise QuestValueError(f"{path.name}, num_samples", settings["num_samples"], "a number of samples")
    samples = settings.get("samples", {})
    if not isinstance(samples, dict) or not all(isinstance(count, int) for count in samples.values()):
        raise QuestValueError(f"{path.name}, samples", samples, "a number of samples for each task")
    return settings


def _is_a(hint: Any, value: object) -> bool:
    """Whether a value has the type of a field."""
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(get_args(hint)[0], each) for each in value)
    if kinds := get_args(hint):
        return any(_is_a(kind, value) for kind in kinds)
    return isinstance(value, int | float if hint is float else hint) and not isinstance(value, bool)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DECIMALS)
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value

"""`Answer`, `Prediction`, `Continued` and `Recollection`: the kinds of lines of a run, with every number checked."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quest_attention.errors import QuestValueError
from quest_attention.eval.longbench import LONGBENCH_PREFIX
from quest_attention.eval.rows import parse_rows
from quest_attention.eval.tasks import CONTINUATION, PERPLEXITY, RECALL
from quest_attention.eval.wording import counted

__all__ = ["Answer", "Continued", "Prediction", "Recollection", "Sample", "read_samples"]

_MOST_NATS = 700.0
"""More than this per token, and the perplexity is no float any more [nats]."""


@dataclass(frozen=True)
class _Key:
    """What names a sample and the arm that took it.

    Attributes:
        task: Name of the task.
        length: Context, question and answer together [tokens].
        index: Number of the sample.
        method: As it was asked for, options included.
        token_budget: None for full attention [tokens].
    """

    task: str
    length: int
    index: int
    method: str
    token_budget: int | None


@dataclass(frozen=True)
class Answer(_Key):
    """An answer to a question.

    Attributes:
        score: 0 to 1; for an exact-match task one or the other.
        depth: Where in the context the needle lies, 0 to 1; None where there is no such place.
        tokens_read: By the layers that may choose, summed over their decode steps [tokens].
        tokens_held: What reading everything would have read [tokens].
    """

    score: float
    depth: float | None
    tokens_read: int
    tokens_held: int


@dataclass(frozen=True)
class Prediction(_Key):
    """How well the tokens of a book were predicted.

    Attributes:
        bucket: Positions summed together [tokens].
        nll: Negative log-likelihood of each bucket, summed [nats].
        count: Tokens predicted in each bucket [tokens].
        tokens_read: As of `Answer` [tokens].
        tokens_held: As of `Answer` [tokens].
    """

    bucket: int
    nll: tuple[float, ...]
    count: tuple[int, ...]
    tokens_read: int
    tokens_held: int


@dataclass(frozen=True)
class Continued(_Key):
    """How well the end of a stretch was predicted.

    Attributes:
        nll: Negative log-likelihood of its tokens, summed [nats].
        agreed: Predictions that are those of full attention [tokens].
        count: Tokens predicted [tokens].
        tokens_read: As of `Answer` [tokens].
        tokens_held: As of `Answer` [tokens].
    """

    nll: float
    agreed: int
    count: int
    tokens_read: int
    tokens_held: int


@dataclass(frozen=True)
class Recollection(_Key):
    """What the selected pages hold of full attention.

    Attributes:
        layers: Layers that took sparse steps.
        mass: Share of the attention mass, 0 to 1, for each layer and KV head.
        top10: Share of the ten tokens with the largest weights, likewise.
    """

    layers: tuple[int, ...]
    mass: tuple[tuple[float, ...], ...]
    top10: tuple[tuple[float, ...], ...]


Sample = Answer | Prediction | Continued | Recollection


def read_samples(path: Path) -> list[Sample]:
    """Read every line of a run.

    Raises:
        QuestValueError: A line is no JSON, lacks a field, holds a number out of range or says something else than
            another of the same sample; the message names the line.
    """
    found: list[Sample] = []
    for row in parse_rows(path.name, path.read_bytes()).values():
        fields = _Fields(row.place, row.fields)
        key = _Key(
            fields.file_name("task"),
            fields.whole("length", 1),
            fields.whole("index"),
            fields.text("method"),
            fields.budget(),
        )
        found.append(_read(key, fields))
    return found


def _read(key: _Key, fields: _Fields) -> Sample:
    names: dict[str, Any] = vars(key)
    if key.task == RECALL:
        layers = tuple(fields.check("layers", each, int, 0) for each in fields.several("layers"))
        return Recollection(
            **names, layers=layers, mass=fields.table("mass", layers), top10=fields.table("top10", layers)
        )
    totals: dict[str, Any] = {"tokens_read": fields.whole("tokens_read"), "tokens_held": fields.whole("tokens_held")}
    if totals["tokens_read"] > totals["tokens_held"]:
        raise fields.error("tokens_read", totals["tokens_read"], f"at most tokens_held, {totals['tokens_held']}")
    if key.task == PERPLEXITY:
        count = tuple(fields.check("count", each, int, 0) for each in fields.several("count"))
        nll = tuple(float(fields.check("nll", each, float, 0)) for each in fields.several("nll", len(count)))
        if not 0 <= sum(nll) <= _MOST_NATS * sum(count) or not sum(count):
            raise fields.error(
                "nll", sum(nll), f"at most {_MOST_NATS:.0f} nats for each of {counted(sum(count), 'token')}"
            )
        return Prediction(**names, bucket=fields.whole("bucket", 1), nll=nll, count=count, **totals)
    if key.task == CONTINUATION:
        number = fields.whole("count", 1)
        agreed = int(fields.check("agreed", fields.get("agreed"), int, 0, number))
        loss = float(fields.check("nll", fields.get("nll"), float, 0, _MOST_NATS * number))
        return Continued(**names, nll=loss, agreed=agreed, count=number, **totals)
    score = fields.share("score")
    if not key.task.startswith(LONGBENCH_PREFIX) and score not in {0.0, 1.0}:
        raise fields.error("score", score, f"0 or 1: {key.task} is matched exactly")
    depth = None if fields.get("depth", None) is None else fields.share("depth")
    return Answer(**names, score=score, depth=depth, **totals)


class _Fields:
    """The fields of a line, each checked when asked for."""

    def __init__(self, place: str, fields: dict[str, Any]) -> None:
        self._place = place
        self._fields = fields

    def error(self, name: str, got: object, expected: str) -> QuestValueError:
        return QuestValueError(f"{self._place}, {name}", got, expected)

    def get(self, name: str, *default: object) -> Any:
        if name not in self._fields and not default:
            raise self.error(name, "nothing", "a field of that name")
        return self._fields.get(name, *default)

    def check(self, name: str, value: Any, kind: type, least: float, most: float = math.inf) -> Any:
        """A number in its range; a whole one where `kind` is int."""
        kinds = (int,) if kind is int else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_number or not (math.isfinite(value) and least <= value <= most):
            what = "a whole number" if kind is int else "a number"
            bounds = f"from {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise self.error(name, value, f"{what} {bounds}")
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str) or not value:
            raise self.error(name, value, "a name")
        return value

    def file_name(self, name: str) -> str:
        """A name that a figure's file can have."""
        value = self.text(name)
        if not re.fullmatch(r"\w+", value):
            raise self.error(name, value, "letters, digits and underscores")
        return value

    def whole(self, name: str, least: int = 0) -> int:
        return int(self.check(name, self.get(name), int, least))

    def share(self, name: str) -> float:
        return float(self.check(name, self.get(name), float, 0, 1))

    def budget(self) -> int | None:
        return None if self.get("token_budget") is None else self.whole("token_budget", 1)

    def several(self, name: str, length: int | None = None) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list) or not value or length not in {None, len(value)}:
            raise self.error(name, value, "a list" if length is None else f"a list of {length}")
        return value

    def table(self, name: str, layers: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
        """Shares for each layer and KV head."""
        rows = self.several(name, len(layers))
        if not all(isinstance(row, list) and row for row in rows):
            raise self.error(name, rows, "a list of KV heads for each layer")
        return tuple(tuple(float(self.check(name, value, float, 0, 1)) for value in row) for row in rows)

"""Cells: what the samples of one task, length, method and budget come to."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from quest_attention.errors import QuestValueError
from quest_attention.eval.longbench import LONGBENCH_PREFIX
from quest_attention.eval.report.samples import Answer, Continued, Prediction, Recollection
from quest_attention.eval.wilson import wilson_interval

__all__ = [
    "AccuracyCell",
    "ContinuationCell",
    "NeedleCell",
    "PerplexityCell",
    "RecallCell",
    "accuracy_cells",
    "continuation_cells",
    "needle_cells",
    "perplexity_cells",
    "recall_cells",
]

_NORMAL_QUANTILE = 1.96
"""Two-sided 95 % of the normal distribution."""
_DEPTHS = 10
"""A needle's depth is rounded to tenths of the context."""

_S = TypeVar("_S")
_K = TypeVar("_K", bound=Hashable)


@dataclass(frozen=True)
class AccuracyCell:
    """Answers to one task at one length by one method with one budget.

    Attributes:
        task: Name of the task.
        length: Context, question and answer together [tokens].
        method: As it was asked for, options included.
        token_budget: None for full attention [tokens].
        n: Answers.
        score: Mean [%].
        low: Lower end of the 95 % interval of the mean: Wilson's for exact-match tasks, else 1.96 standard errors
            [%]. None for a single answer with a score.
        high: Upper end, likewise [%].
        share_read: Tokens read by the layers that may choose, of those held, 0 to 1. None where nothing was counted.
    """

    task: str
    length: int
    method: str
    token_budget: int | None
    n: int
    score: float
    low: float | None
    high: float | None
    share_read: float | None


@dataclass(frozen=True)
class NeedleCell:
    """Answers of `AccuracyCell` for one depth.

    Attributes:
        task: Name of the task.
        length: Context, question and answer together [tokens].
        depth: Where the needle lies, to a tenth of the context [%].
        method: As it was asked for, options included.
        token_budget: None for full attention [tokens].
        n: Answers.
        score: Mean [%].
        low: Lower end of the 95 % interval [%].
        high: Upper end [%].
    """

    task: str
    length: int
    depth: int
    method: str
    token_budget: int | None
    n: int
    score: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PerplexityCell:
    """Predictions at one length by one method with one budget.

    Attributes:
        length: Tokens of a book that are used [tokens].
        method: As it was asked for, options included.
        token_budget: None for full attention [tokens].
        n: Books.
        perplexity: exp of the mean negative log-likelihood of all tokens.
        share_read: As of `AccuracyCell`.
        positions: Ends of the buckets [tokens].
        so_far: Perplexity of all tokens before each of the positions.
    """

    length: int
    method: str
    token_budget: int | None
    n: int
    perplexity: float
    share_read: float | None
    positions: tuple[int, ...]
    so_far: tuple[float, ...]


@dataclass(frozen=True)
class ContinuationCell:
    """Ends of stretches at one length as predicted by one method with one budget.

    Attributes:
        length: Of a stretch [tokens].
        method: As it was asked for, options included.
        token_budget: None for full attention [tokens].
        n: Stretches.
        perplexity: exp of the mean negative log-likelihood of all tokens predicted.
        more: Perplexity above that of full attention on the same stretches [%]. None where it lacks one.
        more_low: Lower end of the 95 % interval: 1.96 standard errors of the mean difference in negative
            log-likelihood [%]. None for one stretch.
        more_high: Upper end, likewise [%].
        agreement: Share of predictions that are those of full attention [%].
        agreement_low: Lower end of the 95 % interval: 1.96 standard errors over the stretches [%].
        agreement_high: Upper end, likewise [%].
        share_read: As of `AccuracyCell`.
    """

    length: int
    method: str
    token_budget: int | None
    n: int
    perplexity: float
    more: float | None
    more_low: float | None
    more_high: float | None
    agreement: float
    agreement_low: float | None
    agreement_high: float | None
    share_read: float | None


@dataclass(frozen=True)
class RecallCell:
    """What the pages that one method selected with one budget at one length hold of full attention.

    Attributes:
        length: Tokens of the context [tokens].
        method: As it was asked for, options included.
        token_budget: [tokens].
        n: Samples.
        mass: Share of the attention mass, mean over samples, layers and KV heads [%].
        mass_low: Lower end of the 95 % interval: 1.96 standard errors over the samples [%]. None for one sample.
        mass_high: Upper end, likewise [%].
        top10: Share of the ten tokens with the largest weights, likewise [%].
        top10_low: As `mass_low` [%].
        top10_high: As `mass_high` [%].
        layers: Layers that took sparse steps.
        mass_by_layer: Mean over samples and KV heads for each of them [%].
        top10_by_layer: Likewise [%].
    """

    length: int
    method: str
    token_budget: int | None
    n: int
    mass: float
    mass_low: float | None
    mass_high: float | None
    top10: float
    top10_low: float | None
    top10_high: float | None
    layers: tuple[int, ...]
    mass_by_layer: tuple[float, ...]
    top10_by_layer: tuple[float, ...]


def accuracy_cells(answers: Iterable[Answer]) -> list[AccuracyCell]:
    """Cells by task, length, method and budget, in the order in which they first appear."""
    return [
        AccuracyCell(*key, len(group), *_mean_score(group), _share_read(group))
        for key, group in _grouped(answers, lambda each: (each.task, each.length, each.method, each.token_budget))
    ]


def needle_cells(answers: Iterable[Answer]) -> list[NeedleCell]:
    """Cells by task, length, depth, method and budget; answers without a depth are left out."""
    placed = [(round(each.depth * _DEPTHS) * 100 // _DEPTHS, each) for each in answers if each.depth is not None]
    return [
        NeedleCell(*key, len(group), *_mean_score([each for _, each in group]))
        for key, group in _grouped(
            placed, lambda pair: (pair[1].task, pair[1].length, pair[0], pair[1].method, pair[1].token_budget)
        )
    ]


def perplexity_cells(predictions: Iterable[Prediction]) -> list[PerplexityCell]:
    """Cells by length, method and budget.

    Raises:
        QuestValueError: Predictions of one cell have other buckets than its first.
    """
    cells = []
    for key, group in _grouped(predictions, lambda each: (each.length, each.method, each.token_budget)):
        first = group[0]
        for each in group:
            _same("bucket", (each.bucket, len(each.count)), (first.bucket, len(first.count)), each)
        nll = [sum(each.nll[bucket] for each in group) for bucket in range(len(first.nll))]
        count = [sum(each.count[bucket] for each in group) for bucket in range(len(first.count))]
        ends = [bucket for bucket in range(len(count)) if sum(count[: bucket + 1])]
        so_far = tuple(math.exp(sum(nll[: end + 1]) / sum(count[: end + 1])) for end in ends)
        positions = tuple(min((end + 1) * first.bucket, first.length) for end in ends)
        cells.append(PerplexityCell(*key, len(group), so_far[-1], _share_read(group), positions, so_far))
    return cells


def continuation_cells(continued: Iterable[Continued]) -> list[ContinuationCell]:
    """Cells by length, method and budget."""
    every = list(continued)
    full = {(each.length, each.index): each.nll / each.count for each in every if each.token_budget is None}
    cells = []
    for key, group in _grouped(every, lambda each: (each.length, each.method, each.token_budget)):
        places = [(each.length, each.index) for each in group]
        more: tuple[float | None, float | None, float | None] = (None, None, None)
        if all(place in full for place in places):
            more = _more([each.nll / each.count - full[place] for each, place in zip(group, places, strict=True)])
        cells.append(
            ContinuationCell(
                *key,
                len(group),
                math.exp(sum(each.nll for each in group) / sum(each.count for each in group)),
                *more,
                *_mean([100 * each.agreed / each.count for each in group]),
                _share_read(group),
            )
        )
    return cells


def recall_cells(recollections: Iterable[Recollection]) -> list[RecallCell]:
    """Cells by length, method and budget.

    Raises:
        QuestValueError: Samples of one cell have other layers than its first.
    """
    cells = []
    for key, group in _grouped(recollections, lambda each: (each.length, each.method, each.token_budget)):
        layers = group[0].layers
        for each in group:
            _same("layers", each.layers, layers, each)
        mass = [[100 * statistics.fmean(heads) for heads in each.mass] for each in group]
        top10 = [[100 * statistics.fmean(heads) for heads in each.top10] for each in group]
        cells.append(
            RecallCell(
                *key,
                len(group),
                *_mean([statistics.fmean(each) for each in mass]),
                *_mean([statistics.fmean(each) for each in top10]),
                layers,
                tuple(statistics.fmean(layer) for layer in zip(*mass, strict=True)),
                tuple(statistics.fmean(layer) for layer in zip(*top10, strict=True)),
            )
        )
    return cells


def _grouped(samples: Iterable[_S], key: Callable[[_S], _K]) -> list[tuple[_K, list[_S]]]:
    groups: defaultdict[_K, list[_S]] = defaultdict(list)
    for each in samples:
        groups[key(each)].append(each)
    return list(groups.items())


def _mean_score(answers: Sequence[Answer]) -> tuple[float, float | None, float | None]:
    """Mean and 95 % interval [%]."""
    scores = [100 * each.score for each in answers]
    if answers[0].task.startswith(LONGBENCH_PREFIX):
        return _mean(scores)
    return statistics.fmean(scores), *wilson_interval(round(sum(each.score for each in answers)), len(answers))


def _mean(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and 1.96 standard errors to either side, within 0 and 100; no interval for a single value [%]."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None, None
    half = _NORMAL_QUANTILE * statistics.stdev(values) / math.sqrt(len(values))
    return mean, max(0.0, mean - half), min(100.0, mean + half)


def _more(differences: Sequence[float]) -> tuple[float, float | None, float | None]:
    """What mean differences in log-likelihood make of perplexity, with the 95 % interval [%]."""
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return 100 * math.expm1(mean), None, None
    half = _NORMAL_QUANTILE * statistics.stdev(differences) / math.sqrt(len(differences))
    return 100 * math.expm1(mean), 100 * math.expm1(mean - half), 100 * math.expm1(mean + half)


def _share_read(group: Sequence[Answer] | Sequence[Prediction] | Sequence[Continued]) -> float | None:
    held = sum(each.tokens_held for each in group)
    if not held:
        return 1.0 if group[0].token_budget is None else None  # full attention reads everything, counted or not
    return sum(each.tokens_read for each in group) / held


def _same(name: str, got: object, expected: object, sample: Prediction | Recollection) -> None:
    if got != expected:
        who = f"sample {sample.index} of {sample.task} by {sample.method}"
        raise QuestValueError(name, got, f"{expected} for {who}, as in the samples before")


# Longer than 250 lines: five kinds of cell, each with what its numbers mean and how samples become it.

"""Which cases of a test with many parameters run: some that stand for all.

A test with the parameters backend, layout, unit and mask has a case for each of their combinations, hundreds of them. A
fault that shows with one value, or with two together, shows in far fewer: those among which every pair of values of two
parameters is. (Most faults are such: Kuhn, Wallace and Gallo, "Software fault interactions and implications for
software testing", IEEE TSE 30(6), 2004.) The others are marked `thorough`. Of a test
whose cases take seconds each and differ little, marked `every_value`, every single value is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Any

import pytest

__all__ = ["mark_thorough", "only", "stand_ins", "there_is"]


def only(condition: Callable[..., bool]) -> Any:
    """Of the combinations of a test's parameters there are only those for which the condition, given them, is true."""
    return pytest.mark.only(condition)


def there_is(item: pytest.Item) -> bool:
    """Whether there is the case, by the test's conditions."""
    return all(mark.args[0](**parameters_of(item)) for mark in item.iter_markers("only"))


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    """The parameters of a case by name; none of a test without."""
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


def stand_ins(cases: list[Mapping[str, Any]], together: int = 2) -> set[int]:
    """Which of the cases of a test have among them all values together that the cases have: pairs of them, say.

    Args:
        cases: Values by parameter, the same parameters in each. Values are told apart by their representation.
        together: Of so many parameters.

    Returns:
        Indices. The next is always the case with the most that none has yet, of several the first.
    """
    parts = [set(combinations(sorted((name, repr(value)) for name, value in case.items()), together)) for case in cases]
    missing: set[Any] = set().union(*parts)
    if not missing:  # of pairs: one parameter, or none
        return set(range(len(cases)))
    chosen = set()
    while missing:
        best = max(range(len(cases)), key=lambda index: len(parts[index] & missing))
        chosen.add(best)
        missing -= parts[best]
    return chosen


def mark_thorough(items: Iterable[pytest.Item]) -> None:
    """Mark the cases for which others stand."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("thorough") is None:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        together = 1 if cases[0].get_closest_marker("every_value") else 2
        standing = stand_ins([parameters_of(item) for item in cases], together)
        for index, item in enumerate(cases):
            if index not in standing:
                item.add_marker(pytest.mark.thorough)

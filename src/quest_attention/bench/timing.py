"""Timings of repeated calls."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["percentiles", "time_calls"]


def time_calls(call: Callable[[], object], repeats: int, warmup: int) -> list[float]:
    """Wall-clock time of each of `repeats` calls after `warmup` uncounted ones, in order [ms].

    For work on the CPU; work on a GPU is not finished when its call returns.
    """
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile of a list of times, in its unit; nearest rank, so each was measured.

    >>> percentiles([5.0, 1.0, 2.0, 4.0, 3.0])
    {'p20': 1.0, 'p50': 3.0, 'p80': 4.0}
    """
    ordered = sorted(times)
    return {f"p{p}": ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in (20, 50, 80)}

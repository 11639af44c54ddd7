"""Timings of repeated calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from quest_attention.ops.capture import capturing

__all__ = ["percentiles", "time_calls", "time_graph", "time_graphs"]


def time_calls(
    call: Callable[[], object], repeats: int, warmup: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Time of each of `repeats` calls after `warmup` uncounted ones, in order [ms].

    For work on the CPU; work on a GPU is not finished when its call returns. By default it is that of the wall; others
    on the machine disturb that of the process, `time.process_time`, less.
    """
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append((clock() - start) * 1e3)
    return times


def time_graph(calls: Sequence[Callable[[], object]], repeats: int, warmup: int = 3) -> list[float]:
    """Time of a call on the GPU, from `repeats` replays of a CUDA graph of all `calls`, one after the other [us].

    Give calls over different data, more in all than the cache of the GPU holds: a call that is timed alone finds its
    data in the cache.
    """
    return time_graphs([calls], repeats, warmup)[0]


def time_graphs(arms: Sequence[Sequence[Callable[[], object]]], repeats: int, warmup: int = 3) -> list[list[float]]:
    """The same for several lists of calls, whose graphs take turns, so that all meet the clocks of the same moment."""
    graphs = [_capture(calls) for calls in arms]
    for _ in range(warmup):
        for graph in graphs:
            graph.replay()
    marks = [
        [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in graphs]
        for _ in range(repeats)
    ]
    for turn in marks:
        for graph, (start, end) in zip(graphs, turn, strict=True):
            start.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize()
    return [
        [turn[place][0].elapsed_time(turn[place][1]) * 1e3 / len(calls) for turn in marks]
        for place, calls in enumerate(arms)
    ]


def _capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of calls, which have run once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # compiles, and makes the handles of libraries, which a capture forbids
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        for call in calls:
            call()
    return graph


def percentiles(times: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile of a list of times, in its unit; nearest rank, so each was measured.

    >>> percentiles([5.0, 1.0, 2.0, 4.0, 3.0])
    {'p20': 1.0, 'p50': 3.0, 'p80': 4.0}
    """
    ordered = sorted(times)
    return {f"p{p}": ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in (20, 50, 80)}

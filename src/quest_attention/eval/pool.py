"""Run the jobs of a plan, in this process or in several: a small model waits for launches, not for the device."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import torch

from quest_attention.errors import QuestValueError
from quest_attention.eval.plan import Arm, Job, Shapes, Work, divide
from quest_attention.eval.runner import Runner

__all__ = ["MakeRunner", "run_jobs"]

MakeRunner = Callable[[], Runner]
"""Loads the model; it is called in each process, so it can be pickled."""
_AHEAD = 2
"""Jobs given out for each process before one comes back."""
_SHAPES_AT_ONCE = 16
_runner: Runner | None = None
"""Of a worker process."""


def run_jobs(
    runner: Runner,
    jobs: Iterable[tuple[Job, list[Arm]]],
    *,
    workers: int = 1,
    make_runner: MakeRunner | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Measure jobs, and give the rows of each when it is done, in any order.

    Args:
        runner: Divides the work, and does it where there is one process.
        jobs: Samples with the arms that are to answer them.
        workers: Processes, each with a model of its own; where the device is `cuda` they share all GPUs.
        make_runner: Makes the runner of a process; needed for more than one.

    Raises:
        QuestValueError: `workers` is not positive.
    """
    if workers < 1:
        raise QuestValueError("workers", workers, "a positive integer")
    asked = list(jobs)
    shapes: Shapes = None
    if workers == 1 or make_runner is None:
        if runner.is_batched:
            shapes = [runner.shape(job) for job, _ in asked]
        for work in divide(asked, runner.batch_size, shapes):
            yield list(runner.measure(work))
        return
    context = multiprocessing.get_context("spawn")  # a fork would share the GPU's state
    started = context.Value("i", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make_runner, started))
    waiting: set[Future[list[dict[str, Any]]]] = set()
    try:
        if runner.is_batched:
            shapes = list(pool.map(_shape, [job for job, _ in asked], chunksize=_SHAPES_AT_ONCE))
        source = iter(divide(asked, runner.batch_size, shapes))
        while True:
            for work in source:
                waiting.add(pool.submit(_measure, work))
                if len(waiting) >= _AHEAD * workers:
                    break
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(make_runner: MakeRunner, started: Synchronized[int]) -> None:
    global _runner  # noqa: PLW0603 - a process of a pool has nowhere else to keep its model
    torch.set_num_threads(1)  # the processes share the cores
    with started.get_lock():
        number = started.value
        started.value += 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())  # what a device named `cuda` is
    _runner = make_runner()


def _shape(job: Job) -> Hashable:
    assert _runner is not None, "the process was started"
    return _runner.shape(job)


def _measure(work: Work) -> list[dict[str, Any]]:
    assert _runner is not None, "the process was started"
    return list(_runner.measure(work))

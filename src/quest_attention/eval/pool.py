"""Run the jobs of a plan, in this process or in several: a small model waits for launches, not for the device."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from typing import Any, NamedTuple

import torch

from quest_attention.errors import QuestStateError, QuestValueError
from quest_attention.eval.plan import Arm, Job, Shapes, Work, divide
from quest_attention.eval.runner import Runner

__all__ = ["Made", "MakeRunner", "Round", "run_jobs"]

Round = Sequence[tuple[Job, list[Arm]]]
"""Samples with the arms that are to answer them."""
MakeRunner = Callable[[], Runner]
"""Loads the model; it is called in each process, so it can be pickled."""
_AHEAD = 2
"""Jobs given out for each process before one comes back."""
_SHAPES_AT_ONCE = 16
_runner: Runner | None = None
"""Of a worker process."""


class Made(NamedTuple):
    """What `run_jobs` gives.

    Attributes:
        rows: Ready for JSON.
        is_batch_done: Whether these were the last of their batch.
    """

    rows: list[dict[str, Any]]
    is_batch_done: bool = False


def run_jobs(
    runner: Runner,
    rounds: Iterable[Round],
    *,
    workers: int = 1,
    make_runner: MakeRunner | None = None,
) -> Generator[Made, None, None]:
    """Measure jobs, and give their rows in any order: as they are made, or of several processes a batch at a time.

    The processes end with this one, however it ends, and at once where the iterator is closed or an error leaves it.

    Args:
        runner: Divides the work, and does it where there is one process.
        rounds: Samples with the arms that are to answer them. A round is asked for when the rows of the one before
            have been taken, so that it may depend on them.
        workers: Processes, each with a model of its own; where the device is `cuda` they share all GPUs.
        make_runner: Makes the runner of a process; needed for more than one.

    Raises:
        QuestValueError: `workers` is not positive.
        QuestStateError: A process ended by itself, as where there is too little memory for so many models.
    """
    if workers < 1:
        raise QuestValueError("workers", workers, "a positive integer")
    if workers > 1 and make_runner is not None:
        yield from _in_processes(runner, rounds, workers, make_runner)
        return
    for jobs in rounds:
        shapes = [runner.shape(job) for job, _ in jobs] if runner.is_batched else None
        for work in divide(jobs, runner.batch_size, shapes):
            for row in runner.measure(work):
                yield Made([row])  # at once, so that an interruption loses nothing
            yield Made([], is_batch_done=True)


def _in_processes(
    runner: Runner, rounds: Iterable[Round], workers: int, make_runner: MakeRunner
) -> Generator[Made, None, None]:
    context = multiprocessing.get_context("spawn")  # a fork would share the GPU's state
    started = context.Value("i", 0)
    # Nothing is ever sent: the processes hold the one end, this one the other, which closes with it, even when killed.
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make_runner, started, theirs))
    try:
        for jobs in rounds:
            yield from _round_in_processes(pool, runner, jobs, workers)
    except BrokenProcessPool:
        raise QuestStateError(
            f"one of {workers} worker processes ended by itself, as where memory runs out: try fewer --workers"
        ) from None
    except BaseException:
        ours.close()  # nobody waits for what is being measured
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        ours.close()
        theirs.close()


def _round_in_processes(pool: ProcessPoolExecutor, runner: Runner, jobs: Round, workers: int) -> Iterator[Made]:
    shapes: Shapes = None
    if runner.is_batched:
        with _interrupts_held():
            found = pool.map(_shape, [job for job, _ in jobs], chunksize=_SHAPES_AT_ONCE)
        shapes = list(found)
    source = iter(divide(jobs, runner.batch_size, shapes))
    waiting: set[Future[list[dict[str, Any]]]] = set()
    while True:
        for work in source:
            with _interrupts_held():
                waiting.add(pool.submit(_measure, work))
            if len(waiting) >= _AHEAD * workers:
                break
        if not waiting:
            return
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            yield Made(future.result(), is_batch_done=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach, before they can say so themselves: this one answers for them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what is blocked here is blocked in a child
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(make_runner: MakeRunner, started: Synchronized[int], parent: Connection) -> None:
    global _runner  # noqa: PLW0603 - a process of a pool has nowhere else to keep its model
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)  # the processes share the cores
    with started.get_lock():
        number = started.value
        started.value += 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())  # what a device named `cuda` is
    _runner = make_runner()


def _end_with(parent: Connection) -> None:
    """Wait until the other end of the pipe is closed, then end this process, whatever it is doing."""
    with suppress(OSError):  # what the end is called on Windows
        parent.poll(None)
    os._exit(1)


def _shape(job: Job) -> Hashable:
    assert _runner is not None, "the process was started"
    return _runner.shape(job)


def _measure(work: Work) -> list[dict[str, Any]]:
    assert _runner is not None, "the process was started"
    return list(_runner.measure(work))

"""Which cores the engines of a test process bind their threads to."""

from __future__ import annotations

import os


def own_cores() -> list[int]:
    """This process's cores, at least two entries, a core of its own for each worker of pytest-xdist first.

    vLLM binds an engine's threads to cores by number: the engines of workers beside each other would share the first.
    """
    cores = sorted(os.sched_getaffinity(0))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % len(cores)
    return (cores[worker:] + cores[:worker]) * 2


def engine_environment(*, is_one_process: bool = False) -> dict[str, str]:
    """This process's environment, with what an engine of a single thread on a CPU needs.

    Args:
        is_one_process: Whether an `LLM` is all in the process that makes it, where it starts sooner. No server can be.
    """
    return {
        **os.environ,
        **({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if is_one_process else {}),
        "OMP_NUM_THREADS": "1",  # threads that wait for one another are slow where others use the machine
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(own_cores()[0]),
    }

"""What a worker calls itself, and its counters over vLLM's `collective_rpc`."""

from __future__ import annotations

from typing import Any

from quest_attention.serving.counters import StepCounters

__all__ = ["QuestWorkerExtension", "worker_label"]


class QuestWorkerExtension:
    """Methods that vLLM adds to its workers.

    llm = LLM(..., worker_extension_cls="quest_attention.vllm.worker.QuestWorkerExtension")
    llm.collective_rpc("quest_counters")  # a dict for each worker
    """

    def quest_counters(self) -> dict[str, int]:
        """What this worker's decode rows read; see `StepCounters.snapshot`. Empty where Quest is off."""
        counters = _counters(self)
        return {} if counters is None else counters.snapshot()

    def quest_reset(self) -> None:
        """Set this worker's counters to zero."""
        counters = _counters(self)
        if counters is not None:
            counters.reset()


def worker_label(parallel: Any, rank: int) -> str:
    """What a worker calls itself in the log: its rank, and its replica where there may be several.

    Args:
        parallel: vLLM's `ParallelConfig`. For models whose replicas know nothing of one another it tells their number
            as 1, to each of them.
        rank: Among the workers that share a model.
    """
    name, replica = f"worker {rank}", getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)
    return f"replica {replica}, {name}" if replica or parallel.data_parallel_size > 1 else name


def _counters(worker: Any) -> StepCounters | None:
    for groups in worker.model_runner.attn_groups:
        for group in groups:
            found: StepCounters | None = getattr(group.get_metadata_builder(), "counters", None)
            if found is not None:
                return found
    return None

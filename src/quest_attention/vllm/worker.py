"""What a worker calls itself, and its counters over vLLM's `collective_rpc`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["QuestWorkerExtension", "worker_label"]


class QuestWorkerExtension:
    """Methods that vLLM adds to its workers.

    llm = LLM(..., worker_extension_cls="quest_attention.vllm.worker.QuestWorkerExtension")
    llm.collective_rpc("quest_counters")  # a dict for each worker
    """

    def quest_counters(self) -> dict[str, int]:
        """What this worker's decode rows read; see `StepCounters.snapshot`. Empty where Quest is off.

        Where layers that choose are in several groups, it is what those of the first group read; see `quest_groups`.
        """
        return next((builder.counters.snapshot() for builder in _counting(self)), {})

    def quest_groups(self) -> list[dict[str, Any]]:
        """The same for each group of layers that share a block table: their names as `layers`, then the numbers."""
        return [{"layers": builder.sparse_layers, **builder.counters.snapshot()} for builder in _counting(self)]

    def quest_reset(self) -> None:
        """Set this worker's counters to zero."""
        for builder in _counting(self):
            builder.counters.reset()


def worker_label(parallel: Any, rank: int) -> str:
    """What a worker calls itself in the log: its rank, and its replica where there may be several.

    Args:
        parallel: vLLM's `ParallelConfig`. For models whose replicas know nothing of one another it tells their number
            as 1, to each of them.
        rank: Among the workers that share a model.
    """
    name, replica = f"worker {rank}", getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)
    return f"replica {replica}, {name}" if replica or parallel.data_parallel_size > 1 else name


def _counting(worker: Any) -> Iterator[Any]:
    """Metadata builders of layers that choose what they read, each with counters of its own."""
    for groups in worker.model_runner.attn_groups:
        for group in groups:
            builder = group.get_metadata_builder()
            if getattr(builder, "counters", None) is not None:
                yield builder

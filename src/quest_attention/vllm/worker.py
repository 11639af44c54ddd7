"""The counters of every worker, over vLLM's `collective_rpc`."""

from __future__ import annotations

from typing import Any

from quest_attention.vllm.counters import StepCounters

__all__ = ["QuestWorkerExtension"]


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


def _counters(worker: Any) -> StepCounters | None:
    for groups in worker.model_runner.attn_groups:
        for group in groups:
            found: StepCounters | None = getattr(group.get_metadata_builder(), "counters", None)
            if found is not None:
                return found
    return None

"""Quest's counters for Prometheus, beside vLLM's own at `/metrics`.

A worker's counters are in another process than the server that answers. Prometheus' client carries them over files, in
a folder that every process finds in PROMETHEUS_MULTIPROC_DIR from its start: with several API servers vLLM sets it,
with one who starts the server does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

__all__ = ["publisher"]

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Where Prometheus' client looks for the folder, when it is imported."""
_ROWS = {
    "sparse_rows": "sparse",
    "dense_rows": "dense",
    "verified_rows": "verified",
    "verified_sparse_rows": "verified_sparse",
}
_TOKENS = {"tokens_read": "read", "tokens_held": "held"}


def publisher(worker: str, layers: str) -> Callable[[dict[str, int]], None] | None:
    """Takes what a worker's rows read since the last time, by the names of `StepCounters.snapshot`.

    None where no other process would see it.

    Args:
        worker: What the worker calls itself.
        layers: For whose layers it counts.
    """
    if not os.environ.get(_FOLDER):
        return None
    rows, tokens = _counters()

    def publish(new: Mapping[str, int]) -> None:
        for counter, names in ((rows, _ROWS), (tokens, _TOKENS)):
            for name, kind in names.items():
                counter.labels(kind, worker, layers).inc(new[name])

    return publish


@cache  # the client takes a name once
def _counters() -> tuple[Any, Any]:
    from prometheus_client import Counter

    labels = ("kind", "worker", "layers")
    return (
        Counter("quest:rows", "Decode rows that chose what they read, read everything, or checked tokens.", labels),
        Counter("quest:tokens", "Tokens per KV head that decode rows read and held, in layers that choose.", labels),
    )

"""Scenarios with vLLM's engine on a CPU, each in a process of its own, and what is true of all of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from cores import engine_environment
from warm import Warm

HERE = Path(__file__).parent
NUM_SPARSE_LAYERS = 4  # of the bundled model's six
MINUTES = 15
"""Of a scenario at most; it takes one or two alone on two cores."""
WARM = Warm(
    (
        "vllm.entrypoints.llm",
        "vllm.v1.worker.cpu_worker",
        "vllm.v1.attention.backends.cpu_attn",
        "vllm.model_executor.models.llama",
        "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
        "quest_attention.vllm.worker",
    ),
    engine_environment() | {"VLLM_LOGGING_LEVEL": "WARNING"},
)


def thorough(*values: Any) -> Any:
    """Parameters of a test that another set of them stands for, but in `make test-thorough`."""
    return pytest.param(*values, marks=pytest.mark.thorough)


@functools.cache
def scenario(name: str) -> Any:
    """What a scenario printed last."""
    code, out, err = WARM.run(HERE / "scenario.py", [name], HERE)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    assert code == 0 and lines, out[-3000:] + err[-6000:]
    return json.loads(lines[-1])


def assert_checked(found: dict[str, Any], *, ranks: int = 1, layers: int = NUM_SPARSE_LAYERS) -> None:
    """Every sparse row of every layer that chooses went through the oracle, on every rank, and nothing was wrong."""
    assert len(found["oracle"]) == len(found["counters"]) == ranks
    for oracle, counters in zip(found["oracle"], found["counters"], strict=True):
        assert oracle["failures"] == []
        assert 0 < oracle["worst"] <= 1
        rows = counters["sparse_rows"] + counters["verified_sparse_rows"]
        assert oracle["seen"]["rows past the budget"] == layers * rows > 0
        assert counters["tokens_read"] < counters["tokens_held"]

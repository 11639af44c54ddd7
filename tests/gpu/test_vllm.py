"""Quest inside vLLM on a GPU: kernels, full CUDA graphs, two ranks. Scenarios of tests/serving, each a process."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SERVING = Path(__file__).parent.parent / "serving"
NUM_SPARSE_LAYERS = 4  # of the bundled model's six
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@functools.cache
def scenario(name: str) -> Any:
    """What a scenario printed last."""
    command = [sys.executable, str(SERVING / "scenario.py"), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SERVING)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and lines, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(lines[-1])


def found_keys(answers: list[list[int]]) -> list[list[int]]:
    """The pass keys, which the model is sure of; what it writes behind them may differ by rounding."""
    return [answer[:6] for answer in answers]


def test_a_budget_of_the_context_gives_the_stock_backends_tokens() -> None:
    inactive, active = scenario("gpu_budget_of_the_context").values()
    assert inactive["counters"] == [{}]
    assert inactive["answers"] == scenario("gpu_stock")["answers"]
    (counters,) = active["counters"]
    assert counters["sparse_rows"] == 0 < counters["dense_rows"]
    # Rows read whole by another kernel: the same numbers but for rounding.
    assert found_keys(active["answers"]) == found_keys(scenario("gpu_stock")["answers"])


def test_eager_steps_are_the_oracles() -> None:
    found = scenario("gpu_eager")
    (oracle,), (counters,) = found["oracle"], found["counters"]
    assert oracle["failures"] == []
    assert 0 < oracle["worst"] <= 1
    assert oracle["seen"]["rows"] > 100
    assert counters["sparse_rows"] > 0
    assert found["metrics"]["prefix_cache_hits"] > 1000


def test_decode_batches_are_replayed_from_graphs() -> None:
    found = scenario("gpu_graphs")
    (counters,) = found["counters"]
    assert counters["sparse_rows"] > 100
    assert counters["eager_steps"] < 10  # steps in which prompts joined
    assert counters["pages_read"] < counters["pages_held"] / 4
    assert found_keys(found["answers"]) == found_keys(scenario("gpu_eager")["answers"][0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_give_the_tokens_of_one() -> None:
    found = scenario("gpu_two_ranks")
    assert len(found["counters"]) == 2
    assert all(worker["sparse_rows"] > 100 for worker in found["counters"])
    assert found_keys(found["answers"]) == found_keys(scenario("gpu_graphs")["answers"])

"""Quest inside vLLM on a GPU: kernels, server, CUDA graphs, two ranks. Scenarios of tests/serving, each a process."""

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

from scenario import BUDGET, GPU_ORACLE, prompts
from server import CLIENTS, NAME, serving

SERVING = Path(__file__).parent.parent / "serving"
KEY = len(" 48213")
"""Characters of a pass key in an answer."""
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


def assert_sampled(found: dict[str, Any], least: int = 10) -> None:
    """A sample of the calls, of at least so many rows, was as float64 has it, and Quest ran."""
    (oracle,), (counters,) = found["oracle"], found["counters"]
    assert oracle["failures"] == []
    assert 0 < oracle["worst"] <= 1
    assert oracle["seen"]["rows"] > least
    assert counters["sparse_rows"] > 0
    assert counters["tokens_read"] < counters["tokens_held"]


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
    assert_sampled(found, 100)
    assert found["metrics"]["prefix_cache_hits"] > 1000


def test_moments_are_those_of_the_keys() -> None:
    found = scenario("gpu_moments")
    assert_sampled(found)
    assert found["metrics"]["num_preemptions"] > 0


@pytest.mark.parametrize("form", ["bounds", "bounds, scaled", "sketch", "sketch, scaled"])
def test_keys_and_values_in_8_bits(form: str) -> None:
    assert_sampled(scenario("gpu_8_bits")[form])


def test_sketches_with_a_budget_of_the_context_give_the_stock_backends_keys() -> None:
    found = scenario("gpu_sketch_budget_of_the_context")
    (counters,) = found["counters"]
    assert counters["sparse_rows"] == 0 < counters["dense_rows"]
    assert counters["tokens_read"] == counters["tokens_held"]
    assert found_keys(found["answers"]) == found_keys(scenario("gpu_stock")["answers"])


def test_single_tokens_by_sketches_are_the_oracles() -> None:
    found = scenario("gpu_sketch")
    assert_sampled(found, 100)
    assert found["metrics"]["prefix_cache_hits"] > 1000
    assert "pages_read" not in found["counters"][0]


def test_runs_of_four_tokens_by_sketches_after_preemption() -> None:
    found = scenario("gpu_sketch_preemption")
    assert_sampled(found)
    assert found["metrics"]["num_preemptions"] > 0


def test_steps_with_sketches_are_replayed_from_graphs() -> None:
    found = scenario("gpu_sketch_graphs")
    (counters,) = found["counters"]
    assert counters["sparse_rows"] > 100
    assert counters["eager_steps"] < 10  # steps in which prompts joined
    assert counters["tokens_read"] < counters["tokens_held"] / 4
    assert found_keys(found["answers"]) == found_keys(scenario("gpu_sketch")["answers"][0])


def test_preempted_rows_and_blocks_used_again() -> None:
    found = scenario("gpu_preemption")
    assert_sampled(found)
    assert found["metrics"]["num_preemptions"] > 0


@pytest.mark.parametrize("form", ["bounds", "sketch"])
def test_blocks_that_come_back_from_the_hosts_memory(form: str) -> None:
    found = scenario("gpu_offloading")[form]
    assert_sampled(found)
    first, _, again = found["answers"]
    assert found_keys(again) == found_keys(first)
    assert found["metrics"]["external_prefix_cache_hits"] > 0, "blocks were loaded"


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="vLLM's n-gram speculation needs numba")
def test_speculated_tokens_that_are_taken_back() -> None:
    found = scenario("gpu_speculation")
    assert_sampled(found)
    drafted, accepted = (found["metrics"][f"spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert accepted < drafted


def test_eight_clients_of_a_server() -> None:
    texts = prompts(CLIENTS, 300)
    # A pool of a size that is given: other tests on the GPU take and free memory while it would be measured.
    options = ("--dtype", "bfloat16", "--block-size", "16", "--kv-cache-memory-bytes", "2G")
    options += ("--gpu-memory-utilization", "0.2")
    with serving(
        {"token_budget": BUDGET}, *options, "--worker-extension-cls", GPU_ORACLE["worker_extension_cls"]
    ) as server:
        server.rpc("install_oracle")
        together = server.ask_together(texts)
        alone = [server.ask(text) for text in texts[:2]]
        example = server.run_example()
        found = {"oracle": server.rpc("oracle_report"), "counters": server.rpc("quest_counters")}
    assert_sampled(found)
    assert [text[:KEY] for text in together[:2]] == [text[:KEY] for text in alone]
    assert example.startswith(f"{NAME}, 4084 tokens: 27183"), example


def test_decode_batches_are_replayed_from_graphs() -> None:
    found = scenario("gpu_graphs")
    (counters,) = found["counters"]
    assert counters["sparse_rows"] > 100
    assert counters["eager_steps"] < 10  # steps in which prompts joined
    assert counters["pages_read"] < counters["pages_held"] / 4
    assert found_keys(found["answers"]) == found_keys(scenario("gpu_eager")["answers"][0])


def test_an_engine_that_slept_chooses_as_before() -> None:
    found = scenario("gpu_sleep")
    (counters,) = found["counters"]
    assert counters["sparse_rows"] > 100
    assert found_keys(found["after"]) == found_keys(found["before"])


def test_requests_with_budgets_of_their_own() -> None:
    for found in scenario("gpu_own_budgets").values():
        oracle = found["oracle"]
        assert oracle["failures"] == [] and 0 < oracle["worst"] <= 1
        for name in ("eager", "graphs"):
            counters = found[name]["counters"]
            assert (counters["sparse_rows"], counters["dense_rows"]) == (4 * 9, 9), "one asks to be read whole"
            assert counters["eager_steps"] >= 9, "a step with a budget of its own is not replayed"
        assert found["graphs"]["counters"]["tokens_read"] == found["eager"]["counters"]["tokens_read"]
        assert found_keys(found["graphs"]["answers"]) == found_keys(found["eager"]["answers"])
        assert found["after"]["counters"]["sparse_rows"] == 5 * 9
        assert found["after"]["counters"]["eager_steps"] < 3, "graphs are replayed again"


@pytest.mark.parametrize("name", ["windows", "sinks", "states", "states_by_sketches"])
def test_layers_of_other_kinds_among_full_ones(name: str) -> None:
    found = scenario(f"gpu_{name}")
    assert_sampled(found, 5)  # of 18 calls, as there is one such layer
    (whole,) = found["whole"]["counters"]
    assert whole["sparse_rows"] == 0 < whole["dense_rows"]
    # Rows read whole by another kernel. A random model's tokens are near one another, so its numbers are compared.
    for ours, theirs in zip(found["whole"]["logprobs"], found["stock"]["logprobs"], strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=0.05)
    assert found["sparse"]["logprobs"] != found["stock"]["logprobs"]
    (groups,) = found["groups"]
    assert [int(layer.split(".")[2]) for group in groups for layer in group["layers"]] == [3]


@pytest.mark.parametrize("name", ["gpu_sparse_verification", "gpu_sparse_verification_of_sketches"])
def test_rows_that_check_drafts_are_the_oracles(name: str) -> None:
    found = scenario(name)
    (oracle,), (counters,) = found["oracle"], found["counters"]
    assert oracle["failures"] == [] and 0 < oracle["worst"] <= 1
    assert oracle["seen"]["rows of several tokens"] > 50
    assert counters["verified_sparse_rows"] > 100
    assert counters["tokens_read"] < counters["tokens_held"]
    drafted, accepted = (found["metrics"][f"spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert 0 < accepted < drafted


@pytest.mark.parametrize("name", ["gpu_sparse_verification", "gpu_sparse_verification_of_sketches"])
def test_rows_that_check_drafts_are_replayed_from_graphs(name: str) -> None:
    found = scenario(f"{name}_graphs")
    (counters,) = found["counters"]
    assert counters["verified_sparse_rows"] > 50
    assert counters["eager_steps"] < 10  # steps in which prompts joined
    assert counters["tokens_read"] < counters["tokens_held"] / 2
    assert found_keys(found["answers"]) == found_keys(scenario(name)["answers"][0])


def test_a_budget_of_the_context_checks_drafts_as_stock_does() -> None:
    found = scenario("gpu_sparse_verification_of_the_context")
    (counters,) = found["counters"]
    assert counters["verified_sparse_rows"] == 0 < counters["verified_rows"]
    assert found_keys(found["answers"]) == found_keys(scenario("gpu_stock_verification")["answers"])


def test_a_model_that_drafts_with_quest_answers_as_stock_does() -> None:
    found = scenario("gpu_drafts_by_quest")
    (counters,) = found["counters"]
    assert counters["verified_sparse_rows"] == 0 < counters["verified_rows"] < counters["sparse_rows"]
    assert counters["eager_steps"] < 10  # steps in which prompts joined: drafts are replayed too
    # Other numbers of rows in a product are summed in another order, so that close calls may fall otherwise later on.
    assert found_keys(found["answers"]) == found_keys(scenario("gpu_stock")["answers"])
    drafted, accepted = (found["metrics"][f"spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert drafted / 2 < accepted


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_give_the_tokens_of_one() -> None:
    found = scenario("gpu_two_ranks")
    assert len(found["counters"]) == 2
    assert all(worker["sparse_rows"] > 100 for worker in found["counters"])
    assert found_keys(found["answers"]) == found_keys(scenario("gpu_graphs")["answers"])

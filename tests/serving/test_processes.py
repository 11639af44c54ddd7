"""Engines of several processes, which wait for one another by asking again and again: one test at a time.

For the environment that has vLLM: `make test-vllm`.
"""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="runs with make test-vllm, which installs vLLM")

from engine import MINUTES, assert_checked, scenario

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * MINUTES)]


def test_two_ranks_each_with_its_own_heads() -> None:
    found = scenario("tensor_parallel")
    assert_checked(found, ranks=2)
    assert found["answers"] == scenario("one_rank")["answers"]


@pytest.mark.thorough  # of four engines; in `.ci/run` blocks are moved by the offloading connector
@pytest.mark.parametrize("form", ["bounds", "sketch"])
def test_prompts_of_another_engine_fetched_by_nixl(form: str) -> None:
    found = scenario("fetched_by_nixl")[form]
    assert_checked(found)
    assert found["answers"] == found["alone"]
    (moved,) = found["moved"]
    assert found["metrics"]["external_prefix_cache_hits"] > 1000
    assert moved["elsewhere"] > 20 and moved["blocks"] > 40
    assert moved["other bits"] == 0

"""The OpenAI server with Quest under eight clients at once, on a CPU."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="runs with make test-vllm, which installs vLLM")

import scenario
from server import CLIENTS, NAME, serving

MINUTES = 15
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * MINUTES)]


@pytest.mark.parametrize(("kept", "what"), [({}, "pages"), (scenario.SKETCH, "tokens")], ids=["bounds", "sketch"])
def test_eight_clients_get_what_one_gets_and_every_step_is_the_oracles(
    kept: dict[str, Any], what: str, tmp_path: Path
) -> None:
    quest = {"token_budget": scenario.BUDGET, "log_interval": 1, **kept}
    prompts = scenario.prompts(CLIENTS, 300)
    options = ("--dtype", "float32", "--block-size", str(scenario.BLOCK))
    options += ("--worker-extension-cls", "vllm_oracle.OracleExtension")
    with serving(quest, *options, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)) as server:
        server.rpc("install_oracle")
        together = server.ask_together(prompts)
        alone = [server.ask(prompt) for prompt in prompts[:2]]
        example = server.run_example()
        (oracle,), (counters,) = server.rpc("oracle_report"), server.rpc("quest_counters")
        time.sleep(1.5)
        server.ask(prompts[0][:200])  # a step, at which a line is due
        told = server.metrics()
    assert together[:2] == alone
    assert example.startswith(f"{NAME}, 4084 tokens: 27183"), example
    for index, text in enumerate(together):
        assert len(text) > 0, index
    assert oracle["failures"] == []
    assert oracle["seen"]["rows past the budget"] == 4 * counters["sparse_rows"] > 0
    assert counters["tokens_read"] < counters["tokens_held"]
    lines = [
        line
        for line in server.log
        if re.search(rf"Quest, worker 0: \d+ of \d+ decode rows sparse, \d+ of \d+ {what} read", line)
    ]
    assert lines, "".join(server.log)[-3000:]
    rows, tokens = (
        {kind: _told(told, name, kind) for kind in kinds}
        for name, kinds in (("rows", ("sparse", "dense", "verified")), ("tokens", ("read", "held")))
    )
    assert rows["sparse"] == counters["sparse_rows"] and rows["verified"] == 0
    assert rows["dense"] >= counters["dense_rows"]
    assert 0 < tokens["read"] < tokens["held"]
    assert any(name.startswith("vllm:") for name in told)


def _told(told: dict[str, float], name: str, kind: str) -> float:
    """Of the one worker's layers."""
    (value,) = (
        value for full, value in told.items() if full.startswith(f"quest:{name}_total{{") and f'kind="{kind}"' in full
    )
    return value

"""The OpenAI server with Quest under eight clients at once, on a CPU."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="runs with make test-vllm, which installs vLLM")

from openai import BadRequestError

import scenario
from engine import thorough
from server import CLIENTS, NAME, helpers_path, serving

MINUTES = 15
_BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * MINUTES)]


@pytest.mark.parametrize("oracle", [scenario.ORACLE, scenario.SIMULATED_ORACLE, scenario.GPU_ORACLE])
def test_a_server_finds_what_tests_have_its_worker_call(oracle: dict[str, str], tmp_path: Path) -> None:
    """Those for a GPU too, whose tests run elsewhere."""
    module, name = oracle["worker_extension_cls"].split(".")
    command = [sys.executable, "-c", f"from {module} import {name}"]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": helpers_path()})


@pytest.mark.parametrize(
    ("kept", "what"), [thorough({}, "pages"), (scenario.SKETCH, "tokens")], ids=["bounds", "sketch"]
)
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
        whole = server.ask(prompts[0], quest_token_budget="none")
        for asked in (scenario.BUDGET + 1, 0, "all", 64.5, [64]):  # the client's error is a 400
            with pytest.raises(
                BadRequestError, match=r"quest_token_budget: got .* expected 'none' or 64 to 128 tokens"
            ):
                server.ask(prompts[0], quest_token_budget=asked)
        with pytest.raises(BadRequestError, match="quest_tokens_budget: got 64, expected quest_token_budget"):
            server.ask(prompts[0], quest_tokens_budget=64)
        chosen = server.ask(prompts[0], quest_token_budget=scenario.BUDGET // 2)
        (oracle,), (counters,) = server.rpc("oracle_report"), server.rpc("quest_counters")
        time.sleep(1.5)
        server.ask(prompts[0][:200])  # a step, at which a line is due
        told = server.metrics()
    assert together[:2] == alone
    assert len(whole) > 0 and len(chosen) > 0
    assert example.startswith(f"{NAME}, 4084 tokens: 27183"), example
    for index, text in enumerate(together):
        assert len(text) > 0, index
    assert oracle["failures"] == []
    assert oracle["seen"]["rows past the budget"] == 4 * counters["sparse_rows"] > 0
    assert counters["dense_rows"] == scenario.ANSWER - 1, "of the one that asked to be read whole"
    assert counters["tokens_read"] < counters["tokens_held"]
    lines = [
        line
        for line in server.log
        if re.search(rf"Quest, worker 0: \d+ of \d+ decode rows sparse, \d+ of \d+ {what} read", line)
    ]
    assert lines, "".join(server.log)[-3000:]
    rows, tokens = (
        {kind: _told(told, name, kind) for kind in kinds}
        for name, kinds in (("rows", ("sparse", "dense", "verified_sparse", "verified")), ("tokens", ("read", "held")))
    )
    assert rows["sparse"] == counters["sparse_rows"] and rows["verified"] == 0
    assert rows["dense"] >= counters["dense_rows"]
    assert 0 < tokens["read"] < tokens["held"]
    assert any(name.startswith("vllm:") for name in told)


@pytest.mark.parametrize("kept", [{}, thorough(scenario.SKETCH)], ids=["bounds", "sketch"])
def test_clients_that_leave_and_rows_that_are_preempted_leave_nothing_behind(kept: dict[str, Any]) -> None:
    """A pool of a quarter of what sixteen requests want; `QUEST_REQUESTS` says how many there are."""
    count = int(os.environ.get("QUEST_REQUESTS", "32"))
    draw = random.Random(0)
    texts = [scenario.prompts(index % 24 + 1, draw.randint(30, 180))[-1] for index in range(count)]
    options = ("--dtype", "float32", "--block-size", str(scenario.BLOCK), "--max-num-seqs", "16", "--max-model-len")
    options += ("640", "--num-gpu-blocks-override", "24", "--worker-extension-cls", "vllm_oracle.OracleExtension")
    with serving({"token_budget": scenario.BUDGET, **kept}, *options) as server:
        server.rpc("install_oracle")  # before there are blocks whose keys it did not see
        before = [server.ask(text) for text in texts[:2]]

        def visit(index: int) -> str:
            if index % 3 == 2:
                server.leave(texts[index], index % 7)
                return ""
            return server.ask(texts[index], 40 + index % 5 * 10)  # long: together they outgrow the pool

        with ThreadPoolExecutor(16) as clients:
            given = list(clients.map(visit, range(count)))
        for _ in range(60):  # the server hears of who left a little later
            told = server.metrics()
            if not any(told[name] for name in told if name.startswith(_BUSY)):
                break
            time.sleep(0.5)
        after = [server.ask(text) for text in texts[:2]]
        (oracle,), (counters,) = server.rpc("oracle_report"), server.rpc("quest_counters")
    assert [one for one in oracle["failures"] if "output off" not in one] == []
    assert oracle["worst"] < 2, "of thousands of calls there are some in which PyTorch, the yardstick, has luck"
    assert oracle["seen"]["rows past the budget"] == 4 * counters["sparse_rows"] > count
    assert not any(told[name] for name in told if name.startswith(_BUSY)), "nobody runs, waits or holds a block"
    (preempted,) = (told[name] for name in told if name.startswith("vllm:num_preemptions_total"))
    assert preempted > 0, counters
    assert before == after == [text[: len(one)] for text, one in zip(given, before, strict=False)]
    keys = [text[text.index("The pass key is") :][16:21] for text in texts]
    found = [key in answer for index, (key, answer) in enumerate(zip(keys, given, strict=True)) if index % 3 != 2]
    assert sum(found) > 0.9 * len(found), "the answers of others"


def _told(told: dict[str, float], name: str, kind: str) -> float:
    """Of the one worker's layers."""
    (value,) = (
        value for full, value in told.items() if full.startswith(f"quest:{name}_total{{") and f'kind="{kind}"' in full
    )
    return value

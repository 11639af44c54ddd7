"""The OpenAI server with Quest under eight clients at once, on a CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="runs with make test-vllm, which installs vLLM")

import scenario

HERE = Path(__file__).parent
EXAMPLE = HERE.parent.parent / "examples" / "ask_a_server.py"
PORT = 8311
NAME = "tiny"
CLIENTS = 8
MINUTES = 15
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * MINUTES)]


@contextmanager
def serving(quest: dict[str, Any], *options: str) -> Iterator[list[str]]:
    """A server that answers; gives the lines of its log, which grow."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(scenario.bundled_model_path()), "--served-model-name", NAME, "--port", str(PORT)]
    command += ["--dtype", "float32", "--max-model-len", "8192"]
    command += ["--block-size", str(scenario.BLOCK), "--enforce-eager", "--max-num-seqs", "4"]
    command += ["--attention-backend", "CUSTOM", "--additional-config", json.dumps({"quest": quest}), *options]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # for /collective_rpc, by which the test asks the worker
        "PYTHONPATH": str(HERE),
    }
    log: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        reader = threading.Thread(target=lambda: log.extend(server.stdout), daemon=True)
        reader.start()
        try:
            wait_until_ready(server, log)
            yield log
        finally:
            server.terminate()
            server.wait(60)
            reader.join(10)


def wait_until_ready(server: subprocess.Popen[str], log: list[str]) -> None:
    while server.poll() is None:
        if is_ready():
            return
        time.sleep(1)
    pytest.fail("the server ended: " + "".join(log)[-6000:])


def is_ready() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
            return True
    except OSError:
        return False


def rpc(method: str) -> Any:
    """Call a method of the worker."""
    body = json.dumps({"method": method}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/collective_rpc", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        text = response.read()
    return json.loads(text)["results"] if text else None


def ask(prompt: str) -> str:
    """As a client does."""
    from openai import OpenAI

    with OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", timeout=600) as client:
        done = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=scenario.ANSWER, temperature=0, extra_body={"ignore_eos": True}
        )
    return done.choices[0].text


def test_eight_clients_get_what_one_gets_and_every_step_is_the_oracles() -> None:
    quest = {"token_budget": scenario.BUDGET, "log_interval": 1}
    prompts = scenario.prompts(CLIENTS, 300)
    with serving(quest, "--worker-extension-cls", "vllm_oracle.OracleExtension") as log:
        rpc("install_oracle")
        with ThreadPoolExecutor(CLIENTS) as clients:
            together = list(clients.map(ask, prompts))
        alone = [ask(prompt) for prompt in prompts[:2]]
        example = subprocess.run(
            [sys.executable, str(EXAMPLE), f"http://127.0.0.1:{PORT}/v1"], capture_output=True, text=True, check=True
        )
        (oracle,), (counters,) = rpc("oracle_report"), rpc("quest_counters")
        time.sleep(1.5)
        ask(prompts[0][:200])  # a step, at which a line is due
    assert together[:2] == alone
    assert example.stdout.startswith(f"{NAME}, 4084 tokens: 27183"), example.stdout
    for index, text in enumerate(together):
        assert len(text) > 0, index
    assert oracle["failures"] == []
    assert oracle["seen"]["rows past the budget"] == 4 * counters["sparse_rows"] > 0
    lines = [
        line for line in log if re.search(r"Quest, worker 0: \d+ of \d+ decode rows sparse, \d+ of \d+ pages", line)
    ]
    assert lines, "".join(log)[-3000:]

"""An OpenAI server with Quest, a process of its own, and what its clients do."""

from __future__ import annotations

import json
import os
import socket
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

import scenario
from cores import engine_environment

HERE = Path(__file__).parent
EXAMPLE = HERE.parent.parent / "examples" / "ask_a_server.py"
NAME = "tiny"
CLIENTS = 8


class Server:
    """A server that runs.

    Attributes:
        url: Of its API.
        log: Lines it has written, which grow.
    """

    def __init__(self, port: int) -> None:
        from openai import OpenAI

        self._address = f"http://127.0.0.1:{port}"
        self.url = f"{self._address}/v1"
        self.log: list[str] = []
        # One for all threads: to make one takes longer than a short answer, and hardly two would be asked for at once.
        self._client = OpenAI(base_url=self.url, api_key="none", timeout=600)

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self._address}/health", timeout=5):
                return True
        except OSError:
            return False

    def rpc(self, method: str) -> Any:
        """Call a method of the worker."""
        body = json.dumps({"method": method}).encode()
        request = urllib.request.Request(f"{self._address}/collective_rpc", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            text = response.read()
        return json.loads(text)["results"] if text else None

    def metrics(self) -> dict[str, float]:
        """What it tells Prometheus, by name and labels."""
        with urllib.request.urlopen(f"{self._address}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}

    def ask(self, prompt: str, tokens: int = scenario.ANSWER, **xargs: Any) -> str:
        """As a client does, who may say more in `vllm_xargs`."""
        return self.complete(prompt, tokens, ignore_eos=True, vllm_xargs=xargs).choices[0].text

    def complete(self, prompt: str, tokens: int, **more: Any) -> Any:
        """What a model writes behind a text: the whole reply, with what it took. `more` is what vLLM alone takes."""
        return self._client.completions.create(
            model=NAME, prompt=prompt, max_tokens=tokens, temperature=0, extra_body=more
        )

    def chat(self, question: str, tokens: int) -> Any:
        """A turn of a chat as a client asks for it, likewise."""
        turns: Any = [{"role": "user", "content": question}]
        return self._client.chat.completions.create(model=NAME, messages=turns, max_tokens=tokens, temperature=0)

    def ask_together(self, prompts: list[str]) -> list[str]:
        """As many clients at once do."""
        with ThreadPoolExecutor(len(prompts)) as clients:
            return list(clients.map(self.ask, prompts))

    def leave(self, prompt: str, tokens: int) -> None:
        """Ask for a long answer as a stream, and hang up after so many tokens."""
        given = self._client.completions.create(
            model=NAME, prompt=prompt, max_tokens=256, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        for _, _ in zip(range(tokens), given, strict=False):
            pass
        given.close()

    def run_example(self) -> str:
        """What the example of docs/vllm.md prints."""
        command = [sys.executable, str(EXAMPLE), self.url]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def helpers_path() -> str:
    """PYTHONPATH with which a server's worker finds what tests have it call."""
    return os.pathsep.join([str(HERE), str(scenario.HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])])


@contextmanager
def serving(
    quest: dict[str, Any] | None, *options: str, model: Path | None = None, **variables: str
) -> Iterator[Server]:
    """A server that answers, eager, with four sequences at once.

    Args:
        quest: Options of Quest; stock without.
        options: More of vLLM's.
        model: Folder of the model; the bundled one without.
        variables: Of its environment.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model or scenario.bundled_model_path()), "--served-model-name", NAME]
    command += ["--port", str(port), "--max-model-len", "8192", "--enforce-eager", "--max-num-seqs", "4"]
    if quest is not None:
        command += ["--attention-backend", "CUSTOM", "--additional-config", json.dumps({"quest": quest})]
    command += options
    environment = {
        **engine_environment(),
        "HF_HUB_OFFLINE": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # for /collective_rpc, by which a test asks the worker
        "PYTHONPATH": helpers_path(),
        **variables,
    }
    server = Server(port)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=lambda: server.log.extend(process.stdout), daemon=True)
        reader.start()
        try:
            while not server.is_ready():
                if process.poll() is not None:
                    reader.join(10)
                    pytest.fail("the server ended: " + "".join(server.log)[-6000:])
                time.sleep(1)
            yield server
        finally:
            server.close()
            process.terminate()
            process.wait(60)
            reader.join(10)

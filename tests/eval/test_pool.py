"""Worker processes end with the one that started them, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked for in /proc"),
]
WORKERS = 2
PATIENCE = 120.0
"""For two processes to import everything [s]."""
PROMPTLY = 15.0
"""For processes to end [s], which would work on for ten minutes."""
SCRIPT = """
import os, sys, time
from pathlib import Path
from quest_attention.errors import QuestError
from quest_attention.eval.plan import Arm, Job
from quest_attention.eval.pool import run_jobs

class Runner:
    is_batched = False

    def batch_size(self, job):
        return 1

    def measure(self, work):
        (Path(sys.argv[1]) / str(os.getpid())).touch()
        if sys.argv[2] == "die":
            os._exit(9)
        time.sleep(600)

if __name__ == "__main__":
    jobs = [(Job("passkey", 64, index), [Arm("full", None)]) for index in range(4)]
    try:
        for _ in run_jobs(Runner(), [jobs], workers=2, make_runner=Runner):
            pass
    except QuestError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
"""
Start = Callable[[str], subprocess.Popen[str]]


def is_alive(process: int) -> bool:
    """Whether it runs: one that ended may wait for its parent to take note."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def await_that(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def workers(folder: Path) -> list[int]:
    return [int(file.name) for file in folder.iterdir()]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a run as a group of processes of its own, so that a signal can go to all of them as Ctrl-C does."""
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(SCRIPT)
    pids.mkdir()
    started = []

    def begin(what: str) -> subprocess.Popen[str]:
        # A shell starts what it puts in the background with the signal ignored, and a child keeps that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        command = [sys.executable, str(script), str(pids), what]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        signal.signal(signal.SIGINT, before)
        started.append(process)
        if what == "work":
            await_that(lambda: len(workers(pids)) == WORKERS, PATIENCE)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()
    for worker in workers(pids):
        if is_alive(worker):
            os.kill(worker, signal.SIGKILL)


def test_workers_end_when_their_parent_is_killed(start: Start, tmp_path: Path) -> None:
    process = start("work")
    found = workers(tmp_path / "pids")
    assert all(map(is_alive, found))
    process.kill()
    await_that(lambda: not any(map(is_alive, found)), PROMPTLY)


@pytest.mark.parametrize("to_all", [False, True])
def test_ctrl_c_ends_workers_at_once_and_without_a_word(start: Start, tmp_path: Path, to_all: bool) -> None:
    process = start("work")
    found = workers(tmp_path / "pids")
    if to_all:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PROMPTLY)
    assert process.returncode == 130
    assert said == ""
    assert not any(map(is_alive, found))


def test_a_worker_that_dies_is_said_to_have(start: Start) -> None:
    process = start("die")
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert said.startswith("one of 2 worker processes ended by itself")

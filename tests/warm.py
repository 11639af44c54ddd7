"""Run scripts in processes of their own that need not import large libraries again, which takes seconds.

This file is also what runs there: it imports them once and forks for each script, which then finds all else as Python
would give it, and ends as a program does.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Warm"]

_SECONDS = 240


class Warm:
    """A process with the imports, from the first script on until `stop`.

    Args:
        imported: Names of modules.
        environment: Of the process; this one's without.
    """

    def __init__(self, imported: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._imported, self._environment = imported, environment
        self._server: subprocess.Popen[str] | None = None

    def stop(self) -> None:
        """End the process; another script starts it again."""
        if self._server is not None:
            self._server.communicate(timeout=_SECONDS)
            self._server = None

    def run(self, script: Path, arguments: Sequence[str], cwd: Path) -> tuple[int, str, str]:
        """What a script ended with, and what it wrote to standard output and standard error."""
        if not hasattr(os, "fork"):
            command = [sys.executable, str(script), *arguments]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_SECONDS, cwd=cwd, env=self._environment
            )
            return done.returncode, done.stdout, done.stderr
        if self._server is None:
            command = [sys.executable, __file__, *self._imported]
            self._server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment,
                start_new_session=True,
            )  # fmt: skip
        server = self._server
        assert server.stdin is not None and server.stdout is not None, "they are pipes"
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("out", "err")]
            server.stdin.write(json.dumps([str(script), list(arguments), str(cwd), *map(str, files)]) + "\n")
            server.stdin.flush()
            try:
                code = int(server.stdout.readline())
            except BaseException:  # of pytest-timeout: what hangs is ended with all that it started
                os.killpg(server.pid, signal.SIGKILL)
                server.communicate()
                self._server = None
                raise
            out, err = (file.read_text(encoding="utf-8") for file in files)
        return code, out, err


def _serve() -> tuple[str, list[str]] | None:
    """Fork for each line of standard input; the script and its arguments in a child, nothing in the end."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # children neither search nor copy what is here
    for line in iter(sys.stdin.readline, ""):
        script, arguments, cwd, *files = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, file in enumerate((os.devnull, *files)):
                flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                descriptor = os.open(file, flags)
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.chdir(cwd)
            return script, arguments
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    gc.unfreeze()  # or nanobind tells of leaks
    return None


if __name__ == "__main__":
    given = _serve()
    if given is not None:
        path, more = given
        sys.argv = [path, *more]
        sys.path[0] = str(Path(path).parent)
        runpy.run_path(path, run_name="__main__")

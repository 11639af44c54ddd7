"""The record of a run: its numbers with all it takes to make them again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from quest_attention.environment import collect_environment

__all__ = ["command_line", "describe_machine", "write_record"]


def describe_machine() -> dict[str, Any]:
    """Devices, versions and commit of this run."""
    here = collect_environment()
    gpus = [device.hardware for device in here.devices if device.device.startswith("cuda")]
    versions = {name: here.packages[name] for name in ("torch", "transformers", "triton")}
    return {
        "cpu": here.devices[0].hardware,
        "gpu": gpus or None,
        "threads": here.threads,
        "python": here.python,
        **versions,
        "quest_attention": here.version,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of the source tree this runs from, marked when it has uncommitted changes; None outside of one.

    A tree that was copied to another machine without its history can say its commit in QUEST_COMMIT.
    """
    if os.environ.get("QUEST_COMMIT"):
        return os.environ["QUEST_COMMIT"]
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../..")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """The command of this run, as a shell takes it."""
    return shlex.join(["python", *sys.argv])


def write_record(path: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a run as JSON, with the command that makes it again.

    Args:
        path: File to write; its folder is made. Where it is absolute, which says something of one machine alone, the
            command names the file as if it stood among the results.
        settings: Shapes, seed and whatever else the rows share.
        rows: The measurements, units in the names of their fields.
    """
    command = command_line()
    if path.is_absolute():
        command = command.replace(str(path), f"benchmarks/results/{path.name}")
    record = {"command": command, "machine": describe_machine(), "settings": settings, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")

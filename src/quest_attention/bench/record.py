"""The record of a run: its numbers with all it takes to make them again."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from quest_attention.environment import collect_environment

__all__ = ["describe_machine", "write_record"]


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


def write_record(path: Path, command: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a run as JSON.

    Args:
        path: File to write; its folder is made.
        command: The command that was run. Of an absolute path to write to, which says something of one machine alone,
            the record keeps the file's name, as if it stood among the results.
        settings: Shapes, seed and whatever else the rows share.
        rows: The measurements, units in the names of their fields.
    """
    if path.is_absolute():
        command = command.replace(str(path), f"benchmarks/results/{path.name}")
    record = {"command": command, "machine": describe_machine(), "settings": settings, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")

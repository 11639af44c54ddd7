"""The record of a run: its numbers with all it takes to make them again."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from quest_attention import __version__

__all__ = ["describe_machine", "write_record"]


def describe_machine() -> dict[str, Any]:
    """Device, versions and commit of this run."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "quest_attention": __version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of the source tree this runs from, marked when it has uncommitted changes; None outside of one."""
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
        command: The command that makes the file again.
        settings: Shapes, seed and whatever else the rows share.
        rows: The measurements, units in the names of their fields.
    """
    record = {"command": command, "machine": describe_machine(), "settings": settings, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")

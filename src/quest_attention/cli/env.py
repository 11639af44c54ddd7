"""`quest env`."""

from __future__ import annotations

import json

from rich.table import Table

from quest_attention.cli.console import stdout_console
from quest_attention.environment import collect_environment

__all__ = ["show_environment"]


def show_environment(*, as_json: bool) -> None:
    """Print what `collect_environment` found."""
    found = collect_environment()
    console = stdout_console()
    if as_json:
        console.print(json.dumps(found.to_dict(), indent=2), markup=False, soft_wrap=True)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("quest-attention", found.version)
    table.add_row("python", found.python)
    table.add_row("system", found.system)
    for name, version in found.packages.items():
        table.add_row(name, version or "[dim]not installed[/]")
    table.add_row("bundled model", "installed" if found.bundled_model else "[yellow]not installed[/]")
    table.add_row("threads", f"{found.threads} for PyTorch")
    for device in found.devices:
        table.add_row("", "")
        table.add_row(device.device, device.hardware)
        table.add_row("  backend", f"[green]{device.backend}[/]: {device.reason}")
    console.print(table)

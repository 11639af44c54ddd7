"""The `quest` command. `main` is its entry point; the commands import torch and transformers only when they run."""

from quest_attention.cli.app import main, run

__all__ = ["main", "run"]

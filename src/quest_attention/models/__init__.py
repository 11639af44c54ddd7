"""The model that comes with the package, so that everything can be tried without a network."""

from __future__ import annotations

from pathlib import Path

from quest_attention.errors import QuestStateError

__all__ = ["bundled_model_path"]

_WEIGHTS = "model.safetensors"


def bundled_model_path() -> Path:
    """Folder of the bundled model, as `from_pretrained` takes it.

    Raises:
        QuestStateError: This installation has no bundled model.
    """
    folder = Path(__file__).parent / "tiny"
    if not (folder / "config.json").is_file() or not (folder / _WEIGHTS).is_file():
        raise QuestStateError("model: this installation has no bundled model: name one with --model")
    return folder

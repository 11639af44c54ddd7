"""Where the real model is, and a process that uses the cores it is given.

`make test` does not look into this folder: `make test-real` fetches the model and runs it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from quest_attention.cli.loading import LoadedModel, load_model

FOLDER = Path(os.environ.get("QUEST_REAL_MODELS", Path(__file__).resolve().parents[2] / ".models"))


@pytest.fixture(scope="session")
def model_file() -> Path:
    """SmolLM2-135M-Instruct; see tools/real_models.py."""
    file = FOLDER / "smollm2.gguf"
    if "QUEST_REAL_MODELS" not in os.environ and not file.is_file():
        pytest.skip(f"there is no {file}: make test-real fetches it")
    return file


@pytest.fixture(scope="session")
def loaded(model_file: Path) -> LoadedModel:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return load_model(str(model_file), device="cpu")

"""Where the real model is, and a process that uses the cores it is given.

`make test` does not look into this folder: `make test-real` and `make test-real-vllm` fetch the model and run it. They
say where it is, and then it is an error that it is not there.
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
def model_folder() -> Path:
    """The same, unpacked for vLLM; see tools/unpack_gguf.py."""
    folder = FOLDER / "smollm2"
    if "QUEST_REAL_MODELS" not in os.environ and not folder.is_dir():
        pytest.skip(f"there is no {folder}: make test-real-vllm makes it")
    assert (folder / "config.json").is_file(), f"{folder} holds no model: tools/unpack_gguf.py makes one"
    return folder


@pytest.fixture(scope="session")
def loaded(model_file: Path) -> LoadedModel:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return load_model(str(model_file), device="cpu")

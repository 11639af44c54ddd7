"""Unpack a GGUF file to a folder that transformers and vLLM load: `tools/unpack_gguf.py .models/smollm2.gguf FOLDER`.

vLLM reads no GGUF by itself. The folder is made anew each time, so that it never holds another model than the file. The
weights are in float32, in which nothing of the file is rounded again: 4 bytes for each parameter.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from quest_attention import QuestError
from quest_attention.cli.loading import load_model


def unpack(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder.

    Raises:
        SystemExit: The file cannot be read, or the folder holds what is no model.
    """
    if folder.exists() and not (folder / "config.json").is_file():
        sys.exit(f"{folder}: there, and no model: it is left alone")
    try:
        loaded = load_model(str(file), device="cpu", dtype="float32")
    except QuestError as error:
        sys.exit(str(error))
    half = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    loaded.model.save_pretrained(half)
    loaded.tokenizer.save_pretrained(half)
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)


def main() -> None:
    """Unpack the file named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="the GGUF file")
    parser.add_argument("folder", type=Path, help="what is made, or replaced where it holds a model")
    options = parser.parse_args()
    unpack(options.file, options.folder)


if __name__ == "__main__":
    main()

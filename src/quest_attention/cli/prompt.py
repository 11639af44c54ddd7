"""Where a prompt comes from: an option, a file or standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from quest_attention.errors import QuestValueError

__all__ = ["read_prompt"]

STDIN = "-"


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt: `prompt`, or the text of `prompt_file` (`-` is standard input), or else what is piped in.

    Raises:
        QuestValueError: Both or neither are given, the file cannot be read, or the text is empty or not UTF-8.
    """
    if prompt is not None and prompt_file is not None:
        raise QuestValueError("prompt_file", prompt_file, "only one of --prompt and --prompt-file")
    if prompt is not None:
        return _checked("prompt", prompt, prompt)
    if prompt_file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise QuestValueError("prompt", None, "a prompt: --prompt TEXT, --prompt-file FILE, or text on standard input")
    if prompt_file is None or prompt_file == STDIN:
        raw, name = sys.stdin.buffer.read(), "standard input"
    else:
        raw, name = _read(prompt_file), prompt_file
    try:
        text = raw.decode("utf-8-sig")  # a byte order mark is no part of the prompt
    except UnicodeDecodeError as error:
        found = f"{name}, byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise QuestValueError("prompt_file", found, "text in UTF-8") from None
    return _checked("prompt_file", f"{name} ({len(raw):,} bytes)", text)


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise QuestValueError("prompt_file", path, "a file that exists") from None
    except IsADirectoryError:
        raise QuestValueError("prompt_file", path, "a file, not a folder") from None
    except OSError as error:
        raise QuestValueError("prompt_file", path, f"a readable file: {error.strerror}") from None


def _checked(argument: str, found: str, text: str) -> str:
    if not text.strip():
        raise QuestValueError(argument, found, "text, not only white space")
    return text

"""What a GGUF file says of itself: enough to tell a model from anything else before it is loaded.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: a magic word, counts, keys with values,
a table of tensors, and the tensors. Package `gguf` reads it too, but every element of every array one by one, which
takes seconds for a vocabulary.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quest_attention.errors import QuestValueError

__all__ = ["GgufHeader", "read_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Version 1 is older than every model worth reading, and a file in big-endian order shows as another number."""
STRING, ARRAY = 8, 9
"""Types of values that have no fixed size."""
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Those that have one, as `struct` spells them."""
DEFAULT_ALIGNMENT = 32
PART_OF_SEVERAL = re.compile(r"-\d{5}-of-\d{5}$")
"""How llama.cpp ends the names of the files of a split model."""
PROJECTOR = "clip"
"""Architecture of the files that turn pictures and sound into tokens, from before files had a type."""


@dataclass(frozen=True)
class GgufHeader:
    """The keys of a GGUF file.

    Attributes:
        values: By key; of an array only its length.
    """

    values: dict[str, Any]

    @property
    def splits_text(self) -> str:
        """How text is split before it is turned into tokens, by llama.cpp's name; its word for unknown is default."""
        return str(self.values.get("tokenizer.ggml.pre", "default"))

    @property
    def is_byte_level(self) -> bool:
        """Whether its vocabulary is one of bytes, as GPT-2's, rather than of characters."""
        return bool(self.values["tokenizer.ggml.model"] == "gpt2")

    @property
    def end_tokens(self) -> list[int]:
        """Ids of the tokens that end a text, a turn or a message."""
        keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
        return [self.values[key] for key in keys if key in self.values]


def read_header(path: Path) -> GgufHeader:
    """Read what a GGUF file says of itself.

    Raises:
        QuestValueError: It is no GGUF file, is cut off, or holds something else than a whole language model.
    """
    if PART_OF_SEVERAL.search(path.stem):
        raise _refusal(path, "a model in one file; this is one of several: join them with llama-gguf-split --merge")
    size = path.stat().st_size
    if size == 0:
        raise _refusal(path, "a GGUF file; this one is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[: len(MAGIC)] != MAGIC:
            raise _refusal(path, f"a GGUF file; this one begins with {data[: len(MAGIC)]!r}")
        try:
            header, end = _read(data, path)
        except (struct.error, UnicodeDecodeError, MemoryError, OverflowError):
            raise _refusal(path, "a whole GGUF file; this one is cut off or damaged") from None
    _check_is_a_model(header.values, path)
    if end > size:
        raise _refusal(path, f"a whole GGUF file; this one has {size:,} of {end:,} bytes")
    return header


def _check_is_a_model(values: dict[str, Any], path: Path) -> None:
    kind, architecture = values.get("general.type", "model"), values.get("general.architecture")
    if kind == "mmproj" or architecture == PROJECTOR:
        raise _refusal(path, "a language model; this file is the projector of one, for pictures or sound")
    if kind != "model":
        raise _refusal(path, f"a language model; by its general.type this file is: {kind}")
    parts = values.get("split.count", 1)
    if not isinstance(parts, int):
        raise _refusal(path, f"a number of parts; this file has the split.count {parts!r}")
    if parts > 1:
        raise _refusal(path, f"a model in one file; this is one of {parts}: join them with llama-gguf-split --merge")
    for key in ("general.architecture", "tokenizer.ggml.model"):
        if key not in values:
            raise _refusal(path, f"a language model with its tokenizer; this file has no {key}")


def _read(data: mmap.mmap, path: Path) -> tuple[GgufHeader, int]:
    """The header, and the byte at which the tensors end."""
    cursor = _Cursor(data, len(MAGIC))
    version, tensors, keys = cursor.take("I"), cursor.take("Q"), cursor.take("Q")
    if version not in VERSIONS:
        raise _refusal(path, f"GGUF of version 2 or 3 in little-endian order; this one says version {version}")
    values: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.take_string()
        values[key] = cursor.take_value(cursor.take("I"))
    end = 0
    for _ in range(tensors):
        cursor.take_string()
        shape = [cursor.take("Q") for _ in range(cursor.take("I"))]
        kind, offset = cursor.take("I"), cursor.take("Q")
        end = max(end, offset + _bytes_of(kind, math.prod(shape)))
    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _refusal(path, f"a file that is not damaged; this one aligns its tensors to {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(values), start + end


def _bytes_of(kind: int, elements: int) -> int:
    """Size of a tensor; 0 for a kind that package `gguf` does not know, of which the loading will speak."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        return 0
    return elements // per_block * block_bytes


class _Cursor:
    """Reads one value after another."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data = data
        self.position = position

    def take(self, spelling: str) -> Any:
        (value,) = struct.unpack_from(f"<{spelling}", self._data, self.position)
        self.position += struct.calcsize(f"<{spelling}")
        return value

    def take_string(self) -> str:
        return self._take_bytes(self.take("Q")).decode("utf-8")

    def take_value(self, kind: int) -> Any:
        if kind == STRING:
            return self.take_string()
        if kind == ARRAY:
            return self._skip_array()
        return self.take(_format(kind))

    def _skip_array(self) -> int:
        """Go past an array and give its length."""
        kind, count = self.take("I"), self.take("Q")
        if kind == STRING:
            for _ in range(count):
                self._take_bytes(self.take("Q"))
        else:
            self._take_bytes(count * struct.calcsize(f"<{_format(kind)}"))
        return int(count)

    def _take_bytes(self, count: int) -> bytes:
        if self.position + count > len(self._data):
            raise struct.error("past the end of the file")
        taken = self._data[self.position : self.position + count]
        self.position += count
        return taken


def _format(kind: int) -> str:
    if kind not in FORMATS:
        raise struct.error(f"no type {kind}")
    return FORMATS[kind]


def _refusal(path: Path, expected: str) -> QuestValueError:
    return QuestValueError("model", str(path), expected)

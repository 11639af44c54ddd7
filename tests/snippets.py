"""What the pages show: their blocks, and the commands in blocks and in lines."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
    "training/README.md",
    "src/quest_attention/models/tiny/README.md",
)
PROGRAMS = {"quest", "make", "pip", "python", "torchrun", "vllm", "bash", "cat"}
"""What a command may begin with. A block that begins with another word is no shell's, unless it says `sh`."""
OF_THE_SERVER = {
    "--additional-config",
    "--attention-backend",
    "--block-size",
    "--enable-dbo",
    "--enable-prompt-embeds",
    "--kv-cache-dtype",
    "--kv-offloading-size",
    "--kv-sharing-fast-prefill",
    "--kv-transfer-config",
    "--language-model-only",
    "--max-model-len",
    "--max-num-seqs",
    "--model",
    "--port",
    "--served-model-name",
    "--speculative-config",
}
"""Options of vLLM's server that the pages name; tests/serving/test_pages.py holds them to vLLM's own."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: Of its first line in the page.
        language: As the fence says; shell where it says nothing and the block begins with a command.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command line: the words of its pipeline's parts, without comments and what is set for them."""

    where: str
    parts: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return f"{self.where} {' '.join(self.parts[-1])[:60]}"


def program(words: list[str] | tuple[str, ...]) -> str:
    """The command's name, without a folder and without a version: `python` for `.venv/bin/python3.12`."""
    return re.sub(r"[\d.]+$", "", Path(words[0]).name) if words else ""


def split(line: str) -> tuple[tuple[str, ...], ...]:
    """Words of a pipeline, part by part."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|")
    lexer.whitespace_split, lexer.commenters = True, "#"
    parts: list[list[str]] = [[]]
    for word in lexer:
        if word == "|":
            parts.append([])
        else:
            parts[-1].append(word)
    found = []
    for words in parts:
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        found.append(tuple(words))
    return tuple(found)


def blocks(page: str) -> list[Block]:
    """Fenced blocks of a page, in order."""
    found, language, start, lines = [], None, 0, []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if not line.lstrip().startswith("```"):
            lines.append(line)
        elif language is None:
            language, start, lines = line.strip().removeprefix("```"), number + 1, []
        else:
            text = "\n".join(lines) + "\n"
            if not language and program(text.split()) in PROGRAMS:
                language = "sh"
            found.append(Block(page, start, language, text))
            language = None
    assert language is None, f"{page}: a block without an end"
    return found


def commands(block: Block) -> list[Command]:
    """Command lines of a shell block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = [Command(str(block), split(line)) for line in lines]
    return [command for command in found if command.parts != ((),)]


def spans(page: str) -> list[str]:
    """Code in the text of a page, outside of its blocks, each on one line."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    in_lines = [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]
    return [span.replace("\\|", "|") for span in in_lines]  # in a table a bar is written so


def inline_commands(page: str) -> list[Command]:
    """Commands among the spans of a page. Of one that leaves something out only the beginning."""
    lines = [span.partition(" ...")[0] for span in spans(page)]
    return [Command(page, split(line)) for line in lines if program(line.split()) in PROGRAMS and " " in line]


def script_options(path: Path) -> tuple[set[str], set[str]]:
    """Options that a script's `main` has, and those of them that it needs; read, because imports may be missing."""
    known, needed = {"--help"}, set()
    mains = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    ]
    for main in mains:
        arguments = main.args.args
        defaults = [None] * (len(arguments) - len(main.args.defaults)) + list(main.args.defaults)
        for argument, default in zip(arguments, defaults, strict=True):
            name = argument.arg.replace("_", "-")
            known.add(f"--{name}")
            if default is None:
                needed.add(f"--{name}")
            if isinstance(default, ast.Constant) and isinstance(default.value, bool):
                known.add(f"--no-{name}")
    return known, needed


ALL = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in ALL if block.language == "python"]
FOR_VLLM = [block for block in PYTHON if "import vllm" in block.text or "from vllm" in block.text]
FOR_GPU = [block for block in PYTHON if "cuda" in block.text and block not in FOR_VLLM]

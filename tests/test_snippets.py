"""Every block of the pages runs as pasted, or what it names exists; the few others are listed here with the reason.

Python blocks run as scripts. Of `quest` the commands that take seconds run; the others are read up to where the work
would begin, with all of their options checked. Of other commands targets, scripts, options and extras must exist.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import snippets
from quest_attention.eval.excerpt import SOUTH
from quest_attention.vllm.options import read_options
from snippets import ROOT, Block, Command

EXCEPTIONS = {
    "README.md": {
        " one KV head, a cache of": "a drawing",
        "U(page) = ": "an equation",
    },
    "CONTRIBUTING.md": {"cli  ->  eval": "a drawing of the layers"},
    "docs/cli.md": {
        "prefill ": "an output of a run, whose times differ; tests/test_cli.py checks its form",
        "drafts ": "likewise, whose number of drafts follows from times",
        "quest: ": "messages; tests/test_cli.py has messages like them",
    },
    "docs/vllm.md": {
        "Quest, worker 0": "an illustration of an output; tests/serving/test_server.py checks its form",
        '{"model": "quest-tiny"': "a request to a server; tests/serving/test_server.py asks so",
    },
}
"""Beginnings of blocks that are neither run nor checked, and why."""
SECONDS = ("generate", "env")
"""Commands of `quest` that run. `demo` runs in `make demo`; `eval` takes minutes, and `report` needs what it left."""
WORK = {
    "demo": "quest_attention.cli.demo.show_demo",
    "generate": "quest_attention.cli.generate.stream_text",
    "eval": "quest_attention.cli.eval.evaluate",
    "report": "quest_attention.cli.eval.report",
    "env": "quest_attention.cli.env.show_environment",
}
"""Where the work of each command begins, once its options are checked."""
BOOK = 6_000
"""Characters of the book that `quest generate` gets: more tokens than the budgets of the pages."""
LONGEST = 600
"""For a script, on a machine that does other things too [s]; lm_eval reads the names of all its tasks."""
NO_DOWNLOAD = "tokenizers/punkt_tab"
"""What RULER's tasks in lm_eval would download to split sentences; the one on the page splits none."""


def needs(block: Block) -> list[pytest.MarkDecorator]:
    """Marks of a Python block: what is not there skips it."""
    if block in snippets.FOR_GPU:
        return [pytest.mark.gpu]
    if "lm_eval" in block.text:
        wanted = ("lm_eval", "accelerate", "nltk", "wonderwords")
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
        skip = pytest.mark.skipif(bool(missing), reason=f"the extra lm-eval: no {', '.join(missing)}")
        return [skip, pytest.mark.slow, pytest.mark.thorough, pytest.mark.timeout(LONGEST)]
    return []


@pytest.mark.parametrize(
    "block",
    [pytest.param(one, marks=needs(one), id=str(one)) for one in snippets.PYTHON if one not in snippets.FOR_VLLM],
)
def test_python_blocks_run_as_pasted(block: Block, tmp_path: Path) -> None:
    (tmp_path / "nltk" / NO_DOWNLOAD).mkdir(parents=True)
    script = tmp_path / "pasted.py"
    script.write_text(block.text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "NLTK_DATA": str(tmp_path / "nltk")},
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST - 10,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "QuestWarning" not in done.stderr
    if "summary()" in block.text:  # of the counters: steps that were sparse
        assert re.search(r"^ *all +[1-9]", done.stdout, re.MULTILINE), done.stdout
    else:
        assert done.stdout or "print(" not in block.text


class Shell:
    """Checks commands, and runs those that take seconds in a folder with the files that the pages mention."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        (folder / "book.txt").write_text(SOUTH.text()[:BOOK], encoding="utf-8")
        (folder / "question.txt").write_text("\nWhat is the name of the ship? It is", encoding="utf-8")
        monkeypatch.chdir(folder)

    def check(self, command: Command, *, may_run: bool) -> None:
        """Check all parts of a pipeline; run them where one is a `quest` that takes seconds."""
        runs = may_run and any(is_short(words) for words in command.parts)
        given = ""
        for words in command.parts:
            name = snippets.program(words)
            if name == "quest":
                given = self._quest(words[1:], given, is_real=runs)
                continue
            assert name in CHECKS, f"{command.where}: nothing checks {name}"
            CHECKS[name](words)
            if runs and shutil.which(name):
                given = subprocess.run(words, input=given, check=True, capture_output=True, text=True).stdout

    def _quest(self, words: tuple[str, ...], stdin: str, *, is_real: bool) -> str:
        """What a `quest` prints. One that is not to run must come to where its work begins, past checks of options."""
        from quest_attention.cli import run  # noqa: PLC0415 - needs typer, which a machine with a GPU may lack

        command, *options = words
        if command.startswith("-"):
            assert command in quest_options(), f"quest {command}: no such option"
            return ""
        assert command in WORK, f"quest {command}: no such command"
        if not options and not is_real:
            return ""
        began: list[object] = []
        if not is_real:
            self._monkeypatch.setattr(WORK[command], lambda *given, **named: began.append((given, named)))
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode() or b"A prompt.")))
        self._capsys.readouterr()
        code = run(words)
        out, err = self._capsys.readouterr()
        assert code == 0, (words, err)
        assert out if is_real else began or "--help" in words, words
        return out


def quest_options() -> set[str]:
    """All options of `quest` and of its commands."""
    from typer.main import get_command  # noqa: PLC0415 - a machine with a GPU may lack it

    from quest_attention.cli.app import app  # noqa: PLC0415

    whole = get_command(app)
    return {name for one in (whole, *whole.commands.values()) for option in one.params for name in option.opts}


def is_short(words: tuple[str, ...]) -> bool:
    """Whether a command takes seconds, and needs nothing that is not here."""
    return words[0] == "quest" and words[1] in SECONDS and "--model" not in words


def expect(found: object, what: str) -> None:
    """Fail where something that a page names is not there."""
    assert found, f"{what}: there is none"


def check_make(words: tuple[str, ...]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words[1:]:
        name, is_set, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_set else rf"^{name}:.*## "
        expect(re.search(pattern, makefile, re.MULTILINE), f"make {name}")


def check_pip(words: tuple[str, ...]) -> None:
    """The package is in no index, so what is installed lies in a clone."""
    if words[1] == "freeze":
        return
    *options, what = words[2:]
    assert words[1] == "install" and set(options) <= {"-e"}, words
    extras = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", what)
    assert extras, f"{what}: not this folder"
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = pyproject.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for extra in filter(None, (extras.group(1) or "").split(",")):
        expect(re.search(rf"^{extra} = \[", section, re.MULTILINE), f"pip install .[{extra}]")


def check_python(words: tuple[str, ...]) -> None:
    if words[1] == "-c":
        compile(words[2], "<page>", "exec")
    elif words[1:3] == ("-m", "vllm.entrypoints.openai.api_server"):
        check_server(words[3:])
    elif words[1] == "-m" and len(words) == 3:
        assert importlib.util.find_spec(words[2]), words
    elif words[1:3] == ("-m", "pytest"):
        assert (ROOT / words[3]).exists(), words
    else:
        check_script(words[1:])


def check_script(words: tuple[str, ...]) -> None:
    script, *rest = words
    assert (ROOT / script).is_file(), f"{script}: no such file"
    known, needed = snippets.script_options(ROOT / script)
    given = {word.partition("=")[0] for word in rest if word.startswith("--")}
    assert given <= known, f"{script}: no {given - known}"
    assert needed <= given, f"{script}: needs {needed - given}"


def check_torchrun(words: tuple[str, ...]) -> None:
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    assert words[1:place:2] == ("--nproc-per-node",), words
    check_script(words[place:])


def check_vllm(words: tuple[str, ...]) -> None:
    assert words[1] == "serve", words
    inner = re.fullmatch(r"\$\((.*)\)", words[2])
    if inner:
        check_python(snippets.split(inner.group(1))[0])
    check_server(words[3:])


def check_server(words: tuple[str, ...]) -> None:
    given = {word for word in words if word.startswith("--")}
    assert given <= snippets.OF_THE_SERVER, given - snippets.OF_THE_SERVER
    if "--additional-config" in words:
        assert words[words.index("--attention-backend") + 1] == "CUSTOM"
        additional = json.loads(words[words.index("--additional-config") + 1])
        assert read_options(SimpleNamespace(additional_config=additional), "cuda"), words


def check_bash(words: tuple[str, ...]) -> None:
    assert (ROOT / words[1]).is_file(), words


def check_nothing(words: tuple[str, ...]) -> None:
    """Beside a `quest` that runs it runs too."""


CHECKS: dict[str, Callable[[tuple[str, ...]], None]] = {
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_torchrun,
    "vllm": check_vllm,
    "bash": check_bash,
    "cat": check_nothing,
    "jq": check_nothing,
}


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=str(command))
        for block in snippets.ALL
        if block.language == "sh"
        for command in snippets.commands(block)
    ],
)
def test_commands_run_or_name_what_exists(command: Command, shell: Shell) -> None:
    shell.check(command, may_run=True)


@pytest.mark.parametrize("page", snippets.PAGES)
def test_commands_in_the_text_name_what_exists(page: str, shell: Shell) -> None:
    for command in snippets.inline_commands(page):
        shell.check(command, may_run=False)
    for span in snippets.spans(page):
        path = re.match(r"(?:benchmarks|docs|examples|src|tests|training)/[\w./-]*\w", span)
        if path:
            assert (ROOT / path.group()).exists(), span
            given = {word for word in span.split() if word.startswith("--")}
            assert not given or given <= snippets.script_options(ROOT / path.group())[0], span


def test_options_in_the_text_exist() -> None:
    known = quest_options() | snippets.OF_THE_SERVER
    for folder in ("benchmarks", "training"):
        for script in (ROOT / folder).glob("*.py"):
            known |= snippets.script_options(script)[0]
    for page in snippets.PAGES:
        for span in snippets.spans(page):
            if span.startswith("--"):
                given = {word for word in span.split() if word.startswith("--")}
                assert given <= known, (page, given - known)


def test_every_other_block_is_listed_with_a_reason() -> None:
    others = [block for block in snippets.ALL if block.language not in ("python", "sh")]
    listed = [(page, beginning) for page, blocks in EXCEPTIONS.items() for beginning in blocks]
    for block in others:
        assert any(block.text.startswith(one) for one in EXCEPTIONS.get(block.page, ())), f"{block}: {block.text[:60]}"
    for page, beginning in listed:
        assert any(block.page == page and block.text.startswith(beginning) for block in others), f"{page}: {beginning}"


def test_nobody_is_told_to_install_the_package_by_its_name() -> None:
    """It is in no index: what is there under this name may be a stranger's."""
    texts = [
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "examples").glob("*.py"),
        *(ROOT / page for page in snippets.PAGES),
    ]
    assert [path for path in texts if re.search(r"install\b[^\n]*quest-attention", path.read_text("utf-8"))] == []


def test_what_needs_vllm_is_run_with_it() -> None:
    """By tests/serving/test_pages.py, in `make test-vllm`."""
    assert snippets.FOR_VLLM
    assert "snippets.FOR_VLLM" in (ROOT / "tests" / "serving" / "test_pages.py").read_text(encoding="utf-8")

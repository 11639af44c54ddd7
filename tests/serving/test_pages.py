"""What the pages give to vLLM: programs, which run as pasted, and options of its server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="runs with make test-vllm, which installs vLLM")

import snippets
from cores import engine_environment
from snippets import Block

MINUTES = 15
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * MINUTES)]
PARSERS = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
"""Where releases of vLLM have the options of their server, the newest first."""


@pytest.mark.parametrize("block", snippets.FOR_VLLM, ids=str)
def test_programs_run_as_pasted_and_read_pages(block: Block, tmp_path: Path) -> None:
    script = tmp_path / "pasted.py"
    script.write_text(block.text, encoding="utf-8")
    environment = engine_environment(is_one_process=True) | {"PYTHONPATH": str(snippets.ROOT / "src")}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"'sparse_rows': [1-9]", done.stdout), done.stdout[-3000:]


def test_options_of_the_server_are_vllms_own() -> None:
    code = """
import importlib, json, sys
from vllm.utils.argparse_utils import FlexibleArgumentParser
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    parser = module.make_arg_parser(FlexibleArgumentParser())
    print(json.dumps([option for action in parser._actions for option in action.option_strings]))
    break
"""
    command = [sys.executable, "-c", code, *PARSERS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(json.loads(done.stdout.splitlines()[-1])) >= snippets.OF_THE_SERVER

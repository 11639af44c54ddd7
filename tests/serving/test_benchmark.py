"""`benchmarks/serve_vllm.py`, as a person would run it, at a size that takes a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="runs with make test-vllm, which installs vLLM")

from cores import engine_environment

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "serve_vllm.py"
MINUTES = 15
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * MINUTES)]
TINY = ("--device", "cpu", "--model", "tiny", "--contexts", "512", "--budget", "128", "--tokens", "8", "--bounds", "kv")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=engine_environment(is_one_process=True)
    )


def test_all_arms_are_timed_and_what_does_not_fit_is_said(tmp_path: Path) -> None:
    output = tmp_path / "served.json"
    arms = ("--sketch", "64", "--estimates", "96")
    done = run(*TINY, *arms, "--batches", "1,1000000", "--repeats", "2", "--output", str(output))
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(output.read_text(encoding="utf-8"))
    assert [row["arm"] for row in record["rows"]] == ["stock", "quest-128", "sketch-64", "estimates-96"]
    for row, budget in zip(record["rows"][1:], (128, 64, 96), strict=True):
        (counters,) = row["counters"]
        assert counters["sparse_rows"] == 2 * 7  # the first token comes with the prompt
        assert counters["tokens_read"] == budget * 2 * 7
    assert record["settings"]["arms"]["estimates-96"]["candidate_factor"] == 0
    pools = [record["settings"]["engines"][arm]["pool_tokens"] for arm in ("sketch-64", "quest-128", "stock")]
    assert pools == sorted(pools)  # so that what the first holds fits the others
    for engine in record["settings"]["engines"].values():
        (left,) = engine["left_out"]
        assert left["batch"] == 1000000 > left["most"]
    assert "left out" in done.stdout


@pytest.mark.thorough
def test_arms_with_drafts_are_timed(tmp_path: Path) -> None:
    output = tmp_path / "served.json"
    more = ("--bounds", "", "--sketch", "96", "--batches", "2", "--repeats", "1", "--speculate", "3")
    more += ("--drafts", "eagle,lossless", "--draft-dense-layers", "0")
    done = run(*TINY[:-2], *more, "--tokens", "40", "--output", str(output))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["arm"]: row for row in json.loads(output.read_text(encoding="utf-8"))["rows"]}
    kinds = ("stock", "stock-eagle-3", "sketch-96", "sketch-96-eagle-3", "sketch-96-lossless-3")
    assert tuple(rows) == kinds
    for name, row in rows.items():
        assert ("drafts" in row) == ("ratio_to_stock_with_drafts" in row) == name.endswith("-3")
    (counters,) = rows["sketch-96-eagle-3"]["counters"]
    assert counters["verified_sparse_rows"] == rows["sketch-96-eagle-3"]["drafts"]["num_drafts"] > 0
    (counters,) = rows["sketch-96-lossless-3"]["counters"]
    assert counters["verified_rows"] == rows["sketch-96-lossless-3"]["drafts"]["num_drafts"] > 0
    assert counters["verified_sparse_rows"] == 0 < counters["sparse_rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "device: got 'tpu', expected cuda or cpu"),
        (("--contexts", ""), "contexts: got ''"),
        (("--contexts", "2048"), "contexts: got 2048, expected more than the budget of 2048"),
        (("--batches", ""), "batches: got ''"),
        (("--batches", "most,0"), "batches: got '0'"),
        (("--bounds", ""), "bounds: got ''"),
        (("--sketch", "0"), "sketch: got '0'"),
        (("--sketch", "8192"), "contexts: got 8192, expected more than the budget of 8192"),
        (("--sketch", "16"), "token_budget: got 16, expected at least 32"),
        (("--bounds", "int4"), "metadata_dtype: got 'int4'"),
        (("--accept", "2"), "accept: got 2.0, expected --speculate with it"),
        (("--speculate", "2", "--drafts", "ngram"), "drafts: got 'ngram', expected 'eagle', 'lossless' or both"),
        (("--speculate", "2", "--accept", "4"), "accept: got 4.0, expected 1 to 3 tokens a step"),
        (("--speculate", "2", "--accept", "2", "--device", "cpu"), "accept: got 2.0, expected 0 on a cpu"),
    ],
)
def test_wrong_arguments_are_named_before_an_engine_starts(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode
    assert message in done.stderr
    assert "Engine" not in done.stderr

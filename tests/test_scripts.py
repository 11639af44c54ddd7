"""Examples, benchmarks and training code run as a person would run them, at sizes that take seconds."""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from quest_attention import QuestConfig
from quest_attention.bench.caches import in_8_bits, make_caches
from quest_attention.bench.steps import quest_steps
from quest_attention.eval.excerpt import SOUTH
from quest_attention.eval.journal import Journal
from quest_attention.eval.report import read_results
from quest_attention.models import bundled_model_path
from quest_attention.ops import quest_decode
from quest_attention.pages import KEY_MAX, KEY_MIN
from warm import Warm

FIXED = {"0.4", "0.3", "0.5"}
"""Numbers of docs/results_bundled.md that nothing printed: bounds on intervals, and what was expected."""
ROOT = Path(__file__).resolve().parent.parent
WARM = Warm()


def run(script: str, *arguments: str) -> str:
    code, out, err = WARM.run(ROOT / script, arguments, ROOT)
    assert code == 0, err[-3000:]
    return out


@pytest.fixture(scope="module", autouse=True)
def _warm() -> Iterator[None]:
    yield
    WARM.stop()


@functools.cache
def printed(script: str) -> str:
    """What a script without options prints: the tables of a page."""
    return run(f"benchmarks/{script}.py")


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """A folder with one book, named as a held-out one."""
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "test-south.txt").write_text(SOUTH.text(), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_examples_answer_right() -> None:
    said = run("examples/find_a_fact.py")
    assert "full attention, 4084 tokens:  27183." in said
    assert "Quest, 64 tokens a step:  27183." in said
    said = run("examples/own_cache.py")
    for number in ("4081726", "9917350", "3360274"):
        assert f"' {number}', hidden: {number}" in said


def test_the_tables_of_the_page_on_vllm_are_those_of_the_results() -> None:
    lines = [line for line in printed("tables_vllm").splitlines() if line]
    page = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    assert len(lines) > 20
    place = 0
    for line in lines:  # all of them, in order
        place = page.index(line, place)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = [line for line in readme.splitlines() if re.match(r"\| \d+K x \d+ \|", line)]
    assert quoted and set(quoted) <= set(lines)


def test_decode_cpu(tmp_path: Path) -> None:
    output = tmp_path / "decode.json"
    run("benchmarks/decode_cpu.py", "--lengths", "2048", "--dtypes", "fp32", "--repeats", "2", "--output", str(output))
    record = json.loads(output.read_text(encoding="utf-8"))
    assert [row["arm"] for row in record["rows"]] == ["dynamic", "dense", "quest-2", "quest-0"]
    assert record["rows"][3]["share_read"] < 0.6
    assert record["rows"][3]["metadata_to_kv_bytes"] == 1 / 16
    assert record["machine"]["torch"]


def test_choice_cpu(tmp_path: Path) -> None:
    """On the bundled model: a loss of every choice, a time of each and of what none can be faster than."""
    output = tmp_path / "choice.json"
    arms = ["bounds@64", "moments,selection_unit=token@64"]
    few = ("--lengths", "512", "--batches", "2", "--stretches", "2", "--predicted", "8", "--repeats", "2")
    run("benchmarks/choice_cpu.py", *few, "--arms", " ".join(arms), "--output", str(output))
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [row["arm"] for row in rows] == ["full", *arms, "nothing", "dense", *arms]
    assert rows[0]["perplexity"] > 1 and all(len(row["loss_of_each_nats"]) == 2 for row in rows[1:3])
    assert all(row["ms"]["p50"] > 0 for row in rows[3:])


@pytest.mark.slow
def test_training_from_books_to_a_measured_model(tmp_path: Path, books: Path) -> None:
    """All steps of training/README.md; the model is hopeless, but it loads and is measured."""
    model, work = tmp_path / "model", tmp_path / "work"
    run("training/tokenizer.py", "--books", str(books), "--output", str(model))
    tiny = ["--tokens-per-step", "256", "--longest", "128", "--workers", "0", "--no-compiled"]
    where = ["--books", str(books), "--work", str(work), "--output", str(model)]
    run("training/train.py", *where, *tiny, "--seconds", "60", "--stop-after", "1")
    run("training/train.py", *where, *tiny, "--seconds", "1")  # goes on from the checkpoint, and ends
    made = json.loads((work / "training.json").read_text(encoding="utf-8"))
    assert made["trained"]["calls"] == 2
    assert len(np.load(work / "books.npy")) == made["trained"]["book_tokens"]
    measure = ["--tasks", "passkey,niah_multikey_2", "--lengths", "256", "--n", "2", "--no-perplexity"]
    run("training/measure.py", "--books", str(books), "--model", str(model), "--output", str(work), *measure)
    rows = json.loads((work / "card.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["task"], row["n"]) for row in rows] == [("passkey", 2), ("niah_multikey_2", 2)]


def test_the_bundled_model_is_small_enough_to_ship() -> None:
    size = sum(path.stat().st_size for path in bundled_model_path().iterdir())
    assert size <= 25_000_000


def test_the_tables_of_the_gpu_page_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    lines = [line for line in printed("tables_gpu").splitlines() if line]
    assert len(lines) > 20
    for line in lines:
        assert line in page


def test_the_table_of_the_page_on_speed_is_that_of_the_results() -> None:
    table = printed("tables_cpu").strip()
    assert len(table.splitlines()) == 10
    assert table in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md", "docs/gpu.md", "docs/vllm.md"])
def test_ratios_times_and_shares_in_a_text_are_printed(page: str) -> None:
    """Every `1.23x`, `4.5 ms` and `6.7 %` outside of the tables is a number of some table that a script prints."""
    scripts = ("tables_accuracy", "tables_cpu", "tables_gpu", "tables_public", "tables_vllm")
    known = set(re.findall(r"\d+\.\d+", "".join(printed(script) for script in scripts)))
    text = (ROOT / page).read_text(encoding="utf-8")
    found = set(re.findall(r"(\d+\.\d+)(?:x| ms| %)", text))
    assert found and found <= known, found - known


def test_the_page_of_the_bundled_model_is_that_of_the_summaries() -> None:
    page = (ROOT / "docs" / "results_bundled.md").read_text(encoding="utf-8")
    lines = [line for line in printed("tables_accuracy").splitlines() if line]
    assert len(lines) > 50
    place = 0
    for line in lines:  # all of them, in order
        place = page.index(line, place)
    for line in page.splitlines():
        assert line in lines or not line.startswith(("quest eval", "| quest", "| oracle", "| full", "| niah")), line
    decimals = re.compile(r"(?<![\w.:])\d+\.\d+(?![\w.])")  # not of versions or of arXiv
    text = [line for line in page.splitlines() if line not in lines]
    assert {number for line in text for number in decimals.findall(line)} <= set(
        decimals.findall(printed("tables_accuracy"))
    ) | FIXED


def test_the_page_on_public_models_is_that_of_the_summaries() -> None:
    """Every table, and every number of the text; so are the rows that README and the page on vLLM quote."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    tables, _, rest = printed("tables_public").partition("```sh")
    commands, _, budgets = rest.partition("| pass key found")
    parts = [f"| pass key found{budgets}", tables, f"```sh{commands}"]  # as they stand on the page
    lines = [line for part in parts for line in part.splitlines() if line]
    assert len(lines) > 100
    place = 0
    for line in lines:
        place = page.index(line, place)
    for line in page.splitlines():
        assert line in lines or not line.startswith(("quest eval", "| ")), line
    decimals = re.compile(r"(?<![\w.:-])\d+\.\d+(?![\w.])")  # not of versions or of names
    known = set(decimals.findall(printed("tables_public")))
    assert {number for line in page.splitlines() if line not in lines for number in decimals.findall(line)} <= known
    vllm = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    assert parts[0].strip() in vllm
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = [line for line in readme.splitlines() if re.match(r"\| (full|quest|token_oracle|h2o)", line)]
    assert quoted and set(quoted) <= set(lines)


@pytest.mark.parametrize(
    ("script", "page", "folder"),
    [("tables_accuracy", "results_bundled", "accuracy"), ("tables_public", "results", "public")],
)
def test_the_figures_of_the_pages_of_results(tmp_path: Path, script: str, page: str, folder: str) -> None:
    pytest.importorskip("matplotlib", reason="an extra of its own")
    run(f"benchmarks/{script}.py", "--figures", str(tmp_path))
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    shown = re.findall(rf"\(figures/{folder}/(\w+\.png)\)", text)
    assert shown
    made = {path.name for path in tmp_path.iterdir()}
    assert set(shown) == made == {path.name for path in (ROOT / "docs" / "figures" / folder).iterdir()}


def test_decode_gpu_on_a_cpu(tmp_path: Path) -> None:
    """Without a GPU there is no graph, but every arm takes its path."""
    output = tmp_path / "decode.json"
    run("benchmarks/decode_gpu.py", "--models", "tiny", "--device", "cpu", "--tokens", "3", "--output", str(output))
    rows = json.loads(output.read_text())["rows"]
    arms = ["stock", "dense", "quest-512", "quest-512-fp8"]
    assert [row["arm"] for row in rows] == [*arms, *arms, "prefill"]
    assert all(row["ms"]["p20"] > 0 for row in rows if row["arm"] != "prefill")
    shares = {row["arm"]: row["share_read"] for row in rows if row["arm"] != "prefill"}
    assert shares["dense"] == 1
    assert 0.5 < shares["quest-512"] < 1


def test_the_figure_of_the_gpu_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra of its own")
    run("benchmarks/plot_gpu.py", "--output", str(tmp_path / "gpu.png"))
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU the interpreter runs the kernel")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter computes in NumPy
def test_steps_of_benchmarks_are_the_fused_step_past_the_budget() -> None:
    caches, lengths = make_caches(2, 2, 64, 1, head_dim=16, dtype=torch.float32, device="cpu")
    queries = [torch.randn(2, 2, 16) for _ in caches]
    config = QuestConfig(32, backend="triton")
    for step, query, kv in zip(quest_steps(queries, caches, lengths, config), queries, caches, strict=True):
        expected = quest_decode(query, kv, lengths, QuestConfig(32, backend="reference")).output
        torch.testing.assert_close(step().output, expected)
    with pytest.raises(RuntimeError, match=r"read \[\[4\], \[4\]\] pages, expected 16"):
        quest_steps(queries, caches, lengths, QuestConfig(256, backend="triton"))


def test_caches_of_benchmarks_hold_bounds_of_their_keys() -> None:
    torch.manual_seed(0)
    caches, lengths = make_caches(
        2, 3, 40, 2, capacity=100, head_dim=8, page_size=16, dtype=torch.float32, device="cpu"
    )
    assert len(caches) == 2 and lengths.tolist() == [40] * 3
    for kv in caches:
        assert kv.page_table.shape == (3, 7)
        assert sorted(kv.page_table[:, :3].flatten().tolist()) == list(range(9))
        for table in kv.page_table:
            keys = kv.keys[table[:3]].flatten(0, 1)[:40]
            for page, part in zip(table[:3], keys.split(16), strict=True):
                torch.testing.assert_close(kv.metadata[page][:, KEY_MIN], part.amin(0))
                torch.testing.assert_close(kv.metadata[page][:, KEY_MAX], part.amax(0))
        narrow = in_8_bits(kv, lengths).metadata.float()
        assert (narrow[:, :, KEY_MIN] <= kv.metadata[:, :, KEY_MIN]).all()
        assert (narrow[:, :, KEY_MAX] >= kv.metadata[:, :, KEY_MAX]).all()


def test_runs_on_public_models_go_on_from_the_committed_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every summary is that of the answers beside it, and `quest eval` would take the folder for a run of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    eval_public = importlib.import_module("eval_public")
    for run_of in eval_public.RUNS:
        folder = tmp_path / run_of.name
        eval_public.begin_from_committed(folder)
        committed = json.loads((eval_public.RESULTS / run_of.name / "summary.json").read_text(encoding="utf-8"))
        assert read_results(folder).summary() == committed
        assert (committed["settings"]["model"], committed["settings"]["lengths"]) == (
            f"{run_of.model}.gguf",
            [run_of.length],
        )
        Journal(folder, committed["settings"])
    before = (folder / "samples.jsonl").read_bytes()
    eval_public.begin_from_committed(folder)
    assert (folder / "samples.jsonl").read_bytes() == before

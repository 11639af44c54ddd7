"""Examples, benchmarks and training code run as a person would run them, at sizes that take seconds."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quest_attention import QuestConfig, QuestValueError, Selection
from quest_attention.bench.caches import cluster_keys, make_caches, with_metadata
from quest_attention.bench.record import write_record
from quest_attention.bench.steps import quest_steps
from quest_attention.cli.app import split_list
from quest_attention.eval.excerpt import SOUTH
from quest_attention.eval.journal import Journal
from quest_attention.eval.plan import Plan
from quest_attention.eval.report import read_results
from quest_attention.forms import Sketch, SketchLayout
from quest_attention.models import bundled_model_path
from quest_attention.ops import quest_decode
from quest_attention.pages import KEY_MAX, KEY_MIN
from quest_attention.vllm.break_even import MEASURED
from warm import Warm

FIXED = {"0.4", "0.3", "0.5"}
"""Numbers of docs/results_bundled.md that nothing printed: bounds on intervals, and what was expected."""
ROOT = Path(__file__).resolve().parent.parent
WARM = Warm(
    (
        "torch",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
    )
)


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


def test_a_server_says_where_it_pays_as_was_measured() -> None:
    """The shortest context at which one sequence was 2 % faster, and at all longer ones, by device and form."""
    runs = (
        ("serve_vllm", "quest-2048"), ("serve_vllm_estimates", "quest-2048"),
        ("serve_vllm_estimates", "estimates-2048"), ("serve_vllm_cpu", "quest-1024"),
    )  # fmt: skip
    found: dict[tuple[str, str], int] = {}
    for run, arm in runs:
        record = json.loads((ROOT / "benchmarks" / "results" / f"{run}.json").read_text(encoding="utf-8"))
        rows = [row for row in record["rows"] if row["arm"] == arm and row["batch"] == 1]
        device = "cpu" if record["settings"]["device"] == "cpu" else record["machine"]["gpu"][0].split(",")[0]
        metadata = {"quest": "bounds"}.get(arm.split("-")[0], "sketch")
        gains = {row["context"]: row["ratio_to_stock"] >= 1.02 for row in rows}
        if arm == "quest-2048" and run == "serve_vllm_estimates":
            ratios = {row["context"]: row["ratio_to_stock"] for row in rows}
        shortest = min(context for context in gains if all(gains[longer] for longer in gains if longer >= context))
        assert found.setdefault((device, metadata), shortest) == shortest
    # Where keys rank candidates sketches were timed beside bounds, not beside stock.
    record = json.loads((ROOT / "benchmarks" / "results" / "serve_vllm_512.json").read_text(encoding="utf-8"))
    ms = {(row["arm"], row["context"]): row["ms_between_tokens"]["p50"] for row in record["rows"] if row["batch"] == 1}
    for context, ratio in ratios.items():
        assert ratio * ms["quest-2048", context] / ms["sketch-512", context] >= 1.02
    assert found == MEASURED


@pytest.mark.parametrize(("quest", "tokens_read", "wrong"), [
    ({"metadata": "bounds"}, 2000, None),  # 125 whole pages
    ({"metadata": "bounds"}, 1984, "1984.0 tokens, expected 2000 to 2010"),
    ({"metadata": "sketch", "candidate_factor": 4}, 2010, None),
    ({"metadata": "sketch", "candidate_factor": 4}, 2009, "2009.0 tokens, expected 2010 to 2010"),
    ({"metadata": "sketch", "candidate_factor": 0}, 1600, None),
    ({"metadata": "sketch", "candidate_factor": 0}, 1000, "1000.0 tokens, expected 1005 to 2010"),
    ({"metadata": "sketch", "candidate_factor": 0}, 2011, "2011.0 tokens, expected 1005 to 2010"),
])  # fmt: skip
def test_an_arm_of_vllm_that_reads_too_little_or_too_much_fails(
    monkeypatch: pytest.MonkeyPatch, quest: dict[str, Any], tokens_read: int, wrong: str | None
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    check_counters = importlib.import_module("serve_vllm").check_counters
    rows = 4 * 2 * 128
    worker = {"sparse_rows": rows, "verified_sparse_rows": 0, "tokens_read": rows * tokens_read, "eager_steps": 2}
    llm = SimpleNamespace(collective_rpc=lambda _: [worker])
    options = {"repeats": 2, "tokens": 128, "drafts": "", "budget": 2010, "quest": quest}
    with nullcontext() if wrong is None else pytest.raises(RuntimeError, match=wrong):
        assert check_counters(llm, 4, options, 16, is_gpu=True) == [worker]


def test_a_record_has_a_command_that_a_shell_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["serve.py", "--bounds", "", "--options", '{"a": "b c"}', "--output", str(tmp_path / "run.json")]
    monkeypatch.setattr("sys.argv", words)
    write_record(tmp_path / "run.json", {}, [])
    command = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["command"]
    assert shlex.split(command) == ["python", *words[:-1], "benchmarks/results/run.json"]


def test_the_commands_of_records_kept_their_quotes() -> None:
    """An option without a value keeps its quotes too, and none has two: one with a space in it would be read as two."""
    looked_at = 0
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        command = record["command"]
        if command is None:  # put together by hand, as the record says
            continue
        assert "  " not in command, path.name
        are_values = [not word.startswith("--") for word in shlex.split(command)[2:]]
        assert not any(map(all, itertools.pairwise(are_values))), f"{path.name}: {command}"
        looked_at += 1
    assert looked_at > 40


def test_a_table_of_vllm_has_columns_for_each_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    times = {"stock": 8.0, "quest-2048": 4.0, "quest-2048-fp8": 3.2, "sketch-512": 2.0, "estimates-2048": 1.6}
    rows = [
        {"arm": arm, "context": 8192, "batch": 16, "ms_between_tokens": {"p50": time}, "ratio_to_stock": 8 / time,
         "tokens_per_second": 16_000 / time}
        for arm, time in times.items()
    ]  # fmt: skip
    latency_table = importlib.import_module("tables_vllm").latency_table
    head, _, line = latency_table(rows).splitlines()
    arms = "bounds, 2,048 |  | bounds in 8 bits, 2,048 |  | sketch, 512 |  | estimates alone, 2,048 | "
    assert head == f"| context, sequences | stock | {arms} | tokens/s, stock | {arms} |"
    rates = "2,000 | 4,000 | 2.00x | 5,000 | 2.50x | 8,000 | 4.00x | 10,000 | 5.00x"
    assert line == f"| 8K x 16 | 8.00 | 4.00 | 2.00x | 3.20 | 2.50x | 2.00 | 4.00x | 1.60 | 5.00x | {rates} |"
    head, _, line = latency_table(rows[1:4:2]).splitlines()
    arms = "bounds, 2,048 | sketch, 512 | "
    assert head == f"| context, sequences | {arms} | tokens/s, {arms} |", "a run without stock"
    assert line == "| 8K x 16 | 4.00 | 2.00 | 2.00x | 4,000 | 8,000 | 2.00x |"


@pytest.fixture
def acceptance(tmp_path: Path) -> Path:
    """What `acceptance.py` may have found."""
    file = tmp_path / "acceptance.json"
    rows = [
        {"text": "book", "arm": arm, "drafts": "greedy", "accepted_at_least": [0.9, 0.8, 0.7, 0.6]}
        for arm in ("moments@1024", "sketch@512")
    ]
    file.write_text(json.dumps({"settings": {"num_dense_layers": 2}, "rows": rows}), encoding="utf-8")
    return file


def test_lossless_arms_on_a_cpu(tmp_path: Path, acceptance: Path) -> None:
    output = tmp_path / "decode.json"
    few = ("--lengths", "2048", "--dtypes", "fp32", "--repeats", "2", "--tokens", "40")
    none = acceptance.with_name("none.json")  # without dense layers
    none.write_text(acceptance.read_text(encoding="utf-8").replace("2}", "0}"), encoding="utf-8")
    run(
        "benchmarks/decode_cpu.py", *few, *(f"--acceptance={file}" for file in (acceptance, none)), f"--output={output}"
    )
    record = json.loads(output.read_text(encoding="utf-8"))
    assert [row["arm"] for row in record["rows"][4:]] == ["written", "lossless-2", "lossless-0"]
    shares = [0.9, 0.8, 0.7, 0.6]
    assert record["settings"]["accepted_at_least"] == {"lossless-2": shares, "lossless-0": shares}
    for row in record["rows"][5:]:
        assert row["ms"]["p50"] > 0 and len(row["turns_ms"]) == 3
        assert row["drafts"]["drafted"] >= 2  # whether more, the times of this machine say


def test_lossless_arms_as_on_a_gpu(tmp_path: Path, acceptance: Path) -> None:
    output = tmp_path / "decode.json"
    few = ("--models", "tiny", "--device", "cpu", "--tokens", "8", "--lossless", "--acceptance", str(acceptance))
    run("benchmarks/decode_gpu.py", *few, "--output", str(output))
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [(row["batch"], row["arm"]) for row in rows] == [
        (batch, arm) for batch in (1, 2) for arm in ("dense", "lossless-512")
    ]
    assert all(row["drafts"]["checks"] > 0 for row in rows[1::2])


def test_decode_cpu(tmp_path: Path) -> None:
    output = tmp_path / "decode.json"
    run("benchmarks/decode_cpu.py", "--lengths", "2048", "--dtypes", "fp32", "--repeats", "2", "--output", str(output))
    record = json.loads(output.read_text(encoding="utf-8"))
    assert [row["arm"] for row in record["rows"]] == ["dynamic", "dense", "quest-2", "quest-0"]
    assert record["rows"][3]["share_read"] < 0.6
    assert record["rows"][3]["metadata_to_kv_bytes"] == 1 / 16
    assert record["machine"]["torch"]


def test_acceptance(tmp_path: Path) -> None:
    """On the bundled model, which has no chat template: of every draft, and more with more drafts."""
    output = tmp_path / "acceptance.json"
    few = ("--context", "600", "--places", "2", "--arms", "bounds@64", "--kinds", "book,code,chat")
    run("benchmarks/acceptance.py", *few, "--output", str(output))
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [(row["text"], row["drafts"]) for row in rows] == [
        (text, drafts) for text in ("book", "code") for drafts in ("greedy", "sampled")
    ]
    for row in rows:
        assert row["places"] == len(row["accepted"]) == 2
        assert row["tokens_a_check"] == sorted(row["tokens_a_check"])
        assert row["tokens_a_check"][7] == 1 + sum(row["accepted"]) / 2


def test_hit_rates(tmp_path: Path) -> None:
    """On the bundled model: more is hot in larger pools, and the traces are the units that steps read."""
    output, traces = tmp_path / "hits.json", tmp_path / "traces.pt"
    arms = ("bounds@128", "sketch,selection_unit=token,candidate_factor=2@64")
    few = ("--context", "600", "--steps", "8", "--warmup", "2", "--sizes", "160,640", "--kinds", "book")
    files = ("--output", str(output), "--traces", str(traces))
    run("benchmarks/hit_rates.py", *few, "--arms", ",".join(arms), "--served", *files)
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    candidates, rows = rows[4:], rows[:4]
    assert [(row["arm"], row["hot_tokens"], row["counted"]) for row in candidates] == [
        (arms[1], size, "candidates") for size in (160, 640)
    ]
    least = 6 * 4 * 2 * 2 * 64  # steps, layers, heads, candidates; forced tokens may be none of them
    assert least <= candidates[0]["units_looked_up"] == candidates[1]["units_looked_up"] < 1.2 * least
    assert candidates[0]["hit_rate"] < candidates[1]["hit_rate"]
    assert [(row["arm"], row["hot_tokens"]) for row in rows] == [(arm, size) for arm in arms for size in (160, 640)]
    for small, large in (rows[:2], rows[2:]):
        assert 0 < small["hit_rate"] <= large["hit_rate"] < 1
        assert small["units_looked_up"] == large["units_looked_up"] > 0
        assert set(small["hit_rate_by_layer"]) == {"2", "3", "4", "5"}
    assert rows[0]["hit_rate"] < rows[1]["hit_rate"]
    kept = torch.load(traces)
    assert {key.split(" layer ")[0] for key in kept} == {f"book 0 {arm}" for arm in arms}
    assert all(units.shape[0] == 8 and int(units.max()) < 608 for units in kept.values())


def test_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the bundled model; and of a selection that lies evenly or in one part, of tokens and of pages."""
    output = tmp_path / "spread.json"
    arms = ("bounds@128", "sketch,selection_unit=token,candidate_factor=0@64")
    few = ("--context", "600", "--steps", "2", "--parts", "4,8", "--kinds", "book")
    run("benchmarks/spread.py", *few, "--arms", ",".join(arms), f"--output={output}")
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [(row["arm"], row["parts"], row["n"]) for row in rows] == [
        (arm, parts, 2 * 4 * 2) for arm in arms for parts in (4, 8)
    ]
    assert all(1 < row["fullest_to_mean"]["p50"] <= row["parts"] for row in rows)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spread = importlib.import_module("spread")
    with pytest.raises(QuestValueError, match="parts: got '1', expected numbers from 2 on"):
        spread.main(parts="1")
    fullest_to_mean = spread.fullest_to_mean
    units = torch.tensor([[[0, 1, 2, 3, -1], [0, 8, 16, 24, -1]]], dtype=torch.int32)
    assert fullest_to_mean(Selection(units, units[..., 0], 1), 32, 4) == [4, 1]
    assert fullest_to_mean(Selection(units, units[..., 0], 16), 512, 4) == [4, 1]


def test_clustered_keys() -> None:
    """Of random keys the newest get larger logits, and the others stay what they are."""
    torch.manual_seed(0)
    (kv,), _ = make_caches(1, 2, 4096, 2, dtype=torch.float32, device="cpu")
    query = torch.randn(2, 8, 128)
    table = kv.page_table.long()
    before = kv.keys[table].flatten(1, 2)  # [B, T, HKV, D]
    first = cluster_keys(kv, query, 4096)
    assert first == 4096 - 256
    after = kv.keys[table].flatten(1, 2)
    assert torch.equal(after[:, :first], before[:, :first])
    gained = torch.einsum("bhgd,bthd->bthg", query.view(2, 2, 4, 128), after - before)[:, first:] / 128**0.5
    assert float(gained.mean()) == pytest.approx(0.7, abs=0.01)


def test_offload_gpu(tmp_path: Path) -> None:
    """As far as a CPU goes: two pools of one memory. Queries that are alike find more of what they read."""
    output = tmp_path / "offload.json"
    reads = "bounds@128,sketch,selection_unit=token,candidate_factor=2@64"
    few = ("--model", "tiny", "--device", "cpu", "--contexts", "600", "--tokens", "2", "--hot-share", "0.4")
    few = (*few, "--own", "0,1", "--reads", reads, "--arms", "quest,offload,all")
    run("benchmarks/offload_gpu.py", *few, "--output", str(output))
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [row["arm"] for row in rows] == ["quest", "offload", "offload", "all", "quest", "offload", "offload"]
    assert all(row["ms"]["p50"] > 0 for row in rows)
    for place in (1, 5):
        alike, other = (row["fetches"]["hit_rate"] for row in rows[place : place + 2])
        assert 0 < other < alike <= 1 and all(row["mib_a_token"] > 0 for row in rows[place : place + 2])
    assert [row["own"] for row in rows[1:3]] == [0.0, 1.0] and rows[1]["hot_tokens"] == 240


def test_prompt_gpu(tmp_path: Path) -> None:
    output = tmp_path / "prompt.json"
    few = ("--model", "tiny", "--device", "cpu", "--contexts", "300", "--chunks", "100", "--reads", "bounds@128")
    run("benchmarks/prompt_gpu.py", *few, "--arms", "stock,quest", "--output", str(output))
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [(row["arm"], row["chunk"]) for row in rows] == [("stock", 100), ("quest", 100)]
    assert all(row["seconds"]["p50"] > 0 for row in rows)


def test_offload_gpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    offload = importlib.import_module("offload_gpu")
    with pytest.raises(QuestValueError, match="arms: got 'offload-90', expected some of quest,offload,all"):
        offload.check_arms(["quest", "offload-90"])
    with pytest.raises(QuestValueError, match=r"own: got '1\.5', expected a number from 0 to 1"):
        offload.shares_of("0.5,1.5")
    with pytest.raises(QuestValueError, match="kv_cache_dtype: got 'int8'"):
        offload.check_stock(["quest"], "int8", "cuda")
    with pytest.raises(QuestValueError, match="arms: got 'stock-offload', expected others on a CPU"):
        offload.check_stock(["quest", "stock-offload"], "auto", "cpu")
    with pytest.raises(QuestValueError, match="hot_tokens: got 40, expected at least 80"):
        offload.check_pools(["offload"], [QuestConfig.paper(64, page_size=16)], 40)


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


def test_a_page_is_filled_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    fill_page = importlib.import_module("marks").fill_page
    page = tmp_path / "page.md"
    page.write_text(
        "a\n\n<!-- one -->\n\n<!-- /one -->\n\nb\n\n<!-- two -->\n\nold\n\n<!-- /two -->\n", encoding="utf-8"
    )
    fill_page(page, {"two": r"| \1 |"})
    filled = "a\n\n<!-- one -->\n\n<!-- /one -->\n\nb\n\n<!-- two -->\n\n| \\1 |\n\n<!-- /two -->\n"
    assert page.read_text(encoding="utf-8") == filled
    with pytest.raises(ValueError, match="got 0 pairs of marks of three"):
        fill_page(page, {"three": "x"})
    gpu = importlib.import_module("tables_gpu")
    assert gpu.PAGE == ROOT / "docs" / "gpu.md"
    before = gpu.PAGE.read_text(encoding="utf-8")
    page.write_text(before, encoding="utf-8")
    fill_page(page, gpu.tables())
    assert page.read_text(encoding="utf-8") == before


def test_sketches_beside_bounds_once_they_were_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a row as `attention_gpu.py` writes it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("tables_gpu")
    row = {
        "shape": [1, 32, 8, 32768, 2048],
        "dense_us": {"tensor cores": {"p50": 40.0}, "cuda cores": {"p50": 60.0}},
        "quest_us": {"p50": 24.0},
        "sketch_us": {"512": {"p50": 16.0}, "2048": {"p50": 20.0}},
        "launches_sketch": {"_scan": 1, "_merge": 2},
        "bytes_quest": 4_000_000,
        "bytes_sketch": {"512": 1_000_000, "2048": 2_000_000},
        "bytes_dense": 80_000_000,
    }
    head, _, line = gpu.sketch_table([row]).splitlines()
    assert head.count("|") == line.count("|") == 13
    assert line == (
        "| 1 x 32/8 x 32K, bounds 2,048 | 40.0 | 24.0 | 2.0 | 16.0 | 2.50x | 1.50x | 0.5 | 20.0 | 2.00x | 1.20x | 1.0 |"
    )
    alone = {**row, "bytes_alone": 3_000_000, "tokens_alone": 1640.2}
    alone["alone_us"] = {"1024": {"p50": 10.0}, "2048": {"p50": 12.0}}
    assert gpu.sketch_table([alone]).splitlines()[2] == f"{line} 12.0 | 3.33x | 2.00x | 1.5 | 1,640 |"
    clustered = {**alone, "clustered_us": {"bounds": {"p50": 24.2}, "alone": {"p50": 13.0}}, "newest_share": 0.313}
    assert gpu.smaller_table([clustered]).splitlines()[2] == (
        "| 1 x 32/8 x 32K, 2,048 | 24.0 |  |  | 10.0 | 2.40x | 12.0 | 2.00x | 24.2 | 13.0 | 31 % |"
    )
    timed = {**row, "launch_times_us": [["scan_kernel", 2.0], ["scan_kernel", 4.0], ["_attend_kernel", 12.5]]}
    timed["bytes_scan"] = 4_000_000
    table = gpu.launches_table([timed], "launch_times_us", [16.0]).splitlines()
    assert table[0] == "| B x HQ/HKV x context | scan | scan | attend | together | the step | scan, of the read rate |"
    assert table[2] == "| 1 x 32/8 x 32K | 2.0 | 4.0 | 12.5 | 18.5 | 16.0 | 50 % |"
    assert gpu.launches_line([row]) == "A step with sketches runs `_scan`, `_merge` x 2. Floors are at 2.00 TB/s."
    machine = {"gpu": ["NVIDIA H100, 79 GiB"], "torch": "2.11", "triton": "3.6", "commit": "0123456789"}
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    for name, rows in (("attention_gpu.json", [{**row, "quest_us": {}}]), ("attention_sketch_gpu.json", [row])):
        if name == "attention_gpu.json":
            del rows[0]["sketch_us"]
        (tmp_path / name).write_text(json.dumps({"machine": machine, "rows": rows}), encoding="utf-8")
    assert gpu.sketch_run() == "attention_sketch_gpu.json"
    assert gpu.origin("attention_sketch_gpu.json") == "NVIDIA H100, torch 2.11, triton 3.6, commit 0123456"
    prefill = {
        "arm": "prefill",
        "model": "m",
        "context": 8192,
        "seconds": {"stock": 1.0, "quest": 1.01, "sketch": 1.02},
    }
    assert gpu.prefill_table([prefill]).splitlines()[-1] == "| m, 8K | 1.000 | 1.010 | +1.0 % | 1.020 | +2.0 % |"


def test_the_page_on_choosing_is_that_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    choosing, marks = (importlib.import_module(name) for name in ("tables_choosing", "marks"))
    before = choosing.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "choosing.md"
    page.write_text(before, encoding="utf-8")
    made = choosing.tables()
    assert {"kept", "needles", "tried", "tried-parts", "origin"} <= set(made)
    assert ("picture" in made) == ("times" in made)  # both, or neither
    marks.fill_page(page, made)
    assert page.read_text(encoding="utf-8") == before
    for name in set(re.findall(r"^<!-- ([\w-]+) -->$", before, re.MULTILINE)) - set(made):
        assert f"<!-- {name} -->\n\n<!-- /{name} -->" in before  # nothing stands for what was not measured
    printed_numbers = set(re.findall(r"\d+\.\d+", "".join(made.values())))
    prose = [line for line in before.splitlines() if line not in "\n".join(made.values())]
    numbers = {number for line in prose for number in re.findall(r"(?<![\w.:])\d+\.\d+(?![\w.])", line)}
    assert numbers <= printed_numbers


def test_ways_to_choose_are_of_both_tables_and_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs and times as they will lie among the results."""
    pytest.importorskip("matplotlib", reason="an extra of its own")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    choosing, plot, ask = (
        importlib.import_module(name) for name in ("tables_choosing", "plot_choosing", "eval_public")
    )

    def run_of(n: int, budgets: tuple[int, ...]) -> SimpleNamespace:
        cells = [SimpleNamespace(method="full", token_budget=None, n=n)]
        for place, way in enumerate(choosing.BY_BUDGET):
            more = {"more": 10.0 - place, "more_low": 9.0 - place, "more_high": 11.0 - place}
            cells += [SimpleNamespace(method=way, token_budget=budget, n=n, **more) for budget in budgets]
        return SimpleNamespace(continuation=cells, accuracy=[])

    runs = {"choice_qwen_31k_text": run_of(12, (512, 1024, 2048))}
    budgets = ("512", "1024", "2048")
    times = {form: {budget: {"p50": 10.0} for budget in budgets} for form in ("bounds", "moments", "sketch", "alone")}
    row = {
        "choices_us": times,
        "bytes_exact": dict.fromkeys(budgets, 50),
        "bytes_dense": 100,
        "dense_us": {"tensor cores": {"p50": 40.0}},
    }
    for module in (choosing, plot):
        monkeypatch.setattr(module, "load", lambda _: [row])
        monkeypatch.setattr(module, "sketch_run", lambda: "attention_gpu.json")
    assert choosing.points({}) == {}
    found = choosing.points(runs)
    assert [[point.token_budget for point in some] for some in found.values()] == [[512, 1024, 2048]] * 5
    assert {point.time for point in found[ask.EXACT_TOKENS]} == {20.0}  # half of the bytes of 40 us
    assert "| sketches, tokens, keys rank candidates | 10.0 | 10.0 | 10.0 |" in choosing.time_table(runs)["times"]
    text = choosing.text_tables(runs)["text"].splitlines()
    heads = " | ".join(f"Qwen 31K, {budget}" for budget in ("512", "1,024", "2,048"))
    assert text[0] == f"| perplexity above full attention's [%] | {heads} |"
    assert text[2] == f"| bounds, pages: the paper's Quest{' | +10.0 (+9.0 to +11.0)' * 3} |"
    assert text[-1] == "| n | 12 | 12 | 12 |"
    monkeypatch.setattr(plot, "kept_runs", lambda: runs)
    plot.main(tmp_path / "choosing.png")
    assert (tmp_path / "choosing.png").read_bytes().startswith(b"\x89PNG")


def test_what_runs_ask_is_what_an_evaluation_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    ask = importlib.import_module("eval_public")
    runs = (*ask.RUNS, *ask.CHOICE_RUNS)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        for each in run.asks:
            plan = Plan(
                each.tasks, split_list(each.methods), tuple(map(str, each.budgets)), (run.length,), each.samples,
                run.dense_layers, least_full=each.least_full,
            )  # fmt: skip
            assert all(plan.arms(task, run.length) for task in each.tasks)


def test_kept_runs_are_what_a_report_sums_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    ask, keeping = (importlib.import_module(name) for name in ("eval_public", "keep_runs"))
    name = "choice_bundled_4k_needles"
    monkeypatch.chdir(tmp_path)
    ask.begin_from_committed(tmp_path / name)
    kept = keeping.keep(tmp_path / name, tmp_path / "results")
    committed = ask.RESULTS / name
    for file in ("summary.json", ask.SAMPLES):
        assert (kept / file).read_bytes() == (committed / file).read_bytes()


def test_the_tables_of_the_page_on_speed_are_those_of_the_results() -> None:
    tables = printed("tables_cpu").strip().split("\n\n")
    assert [len(table.splitlines()) for table in tables] == [10, 12]
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert all(table in page for table in tables)


def test_the_tables_of_lossless_decoding_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    tables = printed("tables_lossless").strip().split("\n\n")
    assert len(tables) == 2
    assert all(table in page for table in tables)


def test_the_tables_of_the_page_on_host_memory_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "offload.md").read_text(encoding="utf-8")
    tables = printed("tables_offload").strip().split("\n\n")
    assert len(tables) == 8, "hits, times, two sequences and prompts with what they were measured on, a layer ahead"
    assert all(table in page for table in tables)


@pytest.mark.parametrize(("page", "scripts"), [
    ("README.md", ("accuracy", "choosing", "cpu", "gpu", "public", "vllm")),
    ("docs/speed.md", ("cpu", "gpu", "lossless", "vllm")),
    ("docs/gpu.md", ("gpu",)),
    ("docs/vllm.md", ("vllm", "choosing", "public")),
])  # fmt: skip
def test_ratios_times_and_shares_in_a_text_are_printed(page: str, scripts: tuple[str, ...]) -> None:
    """Every `1.23x`, `4.5 ms` and `6.7 %` outside of the tables is a number of a table that belongs to the page."""
    known = set(re.findall(r"\d+\.\d+", "".join(printed(f"tables_{script}") for script in scripts)))
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


@pytest.mark.parametrize("name", ["gpu", "offload"])
def test_the_figures_of_pages(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra of its own")
    run(f"benchmarks/plot_{name}.py", "--output", str(tmp_path / "drawn.png"))
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_layer_ahead(tmp_path: Path) -> None:
    """On the bundled model: what enters the layer before says more of a layer's reads than that layer's query does."""
    output = tmp_path / "ahead.json"
    few = ("--context", "600", "--steps", "6", "--kinds", "book", "--output", str(output))
    run("benchmarks/layer_ahead.py", *few, "--arms", "bounds@128,sketch,selection_unit=token@64")
    for row in json.loads(output.read_text(encoding="utf-8"))["rows"]:
        assert 0 < row["new_units"] < row["all_units"]
        assert row["all_found_neighbour's"] < row["all_found_projected"] < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU the interpreter runs the kernel")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter computes in NumPy
def test_steps_of_benchmarks_are_the_fused_step_past_the_budget() -> None:
    caches, lengths = make_caches(2, 2, 64, 1, head_dim=16, dtype=torch.float32, device="cpu")
    queries = [torch.randn(2, 2, 16) for _ in caches]
    config = QuestConfig.paper(32, backend="triton")
    for step, query, kv in zip(quest_steps(queries, caches, lengths, config), queries, caches, strict=True):
        expected = quest_decode(query, kv, lengths, QuestConfig(32, backend="reference")).output
        torch.testing.assert_close(step().output, expected)
    with pytest.raises(RuntimeError, match=r"read \[\[4\], \[4\]\] pages, expected 16"):
        quest_steps(queries, caches, lengths, QuestConfig.paper(256, backend="triton"))


def test_steps_of_benchmarks_choose_tokens_by_sketches_of_their_keys() -> None:
    caches, lengths = make_caches(2, 2, 64, 1, head_dim=16, dtype=torch.float32, device="cpu")
    queries = [torch.randn(2, 2, 16) for _ in caches]
    config = QuestConfig(36, metadata="sketch", selection_unit="token", backend="torch")
    sketched = [with_metadata(kv, lengths, config) for kv in caches]
    for kv, plain in zip(sketched, caches, strict=True):
        assert kv.keys is plain.keys and kv.form == Sketch(16)
        for page, kept in enumerate(kv.metadata[:, 0]):
            by_hand = kv.form.take_by_hand(kept, kv.keys[page, :, 0], 0)
            scales = SketchLayout.of(16, 16).scales  # rounded otherwise by hand
            assert torch.equal(kept[:, :scales], by_hand[:, :scales])
    for step, query, kv in zip(quest_steps(queries, sketched, lengths, config), queries, sketched, strict=True):
        expected = quest_decode(query, kv, lengths, replace(config, backend="reference"))
        assert step().selected.counts.tolist() == [[36], [36]]
        torch.testing.assert_close(step().output, expected.output)
    with pytest.raises(RuntimeError, match=r"read \[\[64\], \[64\]\] tokens, expected 80"):
        quest_steps(queries, sketched, lengths, replace(config, token_budget=80))


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
        narrow = with_metadata(kv, lengths, QuestConfig.paper(metadata_dtype="fp8")).metadata.float()
        assert (narrow[:, :, KEY_MIN] <= kv.metadata[:, :, KEY_MIN]).all()
        assert (narrow[:, :, KEY_MAX] >= kv.metadata[:, :, KEY_MAX]).all()


def test_runs_on_public_models_go_on_from_the_committed_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every summary is that of the answers beside it, and `quest eval` would take the folder for a run of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    eval_public = importlib.import_module("eval_public")
    kept = [run for run in eval_public.CHOICE_RUNS if (eval_public.RESULTS / run.name).exists()]
    assert kept
    for run_of in (*eval_public.RUNS, *kept):
        folder = tmp_path / run_of.name
        eval_public.begin_from_committed(folder)
        committed = json.loads((eval_public.RESULTS / run_of.name / "summary.json").read_text(encoding="utf-8"))
        assert read_results(folder).summary() == committed
        model = "the bundled model" if run_of.model is None else f"{run_of.model}.gguf"
        assert (committed["settings"]["model"], committed["settings"]["lengths"]) == (model, [run_of.length])
        Journal(folder, committed["settings"])
    before = (folder / "samples.jsonl").read_bytes()
    eval_public.begin_from_committed(folder)
    assert (folder / "samples.jsonl").read_bytes() == before

"""The report of a run, from lines made up here whose cells are worked out by hand or by their formula."""

from __future__ import annotations

import json
import math
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from quest_attention import QuestValueError
from quest_attention.eval.report import accuracy_rows, perplexity_rows, read_results, recall_rows, write_report
from quest_attention.eval.wilson import wilson_interval

SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "description": "a model <of> 6 layers & 2 KV heads",
    "page_size": 16,
    "num_dense_layers": 2,
    "question": "decode",
    "seed": 7,
    "num_samples": 40,
    "command": "quest eval --task passkey --output run",
    "machine": {"cpu": "a CPU", "gpu": None, "torch": "2.13.0", "commit": "0123456789ab"},
}
SKILL = {
    "full": 1.0,
    "oracle": 0.97,
    "quest": 0.95,
    "quest:page_size=32": 0.9,
    "streaming_llm": 0.3,
    "h2o": 0.5,
    "tova": 0.55,
    "snapkv": 0.6,
}
"""Methods of made-up runs with how well they do at a budget of an eighth of the length."""


def answer(**fields: Any) -> dict[str, Any]:
    base = {"task": "passkey", "length": 8192, "index": 0, "method": "quest", "token_budget": 64, "score": 1.0}
    return {**base, "answer": "4031", "depth": 0.4, "tokens_read": 10, "tokens_held": 100, "seconds": 0.4} | fields


def prediction(**fields: Any) -> dict[str, Any]:
    base = {"task": "perplexity", "length": 3000, "index": 0, "book": "a", "method": "quest", "token_budget": 64}
    totals = {"tokens_read": 1, "tokens_held": 4}
    return {**base, "bucket": 1024, "nll": [2046.0, 1024.0, 952.0], "count": [1023, 1024, 952], **totals} | fields


def recollection(**fields: Any) -> dict[str, Any]:
    base = {"task": "recall", "length": 8192, "index": 0, "method": "quest", "token_budget": 64, "layers": [2, 3]}
    return {**base, "mass": [[0.8, 0.6], [1.0, 0.8]], "top10": [[0.5, 0.5], [0.5, 0.7]]} | fields


def write_run(folder: Path, lines: Iterable[dict[str, Any]], **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(SETTINGS | settings), encoding="utf-8")
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def arms(methods: Iterable[str], budgets: Iterable[int], length: int) -> list[tuple[str, int | None, float]]:
    """Method, budget and the chance of a right answer."""
    found: list[tuple[str, int | None, float]] = []
    for method in methods:
        if method == "full":
            found.append((method, None, SKILL[method]))
        else:
            found += [(method, b, SKILL[method] ** max(0.3, math.log2(length / b) / 3)) for b in budgets]
    return found


def made_up(
    tasks: Iterable[str],
    lengths: Iterable[int],
    budgets: tuple[int, ...],
    *,
    num_samples: int,
    methods: tuple[str, ...] = tuple(SKILL),
    num_layers: int = 6,
) -> list[dict[str, Any]]:
    """A run as it might be."""
    rng = random.Random(0)
    lines: list[dict[str, Any]] = []
    for task in tasks:
        for length in lengths:
            for method, budget, chance in arms(methods, budgets, length):
                names = {"task": task, "length": length, "method": method, "token_budget": budget}
                read = {"tokens_read": budget or length, "tokens_held": length}
                for index in range(num_samples if task != "perplexity" else 3):
                    depth = index % 11 / 10
                    if task == "perplexity":
                        count = [min(length, start + 1024) - max(1, start) for start in range(0, length, 1024)]
                        loss = 2.2 + (1 - chance) * 1.5
                        nll = [loss * n * (1 + 0.3 / (k + 1)) * rng.uniform(0.97, 1.03) for k, n in enumerate(count)]
                        lines.append(prediction(**names, **read, index=index, nll=nll, count=count))
                    elif task == "recall":
                        if method.partition(":")[0] not in {"quest", "oracle"}:
                            continue
                        layers = list(range(2, num_layers))
                        mass = [[min(1.0, chance * rng.uniform(0.8, 1.05)) for _ in range(2)] for _ in layers]
                        top10 = [[value**2 for value in heads] for heads in mass]
                        lines.append(recollection(**names, index=index, layers=layers, mass=mass, top10=top10))
                    else:
                        hard = chance ** (1 + 2 * (0.2 < depth < 0.8)) if task == "needle_grid" else chance
                        score = rng.random() * hard if task.startswith("longbench") else float(rng.random() < hard)
                        lines.append(answer(**names, **read, index=index, score=score, depth=depth))
    rng.shuffle(lines)
    return lines


def pixels(png: bytes) -> tuple[int, int, bytes]:
    """Width, height and the unpacked bytes of a PNG, filters and all."""
    width, height = struct.unpack(">II", png[16:24])
    data, place = b"", 8
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + size]
        place += size + 12
    return width, height, zlib.decompress(data)


def test_accuracy_by_hand(tmp_path: Path) -> None:
    quest = [answer(index=i, score=float(i != 3), tokens_read=10 + i, tokens_held=100) for i in range(4)]
    full = [answer(index=i, method="full", token_budget=None, tokens_read=0, tokens_held=0) for i in range(2)]
    first, second = read_results(write_run(tmp_path, [*quest, *full])).accuracy
    assert (first.method, first.n, first.score, first.share_read) == ("full", 2, 100.0, 1.0)
    assert (second.method, second.token_budget, second.n, second.score) == ("quest", 64, 4, 75.0)
    assert second.share_read == pytest.approx(46 / 400)
    assert (second.low, second.high) == wilson_interval(3, 4)
    # Wilson by hand: centre (0.75 + 3.8415/8) / (1 + 3.8415/4) = 0.6275, half 0.3269 (z = 1.96)
    assert (second.low, second.high) == (pytest.approx(30.06, abs=0.05), pytest.approx(95.44, abs=0.05))


def test_scores_of_longbench_have_standard_errors(tmp_path: Path) -> None:
    lines = [answer(task="longbench_qasper", index=i, score=score) for i, score in enumerate((0.2, 0.4, 0.6))]
    lines.append(answer(task="longbench_trec", score=0.5))
    several, single = read_results(write_run(tmp_path, lines)).accuracy
    half = 1.96 * 20 / math.sqrt(3)  # 22.6
    assert several.score == pytest.approx(40)
    assert (several.low, several.high) == (pytest.approx(40 - half), pytest.approx(40 + half))
    assert (single.score, single.low, single.high) == (50.0, None, None)


def test_perplexity_by_hand(tmp_path: Path) -> None:
    other = prediction(index=1, nll=[1023.0, 1024.0, 952.0])
    (cell,) = read_results(write_run(tmp_path, [prediction(), other])).perplexity
    assert (cell.n, cell.positions, cell.share_read) == (2, (1024, 2048, 3000), 0.25)
    assert cell.so_far[0] == pytest.approx(math.exp(1.5))
    assert cell.so_far[1] == pytest.approx(math.exp((1.5 * 2046 + 2048) / 4094))
    assert cell.so_far[2] == cell.perplexity == pytest.approx(math.exp((1.5 * 2046 + 2048 + 1904) / 5998))


def test_perplexity_is_compared_with_full_on_the_same_books(tmp_path: Path) -> None:
    full = prediction(method="full", token_budget=None, nll=[1023.0, 1024.0, 952.0], tokens_read=0, tokens_held=0)
    rows = perplexity_rows(read_results(write_run(tmp_path, [full, prediction()])))
    assert rows[0] == ("length", "method", "budget", "perplexity", "against full", "books", "share read")
    assert rows[1] == ("3000", "full", "all", "2.718", "", "1", "100.0 %")
    change = 100 * (math.exp(1023 / 2999) - 1)
    assert rows[2] == ("3000", "quest", "64", f"{math.exp(4022 / 2999):.4g}", f"{change:+.2f} %", "1", "25.0 %")
    uneven = perplexity_rows(read_results(write_run(tmp_path, [full, prediction(), prediction(index=1)])))
    assert uneven[2][4] == ""


def test_recall_by_hand(tmp_path: Path) -> None:
    other = recollection(index=1, mass=[[0.6, 0.4], [0.8, 0.6]])
    results = read_results(write_run(tmp_path, [recollection(), other]))
    (cell,) = results.recall
    assert (cell.n, cell.layers) == (2, (2, 3))
    assert cell.mass_by_layer == (pytest.approx(60), pytest.approx(80))
    assert cell.top10_by_layer == (pytest.approx(50), pytest.approx(60))
    assert (cell.mass, cell.top10) == (pytest.approx(70), pytest.approx(55))
    half = 1.96 * math.sqrt(200) / math.sqrt(2)  # samples of 80 and 60 %
    assert (cell.mass_low, cell.mass_high) == (pytest.approx(70 - half), pytest.approx(70 + half))
    assert recall_rows(results)[1] == ("8192", "quest", "64", "70.0 % (50.4 to 89.6)", "55.0 % (55.0 to 55.0)", "2")


def test_needles_by_depth(tmp_path: Path) -> None:
    depths = ((0.0, 1), (0.02, 0), (0.48, 1), (0.97, 0))
    lines = [answer(task="needle_grid", index=i, depth=d, score=float(s)) for i, (d, s) in enumerate(depths)]
    results = read_results(write_run(tmp_path, lines))
    assert [(cell.depth, cell.n, cell.score) for cell in results.needle] == [
        (0, 2, 50.0),
        (50, 1, 100.0),
        (100, 1, 0.0),
    ]
    assert results.accuracy[0].score == 50.0


def test_rows_for_a_terminal(tmp_path: Path) -> None:
    lines = [answer(index=i, score=float(i < 195), tokens_held=1000) for i in range(200)]
    lines += [answer(index=i, token_budget=128) for i in range(2)]
    lines += [answer(task="needle", method="full", token_budget=None, tokens_read=100)]
    assert accuracy_rows(read_results(write_run(tmp_path, lines, tasks=["passkey", "needle"]))) == [
        ("task", "length", "method", "budget", "score", "n", "share read"),
        ("passkey", "8192", "quest", "64", "97.5 % (94.3 to 98.9)", "200", "1.0 %"),
        ("", "", "quest", "128", "100.0 % (34.2 to 100.0)", "2", "10.0 %"),
        ("needle", "8192", "full", "all", "100.0 % (20.7 to 100.0)", "1", "100.0 %"),
    ]
    assert accuracy_rows(read_results(write_run(tmp_path, [recollection()]))) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task": "passkey", "len', r"samples.jsonl, line 2: got '{\"task\".*expected a JSON object"),
        ("[1]", r"samples.jsonl, line 2: got '\[1\]', expected a JSON object"),
        (answer(index=0), "line 2: got 'sample 0 of passkey by quest again', expected one line for each"),
        ({"task": "passkey"}, "line 2, length: got 'nothing', expected a field of that name"),
        (answer(task="../x"), "line 2, task: got '../x', expected letters"),
        (answer(length=0), "line 2, length: got 0, expected a whole number from 1"),
        (answer(method=3), "line 2, method: got 3, expected a name"),
        (answer(token_budget="64"), "line 2, token_budget: got '64', expected a whole number from 1"),
        (answer(index=1, score=True), "line 2, score: got True, expected a number from 0 to 1"),
        (answer(index=1, score=math.nan), "line 2, score: got nan, expected a number from 0 to 1"),
        (answer(index=1, score=0.5), "line 2, score: got 0.5, expected 0 or 1: passkey is matched exactly"),
        (answer(index=1, tokens_read=101), "line 2, tokens_read: got 101, expected at most tokens_held, 100"),
        (prediction(nll=[1.0]), r"line 2, nll: got \[1.0\], expected a list of 3"),
        (prediction(nll=[1e9, 0, 0]), "line 2, nll: got 1000000000.0, expected at most 700 nats for each of 2999"),
        (recollection(mass=[[0.5]]), r"line 2, mass: got \[\[0.5\]\], expected a list of 2"),
        (recollection(mass=[0.5, 0.5]), r"line 2, mass: got \[0.5, 0.5\], expected a list of KV heads for each layer"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str | dict[str, Any], message: str) -> None:
    write_run(tmp_path, [answer()])
    with (tmp_path / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(QuestValueError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_samples_of_one_cell_must_fit_together(tmp_path: Path) -> None:
    with pytest.raises(QuestValueError, match=r"^bucket: got \(512, 3\), expected \(1024, 3\) for sample 1"):
        read_results(write_run(tmp_path, [prediction(), prediction(index=1, bucket=512)]))
    with pytest.raises(QuestValueError, match=r"^layers: got \(0, 1\), expected \(2, 3\) for sample 1"):
        read_results(write_run(tmp_path, [recollection(), recollection(index=1, layers=[0, 1])]))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuestValueError, match="expected the folder of a run") as caught:
        read_results(tmp_path / "nowhere")
    assert caught.value.argument == "folder"
    with pytest.raises(QuestValueError, match=r"with settings.json in it"):
        read_results(tmp_path)
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(QuestValueError, match=r"with samples.jsonl in it"):
        read_results(tmp_path)
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(QuestValueError, match=r"^settings.json: got .* expected the settings of a run"):
        read_results(tmp_path)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(QuestValueError, match=r"^settings.json, model: got 'nothing', expected a setting"):
        read_results(tmp_path)
    with pytest.raises(QuestValueError, match=r"^samples.jsonl: got 'an empty file', expected at least one line"):
        read_results(write_run(tmp_path, []))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything in it, and its report."""
    folder = tmp_path_factory.mktemp("run")
    tasks = ("passkey", "longbench_qasper", "needle_grid", "perplexity", "recall")
    lines = made_up(
        tasks, (4096, 8192), (64, 256), num_samples=22, methods=("full", "quest", "quest:page_size=32", "h2o")
    )
    assert write_report(write_run(folder, lines)) == folder / "report.html"
    return folder


def test_figures_are_written_and_not_blank(run: Path) -> None:
    names = {path.stem for path in (run / "figures").iterdir()}
    recall = {f"recall_{what}{by}" for what in ("mass", "top10") for by in ("", "_by_layer")}
    assert names == {"accuracy_passkey", "accuracy_longbench_qasper", "needle_grid", "perplexity"} | recall
    for path in (run / "figures").iterdir():
        width, height, data = pixels(path.read_bytes())
        assert 400 < width < 2600
        assert 300 < height
        inked = sum(1 for byte in data if byte not in {0, 255})  # filtered rows of one colour are zeros
        assert inked > 0.005 * width * height


def test_the_page_needs_nothing_beside_it(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    targets = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']*)", page)
    assert targets
    assert all(target.startswith(("data:image/png;base64,", "#")) for target in targets)
    assert not re.search(r"https?:|@import|url\(|<script|<link", page)
    assert page.count("data:image/png;base64,") == len(list((run / "figures").iterdir()))
    for anchor in re.findall(r'href="#([^"]*)', page):
        assert page.count(f'id="{anchor}"') == 1
    assert "One seed (7)" in page
    assert "a model &lt;of&gt; 6 layers &amp; 2 KV heads" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_the_page_shows_every_cell_with_n_and_interval(run: Path) -> None:
    results = read_results(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    cells = [row[2:] for row in accuracy_rows(results)[1:]]
    assert len(cells) == len(results.accuracy) == 3 * 2 * 7
    for row in [*cells, *perplexity_rows(results), *recall_rows(results)]:
        assert "".join(f"<td>{value}</td>" for value in row) in page or "".join(f"<th>{v}</th>" for v in row) in page
    assert f"All {2 * 7 * 11} cells by depth" in page
    assert "not finished" not in page
    for value in ("a CPU", "0123456789ab", "quest eval --task passkey --output run"):
        assert value in page


def test_a_run_that_was_interrupted_says_so(tmp_path: Path) -> None:
    lines = [answer(), answer(index=1), answer(method="h2o")]
    assert "not finished" in write_report(write_run(tmp_path, lines)).read_text(encoding="utf-8")


def test_the_same_input_gives_the_same_files(run: Path, tmp_path: Path) -> None:
    lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "samples.jsonl").write_text("\n".join(reversed(lines)) + "\n", encoding="utf-8")
    (tmp_path / "settings.json").write_bytes((run / "settings.json").read_bytes())
    write_report(tmp_path)
    for name in ("summary.json", "report.html", *(f"figures/{path.name}" for path in (run / "figures").iterdir())):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes(), f"{name}: the order of lines shows"


def test_the_summary_holds_settings_and_every_cell(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["settings"] == SETTINGS
    sizes = {name: len(cells) for name, cells in summary.items() if name != "settings"}
    assert sizes == {"accuracy": 42, "needle": 154, "perplexity": 14, "recall": 8}
    cell = summary["accuracy"][0]
    names = ["task", "length", "method", "token_budget", "n", "score", "low", "high", "share_read"]
    assert list(cell) == names
    assert all(number == round(number, 4) for number in cell.values() if isinstance(number, float))


@pytest.mark.parametrize(
    ("lines", "figures"),
    [
        ([answer(method="full", token_budget=None)], set()),
        ([answer()], {"accuracy_passkey"}),
        ([answer(task="needle_grid")], {"needle_grid"}),
        ([answer(task="needle_grid", depth=None)], set()),
        ([prediction(method="full", token_budget=None)], {"perplexity"}),
        ([prediction(length=900, nll=[9.0], count=[899])], {"perplexity"}),
    ],
)
def test_small_runs(tmp_path: Path, lines: list[dict[str, Any]], figures: set[str]) -> None:
    write_report(write_run(tmp_path, lines))
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == figures


def test_importing_the_report_imports_no_library_for_it() -> None:
    code = (
        "import sys, quest_attention.eval.report; print({'matplotlib', 'jinja2', 'torch', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    write_run(tmp_path, [answer()])
    code = f"""
import sys
from pathlib import Path
from quest_attention.eval.report import write_report
write_report(Path({str(tmp_path)!r}))
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("True False", "")

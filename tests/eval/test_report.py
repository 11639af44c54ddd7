"""`quest report`: cells by hand, a page that needs nothing else, figures with something on them."""

from __future__ import annotations

import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from quest_attention import QuestValueError
from quest_attention.cli.app import run
from quest_attention.eval.report import read_results, write_report
from quest_attention.eval.report.figures import _accuracy, _grid, _styles, draw_pictures
from quest_attention.eval.report.results import tells_nothing
from quest_attention.eval.report.tables import accuracy_rows, continuation_rows, perplexity_rows, recall_rows
from quest_attention.eval.wilson import wilson_interval

METHODS = ("full", "quest", "oracle", "token_oracle", "streaming_llm", "h2o", "tova", "snapkv", "quest:page_size=32")
TASKS = ("passkey", *(f"niah_{kind}" for kind in ("single_1", "single_2", "multikey_1", "multiquery")))
SETTINGS = {
    "model": "the bundled model",
    "description": "the bundled model, 11.0M parameters, float32, cpu, 2 threads",
    "page_size": 16,
    "num_dense_layers": 2,
    "question": "decode",
    "seed": 0,
    "num_samples": 20,
    "command": "quest eval passkey",
    "machine": {"cpu": "a processor", "gpu": None, "torch": "2.13.0"},
}


def answer(task: str, method: str, budget: int | None, score: float, **more: Any) -> dict[str, Any]:
    row = {"task": task, "length": 8192, "index": 0, "method": method, "token_budget": budget, "score": score}
    return {**row, "answer": "", "depth": None, "tokens_read": 10, "tokens_held": 100, "sparse_steps": 4, **more}


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def made_up(tasks: tuple[str, ...] = TASKS, lengths: tuple[int, ...] = (4096, 8192, 32768), n: int = 20) -> list[Any]:
    """A run as it might be: methods that differ, budgets that help."""
    rng = random.Random(0)
    strength = {
        "full": 9.0,
        "quest": 3.0,
        "oracle": 4.0,
        "token_oracle": 5.0,
        "streaming_llm": -3.0,
        "h2o": -2.0,
        "tova": -1.5,
        "snapkv": -0.5,
    }
    rows = []

    def chance(method: str, budget: int | None) -> float:
        power = strength[method.partition(":")[0]] + (0 if budget is None else math.log2(budget / 256))
        return 1 / (1 + math.exp(-power))

    arms = [("full", None), *((method, budget) for method in METHODS[1:] for budget in (64, 128, 256, 512, 1024))]
    for length in lengths:
        for method, budget in arms:
            for index in range(n):
                for task in tasks:
                    right = float(rng.random() < chance(method, budget))
                    rows.append(answer(task, method, budget, right, length=length, index=index, depth=rng.random()))
                depth = {"depth": index % 11 / 10, "length": length, "index": index}
                rows.append(
                    answer("needle_grid", method, budget, float(rng.random() < chance(method, budget)), **depth)
                )
    for index in range(3):
        for method, budget in [("full", None), ("quest", 512), ("quest", 4096), ("streaming_llm", 512)]:
            worse = 0 if budget is None else 30 / budget * (5 if method == "streaming_llm" else 1)
            row = answer("perplexity", method, budget, 0, length=8192, index=index, book="a book", bucket=1024)
            count = [1023, *[1024] * 7]
            nll = [size * (3.3 - 0.04 * part + worse * part / 7) for part, size in enumerate(count)]
            rows.append({**row, "nll": nll, "count": count})
            loss = 300 * (1 + worse) + index
            ends = {"nll": loss, "agreed": 128 - round(99 * worse) - index, "count": 128, "bucket": None}
            rows.append({**answer("continuation", method, budget, 0, length=8192, index=index), **ends})
        for method in ("quest", "oracle"):
            for budget in (64, 256, 1024):
                share = 0.4 + 0.05 * math.log2(budget) + (0.05 if method == "oracle" else 0)
                heads = [[min(1.0, share + 0.01 * layer + 0.01 * index)] * 2 for layer in range(4)]
                base = {"task": "recall", "length": 8192, "index": index, "method": method, "token_budget": budget}
                rows.append({**base, "layers": [2, 3, 4, 5], "mass": heads, "top10": heads})
    return rows


def test_cells_by_hand(tmp_path: Path) -> None:
    rows = [answer("passkey", "quest", 64, float(index != 2), index=index) for index in range(4)]
    rows += [answer("longbench_qasper", "full", None, score, index=index) for index, score in enumerate((0.2, 0.4))]
    predicted = answer("perplexity", "full", None, 0, bucket=2, length=4, book="a")
    rows += [
        {**predicted, "nll": [1.0, 4.0], "count": [1, 2]},
        {**predicted, "index": 1, "nll": [2.0, 2.0], "count": [1, 2]},
    ]
    base = {"task": "recall", "length": 64, "index": 0, "method": "oracle", "token_budget": 16}
    rows.append({**base, "layers": [2, 3], "mass": [[0.5, 0.7], [0.8, 1.0]], "top10": [[1.0, 1.0], [0.0, 0.4]]})
    results = read_results(write(tmp_path, rows))
    key = {cell.task: cell for cell in results.accuracy}
    low, high = wilson_interval(3, 4)
    assert (key["passkey"].score, key["passkey"].n, key["passkey"].share_read) == (75, 4, 0.1)
    assert (key["passkey"].low, key["passkey"].high) == pytest.approx((low, high))
    graded = key["longbench_qasper"]
    assert (graded.score, graded.low) == pytest.approx((30, 30 - 1.96 * 10), abs=0.01)
    (cell,) = results.perplexity
    assert cell.perplexity == pytest.approx(math.exp(9 / 6))
    assert cell.so_far == pytest.approx((math.exp(3 / 2), math.exp(9 / 6)))
    (recall,) = results.recall
    assert recall.mass == pytest.approx(75)
    assert recall.top10_by_layer == pytest.approx((100, 20))
    assert accuracy_rows(results)[0][-2:] == ("share read", "")
    assert ("passkey", "8192", "quest", "64", f"75.0 % ({low:.1f} to {high:.1f})", "4", "10.0 %", "") in accuracy_rows(
        results
    )
    assert perplexity_rows(results)[1][3] == "4.482"
    assert recall_rows(results)[1][3] == "75.0 %"


def test_continuation_by_hand(tmp_path: Path) -> None:
    """Loss is compared stretch by stretch: one that is hard for all methods widens no interval."""
    base = answer("continuation", "full", None, 0, count=100)
    rows = [{**base, "index": index, "nll": nll, "agreed": 99} for index, nll in enumerate((100.0, 400.0))]
    rows += [
        {**base, "method": "quest", "token_budget": 64, "index": index, "nll": nll, "agreed": agreed}
        for index, (nll, agreed) in enumerate(((110.0, 80), (412.0, 70)))
    ]
    full, quest = read_results(write(tmp_path / "both", rows)).continuation
    assert (full.more, full.agreement, full.perplexity) == pytest.approx((0, 99, math.exp(2.5)))
    assert quest.more == pytest.approx(100 * math.expm1(0.11))
    assert quest.more_low == pytest.approx(100 * math.expm1(0.11 - 1.96 * 0.01))
    assert (quest.agreement, quest.agreement_high) == pytest.approx((75, 75 + 1.96 * 5))
    (alone,) = read_results(write(tmp_path / "alone", rows[2:])).continuation
    assert alone.more is None
    results = read_results(tmp_path / "both")
    assert continuation_rows(results)[2][4:6] == ("+11.6 % (+9.5 to +13.8)", "75.0 % (65.2 to 84.8)")


def test_a_cell_in_which_full_attention_fails_tells_nothing(tmp_path: Path) -> None:
    rows = [
        answer(task, method, budget, score, index=index)
        for task, right in (("passkey", 3), ("needle", 2))
        for method, budget in (("full", None), ("quest", 64))
        for index, score in enumerate((1.0,) * right + (0.0,) * (5 - right))
    ]
    results = read_results(write(tmp_path, rows))
    assert not tells_nothing(results, "passkey", 8192) and tells_nothing(results, "needle", 8192)
    assert [row[-1] for row in accuracy_rows(results)[1:]] == [*["tells nothing: full below 60 %"] * 2, "", ""]
    assert write_report(tmp_path).read_text(encoding="utf-8").count("tells nothing: full below 60 %") == 2


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of results and its report."""
    folder = write(tmp_path_factory.mktemp("run"), made_up(TASKS[:2], (4096, 32768), n=4))
    write_report(folder)
    return folder


def test_the_page_needs_nothing_else(reported: Path) -> None:
    folder = reported
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=(?!"data:image/png;base64,|"#)""", page)
    figures = sorted(file.stem for file in (folder / "figures").iterdir())
    recall = [f"recall_{name}{by}" for name in ("mass", "top10") for by in ("", "_by_layer")]
    ends = ["continuation_agreement", "continuation_more"]
    assert figures == sorted([*(f"accuracy_{task}" for task in TASKS[:2]), "needle_grid", "perplexity", *ends, *recall])
    assert page.count("data:image/png;base64,") == len(figures)
    for words in ("quest eval passkey", "quest:page_size=32", "Perplexity", "a processor"):
        assert words in page
    first = (folder / "summary.json").read_text()
    write_report(folder)
    assert (folder / "summary.json").read_text() == first
    assert json.loads(first)["settings"] == SETTINGS


def test_the_page_fits_a_telephone_and_a_dark_room(tmp_path: Path) -> None:
    """What is wide scrolls in a box of its own, which keys reach too; letters of figures keep their size."""
    page = write_report(write(tmp_path, made_up(n=2))).read_text(encoding="utf-8")
    boxed = re.findall(r'<div class="wide" tabindex="0">\s*(<table|<img style="--width: [\d.]+in")', page)
    assert len(boxed) == page.count("<table") + page.count("<img ")
    style = page[page.index("<style>") : page.index("</style>")]
    assert re.search(r"\.wide \{ overflow-x: auto; \}", style)
    assert "overflow-wrap: anywhere" in re.search(r"body \{[^}]*\}", style)[0]  # type: ignore[index]
    assert "width=device-width" in page and "prefers-color-scheme: dark" in style
    assert "background: #fff" in re.search(r"\.wide img \{ display[^}]*\}", style)[0], "figures are drawn in black"  # type: ignore[index]
    assert re.search(r"max-width: 40rem\) \{\s*\.wide img \{ max-width: none; width: var\(--width\); \}", style)


def test_one_of_a_thing_on_the_page_is_one(tmp_path: Path) -> None:
    page = write_report(write(tmp_path, [answer("needle_grid", "full", None, 1.0, depth=0.5)])).read_text("utf-8")
    assert "<p>1 result. " in page and "All by depth: 1 cell<" in page


def test_a_summary_is_enough_for_a_report(reported: Path, tmp_path: Path) -> None:
    folder = reported
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "summary.json").write_bytes((folder / "summary.json").read_bytes())
    write_report(alone)
    for name in ("summary.json", "figures/perplexity.png", "figures/needle_grid.png"):
        assert (alone / name).read_bytes() == (folder / name).read_bytes(), name
    assert accuracy_rows(read_results(alone)) == accuracy_rows(read_results(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": [{"task": "passkey"}]}, r"summary\.json, accuracy: .*cells as quest report writes them"),
        ({"accuracy": [3]}, r"summary\.json, accuracy: got 3"),
        ({"accuracy": {}}, r"summary\.json, accuracy"),
        ({"score": "much"}, r"summary\.json, accuracy: .*'much'"),
        ({"n": 2.5}, r"summary\.json, accuracy"),
        ({"settings": None}, r"summary\.json, settings"),
        ({"settings": {**SETTINGS, "num_samples": "many"}}, "num_samples: got 'many'"),
        ({"settings": {**SETTINGS, "samples": {"recall": "many"}}}, "samples: got {'recall': 'many'}"),
    ],
)
def test_broken_summaries(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    summary = read_results(write(tmp_path / "run", [answer("passkey", "quest", 64, 1.0)])).summary()
    of_cell = change.keys() & summary["accuracy"][0].keys()
    summary = {**summary, "accuracy": [{**summary["accuracy"][0], **change}]} if of_cell else {**summary, **change}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(QuestValueError, match=message):
        read_results(tmp_path)


def test_a_summary_that_is_none(tmp_path: Path) -> None:
    for text in ("[]", "{"):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(QuestValueError, match="the summary of a run as a JSON object"):
            read_results(tmp_path)


@pytest.mark.parametrize(
    ("keys", "columns", "places"),
    [
        ([(4, 1), (8, 1), (16, 1)], 3, [0, 1, 2]),  # one budget each: side by side
        ([(4, 1), (4, 2), (8, 1), (8, 2), (8, 3)], 3, [0, 1, 3, 4, 5]),  # a row for each length
        ([(4, budget) for budget in range(7)], 3, list(range(7))),
        ([(4, budget) for budget in range(4)], 2, list(range(4))),  # even rows
        ([*((4, budget) for budget in range(5)), (8, 1)], 3, [0, 1, 2, 3, 4, 6]),
    ],
)
def test_panels_of_a_length_start_a_row(keys: list[tuple[int, int]], columns: int, places: list[int]) -> None:
    assert _grid(keys) == (columns, places)


def test_no_two_methods_look_alike() -> None:
    styles = _styles(["full", "quest", "oracle", *(f"quest:page_size={size}" for size in range(1, 13))])
    assert len({(style.colour, style.marker) for style in styles.values()}) == len(styles)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_legend_of_long_names_fits(tmp_path: Path, count: int) -> None:
    names = [f"quest:num_recent_pages={size}" for size in range(12)]
    rows = [answer("passkey", name, 64, 1.0, length=1024 * size) for name in names for size in range(1, count + 1)]
    figure = _accuracy("passkey", read_results(write(tmp_path, rows)), _styles(names))
    assert figure is not None
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert box.y0 > max(axes.get_window_extent().y1 for axes in figure.axes)


def test_figures_are_not_blank(tmp_path: Path) -> None:
    results = read_results(write(tmp_path, made_up(("passkey",), (8192,), n=5)))
    for picture in draw_pictures(results):
        image = matplotlib.image.imread(io.BytesIO(picture.png))
        assert (image[..., :3] < 0.9).mean() > 0.005, picture.name


def test_a_report_leaves_other_files_alone(tmp_path: Path) -> None:
    folder = write(tmp_path, [answer("passkey", "full", None, 1.0), answer("passkey", "quest", 64, 1.0)])
    (folder / "figures").mkdir()
    (folder / "figures" / "mine.png").write_bytes(b"mine")
    write_report(folder)
    assert (folder / "figures" / "mine.png").read_bytes() == b"mine"


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    rows = [answer("passkey", "full", None, 1.0, index=index) for index in range(3)]
    page = write_report(write(tmp_path, [*rows, answer("passkey", "quest", 64, 1.0)])).read_text(encoding="utf-8")
    assert "the run is not finished" in page
    even = write_report(write(tmp_path, rows)).read_text(encoding="utf-8")
    assert "the run is not finished" not in even
    assert "fewer than the 20 samples that were asked for" in even
    rows = [answer("passkey", "full", None, 1.0, index=index) for index in range(20)]
    assert "asked for" not in write_report(write(tmp_path, rows)).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": 0.5}, "0 or 1: passkey is matched exactly"),
        ({"score": None}, "score"),
        ({"task": "../x"}, "task: got '../x', expected letters"),
        ({"tokens_read": 101}, "at most tokens_held, 100"),
        ({"length": "long"}, "length"),
        ({"task": "continuation", "nll": 3.0, "count": 4, "agreed": 5}, "agreed: got 5, expected a whole number from"),
        ({"task": "continuation", "nll": 3.0, "count": 0, "agreed": 0}, "count"),
    ],
)
def test_broken_lines(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = answer("passkey", "quest", 64, 1.0)
    with pytest.raises(QuestValueError, match=rf"line 2.*{message}"):
        read_results(write(tmp_path, [good, {**good, "index": 1, **change}]))


def test_folders_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path / "nowhere")]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
    with pytest.raises(QuestValueError, match=r"with settings\.json in it"):
        read_results(tmp_path)
    with pytest.raises(QuestValueError, match="at least one line"):
        read_results(write(tmp_path, []))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, [answer("passkey", "full", None, 1.0), answer("passkey", "quest", 64, 0.0)])
    assert run(["report", str(folder)]) == 0
    shown = capsys.readouterr()
    assert "passkey" in shown.out
    assert "report.html" in shown.err

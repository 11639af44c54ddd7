"""What servers share, with no engine: options, the plan of rows, counters."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import pytest
import torch

from quest_attention import QuestConfig, QuestValueError
from quest_attention.config import SelectionUnit
from quest_attention.ops import Selection
from quest_attention.serving.counters import StepCounters
from quest_attention.serving.options import QuestOptions, advice_on_budget
from quest_attention.serving.requests import config_asked
from quest_attention.serving.rows import RowPlanner, read_lengths


def test_an_operator_is_told_of_a_budget_that_is_small_for_the_longest_sequence() -> None:
    pages, tokens = (QuestConfig(512, metadata="auto").resolved(device) for device in ("cpu", "cuda"))
    for config, most in ((pages, 16), (tokens, 64)):
        assert advice_on_budget(config, 512 * most) is None
        advice = f"token_budget 512 is less than 1/{most} of {512 * most + 1} positions"
        assert str(advice_on_budget(config, 512 * most + 1)).startswith(advice)
    assert "1/16" in str(advice_on_budget(dataclasses.replace(tokens, selection_unit=4), 32768))


def test_options_of_reading_and_of_serving() -> None:
    options = QuestOptions.from_mapping({"token_budget": 1024, "num_dense_layers": 1, "log_interval": 0}, "cpu")
    assert options.config(32) == QuestConfig(1024, 32, num_dense_layers=1).resolved("cpu")
    assert (options.log_interval, options.backend, options.fp8_metadata) == (0, "auto", False)
    assert QuestOptions.from_mapping({}, "cpu").config(16) == QuestConfig().resolved("cpu")
    moments = QuestOptions.from_mapping({"metadata": "moments", "moments_coefficient": 0.5}, "cpu")
    assert moments.config(32) == QuestConfig(page_size=32, metadata="moments", moments_coefficient=0.5)
    assert moments.config(32).num_sink_pages == 1
    assert not moments.fp8_metadata
    units = QuestOptions.from_mapping({"metadata": "sketch", "selection_unit": 4, "candidate_factor": 2}, "cpu")
    assert units.config(16) == QuestConfig(metadata="sketch", selection_unit=4, candidate_factor=2)
    assert units.least_config().page_size == 4  # no smaller page can be cut into units


def test_what_auto_is_in_a_server_depends_on_its_device() -> None:
    def config_of(device: str, **options: Any) -> QuestConfig:
        named = QuestOptions.from_mapping({"metadata": "auto", **options}, device).config(16)
        assert named == QuestOptions.from_mapping(options, device).config(16), "auto is what nobody names"
        return named

    assert config_of("cpu") == QuestConfig(metadata="moments")
    assert config_of("cuda") == QuestConfig(metadata="sketch", selection_unit="token")
    assert config_of("cuda", metadata_dtype="fp8") == QuestConfig(metadata="bounds", metadata_dtype="fp8")
    assert config_of("cuda", selection_unit=4).selection_unit == 4


@pytest.mark.parametrize(
    ("device", "given", "message"),
    [
        (
            "cuda",
            {"token_budget": 16},
            r'^quest\.token_budget: got 16, expected at least 32: 2 forced .*; metadata "auto" is sketch on cuda$',
        ),
        (
            "cpu",
            {"token_budget": 8, "metadata_dtype": "fp8"},
            r'^quest\.token_budget: got 8, expected at least 16: .*; metadata "auto" is bounds on cpu$',
        ),
        (
            "cuda",
            {"metadata_dtype": "fp8", "group_reduction": "mass"},
            r'^quest\.metadata_dtype: got .*, expected kv for sketch: .*; metadata "auto" is sketch on cuda$',
        ),
        (
            "cpu",
            {"selection_unit": "token"},
            r'^quest\.selection_unit: got .*, expected page for moments, .*; metadata "auto" is moments on cpu$',
        ),
        ("cpu", {"candidate_factor": -1}, r"^quest\.candidate_factor: got -1, expected a non-negative integer$"),
    ],
)
def test_a_mistake_with_auto_says_what_auto_is(device: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(QuestValueError, match=message):
        QuestOptions.from_mapping({"metadata": "auto", **given}, device).config(16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "quest: got \\[\\], expected an object"),
        ({"page_size": 16}, "quest.page_size: got 16, expected nothing: a page is the engine's$"),
        ({"num_dense_layer": 1}, "did you mean num_dense_layers"),
        ({"log_interval": "10"}, "quest.log_interval: got '10'"),
        ({"verify": "exact"}, "quest.verify: got 'exact', expected 'dense' or 'sparse'"),
        ({"verify": True}, "quest.verify: got True, expected 'dense' or 'sparse'"),
        ({"num_recent_pages": -1}, "num_recent_pages: got -1"),
        ({"token_budget": 0}, "token_budget: got 0"),
        ({"metadata": "moment"}, r"^quest\.metadata: got 'moment', expected one of bounds, moments, sketch, auto$"),
        ({"metadata": ["moments"]}, r"^quest\.metadata: got \['moments'\], expected one of"),
        (
            {"metadata": "moments", "metadata_dtype": "fp8"},
            r"^quest\.metadata_dtype: got 'fp8', expected kv for moments: fp8 is for bounds$",
        ),
        ({"moments_coefficient": -0.5}, r"^quest\.moments_coefficient: got -0\.5, expected a number from 0 to 100"),
        ({"moments_coeficient": 1}, "did you mean moments_coefficient"),
        (
            {"metadata": "bounds", "selection_unit": "token"},
            r"^quest\.selection_unit: got 'token', expected page for bounds, which scores pages: .* by sketch$",
        ),
        ({"metadata": "sketch", "selection_unit": 8}, r"^quest\.selection_unit: got 8, expected one of page, token, 4"),
        ({"metadata": "sketch", "selection_unit": True}, r"^quest\.selection_unit: got True, expected one of"),
        ({"metadata": "sketch", "metadata_dtype": "fp8"}, r"^quest\.metadata_dtype: got 'fp8', expected kv for sketch"),
        (
            {"metadata": "moments", "candidate_factor": 4},
            r"^quest\.candidate_factor: got 4, expected 0 for whole pages by moments",
        ),
        ({"metadata": "moments", "token_budget": 1}, "token_budget: got 1, expected at least 2: 2 forced pages"),
    ],
)
def test_options_that_are_refused(given: Any, message: str) -> None:
    with pytest.raises(QuestValueError, match=message):
        QuestOptions.from_mapping(given, "cpu")


def test_a_budget_is_held_to_the_size_of_a_page() -> None:
    options = QuestOptions.from_mapping({"token_budget": 64}, "cpu")
    assert options.config(32).page_budget == 2
    with pytest.raises(QuestValueError, match="token_budget: got 64, expected at least 256: 2 forced pages"):
        options.config(128)


def test_lengths_that_are_read_are_those_of_the_chosen_pages() -> None:
    config = QuestConfig(token_budget=50, page_size=16)
    for length in range(1, 200):
        read = int(read_lengths(torch.tensor([length]), config))
        last = (length - 1) % 16 + 1  # tokens of the last page
        assert read == (length if length <= 50 else 2 * 16 + last)


def make_counters(lines: list[str], interval: float = 10, **options: Any) -> StepCounters:
    config = QuestConfig.from_dict({"token_budget": 32, "metadata": "bounds", **options})
    return StepCounters(config, torch.device("cpu"), "worker 0", interval, lines.append)


def test_counters_of_rows_on_host_and_device() -> None:
    counters = make_counters([])
    selected = Selection(torch.zeros(3, 1, 2, dtype=torch.int32), torch.tensor([[2], [1], [0]], dtype=torch.int32), 16)
    counters.count_quest(selected, torch.tensor([100, 10, 0], dtype=torch.int32))
    counters.count_stock([20, 0])
    counters.count_step()
    counters.count_step()
    rows = {"sparse_rows": 1, "dense_rows": 2, "verified_rows": 0, "verified_sparse_rows": 0, "eager_steps": 2}
    pages = {"pages_read": 5, "pages_held": 10, "tokens_read": 80, "tokens_held": 160}
    assert counters.snapshot() == rows | pages
    counters.reset()
    assert not any(counters.snapshot().values())


@pytest.mark.parametrize(("unit", "size"), [("token", 1), (4, 4)])
def test_counters_of_units_count_tokens_and_say_so(unit: SelectionUnit, size: int) -> None:
    lines: list[str] = []
    counters = make_counters(lines, metadata="sketch", selection_unit=unit)
    selected = Selection(torch.zeros(2, 1, 8, dtype=torch.int32), torch.tensor([[8], [3]], dtype=torch.int32), size)
    counters.count_quest(selected, torch.tensor([100, 3 * size], dtype=torch.int32))
    counters.count_stock([20])
    rows = {"sparse_rows": 1, "dense_rows": 2, "verified_rows": 0, "verified_sparse_rows": 0, "eager_steps": 0}
    assert counters.snapshot() == rows | {"tokens_read": 11 * size + 20, "tokens_held": 100 + 3 * size + 20}
    counters.plan(1)
    counters.plan(1)
    assert f"1 of 3 decode rows sparse, {11 * size + 20} of {120 + 3 * size} tokens read (" in lines[0]


def test_rows_that_check_tokens_and_choose_are_counted_apart_from_decode_rows() -> None:
    selected = Selection(torch.zeros(3, 1, 2, dtype=torch.int32), torch.tensor([[2], [1], [2]], dtype=torch.int32), 16)
    lengths = torch.tensor([100, 10, 48], dtype=torch.int32)
    lines: list[str] = []
    every = make_counters(lines)
    every.count_quest(selected, lengths, query_tokens=4)
    found = every.snapshot()
    names = ("sparse_rows", "dense_rows", "verified_sparse_rows", "verified_rows", "tokens_read", "tokens_held")
    assert [found[name] for name in names] == [0, 0, 2, 1, 5 * 16, 11 * 16]
    every.plan(3)
    every.plan(1)
    assert "0 of 0 decode rows sparse and 2 of 3 rows of speculated tokens, 5 of 11 pages read" in lines[0]
    some = make_counters([])
    some.count_quest(selected, lengths, query_tokens=4, is_single=torch.tensor([True, False, False]))
    assert [some.snapshot()[name] for name in names] == [1, 0, 1, 1, 5 * 16, 11 * 16]


def test_rows_of_speculated_tokens_are_counted_and_all_that_is_new_is_published() -> None:
    lines: list[str] = []
    published: list[dict[str, int]] = []
    config = QuestConfig.from_dict({"token_budget": 32, "metadata": "bounds"})
    counters = StepCounters(config, torch.device("cpu"), "worker 0", 1e-9, lines.append, published.append)
    counters.plan(1)
    counters.count_stock([20])
    counters.count_verified([100, 40])
    counters.plan(1)
    assert "0 of 1 decode rows sparse and 0 of 2 rows of speculated tokens, 12 of 12 pages read (100.0 %)" in lines[0]
    counters.count_verified([16])
    counters.plan(0)
    counters.count_verified([16])
    counters.plan(0)  # of a step in which no row decoded
    of_rows = [{name: one[name] for name in ("dense_rows", "verified_rows", "tokens_read")} for one in published]
    assert of_rows == [
        {"dense_rows": 1, "verified_rows": 2, "tokens_read": 192},
        {"dense_rows": 0, "verified_rows": 1, "tokens_read": 16},
        {"dense_rows": 0, "verified_rows": 1, "tokens_read": 16},
    ]


def test_counters_made_by_a_step_are_reset_outside_of_one() -> None:
    counters = make_counters([])
    with torch.inference_mode():
        counters.plan(1)
        counters.count_quest(
            Selection(torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32), 16),
            torch.tensor([99]),
        )
    counters.reset()
    assert not any(counters.snapshot().values())


def test_a_line_at_an_interval_where_something_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = 1000.0, []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    counters = make_counters(lines)
    selected = Selection(torch.zeros(1, 1, 2, dtype=torch.int32), torch.tensor([[2]], dtype=torch.int32), 16)

    def step() -> None:
        counters.plan(1)
        counters.count_quest(selected, torch.tensor([160], dtype=torch.int32))

    counters.plan(0)
    assert lines == []  # nobody decoded
    step()
    step()
    assert len(lines) == 1  # the first step is told of at once
    for _ in range(3):
        step()
    assert len(lines) == 1
    now += 11
    step()
    assert len(lines) == 2
    assert lines[1].startswith(
        "Quest, worker 0: 4 of 4 decode rows sparse, 8 of 40 pages read (20.0 %); since the start"
    )
    now += 600  # idle
    step()
    assert len(lines) == 3
    counters.plan(0)
    assert len(lines) == 3
    silent = make_counters(lines, interval=0)
    for _ in range(2):
        silent.plan(1)
        silent.count_stock([1])
    assert len(lines) == 3


def test_rows_are_sparse_by_the_budget_of_their_request() -> None:
    counters = make_counters([])
    selected = Selection(torch.zeros(1, 1, 1, dtype=torch.int32), torch.tensor([[1]], dtype=torch.int32), 16)
    counters.count_quest(selected, torch.tensor([30], dtype=torch.int32), token_budget=16)
    assert counters.snapshot()["sparse_rows"] == 1, "of the server's 32 it would be within"
    planner = make_planner()
    assert planner.runs_quest([30, 30], [32, 16])
    assert not planner.runs_quest([30, 500], [32, None])


@pytest.mark.parametrize(("asked", "message"), [
    (64, "got 64"), (16, "got 16"), (0, "got 0"), (-32, "got -32"), (True, "got True"), ("32", "got '32'"),
    (24.0, r"got 24\.0"), ("all", "got 'all'"), ([32], r"got \[32\]"),
])  # fmt: skip
def test_budgets_that_a_request_may_not_ask_for(asked: Any, message: str) -> None:
    options = QuestOptions.from_mapping({"token_budget": 48, "metadata": "moments"}, "cpu")
    with pytest.raises(QuestValueError, match=f"^quest_token_budget: {message}, expected 'none' or 32 to 48 tokens$"):
        config_asked(asked, options, 16, 1024)
    with pytest.raises(QuestValueError, match="'none': this server reads everything"):
        config_asked(48, options, 16, 48)


def test_a_small_budget_that_a_request_asks_for_is_as_a_servers() -> None:
    options = QuestOptions.from_mapping({"metadata": "sketch", "selection_unit": "token", "token_budget": 1024}, "cuda")
    assert config_asked("none", options, 16, 65536) is None
    own = config_asked(256, options, 16, 65536)
    expected = QuestOptions.from_mapping({**options.reading, "token_budget": 256}, "cuda").config(16)
    assert own == expected and own.candidate_budget == 2048


@pytest.mark.parametrize(
    "reading", [{}, {"token_budget": 1024}, {"token_budget": 4096}, {"candidate_factor": 0}], ids=str
)
def test_a_budget_that_a_request_asks_for_is_all_that_is_its_own(reading: dict[str, Any]) -> None:
    options = QuestOptions.from_mapping({"metadata": "sketch", "selection_unit": "token", **reading}, "cuda")
    server = options.config(16)
    for asked in range(32, server.token_budget + 1):
        own = config_asked(asked, options, 16, 65536)
        assert own is not None and own.candidate_budget <= server.candidate_budget, "no more work than for the server's"
        factor = server.candidate_factor
        assert dataclasses.replace(own, token_budget=server.token_budget, candidate_factor=factor) == server


def make_planner(
    budget: int = 32, sparse_layers: tuple[str, ...] = ("b", "c"), max_length: int = 1024, device: str = "cpu",
    num_elsewhere: int = 0, **options: Any,
) -> RowPlanner:  # fmt: skip
    return RowPlanner(
        QuestConfig.from_dict({"token_budget": budget, "metadata": "bounds", **options}, device),
        torch.device("cpu"),
        label="worker 0",
        sparse_layers=sparse_layers,
        num_layers=4,
        max_length=max_length,
        log_interval=0,
        logger=logging.getLogger("an engine"),
        num_elsewhere=num_elsewhere,
    )


@pytest.mark.parametrize(("lengths", "runs"), [([], False), ([32, 1], False), ([1, 33], True)])
def test_rows_run_quest_as_soon_as_one_is_past_the_budget(lengths: list[int], runs: bool) -> None:
    planner = make_planner()
    assert planner.runs_quest(lengths) is runs
    assert planner.counted_layer == "b"


def test_a_captured_step_runs_quest_and_is_not_counted() -> None:
    planner = make_planner()
    counters = planner.counters
    assert counters is not None
    with planner.capturing():
        assert planner.is_capturing and planner.runs_quest([1])
        counters.count_stock([100])
    assert not planner.is_capturing
    assert not planner.runs_quest([1])
    assert not any(counters.snapshot().values())
    counters.count_stock([1])
    assert not planner.runs_quest([1])
    assert counters.snapshot()["dense_rows"] == 1  # it forgets once


def test_a_worker_says_what_it_will_read(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make_planner()
    read = "decode rows past 32 tokens read 2 of up to 64 pages of 16 tokens in 2 of 4 layers"
    expected = f"{read}, chosen by Bounds(); backend torch, "
    assert caplog.messages[0].startswith(f"Quest, worker 0: {expected}")
    assert caplog.messages[1].startswith("Quest: token_budget 32 is less than 1/16 of 1024 positions")
    assert {name for name, *_ in caplog.record_tuples} == {"an engine"}


def test_a_worker_says_by_what_it_chooses(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make_planner(metadata="moments", moments_coefficient=0.5)
    assert " in 2 of 4 layers, chosen by Moments(coefficient=0.5); backend torch, " in caplog.messages[0]


@pytest.mark.parametrize(
    ("device", "options", "chosen"),
    [
        ("cpu", {}, 'of 16 tokens in 2 of 4 layers, chosen by Moments(coefficient=1.0), which metadata "auto" is on'),
        ("cuda", {}, "tokens in 2 of 4 layers, chosen by Sketch(page_size=16) and the keys of 1024 candidates, which"),
        ("cuda", {"metadata_dtype": "fp8"}, 'layers, chosen by Bounds(), which metadata "auto" is on cuda; '),
    ],
)  # fmt: skip
def test_a_worker_says_what_auto_became(
    device: str, options: dict[str, Any], chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    make_planner(device=device, metadata="auto", **options)
    assert chosen in caplog.messages[0]


def test_a_worker_that_reads_tokens_says_how_many(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make_planner(35, metadata="sketch", selection_unit=4)
    read = "decode rows past 35 tokens read 32 of up to 1024 tokens in 2 of 4 layers, chosen by Sketch(page_size=16)"
    assert f"{read} and the keys of 1024 candidates; " in caplog.messages[0]
    caplog.clear()
    make_planner(40, metadata="sketch", selection_unit="token", candidate_factor=0)
    assert "chosen by Sketch(page_size=16), estimates alone; " in caplog.messages[0]


def test_a_group_of_dense_layers_leaves_it_to_others_to_say_what_is_read(caplog: pytest.LogCaptureFixture) -> None:
    planner = make_planner(sparse_layers=(), num_elsewhere=2)
    assert planner.counters is None and caplog.messages == []
    assert not planner.runs_quest([2000])


@pytest.mark.parametrize("changes", [{"sparse_layers": ()}, {"budget": 1024}])
def test_a_worker_that_reads_everything_says_so(changes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    planner = make_planner(**changes)
    budget = changes.get("budget", 32)
    assert caplog.messages == [f"Quest reads everything: token_budget {budget} of 1024 positions, 2 dense layers of 4."]
    assert planner.counters is None
    with planner.capturing():
        assert not planner.runs_quest([2000])

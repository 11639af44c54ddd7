"""`QuestConfig`: its numbers, its mistakes, and errors that survive a trip between processes."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch

from quest_attention import QuestConfig, QuestError, QuestValueError
from quest_attention.config import Metadata, SelectionUnit
from quest_attention.forms import form_of

BOUNDS = QuestConfig(metadata="bounds")


def test_derived_numbers() -> None:
    config = dataclasses.replace(BOUNDS, token_budget=100, num_sink_pages=2, num_recent_pages=0)
    assert (config.page_budget, config.page_slots, config.num_forced_pages) == (6, 7, 3)
    assert QuestConfig(2048, 16, 2, 0, 1, "max", "auto", metadata="bounds") == BOUNDS
    assert QuestConfig() == QuestConfig(page_size=16, num_dense_layers=2, num_recent_pages=1, backend="auto")


@pytest.mark.parametrize(
    ("unit", "numbers"), [("page", (16, 1, 6, 7)), (4, (4, 4, 25, 25)), ("token", (1, 16, 100, 100))]
)
def test_numbers_of_units(unit: SelectionUnit, numbers: tuple[int, ...]) -> None:
    config = QuestConfig(token_budget=100, metadata="sketch", selection_unit=unit)
    assert (config.unit_size, config.units_per_page, config.unit_budget, config.unit_slots) == numbers
    assert QuestConfig(token_budget=99, metadata="sketch", selection_unit=4).unit_budget == 24
    assert QuestConfig(token_budget=99, metadata="sketch", selection_unit=4).unit_slots == 25


@pytest.mark.parametrize(
    ("metadata", "reduction", "sinks"), [("bounds", "max", 0), ("moments", "max", 1), ("sketch", "max", 1)]
)
def test_what_metadata_wants_is_replaced_when_a_config_is_made(metadata: Metadata, reduction: str, sinks: int) -> None:
    config = QuestConfig(metadata=metadata)
    assert (config.group_reduction, config.num_sink_pages, config.selection_unit) == (reduction, sinks, "page")
    assert dataclasses.replace(config, token_budget=1024).group_reduction == reduction
    assert QuestConfig(metadata=metadata, group_reduction="max", num_sink_pages=2).num_sink_pages == 2


@pytest.mark.parametrize(
    ("options", "budget", "factor"),
    [
        ({"metadata": "bounds"}, 2048, 0),
        ({"metadata": "bounds", "selection_unit": "token"}, 2048, 4),
        ({"metadata": "sketch"}, 2048, 4),
        ({"metadata": "sketch", "selection_unit": "token"}, 2048, 0),
        ({"metadata": "sketch", "selection_unit": "token", "token_budget": 4096}, 4096, 0),
        ({"metadata": "sketch", "selection_unit": "token", "token_budget": 2047}, 2047, 4),
        ({"metadata": "sketch", "selection_unit": "token", "candidate_factor": 4}, 512, 4),
        ({"metadata": "sketch", "selection_unit": "token", "group_reduction": "mass"}, 512, 4),
        ({"metadata": "sketch", "selection_unit": 4}, 512, 4),
        ({"metadata": "sketch", "selection_unit": 4, "token_budget": 4096}, 4096, 4),
        ({"metadata": "sketch", "selection_unit": "token", "token_budget": 100}, 100, 21),
        ({"metadata": "sketch", "selection_unit": "token", "token_budget": 100, "candidate_factor": 3}, 100, 3),
    ],
)
def test_how_much_is_read_where_nobody_says(options: dict[str, Any], budget: int, factor: int) -> None:
    config = QuestConfig(**options)
    assert (config.token_budget, config.candidate_factor) == (budget, factor)
    default = QuestConfig().resolved("cuda")
    assert (default.token_budget, default.candidate_factor) == (2048, 0)
    assert QuestConfig().resolved("cpu").token_budget == 2048


def test_what_was_not_given_follows_the_metadata_when_it_is_replaced() -> None:
    replaced = dataclasses.replace(BOUNDS, metadata="sketch")
    assert replaced == QuestConfig(metadata="sketch")
    assert (replaced.num_sink_pages, replaced.candidate_factor) == (1, 4)
    assert dataclasses.replace(replaced, metadata="bounds") == BOUNDS
    moments = QuestConfig(metadata="moments", num_sink_pages=1, moments_coefficient=0.5)
    assert dataclasses.replace(moments, moments_coefficient=None, metadata="bounds").num_sink_pages == 1, "as given"
    assert dataclasses.replace(QuestConfig(metadata="moments"), metadata="bounds").num_sink_pages == 0
    with pytest.raises(QuestValueError, match=r"moments_coefficient: got 0\.5, expected none for bounds"):
        dataclasses.replace(moments, metadata="bounds")
    by_token = dataclasses.replace(BOUNDS, selection_unit="token")
    assert (by_token.candidate_factor, dataclasses.replace(by_token, selection_unit="page").candidate_factor) == (4, 0)
    again = pickle.loads(pickle.dumps(BOUNDS))
    assert dataclasses.replace(again, metadata="moments").num_sink_pages == 1


@pytest.mark.parametrize("metadata", ["bounds", "moments", "sketch"])
def test_a_config_read_back_from_its_numbers_is_itself(metadata: Metadata) -> None:
    config = QuestConfig(metadata=metadata)
    assert QuestConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(("factor", "pages"), [(1, 8), (4, 26), (9, 58)])
@pytest.mark.parametrize("metadata", ["bounds", "moments"])
def test_pages_whose_keys_rank_tokens(metadata: Metadata, factor: int, pages: int) -> None:
    """Always as many live tokens as the budget reads, though the page being written may hold one."""
    config = QuestConfig(token_budget=100, metadata=metadata, selection_unit="token", candidate_factor=factor)
    assert config.candidate_pages == pages and (pages - 1) * 16 + 1 >= factor * 100
    assert QuestConfig(metadata=metadata).candidate_pages == 0
    assert QuestConfig(metadata="sketch", selection_unit="token").candidate_pages == 0


def test_auto_is_a_form_once_the_device_is_known() -> None:
    auto = QuestConfig(token_budget=256, metadata="auto")
    assert auto.resolved("cpu") == QuestConfig(256, metadata="moments")
    assert auto.resolved("cuda") == QuestConfig(256, metadata="sketch", selection_unit="token")
    assert auto.resolved("mps") == auto.resolved("cpu")
    by_token = QuestConfig(256, metadata="auto", selection_unit="token", num_sink_pages=2)
    assert by_token.resolved("cpu") == QuestConfig(256, metadata="moments", selection_unit="token", num_sink_pages=2)
    assert BOUNDS.resolved("cuda") is BOUNDS
    for unknown in (lambda: auto.unit_size, lambda: auto.num_forced_pages, lambda: form_of(auto)):
        with pytest.raises(QuestValueError, match="metadata: got 'auto', expected a form by name"):
            unknown()


def test_a_device_may_be_given_as_pytorch_has_it() -> None:
    auto = QuestConfig(256, metadata="auto")
    for device in ("cuda:1", torch.device("cuda"), torch.device("cuda", 3)):
        assert auto.resolved(device) == QuestConfig.from_dict({"token_budget": 256}, device) == auto.resolved("cuda")
        assert auto.resolved(device).auto_device == "cuda"
    for wrong in ("CUDA", "gpu", "tpu", "cuda:x", 3):
        for call in (auto.resolved, lambda device: QuestConfig.from_dict({}, device)):
            with pytest.raises(QuestValueError, match=f"^device: got {wrong!r}, expected a torch"):
                call(wrong)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({"metadata": "sketch", "selection_unit": "token"}, 2048),
        ({"metadata": "sketch", "selection_unit": 4, "candidate_factor": 2}, 1024),
        ({"metadata": "sketch", "selection_unit": "token", "candidate_factor": 0}, 0),
        ({"metadata": "moments", "selection_unit": "token", "candidate_factor": 2}, 1024 + 16),
        ({"metadata": "bounds"}, 0),
    ],
)
def test_tokens_whose_keys_rank_them(given: dict[str, Any], tokens: int) -> None:
    assert QuestConfig(512, **given).candidate_tokens == tokens


FP8, MEAN, MASS = {"metadata_dtype": "fp8"}, {"group_reduction": "mean"}, {"group_reduction": "mass"}


@pytest.mark.parametrize(
    ("given", "cpu", "cuda"),
    [
        (FP8, ("bounds", "page"), ("bounds", "page")),
        (MEAN, ("moments", "page"), ("bounds", "page")),
        (MASS, ("sketch", "token"), ("sketch", "token")),
        ({"moments_coefficient": 1.0}, ("moments", "page"), ("moments", "page")),
        ({"candidate_factor": 8}, ("sketch", "token"), ("sketch", "token")),
        ({"candidate_factor": 0}, ("moments", "page"), ("sketch", "token")),
        ({"selection_unit": "page"}, ("moments", "page"), ("sketch", "page")),
        ({"selection_unit": 4, **FP8}, ("bounds", 4), ("bounds", 4)),
        ({"selection_unit": "token", **MASS}, ("moments", "token"), ("sketch", "token")),
    ],
)
def test_auto_is_the_first_form_that_takes_what_was_given(
    given: dict[str, Any], cpu: tuple[str, SelectionUnit], cuda: tuple[str, SelectionUnit]
) -> None:
    config = QuestConfig(metadata="auto", **given)
    for device, (metadata, unit) in (("cpu", cpu), ("cuda", cuda)):
        expected = QuestConfig.from_dict({**given, "metadata": metadata, "selection_unit": unit})
        assert config.resolved(device) == QuestConfig.from_dict({"metadata": "auto", **given}, device) == expected
        assert config.resolved(device).auto_device == device and expected.auto_device is None
    assert config.auto_device is None and config == QuestConfig.from_dict({"metadata": "auto", **given})


def test_a_config_of_auto_is_chosen_anew_where_it_is_replaced() -> None:
    chosen = QuestConfig(metadata="auto").resolved("cuda")
    for config in (chosen, copy.deepcopy(chosen), pickle.loads(pickle.dumps(chosen))):
        smaller = dataclasses.replace(config, token_budget=512)
        assert smaller == QuestConfig(512, metadata="sketch", selection_unit="token")
        assert smaller.auto_device == "cuda"
        assert dataclasses.replace(smaller, metadata_dtype="fp8") == QuestConfig(512, metadata="bounds", **FP8)
        assert dataclasses.replace(config, metadata="bounds") == BOUNDS  # nobody gave the unit
        assert dataclasses.replace(config, metadata="sketch").selection_unit == "page"
        assert dataclasses.replace(config, metadata="auto").resolved("cpu").metadata == "moments"
    with pytest.raises(QuestValueError, match=r'pages of 16 tokens; metadata "auto" is sketch on cuda$'):
        dataclasses.replace(chosen, token_budget=16)
    numbers = json.loads(json.dumps(dataclasses.asdict(chosen)))
    assert QuestConfig.from_dict(numbers) == chosen and QuestConfig.from_dict(numbers).auto_device is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token_budget": 31}, 'at least 32: 2 forced pages .*; metadata "auto" is moments on cpu, sketch on cuda$'),
        ({"token_budget": 15, **FP8}, '1 forced page of 16 tokens; metadata "auto" is bounds on cpu, bounds on cuda'),
        ({"token_budget": 31, "num_sink_pages": 1}, "at least 32: 2 forced pages of 16 tokens$"),
        ({**MASS, **FP8}, 'max or mean for pages by moments; metadata "auto" is moments on cpu$'),
        ({"num_sink_pages": -1}, "num_sink_pages: got -1, expected a non-negative integer$"),
        ({"moments_coefficient": -1}, "moments_coefficient: got -1, expected a number from 0 to 100$"),
        ({"group_reduction": "sum"}, "group_reduction: got 'sum', expected one of max, mean, mass$"),
        ({"selection_unit": 4, "page_size": 6}, "selection_unit: got 4, expected page or token: 4 does not divide 6$"),
    ],
)
def test_a_mistake_of_a_form_that_nobody_gave_says_whose_it_is(given: dict[str, Any], message: str) -> None:
    with pytest.raises(QuestValueError, match=message):
        QuestConfig(metadata="auto", **given)


def test_a_mistake_on_one_device_waits_for_it() -> None:
    config = QuestConfig(16, metadata="auto", **MEAN)  # by bounds, which the list of a GPU comes to, one page is enough
    assert config.resolved("cuda").page_budget == 1
    with pytest.raises(QuestValueError, match=r'2 forced pages of 16 tokens; metadata "auto" is moments on cpu$'):
        config.resolved("cpu")


def test_the_papers_setting() -> None:
    assert QuestConfig.paper() == QuestConfig(
        2048, 16, 2, 0, 1, "max", metadata="bounds", metadata_dtype="kv", selection_unit="page"
    )
    assert QuestConfig.paper(512, num_dense_layers=0, backend="torch").num_dense_layers == 0
    with pytest.raises(QuestValueError, match="page_sise: got 8, expected a known option"):
        QuestConfig.paper(page_sise=8)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuestConfig().token_budget = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "argument", "expected"),
    [
        ({"token_budget": 0}, "token_budget", "a positive integer"),
        ({"token_budget": -16}, "token_budget", "a positive integer"),
        ({"token_budget": 64.0}, "token_budget", "a positive integer"),
        ({"token_budget": True}, "token_budget", "a positive integer"),
        ({"token_budget": 15}, "token_budget", "at least 16: 1 forced page of 16 tokens"),
        ({"token_budget": 47, "num_sink_pages": 2}, "token_budget", "at least 48"),
        ({"token_budget": 64, "num_recent_pages": 5}, "token_budget", "at least 80"),
        ({"page_size": 0}, "page_size", "a positive integer"),
        ({"page_size": "16"}, "page_size", "a positive integer"),
        ({"num_dense_layers": -1}, "num_dense_layers", "a non-negative integer"),
        ({"num_sink_pages": -1}, "num_sink_pages", "a non-negative integer"),
        ({"num_recent_pages": None}, "num_recent_pages", "a non-negative integer"),
        ({"group_reduction": "sum"}, "group_reduction", "one of max, mean"),
        ({"group_reduction": "mass"}, "group_reduction", "max or mean for pages by bounds"),
        ({"group_reduction": "mass", "metadata": "moments"}, "group_reduction", "max or mean for pages by moments"),
        ({"group_reduction": "mean", "selection_unit": "token"}, "group_reduction", "max or mass for tokens by bounds"),
        ({"candidate_factor": 4}, "candidate_factor", "0 for whole pages by bounds"),
        ({"candidate_factor": 4, "selection_unit": 4, "page_size": 4}, "candidate_factor", "0 for whole pages"),
        ({"candidate_factor": 0, "selection_unit": "token"}, "candidate_factor", "at least 1 for bounds"),
        ({"candidate_factor": 0, "selection_unit": 4, "metadata": "moments"}, "candidate_factor", "at least 1 for mom"),
        ({"candidate_factor": -1, "metadata": "auto"}, "candidate_factor", "a non-negative integer"),
        ({"selection_unit": "word", "metadata": "auto"}, "selection_unit", "one of page, token, 4"),
        ({"moments_coefficient": 1.0}, "moments_coefficient", "none for bounds: it is for moments"),
        ({"moments_coefficient": 0.5, "metadata": "sketch"}, "moments_coefficient", "none for sketch"),
        ({"moments_coefficient": -1, "metadata": "moments"}, "moments_coefficient", "a number from 0 to 100"),
        ({"group_reduction": "mean", "metadata": "sketch"}, "group_reduction", "max or mass for sketch"),
        ({"selection_unit": "pages"}, "selection_unit", "one of page, token, 4"),
        ({"selection_unit": 8}, "selection_unit", "one of page, token, 4"),
        ({"selection_unit": 4.0}, "selection_unit", "one of page, token, 4"),
        ({"selection_unit": True}, "selection_unit", "one of page, token, 4"),
        ({"selection_unit": [4]}, "selection_unit", "one of page, token, 4"),
        ({"selection_unit": 4, "metadata": "sketch", "page_size": 6}, "selection_unit", "page or token: 4 does not"),
        (
            {"token_budget": 31, "metadata": "sketch", "selection_unit": "token"},
            "token_budget",
            "at least 32: 2 forced",
        ),
        ({"metadata": "sketch", "metadata_dtype": "fp8"}, "metadata_dtype", "kv for sketch: fp8 is for bounds"),
        ({"metadata_dtype": "int8"}, "metadata_dtype", "one of kv, fp8"),
        ({"backend": "cuda"}, "backend", "one of auto, torch, triton, reference"),
        ({"budget": 5}, "budget", "a known option"),
    ],
)
def test_mistakes(options: dict[str, Any], argument: str, expected: str) -> None:
    with pytest.raises(QuestValueError) as caught:
        QuestConfig.from_dict({"metadata": "bounds", **options})
    assert caught.value.argument == argument
    assert caught.value.got == options[argument]
    assert caught.value.expected.startswith(expected)
    assert str(caught.value) == f"{argument}: got {options[argument]!r}, expected {caught.value.expected}"


def test_errors_can_be_pickled() -> None:
    error = QuestValueError("page_size", 0, "a positive integer")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, QuestError)
    assert isinstance(again, ValueError)
    assert (again.argument, again.got, again.expected, str(again)) == (
        error.argument,
        error.got,
        error.expected,
        str(error),
    )


@pytest.mark.parametrize(
    "name",
    [name for name, member in vars(QuestConfig).items() if isinstance(member, property) and name != "auto_device"],
)
def test_what_depends_on_a_form_that_nobody_knows(name: str) -> None:
    with pytest.raises(QuestValueError, match="metadata: got 'auto', expected a form by name"):
        getattr(QuestConfig(), name)

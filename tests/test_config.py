"""`QuestConfig`: its numbers, its mistakes, and errors that survive a trip between processes."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from quest_attention import QuestConfig, QuestError, QuestValueError


def test_derived_numbers() -> None:
    config = QuestConfig(token_budget=100, page_size=16, num_sink_pages=2, num_recent_pages=0)
    assert (config.page_budget, config.page_slots, config.num_forced_pages) == (6, 7, 3)
    assert QuestConfig() == QuestConfig(2048, 16, 2, 0, 1, "max", "auto")


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
        ({"metadata_dtype": "int8"}, "metadata_dtype", "one of kv, fp8"),
        ({"backend": "cuda"}, "backend", "one of auto, torch, triton, reference"),
        ({"budget": 5}, "budget", "a known option"),
    ],
)
def test_mistakes(options: dict[str, Any], argument: str, expected: str) -> None:
    with pytest.raises(QuestValueError) as caught:
        QuestConfig.from_dict(options)
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

"""Budgets that requests ask for themselves: who of a batch asked, and what graphs then run."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from quest_attention import QuestConfig, QuestValueError
from quest_attention.serving.options import QuestOptions
from quest_attention.vllm import requests
from quest_attention.vllm.refusals import check_request
from quest_attention.vllm.requests import RequestBudgets

CONFIG = QuestConfig.from_dict({"token_budget": 128, "metadata": "bounds"})


def scheduled(ids: list[str], done: tuple[str, ...] = (), **new: Any) -> Any:
    """As much of vLLM's `SchedulerOutput` as is looked at: requests of the step, some of them new."""
    fresh = [
        SimpleNamespace(req_id=name, sampling_params=None if extra is None else SimpleNamespace(extra_args=extra))
        for name, extra in new.items()
    ]
    return SimpleNamespace(
        finished_req_ids=set(done), scheduled_new_reqs=fresh, num_scheduled_tokens=dict.fromkeys(ids, 1)
    )


def make_budgets(order: list[str]) -> RequestBudgets:
    budgets = RequestBudgets(QuestOptions({"token_budget": 128, "metadata": "bounds"}, device="cuda"), 16, 4096)
    budgets.order = lambda: order
    return budgets


def test_each_row_is_read_as_its_request_asks(caplog: pytest.LogCaptureFixture) -> None:
    budgets = make_budgets(["b", "a", "d"])
    assert budgets.of_rows(3, CONFIG) is None
    budgets.begin(scheduled(["a", "b", "d"], a={"quest_token_budget": 64}, b={"quest_token_budget": "none"}, d={}))
    assert budgets.is_asked
    own = QuestOptions({"token_budget": 64, "metadata": "bounds"}, device="cuda").config(16)
    assert budgets.of_rows(3, CONFIG) == [None, own, CONFIG]
    assert budgets.of_rows(1, CONFIG) == [None], "the others are prompts"
    assert budgets.of_rows(4, CONFIG) == [None, own, CONFIG, CONFIG], "the last only pads"
    budgets.begin(scheduled(["d"]))
    assert budgets.of_rows(1, CONFIG) is None, "a and b wait"
    budgets.begin(scheduled(["a", "d"], done=("b",)))
    assert budgets.is_asked
    budgets.begin(scheduled(["a", "b"], done=("a",), a=None, b={"other": 1}))
    assert not budgets.is_asked, "names are used again"
    budgets.begin(scheduled(["e"], e={"quest_token_budget": 4096}))
    assert not budgets.is_asked and "quest_token_budget: got 4096" in caplog.text


@pytest.mark.filterwarnings("ignore")  # of what vLLM imports
def test_a_step_with_a_budget_of_its_own_takes_no_full_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="runs with make test-vllm, which installs vLLM")
    from vllm.config import CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    asked: list[Any] = []

    def dispatch(*_: Any, **kwargs: Any) -> None:
        asked.append(kwargs.get("invalid_modes"))

    ours = requests._without_full_graphs(dispatch)
    budgets = make_budgets(["a"])
    ours(None, 1)
    monkeypatch.setattr(requests, "_of_step", budgets)
    ours(None, 1)
    budgets.begin(scheduled(["a"], a={"quest_token_budget": "none"}))
    ours(None, 1)
    ours(None, 1, invalid_modes={CUDAGraphMode.PIECEWISE})
    assert asked == [None, None, {CUDAGraphMode.FULL}, {CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE}]
    assert "invalid_modes" in inspect.signature(CudagraphDispatcher.dispatch).parameters, "as the wrapper names it"
    counts: list[Any] = []

    def of_second(*given: Any, **kwargs: Any) -> None:
        counts.append((given[-1], kwargs))

    ours = requests._without_full_graphs_of_second(of_second)
    ours(None, 4, 4, 1, num_active_loras=0, max_query_len=1)
    monkeypatch.setattr(requests, "_of_step", None)
    ours(None, 4, 4, 1, num_active_loras=0, max_query_len=1)
    assert counts == [
        (None, {"num_active_loras": 0, "max_query_len": None}),
        (1, {"num_active_loras": 0, "max_query_len": 1}),
    ]


def test_the_newer_runner_shows_its_batch_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes one anew in each step, and has none of its own as the older one has."""
    budgets = make_budgets(["somebody else"])
    budgets.begin(scheduled(["a", "b"], b={"quest_token_budget": "none"}))
    seen: list[Any] = []

    def prepare_attn(_: Any, input_batch: Any) -> str:
        seen.append(budgets.of_rows(2, CONFIG))
        return str(input_batch.req_ids)

    ours = requests._with_order(prepare_attn)
    assert ours(None, SimpleNamespace(req_ids=["a", "b"])) == "['a', 'b']"
    monkeypatch.setattr(requests, "_of_step", budgets)
    ours(None, SimpleNamespace(req_ids=["a", "b"]))
    assert seen == [[CONFIG, CONFIG], [CONFIG, None]]


def test_replicas_that_agree_on_graphs_may_not_be_asked() -> None:
    served = SimpleNamespace(
        additional_config={"quest": {"token_budget": 512}},
        cache_config=SimpleNamespace(block_size=16),
        model_config=SimpleNamespace(is_hybrid=False, max_model_len=8192),
        parallel_config=SimpleNamespace(data_parallel_size=2),
        use_v2_model_runner=False,
    )
    check_request(served, {"quest_token_budget": 64, "other": 1}, "cuda")
    served.use_v2_model_runner = True
    with pytest.raises(QuestValueError, match="quest_token_budget: got 64, expected nothing with 2 data-parallel"):
        check_request(served, {"quest_token_budget": 64}, "cuda")
    check_request(served, {"other": 1, "question": 2, "quest_token_budget": None}, "cuda")
    with pytest.raises(QuestValueError, match="quest_budget: got 64, expected quest_token_budget"):
        check_request(served, {"quest_budget": 64}, "cuda")
    served.additional_config = {}
    check_request(served, {"quest_token_budget": -1, "quest_budget": 64}, "cuda")

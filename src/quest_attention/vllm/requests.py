"""`RequestBudgets`: what the requests of a worker ask for themselves, told to the builders of its batches.

A client says `quest_token_budget` in `vllm_xargs`, a program in `SamplingParams(extra_args=...)`; what is wrong is
refused where requests arrive. In a worker the runner knows which requests a step is of, and in which order; the
builders, which vLLM gives lengths and blocks alone, ask here.

A CUDA graph holds one budget for all of its rows. So a step with a row of its own budget is kept out of full graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestValueError
from quest_attention.serving.options import QuestOptions
from quest_attention.serving.requests import ASKED, config_asked
from quest_attention.vllm.layout import page_size
from quest_attention.vllm.options import read_options
from quest_attention.vllm.wrapping import wrap_method

__all__ = ["RequestBudgets", "budgets_of_step", "watch_requests"]

_logger = logging.getLogger("vllm.quest_attention")


class RequestBudgets:
    """What the requests of a worker ask for.

    Args:
        options: Of the server.
        page_size: Of its blocks [tokens].
        max_length: Of the longest sequence [tokens].

    Attributes:
        order: Gives the requests of the batch that is being built, by row.
    """

    order: Callable[[], Sequence[str]]

    def __init__(self, options: QuestOptions, page_size: int, max_length: int) -> None:
        self._options, self._page_size, self._max_length = options, page_size, max_length
        self._asked: dict[str, QuestConfig | None] = {}
        self._is_asked = False

    def begin(self, scheduled: Any) -> None:
        """Learn what a step is of, from vLLM's `SchedulerOutput`."""
        for request in scheduled.finished_req_ids:
            self._asked.pop(request, None)
        for new in scheduled.scheduled_new_reqs:
            self._asked.pop(new.req_id, None)
            extra = getattr(new.sampling_params, "extra_args", None)
            if extra and extra.get(ASKED) is not None:
                self._learn(new.req_id, extra[ASKED])
        self._is_asked = bool(self._asked) and any(one in self._asked for one in scheduled.num_scheduled_tokens)

    def _learn(self, request: str, asked: Any) -> None:
        try:
            self._asked[request] = config_asked(asked, self._options, self._page_size, self._max_length)
        except QuestValueError as error:  # who made it passed vLLM's front end by; an error here would end all others
            _logger.warning("Quest: %s. Request %s is read with the server's budget.", error, request)

    @property
    def is_asked(self) -> bool:
        """Whether a request of this step has a budget of its own."""
        return self._is_asked

    def of_rows(self, count: int, config: QuestConfig) -> list[QuestConfig | None] | None:
        """How each of the first rows of the batch is read; None for all of them where no request of it asks.

        Args:
            count: Rows.
            config: Of the server, for rows whose request asks for nothing.
        """
        if not self._is_asked:
            return None
        order = self.order()
        found = [self._asked.get(request, config) for request in order[:count]]
        return found + [config] * (count - len(found))  # rows that only pad


_of_step: RequestBudgets | None = None
"""Of the step that a runner of this process is preparing."""


def budgets_of_step() -> RequestBudgets | None:
    """What the requests ask of whose step a batch is being built; None outside of a step, as when graphs are made."""
    return _of_step


def watch_requests(vllm_config: Any) -> None:
    """Have the runner of this worker say which requests a step is of, and keep such steps out of full graphs."""
    is_second = bool(getattr(vllm_config, "use_v2_model_runner", False))
    if is_second:
        from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager as Graphs
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Runner
    else:
        from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher as Graphs
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner

    def around_step(original: Any) -> Any:
        @wraps(original)
        def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            global _of_step  # noqa: PLW0603 - a worker prepares one step at a time
            budgets = _budgets_of(self)
            if budgets is not None:
                budgets.begin(scheduler_output)
            _of_step = budgets
            try:
                return original(self, scheduler_output, *args, **kwargs)
            finally:
                _of_step = None

        return execute_model

    wrap_method(Runner, "execute_model", around_step)
    wrap_method(Graphs, "dispatch", _without_full_graphs_of_second if is_second else _without_full_graphs)
    if is_second:
        wrap_method(Runner, "prepare_attn", _with_order)


def _budgets_of(runner: Any) -> RequestBudgets | None:
    """Of a runner, made at its first step; None where its server does not ask for Quest."""
    made: RequestBudgets | None = getattr(runner, "quest_budgets", None)
    if made is None:
        settings = runner.vllm_config
        options = read_options(settings, runner.device.type)
        if options is None:
            return None
        size = page_size(settings.cache_config.block_size, settings.model_config, runner.device.type)
        made = RequestBudgets(options, size, settings.model_config.max_model_len)
        made.order = lambda: runner.input_batch.req_ids
        runner.quest_budgets = made
    return made


def _with_order(original: Any) -> Any:
    """The V2 runner of vLLM makes a batch anew in each step, and shows it before builders are asked."""

    @wraps(original)
    def prepare_attn(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if _of_step is not None:
            order = input_batch.req_ids
            _of_step.order = lambda: order
        return original(self, input_batch, *args, **kwargs)

    return prepare_attn


def _without_full_graphs(original: Any) -> Any:
    @wraps(original)
    def dispatch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _of_step is not None and _of_step.is_asked:
            from vllm.config import CUDAGraphMode

            kwargs["invalid_modes"] = {*(kwargs.get("invalid_modes") or ()), CUDAGraphMode.FULL}
        return original(self, *args, **kwargs)

    return dispatch


def _without_full_graphs_of_second(original: Any) -> Any:
    """Full graphs are of batches of one token a row, which this one then is not said to be."""

    @wraps(original)
    def dispatch(self: Any, num_reqs: int, num_tokens: int, uniform_token_count: Any, *args: Any, **kwargs: Any) -> Any:
        if _of_step is not None and _of_step.is_asked:
            uniform_token_count = None
            kwargs |= {"max_query_len": None} if "max_query_len" in kwargs else {}
        return original(self, num_reqs, num_tokens, uniform_token_count, *args, **kwargs)

    return dispatch

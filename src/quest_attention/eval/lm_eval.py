"""`QuestLM`: lm-evaluation-harness on a model that decodes with Quest.

The harness's own adapter prefills whole prompts. Quest reads less in decode steps alone, so it would hardly be active,
and a method that drops keys would see the question while it chooses what to keep. Here the end of a prompt is decoded,
token by token, by Quest and by the dense baseline alike.

In Python, pass a `QuestLM` to `lm_eval.simple_evaluate`. On the command line, run this module in place of `lm_eval`;
in it `quest` is a model:

    python -m quest_attention.eval.lm_eval run --model quest --model_args pretrained=...,token_budget=1024 --tasks ...

It needs lm-evaluation-harness; importing `quest_attention` or `quest_attention.eval` does not.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestStateError, QuestValueError
from quest_attention.eval.context import prefill
from quest_attention.hf import QuestCounters, QuestHandle, cache_argument, enable_quest

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f"lm_eval: got {error}, expected lm-evaluation-harness and what it loads models with: "
        "pip install 'lm-eval[hf]==0.4.13', and wonderwords and nltk for its RULER tasks",
        name=error.name,
    ) from error

__all__ = ["DEFAULT_TAIL_TOKENS", "QuestLM", "ReadTotals"]

DEFAULT_TAIL_TOKENS = 64
"""Last prompt tokens that are decoded: the question of a RULER prompt with the start of its answer, and room."""

_QUEST_OPTIONS = tuple(field.name for field in dataclasses.fields(QuestConfig))
_REFUSED = {"self", "kwargs", "backend", "logits_cache", "tp_plan", "max_batch_size"}
"""Arguments of HFLM that mean nothing here: models are causal, sequences come alone, and nothing groups requests."""
_HARNESS_OPTIONS = tuple(name for name in inspect.signature(HFLM.__init__).parameters if name not in _REFUSED)

_logger = logging.getLogger(__name__)


@dataclass
class ReadTotals:
    """What decode steps read, summed over every request since the start; all zero for the dense baseline.

    Attributes:
        sparse_steps: Steps that read selected pages only, summed over layers [layer steps].
        dense_steps: Steps that read everything, summed over layers, leading dense ones included [layer steps].
        tokens_read: Tokens read per KV head, over layers and steps, in whole units [tokens].
        tokens_held: Tokens that reading everything would have read, counted alike [tokens].
        pages_read: The same in pages; None where steps select less than pages [pages].
        pages_held: Likewise [pages].
    """

    sparse_steps: int = 0
    dense_steps: int = 0
    tokens_read: int = 0
    tokens_held: int = 0
    pages_read: int | None = 0
    pages_held: int | None = 0

    @property
    def share_read(self) -> float:
        """Share of the KV cache that the counted decode steps read, 0 to 1; 1 when nothing was counted."""
        return self.tokens_read / self.tokens_held if self.tokens_held else 1.0

    def add(self, counters: QuestCounters) -> None:
        """Count what a call of the harness has read."""
        self.sparse_steps += counters.sparse_steps
        self.dense_steps += counters.dense_steps
        self.tokens_read += counters.tokens_read
        self.tokens_held += counters.tokens_held
        self.pages_read = _sum(self.pages_read, counters.pages_read)
        self.pages_held = _sum(self.pages_held, counters.pages_held)

    def to_dict(self) -> dict[str, float]:
        """Everything counted, ready for JSON: tokens always, pages where steps select pages."""
        counted = {name: count for name, count in dataclasses.asdict(self).items() if count is not None}
        return {**counted, "share_read": self.share_read}


@register_model("quest")
class QuestLM(HFLM):
    """A causal language model for lm-evaluation-harness whose prompts end in decode steps.

    A generation request is prefilled up to its last `tail_tokens`, densely and in chunks; these are fed one by one, and
    `generate()` writes the answer from the same cache. A request for the likelihood of a continuation treats its
    context alike and then feeds the continuation one by one. `loglikelihood_rolling` decodes whole windows: slow.
    Quest is enabled on the model during a call, and the model is as it was after it.

    Args:
        pretrained: The model, or its name or folder.
        tokenizer: Its tokenizer, or the name of one; that of the model by default.
        config: What decode steps read. None, and no field of it as an option, is the dense baseline: the same
            protocol with transformers' own cache.
        tail_tokens: Last prompt tokens that are fed as decode steps [tokens].
        batch_size: Sequences at a time; 1.
        **options: Fields of `QuestConfig` (`token_budget=1024`) in place of `config`, and arguments of lm_eval's `HFLM`
            (`max_length`, `dtype`, `device`, ...). `backend` is the one of `QuestConfig`.

    Attributes:
        counters: What decode steps have read, over all requests.

    Raises:
        QuestValueError: An option is unknown or wrong, or `batch_size` is not 1.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        config: QuestConfig | None = None,
        tail_tokens: int = DEFAULT_TAIL_TOKENS,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        if str(batch_size) != "1":  # a command line gives text
            raise QuestValueError("batch_size", batch_size, "1: decode steps take one sequence at a time")
        if type(tail_tokens) is not int or tail_tokens < 1:  # True is an int
            raise QuestValueError("tail_tokens", tail_tokens, "a positive integer")
        if config is not None and not isinstance(config, QuestConfig):
            raise QuestValueError("config", config, "a QuestConfig, or None for the dense baseline")
        _check_known(options)
        fields = {name: options.pop(name) for name in _QUEST_OPTIONS if name in options}
        if fields:
            name, value = next(iter(fields.items()))
            if config is not None:
                raise QuestValueError(name, value, "nothing beside config: change the field there")
            if "token_budget" not in fields:
                raise QuestValueError(name, value, "token_budget beside it: without one nothing is sparse")
            config = QuestConfig.from_dict(fields)
        if isinstance(pretrained, str):
            options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, backend="causal", batch_size=1, **options)
        self.quest_config = None if config is None else config.resolved(self.device.type)
        self.tail_tokens = tail_tokens
        self.counters = ReadTotals()
        self._handle: QuestHandle | None = None
        self._dense_prompts: list[int] = []  # lengths of those where a sparse step was due and none came [tokens]

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> QuestLM:
        """Make one from `key=value,...`; see `create_from_arg_obj`."""
        from lm_eval.utils import simple_parse_args_string  # noqa: PLC0415 - lm_eval.utils is heavy, and for this only

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> QuestLM:
        """Make one as lm_eval's command line does, where a budget has to be given, or `dense=True` for the baseline.

        Args:
            arg_dict: From `--model_args`.
            additional_config: `batch_size`, `max_batch_size` and `device`; None is as if not given.

        Raises:
            QuestValueError: As the constructor, or neither a budget nor `dense=True` is given, or both are.
        """
        options = {**arg_dict, **{k: v for k, v in (additional_config or {}).items() if v is not None}}
        dense = options.pop("dense", False)
        if not isinstance(dense, bool):
            raise QuestValueError("dense", dense, "True or False")
        has_budget = options.get("config") is not None or "token_budget" in options
        if dense == has_budget:
            expected = "a budget in tokens, or dense=True for the baseline in the same protocol, and not both"
            raise QuestValueError("token_budget", options.get("token_budget"), expected)
        return cls(**options)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Write an answer to every prompt.

        Args:
            requests: lm_eval's instances, with a prompt and generation arguments each.
            disable_tqdm: Whether to hide the progress bar.

        Returns:
            The answers, in the order of the requests.

        Raises:
            QuestStateError: A prompt was longer than the budget, but its decode steps were not sparse.
            QuestValueError: A request asks for beams or several answers.
            UnsupportedModelError: Quest cannot serve the model.
        """
        with self._reading("generate_until"):
            answers: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
            return answers

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations of contexts.

        Args:
            requests: lm_eval's instances, with a context and a continuation each.
            disable_tqdm: Whether to hide the progress bar.

        Returns:
            For each request the log-likelihood of its continuation [nats], and whether greedy decoding would write it.

        Raises:
            QuestStateError: A request was longer than the budget, but its decode steps were not sparse.
            UnsupportedModelError: Quest cannot serve the model.
        """
        with self._reading("loglikelihood"):
            scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts [nats], in windows of `max_length`, each decoded from its first token."""
        with self._reading("loglikelihood_rolling"):
            scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            return scores

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes into its results about the model, with how it was read."""
        info: dict[str, Any] = super().get_model_info()
        config = None if self.quest_config is None else dataclasses.asdict(self.quest_config)
        return {
            **info,
            "quest": {"config": config, "tail_tokens": self.tail_tokens, "counters": self.counters.to_dict()},
        }

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:  # context [1, T] int64
        """Called by HFLM's `generate_until` for each prompt."""
        for name in ("num_beams", "num_return_sequences"):
            if generation_kwargs.get(name, 1) != 1:
                raise QuestValueError(name, generation_kwargs[name], "1: the cache holds one sequence")
        length = context.shape[1]
        with self._sequence(length, max_length) as cache:
            self._feed(context[:, :-1], max(0, length - self.tail_tokens), cache)  # generate() takes the last token
            made: Tensor = super()._model_generate(
                context=context, max_length=max_length, stop=stop, **cache_argument(cache), **generation_kwargs
            )
        return made

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,  # noqa: ARG002 - the signature is HFLM's; one bar is enough
        override_bs: int | None = None,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        """Called by HFLM's `loglikelihood` and `loglikelihood_rolling`, with tokens."""
        return [self._score(*request) for request in requests]

    def _score(self, texts: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of a continuation [nats], and whether it is the greedy one."""
        if len(context) + len(continuation) > self.max_length + 1:
            _logger.warning(
                "a request of %d tokens is cut on the left to max_length, %d",
                len(context) + len(continuation),
                self.max_length,
            )
        tokens = (context + continuation)[-(self.max_length + 1) :][:-1]  # the last is predicted, never fed
        inputs = torch.tensor([tokens], device=self.device)  # [1, T]
        targets = torch.tensor(continuation, device=self.device)  # [C]
        first_target = len(tokens) - len(continuation)  # its input: the last token of the context
        if first_target < 0:
            raise QuestValueError("continuation", f"{len(continuation)} tokens", f"at most {self.max_length}")
        with self._sequence(len(tokens), len(tokens)) as cache:
            logits = self._feed(inputs, max(0, first_target + 1 - self.tail_tokens), cache, keep_from=first_target)
        scores = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)  # [C, V]
        answer = (float(scores.gather(1, targets[:, None]).sum()), bool((scores.argmax(-1) == targets).all()))
        if texts is not None:  # a window of a rolling request has none
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answer

    def _feed(self, tokens: Tensor, num_prefilled: int, cache: Cache, keep_from: int | None = None) -> Tensor:
        """Prefill the first of `tokens` `[1, T]`, decode the rest; the logits from a position on, `[C, V]`."""
        prefill(self.model, tokens[:, :num_prefilled], cache)
        kept = []
        for index in range(num_prefilled, tokens.shape[1]):
            logits = self.model(
                tokens[:, index : index + 1], **cache_argument(cache), use_cache=True
            ).logits  # [1, 1, V]
            if keep_from is not None and index >= keep_from:
                kept.append(logits[0])
        return torch.cat(kept) if kept else tokens.new_empty(0)

    @contextmanager
    def _sequence(self, length: int, max_length: int) -> Iterator[Cache]:
        """A cache for one sequence, whose decode steps end at `length` tokens or later; what they read is counted."""
        handle = self._handle
        with (
            torch.inference_mode(),
            torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ),
        ):
            if handle is None:
                yield DynamicCache(config=self.model.config)
                return
            before = handle.counters.sparse_steps
            yield handle.make_cache(max_length)
        if length > handle.config.token_budget and handle.counters.sparse_steps == before:
            self._dense_prompts.append(length)

    @contextmanager
    def _reading(self, call: str) -> Iterator[None]:
        """Quest on the model during one call of the harness, if it is to be; counts, and checks that it ran."""
        if self.quest_config is None:
            yield
            return
        self._dense_prompts = []
        # Off: a graph would be captured anew for the cache of each request, which takes longer than its steps.
        with enable_quest(self.model, self.quest_config, cuda_graphs=False) as handle:
            self._handle = handle
            try:
                yield
            finally:
                self._handle = None
                self.counters.add(handle.counters)
        budget = self.quest_config.token_budget
        if self._dense_prompts:
            raise QuestStateError(
                f"{call}: {len(self._dense_prompts)} prompts of up to {max(self._dense_prompts)} tokens were longer "
                f"than the budget of {budget}, but no decode step of theirs was sparse:\n{handle.counters.summary()}"
            )
        if handle.counters.bypassed_steps:
            raise QuestStateError(
                f"{call}: {handle.counters.bypassed_steps} layer steps never reached Quest's attention and read "
                "everything"
            )


def _sum(counted: int | None, more: int | None) -> int | None:
    """Of pages, if both count in them."""
    return None if counted is None or more is None else counted + more


def _check_known(options: Mapping[str, Any]) -> None:
    """Refuse an option that neither `QuestConfig` nor `HFLM` has: HFLM would hand it on to the model's loader."""
    known = [*_QUEST_OPTIONS, *(name for name in _HARNESS_OPTIONS if name not in ("pretrained", "tokenizer"))]
    for name, value in options.items():
        if name not in known:
            close = difflib.get_close_matches(name, [*known, "tail_tokens", "config"], n=1)
            hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
            raise QuestValueError(name, value, f"a known option: {hint}")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


# Longer than 250 lines: one class with all of the harness's interface, and what each of its options means.

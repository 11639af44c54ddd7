"""The decode loop of the evaluation: feed a question token by token, then let `generate()` write an answer.

The question is decoded, not prefilled: otherwise a method that drops keys would see the question while it chooses what
to keep.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from quest_attention.hf import cache_argument

__all__ = ["Decoded", "decode_answer", "decode_answers"]


@dataclass
class Decoded:
    """What `decode_answers` did.

    Attributes:
        answers: Of each sequence, up to its first stop token.
        step_seconds: Time of every decode step, question and answer [s].
        num_question_steps: How many of them fed a question token whose prediction was not used [steps].
    """

    answers: list[list[int]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    num_question_steps: int = 0

    @property
    def tokens(self) -> list[int]:
        """The answer of the first sequence."""
        return self.answers[0]


class _Clock:
    """A logits processor that notes how long each step took, up to its logits."""

    def __init__(self, seconds: list[float], started: float) -> None:
        self._seconds = seconds
        self._last = started

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._last = now
        return scores


def decode_answer(
    model: PreTrainedModel,
    cache: Cache,
    question: Sequence[int],
    max_new_tokens: int,
    *,
    context: Sequence[int] | None = None,
    stop_tokens: Collection[int] = (),
    on_answer: Callable[[], None] | None = None,
) -> Decoded:
    """`decode_answers` for one sequence, given as token ids."""
    ids = None if context is None else torch.tensor([list(context)])
    return decode_answers(
        model,
        cache,
        torch.tensor([list(question)]),
        max_new_tokens,
        context=ids,
        stop_tokens=stop_tokens,
        on_answer=on_answer,
    )


def decode_answers(
    model: PreTrainedModel,
    cache: Cache,
    questions: Tensor,
    max_new_tokens: int,
    *,
    context: Tensor | None = None,
    stop_tokens: Collection[int] = (),
    on_answer: Callable[[], None] | None = None,
) -> Decoded:
    """Feed questions token by token and answer greedily with `generate()`, one forward pass of one token a step.

    Args:
        model: In evaluation mode.
        cache: Holds the contexts; grows in place, until the last sequence has answered.
        questions: `[B, q]` int64, at least one token each.
        max_new_tokens: Tokens of an answer at most.
        context: `[B, T]` int64, what the cache holds, for a `generate()` that looks at it; zeros by default, which
            nothing here reads.
        stop_tokens: Token ids that end an answer.
        on_answer: Called once, before the step that predicts the first token of the answers.

    Returns:
        The answers and the time of every step.
    """
    batch, count = questions.shape
    done = Decoded(num_question_steps=count - 1)
    length = cache.get_seq_length()
    before = torch.zeros(batch, length, dtype=torch.int64) if context is None else context
    ids = torch.cat((before, questions), 1).to(model.device)  # [B, T + q]
    runner: Any = model  # its generate() side, which a type checker does not see
    with torch.inference_mode():
        for index in range(length, ids.shape[1] - 1):
            started = time.perf_counter()
            logits = model(ids[:, index : index + 1], **cache_argument(cache), use_cache=True).logits
            logits[0, -1, 0].item()  # waits for the device, so the time is the step's
            done.step_seconds.append(time.perf_counter() - started)
        if on_answer is not None:
            on_answer()
        made = runner.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(cache),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(stop_tokens) or None,
            pad_token_id=0,
            logits_processor=[_Clock(done.step_seconds, time.perf_counter())],
        )
    answers = made[:, ids.shape[1] :].tolist()
    done.answers = [list(itertools.takewhile(lambda token: token not in stop_tokens, answer)) for answer in answers]
    return done

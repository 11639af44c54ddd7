"""The decode loop of the evaluation: feed a question token by token, then let `generate()` write an answer.

The question is decoded, not prefilled: otherwise a method that drops keys would see the question while it chooses what
to keep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

__all__ = ["Decoded", "decode_answer"]


@dataclass
class Decoded:
    """What `decode_answer` did.

    Attributes:
        tokens: The answer, stop token excluded.
        step_seconds: Time of every decode step, question and answer [s].
        num_question_steps: How many of them fed a question token whose prediction was not used [steps].
    """

    tokens: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    num_question_steps: int = 0


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
    """Feed a question token by token and answer greedily with `generate()`, one forward pass of one token a step.

    Args:
        model: In evaluation mode.
        cache: Holds the context; grows in place.
        question: Token ids, at least one.
        max_new_tokens: Tokens of the answer at most.
        context: Token ids of what the cache holds, for a `generate()` that looks at them; zeros by default, which
            nothing here reads.
        stop_tokens: Token ids that end the answer.
        on_answer: Called once, before the step that predicts the first token of the answer.

    Returns:
        The answer and the time of every step.
    """
    done = Decoded(num_question_steps=len(question) - 1)
    length = cache.get_seq_length()
    before = [0] * length if context is None else list(context)
    ids = torch.tensor([[*before, *question]], device=model.device)  # [1, length + question]
    runner: Any = model  # its generate() side, which a type checker does not see
    with torch.inference_mode():
        for index in range(length, ids.shape[1] - 1):
            started = time.perf_counter()
            logits = model(ids[:, index : index + 1], past_key_values=cache, use_cache=True).logits
            logits[0, -1, 0].item()  # waits for the device, so the time is the step's
            done.step_seconds.append(time.perf_counter() - started)
        if on_answer is not None:
            on_answer()
        made = runner.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
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
    done.tokens = [token for token in made[0, ids.shape[1] :].tolist() if token not in stop_tokens]
    return done

"""The decode loop of the evaluation: prefill a context once, then feed a question token by token and write an answer.

The question is decoded, not prefilled: otherwise a method that drops keys would see the question while it chooses what
to keep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

__all__ = ["PREFILL_CHUNK", "Decoded", "decode_answer", "prefill"]

PREFILL_CHUNK = 512
"""Tokens per forward pass of a prefill: as fast as larger ones on a CPU, and often enough for a progress bar."""


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


def prefill(
    model: PreTrainedModel,
    tokens: Sequence[int],
    cache: Cache,
    *,
    chunk_size: int = PREFILL_CHUNK,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Run a context through the model, in chunks, to fill a cache.

    Args:
        model: In evaluation mode.
        tokens: One sequence of token ids.
        cache: Empty; filled in place.
        chunk_size: Tokens per forward pass [tokens].
        on_progress: Called with the tokens done after each chunk.
    """
    ids = torch.tensor([list(tokens)], device=model.device)  # [1, T]
    with torch.inference_mode():
        for start in range(0, ids.shape[1], chunk_size):
            chunk = ids[:, start : start + chunk_size]
            model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if on_progress is not None:
                on_progress(min(start + chunk_size, ids.shape[1]))


def decode_answer(
    model: PreTrainedModel,
    cache: Cache,
    question: Sequence[int],
    max_new_tokens: int,
    *,
    stop_tokens: Collection[int] = (),
    on_answer: Callable[[], None] | None = None,
) -> Decoded:
    """Feed a question token by token and answer greedily, one forward pass of one token a step.

    Args:
        model: In evaluation mode.
        cache: Holds the context; grows in place.
        question: Token ids, at least one.
        max_new_tokens: Tokens of the answer at most.
        stop_tokens: Token ids that end the answer.
        on_answer: Called once, before the step that predicts the first token of the answer.

    Returns:
        The answer and the time of every step.
    """
    done = Decoded(num_question_steps=len(question) - 1)
    pending = list(question)
    with torch.inference_mode():
        while len(done.tokens) < max_new_tokens:
            if len(pending) == 1 and not done.tokens and on_answer is not None:
                on_answer()
            started = time.perf_counter()
            step = torch.tensor([[pending.pop(0)]], device=model.device)
            logits = model(step, past_key_values=cache, use_cache=True).logits
            predicted = int(logits[0, -1].argmax())  # waits for the device, so the time is the step's
            done.step_seconds.append(time.perf_counter() - started)
            if pending:
                continue
            if predicted in stop_tokens:
                break
            done.tokens.append(predicted)
            pending.append(predicted)
    return done

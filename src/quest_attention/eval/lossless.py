"""One answer by lossless decoding, and what was read for it: beside methods that read less and may answer otherwise."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from quest_attention.config import QuestConfig
from quest_attention.eval.context import Context, copy_cache
from quest_attention.hf import QuestCounters, cache_argument, enable_quest

__all__ = ["LosslessAnswer", "answer_losslessly"]


@dataclass(frozen=True)
class LosslessAnswer:
    """What was written, and how.

    Attributes:
        tokens: The answer, up to its first stop token.
        new_tokens: Tokens written, one that stops included.
        seconds: What they took, drafts and checks together [s].
        counters: Of the steps: drafts are sparse ones, checks and steps without drafts dense ones.
    """

    tokens: list[int]
    new_tokens: int
    seconds: float
    counters: QuestCounters


def answer_losslessly(
    model: PreTrainedModel, source: Context, context: Sequence[int], question: Sequence[int], config: QuestConfig,
    max_new_tokens: int, *, stop_tokens: Collection[int] = (),
) -> LosslessAnswer:  # fmt: skip
    """Answer a question greedily, with Quest's drafts and the model's checks.

    Args:
        model: In evaluation mode.
        source: What the model keeps of the context; it stays as it is.
        context: Tokens of the context.
        question: Tokens of the question, read by dense attention.
        config: What drafts read.
        max_new_tokens: Tokens of the answer at most.
        stop_tokens: Token ids that end it.

    Raises:
        UnsupportedModelError: Drafted tokens cannot be taken back from the model's layers.
    """
    runner: Any = model  # its generate() side, which a type checker does not see
    ids = torch.tensor([[*context, *question]], device=model.device)
    with enable_quest(model, config, cuda_graphs=False, lossless=True) as quest, torch.inference_mode():
        cache = quest.make_cache(ids.shape[1] + max_new_tokens)
        copy_cache(source.cache, cache)
        runner(ids[:, len(context) : -1], **cache_argument(cache), use_cache=True)
        quest.counters.reset()
        started = time.perf_counter()
        made = runner.generate(
            ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=max_new_tokens,
            do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
            eos_token_id=sorted(stop_tokens) or None, pad_token_id=0,
        )  # fmt: skip
        written = made[0, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - started
    answer = list(itertools.takewhile(lambda token: token not in stop_tokens, written))
    return LosslessAnswer(answer, len(written), seconds, quest.counters)

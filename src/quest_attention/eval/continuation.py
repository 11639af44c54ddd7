"""Continuation: the last tokens of a stretch of text, each predicted from what a method reads of all before it.

Perplexity says how likely the text is to the model, agreement how often the model's next token is the one it would have
said with full attention. The text is given, whatever was predicted, so that an error does not lead to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from quest_attention.eval.context import Context, copy_cache
from quest_attention.eval.methods import LayerReads, Method, Quest
from quest_attention.hf import cache_argument

__all__ = ["Continuation", "follow_text", "next_tokens"]


@dataclass(frozen=True)
class Continuation:
    """How a method predicted the end of some texts.

    Attributes:
        nll: Of each sequence, summed negative log-likelihood of its last tokens [nats].
        agreed: Of each sequence, predictions that are those of full attention [tokens].
        count: Predictions of a sequence [tokens].
        reads: What the decode steps read.
    """

    nll: list[float]
    agreed: list[int]
    count: int
    reads: list[LayerReads]


def next_tokens(model: PreTrainedModel, context: Context, following: Tensor) -> Tensor:
    """What full attention would say after each token: `[B, t]` int64, from one pass over all of them.

    Args:
        model: In evaluation mode.
        context: What comes before.
        following: `[B, t]` int64, the tokens after it, on the model's device.
    """
    cache = DynamicCache(config=model.config)
    copy_cache(context.cache, cache)
    with torch.inference_mode():
        said: Tensor = model(following, **cache_argument(cache), use_cache=True).logits.argmax(-1)
    return said


def follow_text(
    model: PreTrainedModel, method: Method, context: Context, following: Tensor, expected: Tensor
) -> Continuation:
    """Feed the tokens that follow a context one by one, as decode steps, and look at each prediction.

    Args:
        model: In evaluation mode.
        method: What reads. Quest replays CUDA graphs where it can, whatever its `cuda_graphs` was.
        context: From `read_context`, of `B` sequences; it stays as it is.
        following: `[B, t + 1]` int64; the first is fed and not predicted, the last predicted and not fed.
        expected: `[B, t]` int64, from `next_tokens` of the tokens that are fed.
    """
    if type(method) is Quest:
        method.cuda_graphs = None  # so many steps are worth a capture
    count = following.shape[1] - 1
    following, expected = following.to(model.device), expected.to(model.device)
    nll = torch.zeros(following.shape[0], dtype=torch.float64, device=model.device)
    agreed = torch.zeros(following.shape[0], dtype=torch.int64, device=model.device)
    length = context.cache.get_seq_length() + count
    with torch.inference_mode(), method.session(model, length) as session:
        session.load(context)
        for index in range(count):
            logits = model(following[:, index : index + 1], **cache_argument(session.cache), use_cache=True).logits
            last = logits[:, -1].float()  # [B, V]
            nll += F.cross_entropy(last, following[:, index + 1], reduction="none").double()
            agreed += last.argmax(-1) == expected[:, index]
        reads = session.reads()
    return Continuation(nll.tolist(), agreed.tolist(), count, reads)

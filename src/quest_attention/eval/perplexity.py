"""Perplexity by position: a method predicts each token of a book from what it reads of those before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from quest_attention.eval.context import PREFILL_CHUNK
from quest_attention.eval.methods import Full, LayerReads, Method, Quest
from quest_attention.hf import cache_argument

__all__ = ["BUCKET", "Predictions", "predict_tokens"]

BUCKET = 1024
"""Positions summed together [tokens]."""


@dataclass(frozen=True)
class Predictions:
    """How well tokens were predicted.

    Attributes:
        nll: `[B, buckets]` float64: negative log-likelihood summed over the positions of each bucket [nats].
        count: Tokens predicted in each bucket, the same for each sequence [tokens].
        reads: What the decode steps read.
    """

    nll: Tensor
    count: list[int]
    reads: list[LayerReads]


def predict_tokens(model: PreTrainedModel, method: Method, tokens: Tensor) -> Predictions:
    """Feed texts to a method token by token, and see how likely it finds each next token.

    Up to the method's budget a step reads everything, whoever reads, so those tokens go through the model in one pass;
    so do all of full attention's.

    Args:
        model: In evaluation mode.
        method: What reads.
        tokens: `[B, T]` int64, texts of one length.
    """
    if type(method) is Quest:
        method.cuda_graphs = None  # thousands of steps are worth a capture
    tokens = tokens.to(model.device)
    length = tokens.shape[1]
    at_once = length if method.token_budget is None else min(length, method.token_budget)
    losses = torch.zeros(tokens.shape[0], length, dtype=torch.float64, device=model.device)  # [b, i]: of token i
    with torch.inference_mode(), method.session(model, length) as session:
        for start in range(0, at_once, PREFILL_CHUNK):
            stop = min(start + PREFILL_CHUNK, at_once)
            logits = model(tokens[:, start:stop], **cache_argument(session.cache), use_cache=True).logits
            _note(losses, tokens, start, logits)
        session.reset_counts()
        for start in range(at_once, length):
            logits = model(tokens[:, start : start + 1], **cache_argument(session.cache), use_cache=True).logits
            _note(losses, tokens, start, logits)
        reads = [] if isinstance(method, Full) else session.reads()
    padded = F.pad(losses, (0, -length % BUCKET)).unflatten(1, (-1, BUCKET)).sum(2)
    count = [min(length, start + BUCKET) - max(1, start) for start in range(0, length, BUCKET)]  # none for token 0
    return Predictions(padded.cpu(), count, reads)


def _note(losses: Tensor, tokens: Tensor, start: int, logits: Tensor) -> None:
    """Write the loss of the tokens that follow those at `start`, of which there are as many as logits `[B, t, V]`."""
    following = tokens[:, start + 1 : start + 1 + logits.shape[1]]
    if following.shape[1]:
        logits = logits[:, : following.shape[1]].float()
        found = F.cross_entropy(logits.transpose(1, 2), following, reduction="none")
        losses[:, start + 1 : start + 1 + following.shape[1]] = found.double()

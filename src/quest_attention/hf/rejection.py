"""Which drafted tokens stay, and which token comes after them: speculative sampling, for rows of their own lengths.

Leviathan et al., arXiv:2211.17192, algorithm 1: a draft `x`, drawn from `q`, stays with probability `min(1, p(x) /
q(x))`; in place of the first that does not, a token is drawn from what `p` has more than `q`; after all of them one is
drawn from `p`. So every token is distributed as `p` says, whatever `q` is.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accept_likeliest", "accept_sampled", "draw"]


def accept_likeliest(drafts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the drafts that are the likeliest tokens, up to the first that is not.

    Args:
        drafts: `[B, K]` int64, tokens.
        scores: `[B, K + 1, V]` float32, of the tokens at the places of the drafts and after the last.

    Returns:
        `[B]` int64, drafts that stay [tokens]; `[B]` int64, the token after them.

    >>> scores = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]])
    >>> [each.tolist() for each in accept_likeliest(torch.tensor([[1, 0]]), scores)]
    [[1], [2]]
    """
    best = scores.argmax(-1)  # [B, K + 1]
    accepted = (best[:, :-1] == drafts).long().cumprod(1).sum(1)
    return accepted, best.gather(1, accepted[:, None])[:, 0]


def accept_sampled(drafts: Tensor, drafted_by: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Keep each draft with the probability that makes all tokens distributed as the scores say.

    Args:
        drafts: `[B, K]` int64, tokens.
        drafted_by: `[B, K, V]` float32, the probabilities that each was drawn from.
        scores: `[B, K + 1, V]` float32, of the tokens at the places of the drafts and after the last.

    Returns:
        `[B]` int64, drafts that stay [tokens]; `[B]` int64, the token after them.
    """
    wanted = scores.softmax(-1)  # [B, K + 1, V]
    count = drafts.shape[1]
    has = wanted[:, :-1].gather(2, drafts[..., None])[..., 0]  # [B, K]
    had = drafted_by.gather(2, drafts[..., None])[..., 0]
    # A draw is never 1, so that a draft which is sure to stay does.
    stays = torch.rand_like(has) * had < has
    accepted = stays.long().cumprod(1).sum(1)
    at = accepted[:, None, None].expand(-1, 1, wanted.shape[2])
    left = wanted.gather(1, at)[:, 0]  # [B, V]
    if count:
        taken = drafted_by.gather(1, at.clamp(max=count - 1))[:, 0]
        more = (left - taken).clamp(min=0)
        # Where both distributions are the same but for rounding, nothing is left over: the refusal was rounding too.
        is_refused = (accepted < count) & (more.sum(-1) > 0)
        left = torch.where(is_refused[:, None], more, left)
    return accepted, draw(left)


def draw(weights: Tensor) -> Tensor:
    """A token of each row, `[B]` int64, by weights `[B, V]` that need not sum to 1."""
    return torch.multinomial(weights, num_samples=1)[:, 0]

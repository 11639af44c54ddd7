"""Scores as distinct integers, so that the best of them are the same ones everywhere. For the PyTorch path."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_attention.ops.selection import DecodeWorkspace, Workspace

__all__ = ["ALWAYS", "ranking", "ranking_of_weights"]

ALWAYS = torch.iinfo(torch.int64).max
"""Above the key of any score."""


def ranking(scores: Tensor, workspace: Workspace | None) -> Tensor:
    """Distinct int64 keys `[B, HKV, U]` that order units by score and, where scores are equal, the lower unit first.

    The bits of a float32, negated when its sign is set, order like the number (and -0.0 like 0.0); the index of the
    unit goes below them.
    """
    live = scores.shape[2]
    if not isinstance(workspace, DecodeWorkspace):
        workspace = DecodeWorkspace.allocate(scores.shape[0], scores.shape[1], live, scores.device)
    bits = scores.view(torch.int32)
    ordered, keys = workspace.ordered[:, :, :live], workspace.keys[:, :, :live]
    torch.bitwise_right_shift(bits, 31, out=ordered)
    ordered.bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    keys.copy_(ordered).sub_(ordered.bitwise_right_shift_(31))
    return keys.bitwise_left_shift_(32).bitwise_or_(workspace.below[:live])


def ranking_of_weights(scores: Tensor) -> Tensor:
    """Distinct float64 keys `[B, HKV, U]` that order log weights as `ranking` does, in a quarter of its time.

    A float32 leaves the low bits of a float64 empty, and of negative numbers more bits are less: so the index of the
    unit is added there. Weights of one are taken as a little less, since zero has no such bits.

    Args:
        scores: `[B, HKV, U]` float32, finite, at most 0 or, by rounding, a little more; they are changed.
    """
    keys = scores.clamp_(max=-torch.finfo(torch.float32).tiny).double()
    keys.view(torch.int64).add_(torch.arange(scores.shape[2], device=scores.device))
    return keys

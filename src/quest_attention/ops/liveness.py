"""What of a sequence may be attended to: its tokens, the units and pages that hold one. For the PyTorch path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attendable", "begun_tokens", "live_tokens", "live_units"]


def live_tokens(seq_lens: Tensor | int, token_mask: Tensor | None, max_tokens: int, like: Tensor) -> Tensor:
    """`[B, max_tokens]` bool: tokens a sequence may attend to, by logical position."""
    token = torch.arange(max_tokens, device=like.device)
    ends = seq_lens[:, None] if isinstance(seq_lens, Tensor) else seq_lens
    if token_mask is None:
        return (token < ends).expand(like.shape[0], -1)
    known = min(token_mask.shape[1], max_tokens)
    return (token < ends) & F.pad(token_mask[:, :known], (0, max_tokens - known), value=False)


def begun_tokens(seq_lens: Tensor | int, page_size: int, max_tokens: int, like: Tensor) -> Tensor:
    """`[B, max_tokens]` bool, or `[1, max_tokens]`: those behind the last complete page of a sequence."""
    token = torch.arange(max_tokens, device=like.device)
    ends = seq_lens[:, None] if isinstance(seq_lens, Tensor) else seq_lens
    return (token >= ends // page_size * page_size).view(-1, max_tokens)


def live_units(
    seq_lens: Tensor | int, token_mask: Tensor | None, unit_size: int, max_units: int, like: Tensor
) -> Tensor:
    """`[B, U]` bool: units, pages or smaller, that hold a token the sequence may attend to."""
    if token_mask is None:
        ends = seq_lens[:, None] if isinstance(seq_lens, Tensor) else seq_lens
        starts = torch.arange(0, max_units * unit_size, unit_size, device=like.device)
        return (starts < ends).expand(like.shape[0], -1)
    live = live_tokens(seq_lens, token_mask, max_units * unit_size, like)
    return live.view(like.shape[0], max_units, unit_size).any(-1)


def attendable(units: Tensor, is_unit: Tensor, ends: Tensor | int, token_mask: Tensor | None, size: int) -> Tensor:
    """`[B, HKV, K * size]` bool: tokens of the gathered units that may be attended to."""
    offsets = torch.arange(size, device=units.device)
    token = units[..., None] * size + offsets  # [B, HKV, K, size]
    live = (token < (ends[..., None] if isinstance(ends, Tensor) else ends)) & is_unit[..., None]
    if token_mask is None:
        return live.flatten(2)
    token, known = token.flatten(2), token_mask.shape[1]
    table = token_mask[:, None].expand(-1, units.shape[1], -1)
    return live.flatten(2) & (token < known) & table.gather(2, token.clamp(max=known - 1))

"""Scores of units from estimates of their tokens' logits: the log of the attention that each would have.

For the PyTorch path, and for forms of metadata that score tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quest_attention.ops.gathering import metadata_rows
from quest_attention.ops.liveness import live_tokens, live_units
from quest_attention.ops.step import Step
from quest_attention.pages import num_pages

__all__ = ["score_masses"]

_CHUNK_BYTES = 1 << 21
"""Metadata taken to float32 at a time on a CPU [bytes]: a bound on scratch memory."""


def score_masses(step: Step, out: Tensor | None) -> Tensor:
    """Log masses `[B, HKV, U]` float32; see `ops.score_pages`.

    A weight needs its head's normaliser, so all tokens are estimated before any unit is scored: estimates
    `[B, HKV, T, G]`, which grow with the context, are allocated anew at each step.
    """
    kv, config, seq_lens = step.kv, step.config, step.seq_lens
    batch, heads = kv.batch_size, kv.num_kv_heads
    scores = out
    if scores is None:
        scores = step.query.new_empty(batch, heads, kv.max_pages * config.units_per_page, dtype=torch.float32)
    pages = num_pages(seq_lens, kv.page_size) if isinstance(seq_lens, int) else kv.max_pages
    used = scores[:, :, : pages * config.units_per_page]
    if used.shape[2] < scores.shape[2]:
        scores[:, :, used.shape[2] :] = -math.inf
    if used.numel() == 0:
        return scores
    logits = _scaled_estimates(step, pages)  # [B, HKV, T, G]
    is_dead = ~live_tokens(seq_lens, step.token_mask, logits.shape[2], scores)[:, None, :, None]
    is_unknown = ~logits.isfinite() & ~is_dead
    if step.softcap is not None:
        logits = step.softcap * torch.tanh(logits / step.softcap)
    logits.masked_fill_(is_dead | is_unknown, -math.inf)
    normaliser = torch.logsumexp(logits, 2, keepdim=True)  # [B, HKV, 1, G]
    if step.sinks is not None:
        normaliser = torch.logaddexp(normaliser, step.sinks.float().view(1, heads, 1, -1))
    logits -= normaliser.masked_fill(normaliser == -math.inf, 0)
    by_unit = logits.view(batch, heads, used.shape[2], -1)  # [B, HKV, U, unit_size * G]
    if config.group_reduction == "mass":
        torch.logsumexp(by_unit, 3, out=used).sub_(math.log(logits.shape[3]))
    else:
        torch.amax(by_unit, 3, out=used)
    # A unit with a key that is not finite ranks first, so that it is read and shows as in dense attention.
    used.masked_fill_(is_unknown.view(by_unit.shape).any(3), math.inf)
    return scores


def _scaled_estimates(step: Step, pages: int) -> Tensor:
    """Estimates of the logits of the first `pages` pages, scaled as in attention: `[B, HKV, T, G]` float32."""
    query, kv = step.query, step.kv
    batch, heads, page_size = kv.batch_size, kv.num_kv_heads, kv.page_size
    grouped = query.float().reshape(batch * heads, -1, kv.head_dim)  # [R, G, D]
    seen = kv.form.see(grouped)
    table = kv.page_table
    if isinstance(step.seq_lens, Tensor) and kv.contiguous is None:  # past its end the table may hold anything
        table = table.masked_fill(~live_units(step.seq_lens, None, page_size, kv.max_pages, table), 0)
    chunk = pages
    if query.device.type == "cpu":
        numbers = max(1, kv.metadata[:1].numel() * batch)
        chunk = max(1, _CHUNK_BYTES // (4 * numbers))
    logits = grouped.new_empty(batch * heads, pages * page_size, grouped.shape[1])
    for start in range(0, pages, chunk):
        stop = min(pages, start + chunk)
        kept = metadata_rows(kv, table[:, start:stop], start, stop)
        logits[:, start * page_size : stop * page_size] = kv.form.score(seen, kept)
    logits = logits.view(batch, heads, -1, grouped.shape[1])
    if kv.key_scale is not None:
        logits *= kv.key_scale[:, None, None]
    return logits.mul_(step.scale)

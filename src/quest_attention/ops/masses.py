"""Scores of units from their tokens' logits: the log of the attention that each would have. For the PyTorch path.

Logits are the estimates of a form that scores tokens, or those of exact keys: of its best units, or, where a form
scores pages, of the best pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from quest_attention.ops.fetching import fetch_units
from quest_attention.ops.gathering import gather_keys, metadata_rows
from quest_attention.ops.liveness import attendable, begun_tokens, live_tokens, live_units
from quest_attention.ops.ranking import ranking
from quest_attention.ops.selection import Selection
from quest_attention.ops.step import Step
from quest_attention.pages import num_pages

__all__ = ["NO_CANDIDATE", "Estimates", "KeysOf", "score_candidates", "score_masses"]

KeysOf: TypeAlias = Callable[[Tensor], Tensor]
"""Gives the keys `[B, HKV, N * unit_size, D]` of units `[B, HKV, N]` int64."""

NO_CANDIDATE = torch.finfo(torch.float32).min
"""Score of a live unit that the first estimate did not let pass: below all that it did, above those that are not live.
"""
_CHUNK_BYTES = 1 << 21
"""Metadata taken to float32 at a time on a CPU [bytes]: a bound on scratch memory."""


class Estimates(Protocol):
    """Estimates of the logits of a step, scaled as in attention, of a form that scores tokens: by a backend's means.

    Past the end of a sequence, and in a page that is not complete, they may be anything.
    """

    def of_all(self, pages: int) -> Tensor:
        """Those of the tokens of the first `pages` pages: `[B, HKV, T, G]` float32."""
        ...


def score_masses(
    step: Step, out: Tensor | None, estimates: Estimates | None = None, keys_of: KeysOf | None = None,
    fetch: Callable[..., None] = fetch_units,
) -> Tensor:  # fmt: skip
    """Log masses `[B, HKV, U]` float32; see `ops.score_pages`.

    A weight needs its head's normaliser, so all tokens are estimated before any unit is scored: estimates
    `[B, HKV, T, G]`, which grow with the context, are allocated anew at each step.

    Where a config has candidates, a second stage follows: the units that score best by the estimates are scored once
    more, by the exact logits of their tokens, and all other live ones score `NO_CANDIDATE`. Few tokens have no
    normaliser of their own, so that of the estimates of all is taken.

    Of a form that takes whole pages there is nothing to score the page being written by. Its tokens are no part of the
    normaliser, and its units score +inf: they are read always.

    Args:
        step: What to read and how.
        out: To write to.
        estimates: By a backend's means; None is as the form itself makes them.
        keys_of: Reads the keys of candidates; None where they lie in the cache as `PagedKV` says.
        fetch: Where there is a pool of hot units, a backend's verb that has candidates there before they are read.
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
    estimates = estimates or _TorchEstimates(step)
    logits = estimates.of_all(pages)  # [B, HKV, T, G]
    live = live_tokens(seq_lens, step.token_mask, logits.shape[2], scores)  # [B, T]
    begun = None
    if kv.form.takes_whole_pages:
        begun = begun_tokens(seq_lens, kv.page_size, logits.shape[2], scores)
    is_unknown = _weighable(step, logits, live[:, None], None if begun is None else begun[:, None])
    normaliser = _normaliser(step, logits)
    _reduce(step, logits.sub_(normaliser), is_unknown, used)
    if not config.candidate_budget:
        return scores

    size, candidates = config.unit_size, min(config.candidate_budget, used.shape[2])
    units = ranking(used, step.workspace).topk(candidates, sorted=False).indices  # [B, HKV, C]
    is_unit = used.gather(2, units) != -math.inf
    keys = _keys_of(step, units, is_unit, fetch) if keys_of is None else keys_of(units.masked_fill(~is_unit, 0))
    logits = _logits_of(step, keys)  # [B, HKV, C * size, G]
    tokens = (units[..., None] * size + torch.arange(size, device=units.device)).flatten(2)
    is_live = live[:, None].expand(-1, heads, -1).gather(2, tokens)
    is_begun = None if begun is None else begun[:, None].expand(batch, heads, -1).gather(2, tokens)
    is_unknown = _weighable(step, logits, is_live, is_begun)
    best = used.new_empty(units.shape)
    _reduce(step, logits.sub_(normaliser), is_unknown, best)
    used.masked_fill_(used != -math.inf, NO_CANDIDATE).scatter_(2, units, best)
    return scores


def _keys_of(step: Step, units: Tensor, is_unit: Tensor, fetch: Callable[..., None]) -> Tensor:
    """Keys of candidates `[B, HKV, C]` int64, out of the pool of hot units where there is one."""
    if step.hot is None:
        return gather_keys(step.kv, units, step.config.unit_size, is_unit)
    wanted = units.masked_fill(~is_unit, -1).to(torch.int32)
    fetch(step.kv, step.hot, wanted, step.seq_lens, keys_only=True)
    return gather_keys(step.hot.paged, units, step.hot.unit_size, is_unit)


def score_candidates(step: Step, candidates: Selection, out: Tensor | None) -> Tensor:
    """Log masses `[B, HKV, U]` float32 by the exact keys of some pages: a head's weights are normalised over those.

    Units of other pages score `NO_CANDIDATE`.

    Args:
        step: What to read and how.
        candidates: Pages `[B, HKV, C]` whose keys rank tokens.
        out: To write to.
    """
    kv, config, seq_lens = step.kv, step.config, step.seq_lens
    batch, heads, max_units = kv.batch_size, kv.num_kv_heads, kv.max_pages * config.units_per_page
    scores = out
    if scores is None:
        scores = step.query.new_empty(batch, heads, max_units, dtype=torch.float32)
    live = live_units(seq_lens, step.token_mask, config.unit_size, max_units, scores)
    scores.copy_(torch.where(live, NO_CANDIDATE, -math.inf)[:, None].expand_as(scores))
    slots = candidates.units.shape[2]
    if slots == 0:
        return scores
    ends = seq_lens[:, None, None] if isinstance(seq_lens, Tensor) else seq_lens
    is_page = candidates.units >= 0
    pages = candidates.units.masked_fill(~is_page, 0).long()
    logits = _logits_of(step, gather_keys(kv, pages, kv.page_size, is_page))  # [B, HKV, C * page_size, G]
    is_live = attendable(pages, is_page, ends, step.token_mask, kv.page_size)
    is_unknown = _weighable(step, logits, is_live, None)
    weighed = scores.new_empty(batch, heads, slots * config.units_per_page)
    _reduce(step, logits.sub_(_normaliser(step, logits)), is_unknown, weighed)
    # Slots without a page are written to a row behind all others.
    units = pages[..., None] * config.units_per_page + torch.arange(config.units_per_page, device=pages.device)
    units = units.masked_fill(~is_page[..., None], max_units).flatten(2)
    padded = F.pad(scores, (0, 1)).scatter_(2, units, weighed)
    return scores.copy_(padded[:, :, :max_units])


class _TorchEstimates:
    """As the form itself makes them, the metadata of some pages at a time."""

    def __init__(self, step: Step) -> None:
        kv = step.kv
        self._step = step
        self._seen = kv.form.see(step.query.float().reshape(kv.batch_size * kv.num_kv_heads, -1, kv.head_dim))
        self._table = kv.page_table
        if isinstance(step.seq_lens, Tensor) and kv.contiguous is None:  # past its end the table may hold anything
            live = live_units(step.seq_lens, None, kv.page_size, kv.max_pages, kv.page_table)
            self._table = kv.page_table.masked_fill(~live, 0)

    def of_all(self, pages: int) -> Tensor:
        """See `Estimates.of_all`."""
        kv, seen = self._step.kv, self._seen
        chunk = max(1, pages)
        if seen.device.type == "cpu":
            chunk = max(1, _CHUNK_BYTES // (4 * max(1, kv.metadata[:1].numel() * kv.batch_size)))
        logits = seen.new_empty(seen.shape[0], pages * kv.page_size, seen.shape[1])
        for start in range(0, pages, chunk):
            stop = min(pages, start + chunk)
            kept = metadata_rows(kv, self._table[:, start:stop], start, stop)
            logits[:, start * kv.page_size : stop * kv.page_size] = kv.form.score(seen, kept)
        logits = logits.view(kv.batch_size, kv.num_kv_heads, *logits.shape[1:])
        if kv.key_scale is not None:
            logits *= kv.key_scale[:, None, None]
        return logits.mul_(self._step.scale)


def _logits_of(step: Step, keys: Tensor) -> Tensor:
    """Exact logits of keys `[B, HKV, T, D]`, scaled: `[B, HKV, T, G]` float32."""
    kv = step.kv
    grouped = step.query.float().view(kv.batch_size, kv.num_kv_heads, -1, kv.head_dim)
    return (keys.float() @ grouped.transpose(2, 3)).mul_(step.scale)


def _weighable(step: Step, logits: Tensor, is_live: Tensor, is_begun: Tensor | None) -> Tensor:
    """Cap logits `[B, HKV, T, G]`, and set to -inf, in place, those that have no weight; gives which are not known.

    Args:
        step: What to read and how.
        logits: Scaled ones, estimates or by keys.
        is_live: `[B, 1 or HKV, T]`, tokens that may be attended to.
        is_begun: Likewise, tokens of a page that is not complete and is read whatever they are; None where none is.

    Returns:
        `[B, HKV, T, G]` bool, live tokens without a finite logit.
    """
    is_unknown = ~logits.isfinite()
    if is_begun is not None:
        is_unknown |= is_begun[..., None]
    is_dead = ~is_live[..., None]
    is_unknown &= ~is_dead
    if step.softcap is not None:
        logits.div_(step.softcap).tanh_().mul_(step.softcap)
    logits.masked_fill_(is_dead | is_unknown, -math.inf)
    return is_unknown


def _normaliser(step: Step, logits: Tensor) -> Tensor:
    """Log of the sum of all weights of a head, its sink's included: `[B, HKV, 1, G]`; 0 where it has none."""
    normaliser = torch.logsumexp(logits, 2, keepdim=True)
    if step.sinks is not None:
        normaliser = torch.logaddexp(normaliser, step.sinks.float().view(1, logits.shape[1], 1, -1))
    return normaliser.masked_fill(normaliser == -math.inf, 0)


def _reduce(step: Step, weights: Tensor, is_unknown: Tensor, scores: Tensor) -> None:
    """Log weights of tokens `[B, HKV, T, G]` as scores of units `[B, HKV, U]`, over a unit's tokens and the group."""
    by_unit = weights.view(*scores.shape, -1)  # [B, HKV, U, unit_size * G]
    if step.config.group_reduction == "mass":
        torch.logsumexp(by_unit, 3, out=scores).sub_(math.log(weights.shape[3]))
    else:
        torch.amax(by_unit, 3, out=scores)
    # The page being written is read always; a unit with a key that is not finite, to show as in dense attention.
    scores.masked_fill_(is_unknown.view(by_unit.shape).any(3), math.inf)

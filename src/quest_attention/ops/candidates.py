"""A decode step that ranks the tokens of some pages by their exact keys, as a whole: the PyTorch path on a CPU.

The logits by which tokens are ranked are those that attention weighs them by, so the keys are read once, and of the
values only those of the chosen tokens. The verbs, one after the other, would read the chosen tokens' keys again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quest_attention.ops.gathering import gather_keys, gather_values
from quest_attention.ops.ranking import ranking_of_weights
from quest_attention.ops.selection import Selection
from quest_attention.ops.step import Step
from quest_attention.ops.torch_backend import candidates_of
from quest_attention.pages import num_pages

__all__ = ["quest_decode"]


def quest_decode(step: Step) -> tuple[Tensor, Selection] | None:
    """See `ops.quest_decode`. None for all but tokens ranked by exact keys, on a CPU, of unmasked rows of one length.

    None also where a logit is not finite: the verbs look at each token then.
    """
    kv, config, length = step.kv, step.config, step.seq_lens
    if not config.candidate_pages or config.unit_size > 1 or kv.keys.device.type != "cpu":
        return None
    if not isinstance(length, int) or step.token_mask is not None or length <= config.token_budget or not kv.batch_size:
        return None
    keys, pages = _candidate_keys(step, length)
    weights = _log_weights(step, keys)
    if weights is None:
        return None
    used = keys.shape[2]
    best = _best(step, weights[..., :used])  # [B, HKV, K]
    tokens = best
    if pages is not None:
        places = torch.arange(kv.page_size, device=pages.device)
        tokens = (pages[..., None] * kv.page_size + places).flatten(2).gather(2, best)

    # Attention over the chosen tokens alone: their weights among all candidates, normalised anew.
    chosen = weights.gather(3, best[:, :, None].expand(-1, -1, weights.shape[2], -1))
    if step.sinks is not None:
        chosen = torch.cat([chosen, weights[..., used:]], 3)
    shares = torch.softmax(chosen, 3)[..., : config.token_budget]
    output = (shares @ gather_values(kv, tokens, 1).float()).to(step.query.dtype).flatten(1, 2)
    if step.out is not None:
        output = step.out.copy_(output)
    counts = torch.full(tokens.shape[:2], config.token_budget, dtype=torch.int32, device=output.device)
    return output, Selection(tokens.to(torch.int32), counts, 1)


def _candidate_keys(step: Step, length: int) -> tuple[Tensor, Tensor | None]:
    """Keys that rank tokens, `[B, HKV, T, D]`, and the pages they are of, `[B, HKV, C]` int64 ascending.

    None instead of the pages where they are all that a sequence has.
    """
    kv, most, size = step.kv, step.config.candidate_pages, step.kv.page_size
    held = num_pages(length, size)
    if held > most:
        pages = candidates_of(step).units.long()
        used = (most - 1) * size + (length - 1) % size + 1  # the page being written is last, and the cut is all to mask
        return gather_keys(kv, pages, size)[:, :, :used], pages
    if kv.contiguous is not None and kv.key_scale is None:
        return kv.contiguous.keys[:, :, :length], None
    every = torch.arange(held, device=kv.keys.device).expand(kv.batch_size, kv.num_kv_heads, -1)
    return gather_keys(kv, every, size)[:, :, :length], None


def _log_weights(step: Step, keys: Tensor) -> Tensor | None:
    """Log-softmax over the candidates `[B, HKV, T, D]`, and behind them the sink: `[B, HKV, G, T or T + 1]` float32.

    None where a logit is not finite.
    """
    kv = step.kv
    query = step.query.float().view(kv.batch_size, kv.num_kv_heads, -1, kv.head_dim) * step.scale
    logits = query @ keys.float().transpose(2, 3)
    if not bool(logits.sum().isfinite()):
        return None
    if step.softcap is not None:
        logits.div_(step.softcap).tanh_().mul_(step.softcap)
    if step.sinks is not None:  # one more logit that takes weight and gives no value
        column = step.sinks.float().view(1, kv.num_kv_heads, -1, 1).expand(kv.batch_size, -1, -1, -1)
        logits = torch.cat([logits, column], 3)
    return torch.log_softmax(logits, 3)


def _best(step: Step, weights: Tensor) -> Tensor:
    """The forced tokens and those of the largest log weights `[B, HKV, G, T]`: `[B, HKV, K]` int64, ascending."""
    config, size, used = step.config, step.kv.page_size, weights.shape[3]
    scores = torch.logsumexp(weights, 2) if config.group_reduction == "mass" else torch.amax(weights, 2)
    rank = ranking_of_weights(scores)
    rank[:, :, : config.num_sink_pages * size] = math.inf
    rank[:, :, (num_pages(used, size) - max(1, config.num_recent_pages)) * size :] = math.inf
    return rank.topk(config.token_budget, sorted=False).indices.sort(-1).values

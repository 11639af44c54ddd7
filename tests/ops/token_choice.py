"""What is true of every step of `token_decode`, whichever tokens its sample of ranks makes it draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from caches import Cache
from quest_attention import QuestConfig
from quest_attention.ops import Step, reference
from quest_attention.ops.triton import token_decode, token_workspace
from quest_attention.pages import num_pages

__all__ = ["assert_chosen"]

_ROUNDING = 0.02
"""Of a rank in float16, up to 32 in size, and of the estimates' own arithmetic."""


def _rows(cache: Cache, query: Tensor, b: int, h: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a row: keys and values `[T, D]` float64, queries `[G, D]`, and estimates of complete pages `[T', G]`."""
    kv, end = cache.kv, cache.lengths[b]
    group = query.shape[1] // kv.num_kv_heads
    pages = kv.page_table[b, : num_pages(end, kv.page_size)].long()
    keys, values = (stored[pages][:, :, h].flatten(0, 1)[:end].double() for stored in (kv.keys, kv.values))
    scale = 1.0
    if kv.key_scale is not None and kv.value_scale is not None:
        scale = float(kv.key_scale.expand(kv.num_kv_heads)[h])
        keys, values = keys * scale, values * float(kv.value_scale.expand(kv.num_kv_heads)[h])
    heads = query[b, h * group : (h + 1) * group]
    kept = kv.metadata[pages[: end // kv.page_size], h].flatten(1)[None]
    return keys, values, heads.double(), kv.form.score(kv.form.see(heads.float()[None]), kept)[0] * scale


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def assert_chosen(
    cache: Cache,
    query: Tensor,
    config: QuestConfig,
    rounding: float = _ROUNDING,
    *,
    token_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> list[float]:
    """Run a step twice, and hold it to what is kept, to the keys, and to the oracle's attention over its choice.

    Args:
        cache: Sketched.
        query: `[B, HQ, D]`.
        config: Of single tokens by sketches.
        rounding: Of a rank in base 2, as far as a sign's worth may be rounded.
        token_mask: As of a `Step`.
        softcap: Likewise.
        sinks: Likewise.

    Returns:
        Of each row of more live tokens than the budget, the share of those of the largest weights that were chosen.
    """
    kv = cache.kv
    workspace = token_workspace.make_token_workspace(kv, query.shape[1], config)
    assert workspace is not None
    step = Step(
        query=query, kv=kv, seq_lens=cache.seq_lens, config=config, workspace=workspace, token_mask=token_mask,
        softcap=softcap, sinks=sinks,
    )  # fmt: skip
    done, once_more = (token_decode.decode_tokens(step) for _ in range(2))
    assert done is not None and once_more is not None
    (output, selected), (again, same) = done, once_more
    assert torch.equal(output, again), "the same twice"
    assert torch.equal(selected.units, same.units)
    assert not workspace.counters.any() and not workspace.found.any(), "counters are as they were"

    group = query.shape[1] // kv.num_kv_heads
    parts = 1 if group == 1 else 4
    norms = workspace.norms.flatten()[: kv.batch_size * kv.num_kv_heads * parts * 16].view(-1, parts, 16).double()
    shares = []
    for b, end in enumerate(cache.lengths):
        for h in range(kv.num_kv_heads):
            chosen = selected.units[b, h, : int(selected.counts[b, h])].long()
            assert (chosen[1:] > chosen[:-1]).all(), "in the order of the sequence"
            assert (selected.units[b, h, len(chosen) :] == -1).all()
            live = torch.arange(end, device=query.device)
            if token_mask is not None:
                live = live[: token_mask.shape[1]][token_mask[b, :end]]
            if len(live) <= config.token_budget:
                assert chosen.tolist() == live.tolist(), "read whole"
                continue
            assert len(chosen) == config.token_budget
            pages = (live // kv.page_size).unique()
            forced = int(pages[config.num_sink_pages]) * kv.page_size
            last = int(pages[-max(1, config.num_recent_pages)]) * kv.page_size
            among = live[(live >= forced) & (live < last)]
            always = live[(live < forced) | (live >= last)]
            keys, _, heads, estimates = _rows(cache, query, b, h)
            scale, in_base_2 = kv.head_dim**-0.5, math.log2(math.e)
            norm = torch.logsumexp(norms[b * kv.num_kv_heads + h, :, :group] * math.log(2), 0) / math.log(2)
            exact = (_capped(keys @ heads.T * scale, softcap) * in_base_2 - norm).amax(1)
            rough = (_capped(estimates.double() * scale, softcap) * in_base_2 - norm).amax(1)
            passes = _passing(workspace.passing, b * kv.num_kv_heads + h, kv.max_pages, kv.page_size)[:last]
            assert passes[among].sum() >= len(chosen) - len(always), "candidates for all that is read"
            ranks = rough[among[passes[among]]]
            lowest = ranks[~ranks.isnan()].min()  # of a page whose sketch is not finite all pass
            assert not (rough[among] > lowest + rounding)[~passes[among]].any(), "who passes ranks above who does not"
            mine = torch.zeros(end, dtype=torch.bool, device=query.device)
            mine[chosen] = True
            assert mine[always].all(), "forced pages are read"
            assert mine[live].sum() == len(chosen), "none of the dead is"
            free = among[mine[among]]
            assert passes[free].all()
            left = among[passes[among] & ~mine[among]]
            if len(left):
                assert exact[left].max() <= exact[free].min() + 1e-3, "the best of the candidates by their keys"
            best = among[exact[among].topk(len(free)).indices]
            shares.append(float(mine[best].double().mean()))
    as_lists = [[[unit for unit in head if unit >= 0] for head in row] for row in selected.units.tolist()]
    expected, _ = reference.sparse_decode_attention(
        query, kv, cache.lengths, as_lists, kv.head_dim**-0.5, softcap, sinks, token_mask, unit_size=1
    )  # fmt: skip
    precision = torch.finfo(query.dtype).eps
    torch.testing.assert_close(output.double().cpu(), expected.double().cpu(), rtol=4 * precision, atol=8 * precision)
    return shares


def _passing(words: Tensor, row: int, max_pages: int, page_size: int) -> Tensor:
    """Which tokens of a row passed, `[T]` bool, from the words that say so."""
    each = -(-page_size // 16)
    mine = words.flatten()[row * max_pages * each : (row + 1) * max_pages * each].view(max_pages, each)
    token = torch.arange(16, device=words.device)
    passing: Tensor = (mine[..., None] >> (token // 2 * 4 + token % 2) & 1).bool().flatten(1)[:, :page_size].flatten()
    return passing

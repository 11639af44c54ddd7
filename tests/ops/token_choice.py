"""What is true of every step of `token_decode`, whichever tokens its sample of ranks makes it draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from caches import Cache
from quest_attention import QuestConfig
from quest_attention.forms.sketch import SketchLayout
from quest_attention.ops import Selection, Step, reference
from quest_attention.ops.triton import token_decode, token_workspace
from quest_attention.pages import PagedKV, num_pages

__all__ = ["assert_choice", "assert_chosen"]

_ROUNDING = 0.02
"""Of a rank in float16, up to 32 in size, and of the estimates' own arithmetic."""
_ON_A_GPU = 0.05
"""The same of products in 16 bits, or of a rank that the hardware's own tanh has capped."""
_SCANNED = 2**-16
"""Of a product of whole numbers, in units of the largest: what one sum in float32 and one normaliser leave."""
_SWAPPED = 1e-3
"""Of an exact rank: such a distance two sums of products may turn round."""
_SUM = 2e-3
"""Of a log-sum-exp in base 2."""


def _rows(step: Step, b: int, h: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a row: keys `[T, D]` and queries `[G, D]` float64, and estimates of complete pages `[T', G]` as kernels do."""
    kv = step.kv
    group = step.query.shape[1] // kv.num_kv_heads
    pages = kv.page_table[b, : num_pages(end, kv.page_size)].long()
    keys = kv.keys[pages][:, :, h].flatten(0, 1)[:end].double()
    scale = 1.0 if kv.key_scale is None else float(kv.key_scale.expand(kv.num_kv_heads)[h])
    heads = step.query[b, h * group : (h + 1) * group]
    kept = kv.metadata[pages[: end // kv.page_size], h].flatten(1)[None]
    if not token_workspace.can_scan(kv, group):
        estimates = kv.form.score(kv.form.see(heads.float()[None]), kept)
    else:
        of_mean, of_sign = (_rounded(kv, heads, codes) for codes in (127, 7))
        estimates = kv.form.score(of_mean, _without(kept, kv, 1)) + kv.form.score(of_sign, _without(kept, kv, 0))
    return keys * scale, heads.double(), estimates[0].double() * scale


def _rounded(kv: PagedKV, heads: Tensor, codes: int) -> Tensor:
    """What a form sees of queries `[G, D]` if each, turned, is so many codes from 0 to its largest number."""
    dim = heads.shape[-1]
    turned = kv.form.see(heads.float())[..., :dim]
    step = turned.abs().amax(-1, keepdim=True).clamp(min=1e-30) / codes
    rounded = (turned / step + 0.5).floor() * step
    return kv.form.see(kv.form.see(rounded)[..., :dim])[None]  # turning twice is not turning


def _without(kept: Tensor, kv: PagedKV, part: int) -> Tensor:
    """Sketches `[1, P, bytes]` whose means (0) or signs (1) are worth nothing; not finite is what was not."""
    at = SketchLayout.of(kv.page_size, kv.head_dim).scales + 4 * part
    kept = kept.clone()
    kept[..., at : at + 4] = (kept[..., at : at + 4].clone().view(torch.float32) * 0).view(torch.uint8)
    return kept


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def assert_choice(step: Step, selected: Selection) -> list[float]:
    """Hold what a step chose to its sketches, to its keys, and to what its workspace says of it.

    Args:
        step: The last that used its workspace.
        selected: What it chose.

    Returns:
        Of each row of more live tokens than the budget, the share of those of the largest weights that were chosen; by
        estimates where these alone choose.
    """
    kv, query, config, workspace = step.kv, step.query, step.config, step.workspace
    assert isinstance(workspace, token_workspace.TokenWorkspace)
    group = query.shape[1] // kv.num_kv_heads
    parts = 1 if group == 1 else token_workspace.SAMPLE_PARTS
    rows = kv.batch_size * kv.num_kv_heads
    heads = max(16, 1 << (group - 1).bit_length())  # of a part in a workspace's norms
    norms = workspace.norms.flatten()[: rows * parts * heads].view(rows, parts, heads).double()
    norms = torch.logsumexp(norms * math.log(2), 1) / math.log(2)
    lengths = step.seq_lens.tolist() if isinstance(step.seq_lens, Tensor) else [step.seq_lens] * kv.batch_size
    scans = token_workspace.can_scan(kv, group)
    shares = []
    for b, end in enumerate(lengths):
        for h in range(kv.num_kv_heads):
            row = b * kv.num_kv_heads + h
            chosen = selected.units[b, h, : int(selected.counts[b, h])].long()
            assert (chosen[1:] > chosen[:-1]).all(), "in the order of the sequence"
            assert (selected.units[b, h, len(chosen) :] == -1).all()
            live = torch.arange(end, device=query.device)
            if step.token_mask is not None:
                live = live[: step.token_mask.shape[1]][step.token_mask[b, :end]]
            if len(live) <= config.token_budget:
                assert chosen.tolist() == live.tolist(), "read whole"
                continue
            if config.candidate_factor:
                assert len(chosen) == config.token_budget
            pages = (live // kv.page_size).unique()
            forced = int(pages[config.num_sink_pages]) * kv.page_size
            last = int(pages[-max(1, config.num_recent_pages)]) * kv.page_size
            among = live[(live >= forced) & (live < last)]
            always = live[(live < forced) | (live >= last)]
            keys, heads, estimates = _rows(step, b, h, end)
            logits, estimates = (
                _capped(one.double() * step.scale, step.softcap) * math.log2(math.e)
                for one in (keys @ heads.T, estimates)
            )
            sinks = None if step.sinks is None else step.sinks.view(-1, group)[h].double() * math.log2(math.e)
            dropped = 0 if config.candidate_factor or group == 1 else token_workspace.DROPPED_KEYS
            norm, expected = norms[row, :group], _sum_of(logits, live, parts, kv.page_size, sinks, dropped)
            assert (norm - expected).abs().max() < _SUM, f"heads' sums {norm.tolist()}, not {expected.tolist()}"
            exact, rough = ((one - norm).amax(1) for one in (logits, estimates))
            passes = _passing(workspace.passing, row, kv.max_pages, kv.page_size)[:last]
            if config.candidate_factor:
                assert passes[among].sum() >= len(chosen) - len(always), "candidates for all that is read"
            ranks = rough[among[passes[among]]]
            assert passes[among][rough[among].isnan()].all(), "of a page whose sketch is not finite all pass"
            lowest = ranks[~ranks.isnan()].min()
            rounding = _ON_A_GPU if query.is_cuda else _ROUNDING
            if scans and step.softcap is None:
                rounding = _SUM + _SCANNED * float(estimates[among].nan_to_num(0).abs().max())
            above = (rough[among] - lowest)[~passes[among]].nan_to_num(-math.inf)
            assert not (above > rounding).any(), f"who does not pass ranks {float(above.max())} above who does"
            mine = torch.zeros(end, dtype=torch.bool, device=query.device)
            mine[chosen] = True
            assert mine[always].all(), "forced pages are read"
            assert mine[live].sum() == len(chosen), "none of the dead is"
            free = among[mine[among]]
            assert passes[free].all()
            if not config.candidate_factor:
                room = config.token_budget - len(always)
                assert free.tolist() == among[passes[among]][-room:].tolist(), "all that passes, if there is room"
                assert 0 < len(free) <= room
                best = among[rough[among].nan_to_num(math.inf).topk(len(free)).indices]
                shares.append(float(mine[best].double().mean()))
                continue
            left = among[passes[among] & ~mine[among]]
            if len(left):
                assert exact[left].max() <= exact[free].min() + _SWAPPED, "the best of the candidates by their keys"
            best = among[exact[among].topk(len(free)).indices]
            shares.append(float(mine[best].double().mean()))
    return shares


def assert_chosen(
    cache: Cache,
    query: Tensor,
    config: QuestConfig,
    *,
    token_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> list[float]:
    """Run a step twice, and hold it to `assert_choice`, and to the oracle's attention over its choice.

    Args:
        cache: Sketched.
        query: `[B, HQ, D]`.
        config: Of single tokens by sketches.
        token_mask: As of a `Step`.
        softcap: Likewise.
        sinks: Likewise.

    Returns:
        As of `assert_choice`.
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
    shares = assert_choice(step, selected)
    as_lists = [[[unit for unit in head if unit >= 0] for head in row] for row in selected.units.tolist()]
    expected, _ = reference.sparse_decode_attention(
        query, kv, cache.lengths, as_lists, kv.head_dim**-0.5, softcap, sinks, token_mask, unit_size=1
    )  # fmt: skip
    precision = torch.finfo(query.dtype).eps
    torch.testing.assert_close(output.double().cpu(), expected.double().cpu(), rtol=4 * precision, atol=8 * precision)
    return shares


def _sum_of(
    logits: Tensor, live: Tensor, parts: int, page_size: int, sinks: Tensor | None, dropped: int
) -> Tensor:  # fmt: skip
    """The log-sum-exp `[G]` of a row's exact logits `[T, G]`, all in base 2, of the tokens that `preparation` draws.

    Each of its parts has some of them, and leaves out so many of the largest of each head.
    """
    first, end = int(live[0]), int(live[-1]) + 1
    edge = min(page_size, token_workspace.SAMPLED_KEYS * parts // 4)
    drawn = token_workspace.SAMPLED_KEYS * parts - 2 * edge
    nth = torch.arange(drawn)
    between = max(1, end - first - 2 * edge)
    each = max(16, -(-16 * between // drawn))  # sixteenths of a token
    rare = max(0, each.bit_length() - 5)
    each = -(-each >> rare << rare)
    position = (nth * each + ((nth * 40503 >> 6 & 1023) * (each - 15) >> 10)) // 16
    assert len(position.unique()) == len(position)
    position = torch.where(position < between, position + first + edge, -1)
    edges = torch.cat([torch.arange(first, first + edge), torch.arange(end - edge, end)])
    worth = torch.full([len(edges) + len(position)], math.log2(each / 16), dtype=torch.float64, device=logits.device)
    worth[: len(edges)] = 0
    position = torch.cat([edges, position]).to(logits.device)
    is_live = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    is_live[live] = True
    is_drawn = (position >= first) & (position < end)
    position = position.clamp(min=0, max=len(logits) - 1)
    is_known = (is_drawn & is_live[position])[:, None] & logits[position].isfinite()
    weights = (logits[position] + worth[:, None]).masked_fill(~is_known, -math.inf)
    weights = weights.view(parts, token_workspace.SAMPLED_KEYS, -1)
    for _ in range(dropped):
        rest = weights.masked_fill(weights == weights.amax(1, keepdim=True), -math.inf)
        weights = torch.where(rest.amax(1, keepdim=True) > -math.inf, rest, weights)
    weights = weights.flatten(0, 1)
    if sinks is not None:
        weights = torch.cat([weights, sinks[None]])
    return torch.logsumexp(weights * math.log(2), 0) / math.log(2)


def _passing(words: Tensor, row: int, max_pages: int, page_size: int) -> Tensor:
    """Which tokens of a row passed, `[T]` bool, from the words that say so."""
    each = -(-page_size // 16)
    mine = words.flatten()[row * max_pages * each : (row + 1) * max_pages * each].view(max_pages, each)
    token = torch.arange(16, device=words.device)
    passing: Tensor = (mine[..., None] >> (token % 8 * 4 + token // 8) & 1).bool().flatten(1)[:, :page_size].flatten()
    return passing

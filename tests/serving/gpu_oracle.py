"""The oracle inside vLLM on a GPU: a sample of the Quest calls of an eager engine, against float64 on the same GPU.

There keys and values can be read back from vLLM's cache, so nothing is kept a second time.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from known_scales import KnownScales
from quest_attention.config import QuestConfig
from quest_attention.ops import Selection, Step, resolve_backend
from quest_attention.ops.masses import NO_CANDIDATE
from quest_attention.ops.query_tokens import QueryTokens
from quest_attention.pages import PagedKV, num_pages
from quest_attention.vllm.gpu import QuestGPUImpl
from quest_attention.vllm.impl import OpenCache
from quest_attention.vllm.step import QuestStep
from quest_attention.vllm.worker import QuestWorkerExtension
from right_metadata import is_right
from token_choice import assert_choice

_FLOAT32_SUM = 1e-4
"""How far two float32 sums of 128 products lie apart at most, relative to them: such scores may swap places."""
_LOG_MASS = 5e-3
"""How far log masses of two backends lie apart, as tests/gpu/test_sketches.py has it."""
_WITHOUT_SCORE = 1 / 64
"""Of the units read, how many at most were no candidates of the other backend."""
_EVERY = 7
"""One call in so many is checked: a number that shares nothing with layers, so that each layer gets its turn."""


class GPUOracleExtension(KnownScales, QuestWorkerExtension):
    """What tests ask of a worker on a GPU; vLLM adds it by `worker_extension_cls`."""

    def install_oracle(self) -> None:
        """Check a sample of the Quest calls of this worker from now on."""
        self._seen: Counter[str] = Counter()
        self._failures: list[str] = []
        self._worst = 0.0
        self._attend = attend = QuestGPUImpl.attend

        def checked_attend(
            impl: Any, layer: Any, query: Tensor, opened: OpenCache, step: QuestStep, output: Tensor
        ) -> Selection:
            output.fill_(float("nan"))
            selected = attend(impl, layer, query, opened, step, output)
            self._seen["calls"] += 1
            if self._seen["calls"] % _EVERY == 0:
                self._check(layer.layer_name, opened.with_table(step.block_table), query, step, selected, output, impl)
            return selected

        QuestGPUImpl.attend = checked_attend  # type: ignore[method-assign]

    def remove_oracle(self) -> None:
        """Check no more."""
        QuestGPUImpl.attend = self._attend  # type: ignore[method-assign]

    def oracle_report(self) -> dict[str, Any]:
        """What was seen, the worst error of an output in units of what it may be, and what was wrong."""
        return {"seen": dict(self._seen), "worst": self._worst, "failures": self._failures}

    def _check(
        self, layer: str, kv: PagedKV, query: Tensor, step: QuestStep, selected: Selection, output: Tensor, impl: Any
    ) -> None:
        tokens = step.tokens
        by_row = query[:, None] if tokens is None else tokens.by_row(query)  # [R, T, HQ, D]
        attended = output[:, None] if tokens is None else tokens.by_row(output)
        lens = None if tokens is None else tokens.lens
        has = [by_row.shape[1]] * len(by_row) if lens is None else lens.tolist()
        several = QueryTokens(by_row, lens, kv, step.seq_lens)
        asked = Step(
            query=several.folded(), kv=kv, seq_lens=step.seq_lens, config=several.config(step.config),
            sm_scale=impl.scale, softcap=impl._softcap, sinks=several.folded_sinks(impl.sinks),
            workspace=step.workspace,
        )  # fmt: skip
        is_whole = (
            selected.unit_size == 1 and step.workspace is not None
        )  # a step of few launches, which left its notes
        wrong = _wrong_tokens(asked, selected) if is_whole else _wrong_units(asked, selected)
        self._failures.extend(f"{layer}, {one}" for one in wrong)
        group, size = by_row.shape[2] // kv.num_kv_heads, selected.unit_size
        rounded = 1 if by_row.shape[1] == 1 else 2  # what lies before several tokens of a step is rounded by itself
        for b, length in enumerate(step.seq_lens.tolist()):
            if length == 0:
                continue
            self._seen["rows"] += 1
            self._seen["rows of several tokens"] += by_row.shape[1] > 1
            table = kv.page_table[b, : num_pages(length, kv.page_size)].long()
            keys, values = (
                part[table].flatten(0, 1)[:length]
                if scale is None
                else (part[table].double() * scale[:, None]).flatten(0, 1)[:length].to(query.dtype)
                for part, scale in ((kv.keys, kv.key_scale), (kv.values, kv.value_scale))
            )  # [T, H, D]
            if not is_right(kv.form, kv.metadata[table], kv.keys[table], length).all():
                self._failures.append(f"{layer}, row {b}: a page's {kv.form.name} are not those of its keys")
            ours = plain = 0.0
            for h, nth in itertools.product(range(kv.num_kv_heads), range(has[b])):
                units = selected.units[b, h][selected.units[b, h] >= 0].long()
                read = (units[:, None] * size + torch.arange(size, device=units.device)).flatten()
                read = read[read < length - has[b] + nth + 1]  # none that is later
                heads = slice(h * group, (h + 1) * group)
                sinks = None if impl.sinks is None else impl.sinks[heads]
                q, k, v = by_row[b, nth, heads], keys[read, h], values[read, h]
                exact = _attend(q.double(), k.double(), v.double(), impl.scale, impl._softcap, sinks)
                ours = max(ours, float((attended[b, nth, heads] - exact).abs().nan_to_num(1e9).max()))
                by_torch = _attend(q, k, v, impl.scale, impl._softcap, sinks)
                rounding = torch.finfo(output.dtype).eps / 2 * float(exact.abs().max())  # of an output that is right
                plain = max(plain, rounded * rounding, float((by_torch - exact).abs().max()))
            allowed = 2 * plain + torch.finfo(torch.float32).eps
            self._worst = max(self._worst, ours / allowed)
            if ours > allowed:
                self._failures.append(f"{layer}, row {b}: output off by {ours:.2e}, expected at most {allowed:.2e}")


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention `[G, DV]` of some heads over some tokens, as plain PyTorch has it in the dtype of what it is given."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None], scale=scale)[0, 0]
    precise = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(precise) @ k.to(precise).T * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(precise)[:, None]], 1)
    return torch.softmax(logits, 1)[:, : len(k)].to(v.dtype) @ v


def _wrong_tokens(asked: Step, selected: Selection) -> list[str]:
    """What is wrong with a choice of single tokens, beside the kernels' own sample: see `token_choice`."""
    try:
        assert_choice(asked, selected)
    except AssertionError as error:
        return [str(error)]
    return []


def _wrong_units(asked: Step, selected: Selection) -> list[str]:
    """What was read or left out beside the choice of the PyTorch path."""
    config = asked.config
    asked = replace(asked, config=replace(config, backend="torch"), workspace=None)
    verbs = resolve_backend("torch", asked.query.device).verbs
    scores = verbs.score_pages(asked, None)
    expected = verbs.select_pages(asked, scores)
    assert isinstance(asked.seq_lens, Tensor), "a batch of vLLM has lengths on the device"
    found = []
    for b, length in enumerate(asked.seq_lens.tolist()):
        for h in range(asked.kv.num_kv_heads):
            read, wanted = (one.units[b, h][one.units[b, h] >= 0].tolist() for one in (selected, expected))
            wrong = _wrongly(scores[b, h], read, wanted, length, config)
            if wrong:
                found.append(f"row {b}, head {h}: {wrong} read or left out")
    return found


def _wrongly(scores: Tensor, read: list[int], wanted: list[int], length: int, config: QuestConfig) -> list[int]:
    """Units that were read or left out and are not at the threshold, where float32 sums in another order may swap two.

    A token that is a candidate of one and not of the other has no score; of such there may be few.
    """
    swapped = sorted(set(read) ^ set(wanted))
    if not swapped:
        return []
    if len(read) != len(wanted):
        return swapped
    size, page_size = config.unit_size, config.page_size
    recent = (num_pages(length, page_size) - max(1, config.num_recent_pages)) * page_size
    chosen = [unit for unit in wanted if config.num_sink_pages * page_size <= unit * size < recent]
    threshold = float(scores[chosen].min())
    off = scores[swapped].tolist()
    few = len([score for score in off if score == NO_CANDIDATE]) <= len(wanted) * _WITHOUT_SCORE
    near = _FLOAT32_SUM * abs(threshold) + (_LOG_MASS if config.metadata == "sketch" else 0)
    return [
        unit
        for unit, score in zip(swapped, off, strict=True)
        if (not few if score == NO_CANDIDATE else abs(score - threshold) > near)
    ]

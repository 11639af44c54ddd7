"""The oracle inside a vLLM worker: every Quest call of every layer and step is checked where it happens.

A server's keys and values are kept a second time, by slot, as they come: vLLM's CPU cache has formats of its own. Each
call's page metadata, selection and output are then held to `ops.reference` over that copy. Workers get this over vLLM's
`collective_rpc`, so that it is there in other processes too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from known_scales import KnownScales
from quest_attention.forms import FP8, form_of
from quest_attention.ops import Selection, reference
from quest_attention.pages import PagedKV
from quest_attention.vllm.step import QuestStep
from quest_attention.vllm.worker import QuestWorkerExtension
from right_metadata import is_right

_FLOAT32_SUM = 1e-4
"""How far two float32 sums of 128 products of unit size lie apart at most: scores closer than this may swap places."""
_LARGEST = torch.finfo(FP8).max
_EVERY = 13
"""Of the calls with sketches the selection of one in so many is held to the reference, which takes bit by bit: a number
that shares nothing with layers, so that each layer gets its turn."""
_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
"""Of PyTorch's attention; the second is a yardstick in float32 alone."""
_EXPONENTIAL = 20 * torch.finfo(torch.float32).eps
"""How far PyTorch's fused kernel may be off in an exponential, of its size: `exp_u20` is good to 20 units in the last
place where vectors are whole (ATen's `vec512_float.h` says so, and so it is off), `std::exp` to one in what is left."""


class Oracle:
    """Keeps a copy of what is written, and checks what is read.

    Attributes:
        seen: Calls, rows and so on that were checked.
        worst: Largest error of an output, in units of what it may be.
        failures: What was wrong, in words; empty when nothing was.
    """

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.failures: list[str] = []
        self.worst = 0.0
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}
        self._scales: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def write(self, layer: str, kv: PagedKV, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Tokens go to their slots, divided by the scales of the layer where it has some; what nobody wrote is NaN."""
        self._scales[layer] = scales = (kv.key_scale, kv.value_scale)
        used = slots >= 0
        page, offset = slots[used] // kv.page_size, slots[used] % kv.page_size
        for copy, fresh, scale in zip(self._copy_of(layer, kv), (key, value), scales, strict=True):
            stored = fresh[used]
            if scale is not None:
                stored = (stored.double() / scale[:, None]).clamp(-_LARGEST, _LARGEST).to(FP8)
            copy[page, offset] = stored

    def give(self, pages: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Keys and values of some pages, `[P, N, H, D]` each, by layer."""
        return {layer: (keys[pages], values[pages]) for layer, (keys, values) in self._copies.items()}

    def take(self, layer: str, kv: PagedKV, given: tuple[Tensor, Tensor], pages: Tensor) -> None:
        """Pages are filled from elsewhere with what `give` gave for them there."""
        for copy, part in zip(self._copy_of(layer, kv), given, strict=True):
            copy[pages] = part

    def _copy_of(self, layer: str, kv: PagedKV) -> tuple[Tensor, Tensor]:
        if layer not in self._copies:
            empty = torch.full(kv.keys.shape, float("nan")).to(kv.keys.dtype)
            self._copies[layer] = (empty, empty.clone())
        return self._copies[layer]

    def check(
        self,
        layer: str,
        metadata: Tensor,
        query: Tensor,
        step: QuestStep,
        selected: Selection,
        output: Tensor,
        yardstick: Tensor | None,
        impl: Any,
    ) -> None:
        """One call: what is kept of every page, the pages that were chosen, the output.

        That may be twice as far from float64 as PyTorch's attention in the same dtype, or as `yardstick`: vLLM's kernel
        over the same tokens in a cache of their own, which on a CPU is less exact than PyTorch's.
        """
        key_scale, value_scale = self._scales[layer]
        kv = PagedKV(
            *self._copies[layer], metadata, step.block_table, form=form_of(step.config), key_scale=key_scale,
            value_scale=value_scale,
        )  # fmt: skip
        lengths, config = step.seq_lens.tolist(), step.config
        self.seen["calls"] += 1
        self._check_metadata(layer, kv, lengths)
        chosen = [[[unit for unit in head if unit >= 0] for head in row] for row in selected.units.tolist()]
        has = tokens_of_rows(step)
        for length, count in zip(lengths, has, strict=True):
            self.seen["rows past the budget" if length > config.token_budget else "rows within it"] += 1
            self.seen[f"rows of {count}"] += 1
        if kv.form.scores == "page" or self.seen["calls"] % _EVERY == 0:
            together = one_group(query, has, kv.num_kv_heads)
            self._check_selection(layer, replace(step, block_table=kv.page_table), together, kv, chosen, impl)
        # From here on each token is a row: it sees what its row chose and no token behind itself.
        row_of = [row for row, count in enumerate(has) for _ in range(count)]
        lengths = [
            max(0, length - count + 1 + at) for length, count in zip(lengths, has, strict=True) for at in range(count)
        ]
        kv = replace(kv, page_table=kv.page_table[row_of])
        chosen = [
            [[unit for unit in head if unit * selected.unit_size < length] for head in chosen[row]]
            for row, length in zip(row_of, lengths, strict=True)
        ]
        exact, _ = reference.sparse_decode_attention(
            query, kv, lengths, chosen, impl.scale, impl._softcap, impl.sinks, unit_size=selected.unit_size
        )
        error = float((output.double() - exact).abs().max()) if output.isfinite().all() else float("inf")
        stock = 0.0 if yardstick is None else float((yardstick.double() - exact).abs().max())
        # Where the verbs merge two parts, that before the tokens of the step was rounded to its dtype once more.
        merged = step.tokens is not None and yardstick is None and query.dtype != torch.float32
        rounding = torch.finfo(query.dtype).eps / 2 * float(exact.abs().max()) if merged else 0.0
        allowed = rounding + 2 * max(
            stock, self._plain_error(query, kv, lengths, chosen, selected.unit_size, exact, impl)
        )
        self.worst = max(self.worst, error / allowed)
        if error > allowed:
            self._fail(f"{layer}: output off by {error:.2e}, expected at most {allowed:.2e}")

    def _check_selection(
        self, layer: str, step: QuestStep, query: Tensor, kv: PagedKV, chosen: list[list[list[int]]], impl: Any
    ) -> None:
        """The units of each row and head are those with the best scores, but for scores that lie together."""
        config, lengths = step.config, step.seq_lens.tolist()
        recent = max(config.num_recent_pages, 1 + -(-(max(tokens_of_rows(step)) - 1) // config.page_size))
        sinks = impl.sinks
        if sinks is not None:
            sinks = sinks.unflatten(0, (kv.num_kv_heads, -1)).repeat(1, query.shape[1] // sinks.shape[0]).flatten()
        scores = reference.score_pages(
            query, kv, lengths, group_reduction=config.group_reduction, sm_scale=impl.scale, softcap=impl._softcap,
            sinks=sinks, unit_size=config.unit_size, candidates=config.candidate_budget or None,
        )  # fmt: skip
        expected = reference.select_pages(
            scores, lengths, config.page_size, config.token_budget, config.num_sink_pages, recent,
            unit_size=config.unit_size,
        )  # fmt: skip
        for b, row in enumerate(chosen):
            for h, units in enumerate(row):
                self.seen["selections"] += 1
                if units == expected[b][h]:
                    continue
                swapped = set(units) ^ set(expected[b][h])
                values = [float(scores[b, h, unit]) for unit in swapped]
                if len(units) != len(expected[b][h]) or max(values) - min(values) > _FLOAT32_SUM * max(
                    map(abs, values)
                ):
                    self._fail(f"{layer}, row {b}, head {h}: read {units}, expected {expected[b][h]}")

    def report(self) -> dict[str, Any]:
        """What was seen, the worst error of an output in units of what it may be, and what was wrong."""
        return {"seen": dict(self.seen), "worst": self.worst, "failures": self.failures}

    def stock(self, impl: Any, layer: Any, query: Tensor, step: QuestStep, selected: Selection) -> Tensor:
        """What vLLM's kernel makes of the selected pages, copied row after row to a plain cache of one KV head."""
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

        page = selected.units.clamp(min=0).long()
        physical = step.block_table[:, None].expand(-1, page.shape[1], -1).gather(2, page).long()  # [R, H, K]
        heads = torch.arange(page.shape[1])[None, :, None].expand_as(physical)
        rows, slots = page.shape[0] * page.shape[1], page.shape[2]
        keys, values = (
            copy.transpose(1, 2)[physical, heads].nan_to_num(0).view(-1, 1, copy.shape[-1])  # [R * H * K * N, 1, D]
            for copy in self._copies[_source(layer)]
        )
        cache = keys.new_zeros(rows * slots, 1, step.config.page_size, 2 * keys.shape[-1])
        where = torch.arange(keys.shape[0])
        CPUAttentionBackendImpl.do_kv_cache_update(impl, layer, keys, values, cache, where)
        table = torch.arange(rows * slots, dtype=torch.int32).view(rows, slots)
        metadata = replace(step.folded, block_table=table)
        by_head = query.unflatten(1, (page.shape[1], -1))  # [N, HKV, G, D]
        parts = by_head.split(tokens_of_rows(step))
        grouped = torch.cat([part.transpose(0, 1).flatten(0, 1) for part in parts])  # of a row head after head
        output = torch.empty_like(grouped)
        CPUAttentionBackendImpl.forward(impl, layer, grouped, None, None, cache, metadata, output)
        back = output.split([len(part) * page.shape[1] for part in parts])
        return torch.cat([one.unflatten(0, (page.shape[1], -1)).transpose(0, 1) for one in back]).view(query.shape)

    def _check_metadata(self, layer: str, kv: PagedKV, lengths: list[int]) -> None:
        """What is kept of live pages is right; and whether bounds are as narrow as can be."""
        for b, length in enumerate(lengths):
            table = kv.page_table[b, : -(-length // kv.page_size)].long()
            keys, kept = kv.keys[table], kv.metadata[table]
            self.seen["pages"] += len(table)
            for page in (~is_right(kv.form, kept, keys, length)).nonzero().flatten().tolist():
                self._fail(f"{layer}, row {b}, page {page}: not the {kv.form.name} of its keys, or nobody wrote one")
            if kv.form.is_bound:
                for page, bounds in enumerate(kept.double()):  # [H, 2, D]
                    own = keys.double()[page, : length - page * kv.page_size]  # [T, H, D]
                    narrowest = torch.stack([own.amax(0), own.amin(0)], 1)
                    self.seen["pages with exact bounds"] += torch.equal(narrowest, bounds)

    @staticmethod
    def _plain_error(
        query: Tensor, kv: PagedKV, lengths: list[int], chosen: list[list[list[int]]], size: int, exact: Tensor,
        impl: Any,
    ) -> float:  # fmt: skip
        """Largest error of PyTorch's attention over the same tokens in the same dtype.

        In float32 that of the worse of its two kernels, as in `likeness.plain_attention_error`, or what their
        exponentials may make of it, if that is more. Which tokens have a good one depends on how many there are: of 82
        the two newest, which often weigh most, come after the last whole vector, and of 96 with a mask they are in it.
        So a call over few rows may be lucky throughout, and the verbs' call over the same tokens not.
        """
        group, worst = query.shape[1] // kv.num_kv_heads, torch.finfo(torch.float32).eps
        for b, length in enumerate(lengths):
            for h in range(kv.num_kv_heads if length else 0):
                units = torch.tensor(chosen[b][h])
                tokens = (units[:, None] * size + torch.arange(size)).flatten()
                tokens = tokens[tokens < length]
                where = kv.page_table[b, tokens // kv.page_size].long(), tokens % kv.page_size
                keys, values = (
                    part[where][:, h] if scale is None else (part[where][:, h].double() * scale).to(query.dtype)
                    for part, scale in ((kv.keys, kv.key_scale), (kv.values, kv.value_scale))
                )
                heads = slice(h * group, (h + 1) * group)  # together, as PyTorch rounds by how many there are
                for kind in _KERNELS[: 1 + (query.dtype == torch.float32)]:
                    with sdpa_kernel(kind):
                        plain = _plain(query[b, heads], keys, values, heads, impl)
                    worst = max(worst, float((plain.double() - exact[b, heads]).abs().max()))
                if query.dtype == torch.float32:
                    spread = _spread(query[b, heads], keys, values, heads, exact[b, heads], impl)
                    worst = max(worst, _EXPONENTIAL * float(spread.max()))
        return worst

    def _fail(self, what: str) -> None:
        if len(self.failures) < 20:
            self.failures.append(what)


def tokens_of_rows(step: QuestStep) -> list[int]:
    """How many tokens each row of a step has."""
    if step.tokens is None:
        return [1] * step.num_rows
    if step.tokens.lens is None:
        return [step.tokens.most] * step.num_rows
    found: list[int] = step.tokens.lens.tolist()
    return found


def one_group(query: Tensor, has: list[int], num_kv_heads: int) -> Tensor:
    """Of the tokens `[N, HQ, D]` of rows one `[R, HKV * T * G, D]`, each KV head with those of all of a row's tokens.

    What a row lacks is its last token again.
    """
    rows = []
    for part in query.unflatten(1, (num_kv_heads, -1)).split(has):
        padded = torch.cat([part, part[-1:].expand(max(has) - len(part), *part.shape[1:])])  # [T, HKV, G, D]
        rows.append(padded.transpose(0, 1).flatten(0, 2))
    return torch.stack(rows)


def _source(layer: Any) -> str:
    """Name of the layer whose keys and values a layer reads."""
    return getattr(layer, "kv_sharing_target_layer_name", None) or str(layer.layer_name)


def _plain(query: Tensor, keys: Tensor, values: Tensor, heads: slice, impl: Any) -> Tensor:
    """PyTorch's attention of one KV head in the dtype of the cache, `[G, D]`; in steps where it has no function for it.

    The function knows no softcap and no sinks.
    """
    if impl._softcap is None and impl.sinks is None:
        return F.scaled_dot_product_attention(
            query[None, None], keys[None, None], values[None, None], scale=impl.scale
        )[0, 0]
    logits = query @ keys.T * impl.scale
    if impl._softcap is not None:
        logits = (logits / impl._softcap).tanh() * impl._softcap
    count = logits.shape[1]
    if impl.sinks is not None:
        logits = torch.cat([logits, impl.sinks[heads, None].to(logits)], 1)
    weights = torch.softmax(logits, -1, dtype=torch.float32)[:, :count]
    return weights.to(values) @ values


class OracleExtension(KnownScales, QuestWorkerExtension):
    """What tests ask of a worker; vLLM adds it by `worker_extension_cls`."""

    def install_oracle(self) -> None:
        """Check every Quest call of this worker from now on. Before the first request: what was not seen is missing."""
        from quest_attention.vllm.cpu import QuestCPUImpl

        self.watch(QuestCPUImpl, has_yardstick=True)

    def watch(self, kind: Any, *, has_yardstick: bool) -> None:
        """Check every call of a class of attention; with vLLM's own kernel as a yardstick where it attends."""
        oracle = self._oracle = Oracle()  # type: ignore[attr-defined]
        write, attend = kind.write, kind.attend

        def checked_write(impl: Any, layer: Any, key: Tensor, value: Tensor, opened: Any, slots: Tensor) -> None:
            write(impl, layer, key, value, opened, slots)
            oracle.write(layer.layer_name, opened.paged, key, value, slots)

        def checked_attend(
            impl: Any, layer: Any, query: Tensor, opened: Any, step: QuestStep, output: Tensor
        ) -> Selection:
            output.fill_(float("nan"))
            selected: Selection = attend(impl, layer, query, opened, step, output)
            # Units of less than a page, and sinks of each head, are not vLLM's to read.
            by_stock = has_yardstick and step.folded is not None and impl.sinks is None
            yardstick = oracle.stock(impl, layer, query, step, selected) if by_stock else None
            metadata = opened.parts.metadata
            oracle.check(_source(layer), metadata, query, step, selected, output, yardstick, impl)
            return selected

        def unwatch() -> None:
            kind.write, kind.attend = write, attend

        self._unwatch = unwatch  # type: ignore[attr-defined]
        kind.write, kind.attend = checked_write, checked_attend

    def remove_oracle(self) -> None:
        """Check no more calls: another engine of this process is about to start."""
        self._unwatch()  # type: ignore[attr-defined]

    def quest_form(self) -> str:
        """What this worker's steps are planned with."""
        builders = [
            group.get_metadata_builder()
            for groups in self.model_runner.attn_groups  # type: ignore[attr-defined]
            for group in groups
        ]
        (form,) = {str(form_of(builder.config)) for builder in builders if hasattr(builder, "counters")}
        return form

    def oracle_report(self) -> dict[str, Any]:
        """What the oracle of this worker saw."""
        oracle: Oracle = self._oracle  # type: ignore[attr-defined]
        return oracle.report()


def _spread(query: Tensor, keys: Tensor, values: Tensor, heads: slice, exact: Tensor, impl: Any) -> Tensor:
    """How far values lie from the output, on the weighted mean, `[G, DV]`: what errors of weights multiply.

    With weights `w_t` an output is `o = sum w_t v_t / sum w_t`. If each is off by a factor `1 + e_t`, then `o` is off
    by `sum p_t e_t (v_t - o)` to first order, where `p_t = w_t / sum w_t`. With every `|e_t|` at most `e` that is
    `e * sum p_t |v_t - o|` or less. What all weights are off by alike cancels. A sink is a token whose value is 0.
    """
    weights = _plain(query, keys, torch.eye(len(keys)).to(keys), heads, impl).double()  # [G, T]
    apart = (values.double() - exact[:, None]).abs()  # [G, T, DV]
    return (weights[:, None] @ apart)[:, 0] + (1 - weights.sum(-1, keepdim=True)).clamp(min=0) * exact.abs()

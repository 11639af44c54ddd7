"""`Step`: one decode step of one layer, checked when it is made; `Rows`, what choosing units needs to know of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestValueError
from quest_attention.ops.checks import check_factors, check_kinds, check_lengths, check_token_mask, check_wide
from quest_attention.ops.hot_units import HotUnits, check_pool, least_slots
from quest_attention.ops.selection import Workspace
from quest_attention.pages import PagedKV, check_like, num_pages

__all__ = ["Rows", "Step"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """The sequences of a step, and how much may be read of each: what choosing units needs beside their scores.

    Attributes:
        seq_lens: `[B]` int32/int64 on the device of the cache, or the length of every sequence [tokens].
        config: Budget, forced pages, what is selected, group reduction and backend, with a form of metadata.
        token_mask: `[B, T]` bool, True where a token may be attended to; False past T.
        workspace: Memory to reuse, from `make_workspace`.
    """

    seq_lens: Tensor | int
    config: QuestConfig
    token_mask: Tensor | None = None
    workspace: Workspace | None = None

    def slots(self, max_units: int) -> int:
        """Slots per row of a selection among so many units [units]."""
        return self.slots_of(max_units, self.config.unit_size, self.config.token_budget)

    def slots_of(self, max_units: int, unit_size: int, token_budget: int) -> int:
        """The same for units of any size and another budget. Padding may shift a unit, unless it is a token."""
        may_shift = self.token_mask is not None and unit_size > 1
        return min(max_units, num_pages(token_budget, unit_size) + may_shift)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step(Rows):
    """One decode step of one layer, whole or in parts: `ops.quest_decode` says what each part means.

    What holds a `Step` need check nothing again: backends take one as it is. Metadata "auto" of a config becomes the
    form that the cache has.

    Attributes:
        query: `[B, HQ, D]`, dtype of the cache, or a wider one where that is quantised, HQ a multiple of HKV.
        kv: The cache, its metadata up to date.
        sm_scale: Factor on the logits; None is `D ** -0.5`.
        softcap: Cap of the scaled logits.
        sinks: `[HQ]`, one more logit per head that takes weight and gives no value.
        out: `[B, HQ, DV]` contiguous, dtype of the query, to write the output to.
        hot: Where what is selected is fetched to, and read from.

    Raises:
        QuestValueError: A shape, dtype, device or number is wrong, or one does not fit another.
    """

    query: Tensor
    kv: PagedKV
    sm_scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    out: Tensor | None = None
    hot: HotUnits | None = None

    def __post_init__(self) -> None:
        check_kinds(self.kv, self.query, self.config)
        kv, query, config, keys = self.kv, self.query, self.config, self.kv.keys
        # Asked for once: at a few hundred nanoseconds each, a tensor's shape is what making a step takes.
        _, page_size, kv_heads, dim = keys.shape
        batch, max_pages = kv.batch_size, kv.max_pages
        shape, device = query.shape, keys.device
        if len(shape) != 3 or shape[0] != batch or shape[2] != dim:
            expected = f"[{batch}, HQ, {dim}]: one token per sequence of the page table"
            raise QuestValueError("query.shape", list(shape), expected)
        if shape[1] == 0 or shape[1] % kv_heads:
            raise QuestValueError("query.shape[1]", shape[1], f"a multiple of the {kv_heads} KV heads")
        if kv.is_quantised:
            check_wide("query", query)
        check_like("query", query, shape, keys, "keys", check_dtype=not kv.is_quantised)
        check_lengths("seq_lens", self.seq_lens, batch, max_pages * page_size, device)
        check_token_mask(self.token_mask, batch, device)
        check_factors(self.sm_scale, self.softcap)
        if self.sinks is not None:
            check_like("sinks", self.sinks, shape[1:2], query, "the query", check_dtype=False)
        if config.metadata == "auto":
            config = config.resolved(device.type, kv.form.name)
            object.__setattr__(self, "config", config)
        if config.page_size != page_size:
            raise QuestValueError("config.page_size", config.page_size, f"{page_size}, as the cache")
        if self.out is not None:
            check_like("out", self.out, (batch, shape[1], kv.values.shape[3]), query, "the query")
            if not self.out.is_contiguous():
                raise QuestValueError("out.stride()", self.out.stride(), "a contiguous tensor")
        self._check_hot(config)
        workspace = self.workspace
        if workspace is not None:
            fits = getattr(workspace, "fits", None)  # what classes of it there are, the backends know
            if fits is None or not fits(kv, shape[1], config):
                got, expected = type(workspace).__name__, "one that make_workspace gave for this shape"
                raise QuestValueError("workspace", got, expected)

    def _check_hot(self, config: QuestConfig) -> None:
        """A pool that has room for what the step reads together."""
        if self.hot is None:
            return
        check_pool(self.hot)
        if config.candidate_pages:
            expected = f"page for {config.metadata} beside hot units: it ranks tokens by the keys of whole pages"
            raise QuestValueError("config.selection_unit", config.selection_unit, expected)
        max_units = self.kv.max_pages * config.units_per_page
        self.hot.check(self.kv, config.unit_size, least_slots(config, max_units))

    @property
    def scale(self) -> float:
        """Factor on the logits, which `sm_scale` may leave to the head dimension."""
        return self.kv.head_dim**-0.5 if self.sm_scale is None else self.sm_scale

    @property
    def scratch(self) -> Tensor | None:
        """Room for scores, `[B, HKV, U]` float32, in the workspace, which may be for more rows, or longer ones."""
        if self.workspace is None or self.workspace.scores is None:
            return None
        kv, scores = self.kv, self.workspace.scores
        shape = (kv.batch_size, kv.num_kv_heads, kv.max_pages * self.config.units_per_page)
        return scores if scores.shape == shape else scores.view(-1)[: math.prod(shape)].view(shape)

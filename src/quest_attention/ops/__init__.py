"""The verbs of Quest, on a paged view of the KV cache.

    update_page_metadata     take new tokens into the metadata of their pages
    append_token             write one token of each sequence, and take it into the metadata
    append_slots             write tokens to the slots of a server's cache, and take them into the metadata
    update_slot_metadata     the metadata alone, where somebody else writes the keys
    score_pages              how much each page, or smaller unit, promises the query
    select_pages             choose the units to read
    sparse_decode_attention  attend to the tokens of the chosen units
    quest_decode             score, select and attend: one decode step of one layer
    run_step                 the same of a `Step`, with another score or another attention
    fetch_units              have units of a cache in a pool of faster memory
    count_reads              add what a step read to counters on the device

Where pages are scored and less than a page is selected, `quest_decode` scores pages, takes some times the budget of
them as candidates and ranks their tokens by their exact keys: see `QuestConfig.candidate_factor`.

Each verb checks its arguments, those of a step by making a `Step`, then runs the backend that `dispatch` resolves.
Shapes use the letters of `pages.py`, and U for the logical units of a sequence. What is selected is a unit: a page, or,
where the metadata scores tokens, one token or a run of four; P pages are `P * page_size / unit_size` units. Wherever
`seq_lens` is taken it is either `[B]` int32/int64 on the device of the cache, or an int: the length of every sequence,
known to the host, which spares masks and is the fast form on a CPU.

Tensors may have any strides, be views or expanded, where nothing else is said: what is small is copied if a kernel
needs it side by side, inside a CUDA graph too. Keys, values, bounds and scores to write to have a last stride of 1.
Values are checked on a CPU; on any other device that would wait for it, so there they are the caller's to keep right.

Keys that are not finite: a unit that holds one scores +inf, so it is read as long as the budget has room and shows in
the output as it would in dense attention; nothing else is promised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor

from quest_attention.config import (
    Backend,
    GroupReduction,
    Metadata,
    QuestConfig,
    SelectionUnit,
    as_given,
    check_integer,
)
from quest_attention.errors import QuestValueError
from quest_attention.forms import Bounds, MetadataForm, Scored, form_of
from quest_attention.ops.checks import (
    check_cache,
    check_counters,
    check_kinds,
    check_lengths,
    check_new_tokens,
    check_one_table,
    check_query_heads,
    check_score_output,
    check_scores,
    check_selected,
    check_slot_metadata,
    check_slots,
    check_tensor,
    check_token,
    check_token_mask,
)
from quest_attention.ops.dispatch import ResolvedBackend, Verbs, resolve_backend
from quest_attention.ops.hot_units import HotUnits, check_pool
from quest_attention.ops.query_tokens import QueryTokens
from quest_attention.ops.selection import DecodeWorkspace, Selection, Workspace
from quest_attention.ops.step import Rows, Step
from quest_attention.pages import PagedKV, check_like

__all__ = [
    "DecodeWorkspace",
    "HotUnits",
    "QuestOutput",
    "ResolvedBackend",
    "Selection",
    "Step",
    "Workspace",
    "append_slots",
    "append_token",
    "check_backend",
    "count_reads",
    "fetch_units",
    "make_workspace",
    "quest_decode",
    "resolve_backend",
    "run_step",
    "score_pages",
    "select_pages",
    "sparse_decode_attention",
    "update_page_metadata",
    "update_slot_metadata",
]


class QuestOutput(NamedTuple):
    """Result of `quest_decode`.

    Attributes:
        output: `[B, HQ, DV]`, dtype of the query; `[B, T, HQ, DV]` of several query tokens.
        selected: The units that were read.
    """

    output: Tensor
    selected: Selection


def update_page_metadata(
    kv: PagedKV, seq_lens: Tensor | int, num_new_tokens: Tensor | int, backend: Backend = "auto"
) -> None:
    """Take the tokens written last into the metadata of their pages, in place: after a prefill, a chunk or one token.

    A page whose first token is among the new ones starts anew, whatever it held; any other page's goes on. So after a
    rollback the bounds of the last page may be wider than its keys: still bounds. Taking all of its tokens again makes
    any form of metadata right. Source: section 3.2 of the paper.

    A form that takes whole pages, as a sketch does, takes those alone that the new tokens complete, with all of their
    keys; so it is right whatever was rolled back. See `forms.MetadataForm.takes_whole_pages`.

    Args:
        kv: The cache; keys of the new tokens are already in it.
        seq_lens: Tokens per sequence, the new ones included [tokens].
        num_new_tokens: How many of them are new: an int or `[B]`, at most `seq_lens` [tokens]. On a GPU, where values
            are not checked, more mean all of them.
        backend: Which implementation runs.

    Raises:
        QuestValueError: A length is out of range, its shape or dtype is wrong, or the backend does not compute in the
            dtype of the cache.
        BackendError: The backend cannot run here.

    >>> import torch
    >>> keys = torch.tensor([[3.0], [-1.0], [2.0], [0.0]]).view(1, 1, 4, 1)
    >>> kv = PagedKV.from_contiguous(keys, keys.clone(), torch.zeros(1, 1, 2, 2, 1))
    >>> update_page_metadata(kv, seq_lens=3, num_new_tokens=3)
    >>> kv.contiguous.metadata.flatten().tolist()
    [3.0, -1.0, 2.0, 2.0]
    """
    check_one_table(kv)
    most = kv.max_pages * kv.page_size
    check_lengths("seq_lens", seq_lens, kv.batch_size, most, kv.keys.device)
    check_lengths("num_new_tokens", num_new_tokens, kv.batch_size, most, kv.keys.device)
    check_new_tokens(num_new_tokens, seq_lens, kv.keys.device)
    _verbs(backend, kv.keys).update_page_metadata(kv, seq_lens, num_new_tokens)


def append_token(kv: PagedKV, keys: Tensor, values: Tensor, seq_lens: Tensor | int, backend: Backend = "auto") -> None:
    """Write one token of each sequence where its length says, and take it into the metadata of its page, in place.

    For a decode step whose lengths only the device knows, as in a CUDA graph; a length of the host's is sent there.
    A cache in 8 bits takes a wider dtype and rounds it, in units of its scales, to the nearest, the largest number it
    has standing for all beyond it; its metadata is of what is stored, which rounding may have carried past a bound.

    Args:
        kv: The cache.
        keys: `[B, HKV, D]`, dtype of the cache, or bfloat16, float16 or float32 for one in 8 bits; channels side by
            side.
        values: `[B, HKV, DV]`, likewise.
        seq_lens: Tokens per sequence, the new one included; 0 leaves a sequence alone [tokens].
        backend: Which implementation runs.

    Raises:
        QuestValueError: A shape, dtype, device or length is wrong.
        BackendError: The backend cannot run here.

    >>> import torch
    >>> kv = PagedKV.from_contiguous(torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 4, 1), torch.empty(1, 1, 2, 2, 1))
    >>> append_token(kv, torch.full((1, 1, 1), 5.0), torch.ones(1, 1, 1), torch.tensor([3]))
    >>> kv.contiguous.keys.flatten().tolist(), kv.contiguous.metadata[0, 0, 1].flatten().tolist()
    ([0.0, 0.0, 5.0, 0.0], [5.0, 5.0])
    """
    check_one_table(kv)
    check_token("keys", keys, kv.keys, kv.batch_size)
    check_token("values", values, kv.values, kv.batch_size)
    check_lengths("seq_lens", seq_lens, kv.batch_size, kv.max_pages * kv.page_size, kv.keys.device)
    _verbs(backend, kv.keys).append_token(kv, keys, values, _per_row(seq_lens, kv.page_table))


def append_slots(kv: PagedKV, keys: Tensor, values: Tensor, slots: Tensor, backend: Backend = "auto") -> None:
    """Write tokens to their slots, and take them into the metadata of their pages, in place.

    For a server, whose batch holds prompts and single tokens of many sequences: the slot says where a token goes,
    whoever it belongs to, so the page table is not read. The tokens of a sequence stand next to each other, in order.
    A page whose first token is among them starts anew; any other page's goes on, also after speculated tokens were
    rolled back. Source: section 3.2 of the paper; `slot_mapping` in vLLM. Of a cache in 8 bits see `append_token`.

    Args:
        kv: The cache.
        keys: `[T, HKV, D]`, dtype as `append_token` takes it, channels side by side.
        values: `[T, HKV, DV]`, likewise.
        slots: `[T]` int32 or int64, page id times page size plus the offset in the page; a negative one is skipped.
        backend: Which implementation runs.

    Raises:
        QuestValueError: A shape, dtype, device or slot is wrong.
        BackendError: The backend cannot run here.

    >>> import torch
    >>> pages = torch.zeros(3, 2, 1, 1)  # three pages of two tokens
    >>> kv = PagedKV.from_nhd(pages, pages.clone(), torch.zeros(3, 1, 2, 1), torch.zeros(0, 3, dtype=torch.int32))
    >>> append_slots(kv, torch.tensor([5.0, -1.0]).view(2, 1, 1), torch.ones(2, 1, 1), torch.tensor([2, 3]))
    >>> kv.keys.flatten().tolist(), kv.metadata[1].flatten().tolist()
    ([0.0, 0.0, 5.0, -1.0, 0.0, 0.0], [5.0, -1.0])
    """
    check_cache(kv)
    check_tensor("keys", keys, "[T, HKV, D]")
    check_slots(slots, len(keys) if keys.dim() else 0, kv.keys.shape[0] * kv.page_size, kv.keys.device)
    check_token("keys", keys, kv.keys, slots.shape[0])
    check_token("values", values, kv.values, slots.shape[0])
    _verbs(backend, kv.keys).append_slots(kv, keys, values, slots)


def update_slot_metadata(
    metadata: Tensor,
    keys: Tensor,
    slots: Tensor,
    *,
    page_size: int,
    form: MetadataForm = Bounds(),  # noqa: B008 - a frozen value
    backend: Backend = "auto",
) -> None:
    """`append_slots` for the metadata alone: where the cache is in a format of its own and somebody else writes it.

    Not for forms that take whole pages, which need the keys written before.

    Args:
        metadata: `[N, HKV, *form.shape]`, numbers of a row side by side, as in `PagedKV`.
        keys: `[T, HKV, D]`, as they are stored, channels side by side.
        slots: See `append_slots`.
        page_size: Tokens per page [tokens].
        form: What the metadata is.
        backend: Which implementation runs.

    Raises:
        QuestValueError: A shape, dtype, device or slot is wrong.
        BackendError: The backend cannot run here.
    """
    check_slot_metadata(metadata, keys, page_size, form)
    if form.takes_whole_pages:
        expected = f"a form that takes tokens: {form.name} is of whole pages in the cache, as append_slots has them"
        raise QuestValueError("form", form.name, expected)
    check_slots(slots, keys.shape[0], metadata.shape[0] * page_size, metadata.device)
    _verbs(backend, keys).update_slot_metadata(metadata, keys, slots, page_size, form)


def score_pages(
    query: Tensor,
    kv: PagedKV,
    seq_lens: Tensor | int,
    *,
    token_mask: Tensor | None = None,
    group_reduction: GroupReduction | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
    sm_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    selection_unit: SelectionUnit = "page",
) -> Tensor:
    """How much each unit promises the query, by the metadata of its page: the unit's criticality.

    Two kinds of metadata give two kinds of scores. Only the order of one step's scores means the same in both.

    Metadata that scores pages gives the largest unscaled logit that a key of the page promises. Of bounds
    `U(page) = sum_d max(q_d * min_d, q_d * max_d)`, equation 2 of the paper, which no key exceeds; other forms say what
    theirs is. The query heads that share a KV head are reduced to one score. Scale, softcap and sinks change nothing.

    Metadata that scores tokens gives log masses: the logarithm of the share of the attention that the unit would have,
    were the estimates of its tokens' logits true. Each query head's estimates are scaled and capped as its logits are,
    and normalised over the tokens it may attend to and its sink; the logarithm keeps apart what is far below the
    largest. Then the heads of a group are reduced, "mass" to the mean of the mass that they give to the unit's tokens
    together, "max" to the largest weight that one of them gives to one token. Of a form that takes whole pages the page
    being written has no estimates: its tokens are left out where the others are weighed, and its units score +inf, as
    they are read always. This is the first stage of `quest_decode`, which may have a second one (see
    `QuestConfig.candidate_factor`).

    The arithmetic is float32 whatever the dtype of the cache.

    Args:
        query: `[B, HQ, D]`, dtype as `append_token` takes it, HQ a multiple of HKV.
        kv: The cache.
        seq_lens: Tokens per sequence [tokens].
        token_mask: `[B, T]` bool, True where a token may be attended to (padding is False, and so is what lies past
            T). A unit without such a token scores -inf.
        group_reduction: Over the heads of a group: `"max"` or `"mean"`, for metadata that scores tokens `"max"` or
            `"mass"`; None is the first of these.
        out: `[B, HKV, U]` float32 to write to, the scores of a row side by side.
        backend: Which implementation runs.
        sm_scale: Factor on the logits; None is `D ** -0.5`.
        softcap: See `sparse_decode_attention`.
        sinks: See `sparse_decode_attention`.
        selection_unit: What is scored: `"page"`, or, by metadata that scores tokens, `"token"` or 4 of them.

    Returns:
        `[B, HKV, U]` float32, -inf past the end of a sequence; U is P for pages.

    Raises:
        QuestValueError: A shape, dtype, device or option is wrong.
        BackendError: The backend cannot run here, or has no scores of this kind.
    """
    check_cache(kv)
    if kv.form.scores == "page" and selection_unit != "page":
        expected = f"page for {kv.form.name}, which scores pages: quest_decode ranks tokens of the best by their keys"
        raise QuestValueError("selection_unit", selection_unit, expected)
    config = _config(kv.page_size, backend, _kind(kv.form), as_given(group_reduction), as_given(selection_unit))
    step = Step(
        query=query, kv=kv, seq_lens=seq_lens, config=config,
        sm_scale=sm_scale, softcap=softcap, sinks=sinks, token_mask=token_mask,
    )  # fmt: skip
    check_one_table(kv)
    if out is not None:
        check_score_output(out, kv, config.units_per_page)
    return _verbs(backend, kv.keys).score_pages(step, out)


def select_pages(
    scores: Tensor,
    seq_lens: Tensor | int,
    *,
    page_size: int,
    token_budget: int,
    num_sink_pages: int = 0,
    num_recent_pages: int = 1,
    token_mask: Tensor | None = None,
    selection_unit: SelectionUnit = "page",
    backend: Backend = "auto",
) -> Selection:
    """Choose the units to read, pages or fewer tokens: the forced ones, then those with the highest scores.

    A sequence of at most `token_budget` tokens selects all its units; any other `token_budget // unit_size`. Ties go to
    the lower unit. Forced are pages, whatever the unit: all units of theirs that hold a token are read.

    With a mask, a sequence has the tokens that may be attended to, and the units that hold one. So few tokens may lie
    in many units; what a step reads, and the memory for it, stays bounded all the same: no sequence gets more than
    `ceil(token_budget / unit_size) + 1` units, which hold any `token_budget` tokens that follow one another, as they do
    where padding is on one side. Where holes spread them wider, the best of their units are read. Units of one token
    have no holes, and `token_budget` of them are enough.

    Args:
        scores: `[B, HKV, U]` float32, without NaN.
        seq_lens: Tokens per sequence [tokens].
        page_size: Tokens per page [tokens].
        token_budget: Most tokens to read, forced pages included [tokens].
        num_sink_pages: First pages to read always [pages].
        num_recent_pages: Last pages to read always [pages]; the page being written is read even with 0.
        token_mask: `[B, T]` bool, True where a token may be attended to; False past T. Sink and recent pages are
            counted among the pages that hold such a token.
        selection_unit: What the scores are of, and what is selected: `"page"`, `"token"` or 4 tokens.
        backend: Which implementation runs.

    Returns:
        The selected units, in ascending order, unused slots last.

    Raises:
        QuestValueError: A shape, dtype or number is wrong, or the budget cannot hold the forced pages.
        BackendError: The backend cannot run here, or does not select such units.

    >>> import torch
    >>> scores = torch.tensor([[[1.0, 5.0, 2.0, 5.0, 0.0]]])
    >>> select_pages(scores, 5, page_size=1, token_budget=3).units.tolist()
    [[[1, 3, 4]]]
    """
    check_scores(scores)
    # Of a config None is what its metadata wants, and here there is none.
    check_integer("token_budget", token_budget, minimum=1)
    check_integer("num_sink_pages", num_sink_pages, minimum=0)
    if cast("object", selection_unit) is None:
        raise QuestValueError("selection_unit", None, f"one of {', '.join(map(str, get_args(SelectionUnit)))}")
    # The config knows what a budget must hold; whose the scores are nobody asks, so that any unit may be selected.
    # What comes from another config is given here, whether it was given there or not.
    config = QuestConfig(
        as_given(token_budget), page_size, num_sink_pages=as_given(num_sink_pages), num_recent_pages=num_recent_pages,
        metadata=_LIKE["token"], selection_unit=as_given(selection_unit),
    )  # fmt: skip
    check_lengths("seq_lens", seq_lens, scores.shape[0], scores.shape[2] * config.unit_size, scores.device)
    check_token_mask(token_mask, scores.shape[0], scores.device)
    rows = Rows(seq_lens=seq_lens, config=config, token_mask=token_mask)
    return _verbs(backend, scores).select_pages(rows, scores)


def sparse_decode_attention(
    query: Tensor,
    kv: PagedKV,
    seq_lens: Tensor | int,
    selected: Selection,
    *,
    sm_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attend to the tokens of the selected units alone.

    Args:
        query: `[B, HQ, D]`, dtype as `append_token` takes it, HQ a multiple of HKV. Or `[B, T, HQ, D]`, the last T
            tokens of each sequence, up to 16: each attends to what is selected and lies before them all, and to those
            of them that are no later than itself.
        kv: The cache; its page table may be one of each KV head.
        seq_lens: Tokens per sequence [tokens].
        selected: Units to read, from `select_pages` or chosen otherwise: see `Selection`.
        sm_scale: Factor on the logits; None is `D ** -0.5`.
        softcap: Cap of the scaled logits, `softcap * tanh(logit / softcap)`, as in Gemma 2.
        sinks: `[HQ]`, one more logit per head that takes weight and gives no value, as in GPT-OSS.
        token_mask: `[B, T]` bool, True where a token may be attended to; False past T.
        return_lse: Give the log-sum-exp of the logits (sinks included) too, with which partial results are merged.
        backend: Which implementation runs.

    Returns:
        The output `[B, HQ, DV]` in the dtype of the query, zero where a sequence has no token to attend to; and the
        log-sum-exp `[B, HQ]` in float32 (natural logarithm), or None. Of several query tokens `[B, T, HQ, DV]`, and no
        log-sum-exp.

    Raises:
        QuestValueError: A shape, dtype, device or number is wrong.
        BackendError: The backend cannot run here, or does not read such units.
    """
    if getattr(query, "ndim", None) == 4:
        if return_lse:
            raise QuestValueError("return_lse", True, "False with several query tokens")
        check_kinds(kv, query, _config(kv.page_size, backend))
        tokens = resolve_backend(backend, kv.keys.device, kv.keys.dtype).query_tokens(query, None, kv, seq_lens)
        step = Step(
            query=tokens.folded(), kv=kv, seq_lens=seq_lens, config=_config(kv.page_size, backend),
            sm_scale=sm_scale, softcap=softcap, sinks=tokens.folded_sinks(sinks), token_mask=token_mask,
        )  # fmt: skip
        check_selected(selected, kv)
        return tokens.attend(step, selected, _verbs(backend, kv.keys)), None
    step = Step(
        query=query, kv=kv, seq_lens=seq_lens, config=_config(kv.page_size, backend),
        sm_scale=sm_scale, softcap=softcap, sinks=sinks, token_mask=token_mask,
    )  # fmt: skip
    check_selected(selected, kv)
    return _verbs(backend, kv.keys).sparse_decode_attention(step, selected, return_lse=return_lse)


def quest_decode(
    query: Tensor,
    kv: PagedKV,
    seq_lens: Tensor | int,
    config: QuestConfig,
    *,
    sm_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    token_mask: Tensor | None = None,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
    query_lens: Tensor | None = None,
    hot: HotUnits | None = None,
) -> QuestOutput:
    """One decode step of one layer: score the units, select, attend. Figure 5 of the paper.

    **Several query tokens of a sequence**, as when drafted tokens are checked: `[B, T, HQ, D]`, T up to 16, the last
    tokens of each sequence, whose keys and values are in the cache. One choice serves all of them: their query heads
    are one group, so that with "max" a unit counts as it does to the token that it matters to most. The pages in which
    the T tokens may lie are always read. Each token attends to what was chosen and to no later token. With a budget of
    the length that is causal attention, and with T = 1 it is the step of one token, bit by bit.

    Args:
        query: `[B, HQ, D]`, dtype as `append_token` takes it, HQ a multiple of HKV; or `[B, T, HQ, D]`.
        kv: The cache, its metadata up to date.
        seq_lens: Tokens per sequence, the query's own included [tokens].
        config: Budget, forced pages, what is selected, group reduction and backend. Page size and metadata must be the
            cache's; metadata "auto" is the cache's, with what else is not given as it is for its device.
        sm_scale: Factor on the logits; None is `D ** -0.5`.
        softcap: See `sparse_decode_attention`.
        sinks: See `sparse_decode_attention`.
        token_mask: `[B, T]` bool, True where a token may be attended to; False past T. See `select_pages`.
        workspace: Memory to reuse, from `make_workspace`; without one the step allocates it. With several query tokens
            one for T times as many query heads.
        out: `[B, HQ, DV]` or `[B, T, HQ, DV]` contiguous, dtype of the query, to write the output to.
        query_lens: With several query tokens, how many each sequence has: `[B]` int32/int64, 1 to T, the first ones of
            its row; None where all have T. What follows is not looked at, and its output is zero. With
            `group_reduction` "mean" and "mass" a sequence that has fewer counts its last one for those that it lacks.
        hot: A pool beside a contiguous cache: what is selected is fetched there and read there. The output is the same.
            With several query tokens None.

    Returns:
        The output, of the shape of the query but for its channels, and the units that were read.

    Raises:
        QuestValueError: A shape, dtype, device or number is wrong.
        BackendError: The backend cannot run here, or not with these units or this metadata.

    >>> import torch
    >>> keys, values = torch.randn(2, 1, 4, 64, 32)  # one sequence, 4 KV heads, 64 tokens
    >>> kv = PagedKV.from_contiguous(keys, values, torch.empty(1, 4, 4, 2, 32))
    >>> update_page_metadata(kv, 60, 60)
    >>> step = quest_decode(torch.randn(1, 8, 32), kv, 60, QuestConfig(token_budget=32))
    >>> step.output.shape, step.selected.units.shape
    (torch.Size([1, 8, 32]), torch.Size([1, 4, 2]))
    """
    if getattr(query, "ndim", None) == 4:  # what is no tensor is named below, or by a step
        if hot is not None:
            raise QuestValueError("hot", "a pool", "None with several query tokens")
        check_kinds(kv, query, config)
        given = {"sm_scale": sm_scale, "softcap": softcap, "token_mask": token_mask, "workspace": workspace}
        backend = resolve_backend(config.backend, kv.keys.device, kv.keys.dtype)
        return _decode_several(backend.query_tokens(query, query_lens, kv, seq_lens), config, sinks, out, given)
    if query_lens is not None:
        raise QuestValueError("query_lens", "a tensor", "None with queries [B, HQ, D], of one token each")
    step = Step(
        query=query, kv=kv, seq_lens=seq_lens, config=config, sm_scale=sm_scale, softcap=softcap, sinks=sinks,
        token_mask=token_mask, workspace=workspace, out=out, hot=hot,
    )  # fmt: skip
    return run_step(step)


def _decode_several(
    tokens: QueryTokens, config: QuestConfig, sinks: Tensor | None, out: Tensor | None, given: dict[str, Any]
) -> QuestOutput:
    """`quest_decode` of several query tokens a sequence; `given` is what a step takes of them as of one."""
    query, kv, seq_lens = tokens.query, tokens.kv, tokens.seq_lens
    if out is not None:
        check_like("out", out, (*query.shape[:3], kv.values.shape[3]), query, "the query")
    if tokens.count == 1:
        single = None if out is None else out[:, 0]
        step = Step(query=query[:, 0], kv=kv, seq_lens=seq_lens, config=config, sinks=sinks, out=single, **given)
        done = run_step(step)
        return QuestOutput(done.output[:, None], done.selected)
    forcing, sinks = tokens.config(config), tokens.folded_sinks(sinks)
    step = Step(query=tokens.folded(), kv=kv, seq_lens=seq_lens, config=forcing, sinks=sinks, **given)
    verbs = _verbs(step.config.backend, kv.keys)
    output, selected = run_step(step, attend=lambda asked, chosen: tokens.attend(asked, chosen, verbs))
    return QuestOutput(output if out is None else out.copy_(output), selected)


def run_step(
    step: Step,
    *,
    score: Callable[[Step], Tensor] | None = None,
    attend: Callable[[Step, Selection], Tensor] | None = None,
) -> QuestOutput:
    """Score, select, attend: what `quest_decode` runs, for those who score or attend in a way of their own.

    Args:
        step: What to read and how.
        score: In place of `score_pages`: gives scores `[B, HKV, U]`, float32 without NaN, U at least the units that
            hold a token.
        attend: In place of `sparse_decode_attention`: gives the output `[B, HQ, DV]`, which is returned as it is.

    Returns:
        The output and the units that were read.

    Raises:
        QuestValueError: The config's form of metadata is not the cache's; or the scores have another shape or dtype, or
            fewer units than a sequence.
        BackendError: The backend cannot run here.
    """
    check_one_table(step.kv)
    if score is None and step.kv.form != (form := form_of(step.config)):
        got, expected = (form.name, step.kv.form.name) if form.name != step.kv.form.name else (form, step.kv.form)
        raise QuestValueError("config.metadata", got, f"{expected}, as the cache")
    backend = resolve_backend(step.config.backend, step.kv.keys.device, step.kv.keys.dtype)
    check_backend(backend, step.config)
    if backend.fused is not None and score is None and attend is None:
        done = backend.fused(step)
        if done is not None:
            return QuestOutput(*done)
    verbs = backend.verbs
    if step.hot is not None and attend is None:
        attend = partial(_attend_to_pool, verbs, step.hot, False)
    if attend is not None and backend.choose is not None and score is None:
        chosen = backend.choose(step)
        if chosen is not None:
            return QuestOutput(attend(step, chosen), chosen)
    if score is None:
        scores = verbs.score_pages(step, step.scratch)
    else:
        scores = score(step)
        check_scores(scores)
        if scores.shape[:2] != (step.kv.batch_size, step.kv.num_kv_heads):
            expected = f"[{step.kv.batch_size}, {step.kv.num_kv_heads}, U]"
            raise QuestValueError("scores.shape", list(scores.shape), expected)
        most = scores.shape[2] * step.config.unit_size
        check_lengths("seq_lens", step.seq_lens, scores.shape[0], most, scores.device)
    selected = verbs.select_pages(step, scores)
    if step.hot is not None and score is None and step.config.candidate_budget:
        attend = partial(_attend_to_pool, verbs, step.hot, True)  # candidates were fetched to be scored
    if attend is not None:
        return QuestOutput(attend(step, selected), selected)
    output, _ = verbs.sparse_decode_attention(step, selected, is_own=True)
    return QuestOutput(output if step.out is None else step.out.copy_(output), selected)


def _attend_to_pool(verbs: Verbs, hot: HotUnits, is_again: bool, step: Step, selected: Selection) -> Tensor:
    """In place of attention over the cache: fetch what was selected, and attend to the pool."""
    verbs.fetch_units(step.kv, hot, selected.units, step.seq_lens, is_again=is_again)
    near = Step(
        query=step.query, kv=hot.paged, seq_lens=step.seq_lens, config=_config(hot.unit_size, step.config.backend),
        sm_scale=step.sm_scale, softcap=step.softcap, sinks=step.sinks, token_mask=step.token_mask,
    )  # fmt: skip
    output, _ = verbs.sparse_decode_attention(near, selected, is_own=True)
    return output if step.out is None else step.out.copy_(output)


def fetch_units(
    kv: PagedKV, hot: HotUnits, selected: Selection, seq_lens: Tensor | int, backend: Backend = "auto"
) -> None:
    """Have selected units of a contiguous cache in its pool of hot ones: what is not there is copied.

    Where no slot is free, a clock makes room, which lets be what was used since it came by last. What one fetch is
    asked for makes no room for another part of it, so a row must have as many slots. A unit that holds the last token
    of its sequence is copied in any case, since that token is new; whoever writes elsewhere calls `HotUnits.forget`.

    Args:
        kv: The cache.
        hot: Its pool.
        selected: Different units, of the size of the pool's; what is no unit of the sequence is skipped.
        seq_lens: Tokens per sequence [tokens].
        backend: Which implementation runs.

    Raises:
        QuestValueError: The pool is of another cache, or has fewer slots than there are units in a list.
        BackendError: The backend cannot run here.

    >>> import torch
    >>> keys = torch.arange(4.0).view(1, 1, 4, 1)
    >>> kv = PagedKV.from_contiguous(keys, keys, torch.zeros(1, 1, 2, 2, 1))
    >>> hot = HotUnits.allocate(kv, unit_size=2, slots=1)
    >>> one = torch.ones(1, 1, 1, dtype=torch.int32)
    >>> fetch_units(kv, hot, Selection(units=one, counts=one[0], unit_size=2), 4)
    >>> hot.table.tolist(), hot.keys.flatten().tolist(), hot.counts.tolist()
    ([[[-1, 0]]], [2.0, 3.0], [1, 1, 1, 1, 0])
    """
    check_one_table(kv)
    check_selected(selected, kv)
    check_pool(hot)
    check_lengths("seq_lens", seq_lens, kv.batch_size, kv.max_pages * kv.page_size, kv.keys.device)
    hot.check(kv, selected.unit_size, selected.units.shape[2])
    _verbs(backend, kv.keys).fetch_units(kv, hot, selected.units, seq_lens)


def count_reads(
    selected: Selection,
    seq_lens: Tensor | int,
    counters: Tensor,
    *,
    token_budget: int,
    backend: Backend = "auto",
) -> None:
    """Add what a step read to counters on the device, in place, where a CUDA graph can replay it.

    Args:
        selected: The units that were read.
        seq_lens: Tokens per sequence; a sequence of none counts nowhere [tokens].
        counters: `[4]` int64: rows past the budget, rows within it, units read and units held per KV head, of the size
            of those selected; where the KV heads of a step read different numbers of units, their mean, rounded down.
        token_budget: See `select_pages` [tokens].
        backend: Which implementation runs.

    Raises:
        QuestValueError: A shape, dtype, device or number is wrong.
        BackendError: The backend cannot run here.

    >>> import torch
    >>> counters = torch.zeros(4, dtype=torch.int64)
    >>> selected = Selection(torch.zeros(2, 1, 2, dtype=torch.int32), torch.tensor([[2], [1]], dtype=torch.int32), 16)
    >>> count_reads(selected, torch.tensor([90, 12]), counters, token_budget=32)
    >>> counters.tolist()
    [1, 1, 3, 7]
    """
    check_counters(counters, selected, seq_lens, token_budget)
    verbs = resolve_backend(backend, counters.device).verbs
    verbs.count_reads(selected, _per_row(seq_lens, selected.counts), counters, token_budget)


def make_workspace(
    kv: PagedKV, num_query_heads: int, config: QuestConfig, batch_sizes: Iterable[int] | None = None
) -> Workspace | None:
    """Allocate what `quest_decode` needs for steps over a cache, so that a step allocates nothing that grows.

    A step that scores tokens still allocates their estimates, which grow with the cache's capacity.

    Args:
        kv: The cache.
        num_query_heads: Query heads, HQ.
        config: What to read; metadata "auto" is as for `quest_decode`.
        batch_sizes: Of steps over the same pages that may use the memory, whatever the page table; None is the batch of
            the cache [sequences]. The PyTorch backend serves that one only.

    Returns:
        Memory for one step at a time: layers that run one after the other can share it. None where the backend needs
        none for this shape.

    Raises:
        QuestValueError: `num_query_heads` is no multiple of the cache's KV heads, or a batch size no positive integer.
        BackendError: The backend cannot run here, or not with these units or this metadata.
    """
    check_cache(kv)
    check_kinds(kv, kv.keys, config)
    check_query_heads(num_query_heads, kv)
    if batch_sizes is not None:
        if not isinstance(batch_sizes, Iterable):
            raise QuestValueError("batch_sizes", batch_sizes, "positive integers, or None")
        batch_sizes = tuple(batch_sizes)
        for size in batch_sizes:
            check_integer("batch_sizes", size, minimum=1)
    config = config.resolved(kv.keys.device.type, kv.form.name)
    backend = resolve_backend(config.backend, kv.keys.device, kv.keys.dtype)
    check_backend(backend, config)
    return backend.make_workspace(kv, num_query_heads, config, batch_sizes)


def check_backend(backend: ResolvedBackend, config: QuestConfig) -> None:
    """Refuse what a backend does not do of a config.

    Raises:
        QuestValueError: The Triton kernels are to rank tokens by exact keys.
    """
    if config.candidate_pages and backend.name == "triton":
        expected = f"page for {config.metadata} with the Triton kernels, which rank no tokens by their keys: or sketch"
        raise config.mistake("selection_unit", config.selection_unit, expected)


_LIKE: dict[Scored, Metadata] = {"page": "bounds", "token": "sketch"}
"""Metadata whose options are those of any that scores pages, or tokens: of a form of the user's own too."""


def _kind(form: MetadataForm) -> Metadata:
    """The form's name if a config knows it, else that of one that scores alike."""
    return cast("Metadata", form.name) if form.name in get_args(Metadata) else _LIKE[form.scores]


def _config(
    page_size: int, backend: Backend, metadata: Metadata = "bounds", group_reduction: GroupReduction | None = None,
    unit: SelectionUnit = "page",
) -> QuestConfig:  # fmt: skip
    """The config of a step that chooses nothing: of a budget it has a page, since it must have one."""
    options = page_size, backend, metadata, group_reduction, unit
    try:
        return _config_once(*options)
    except TypeError:  # a list, say, is not to be looked up, and is refused by its name
        return _config_once.__wrapped__(*options)


@lru_cache(maxsize=None, typed=True)  # 4.0 is no 4, and is to be refused as such
def _config_once(
    page_size: int, backend: Backend, metadata: Metadata, group_reduction: GroupReduction | None, unit: SelectionUnit
) -> QuestConfig:
    return QuestConfig(
        page_size, page_size, num_sink_pages=0, group_reduction=cast("GroupReduction", group_reduction),
        backend=backend, metadata=metadata, selection_unit=unit, candidate_factor=0,
    )  # fmt: skip


def _verbs(backend: Backend, keys: Tensor) -> Verbs:
    """The verbs for a tensor of the cache, or for one that the kernels take wherever they take a cache's."""
    return resolve_backend(backend, keys.device, keys.dtype).verbs


def _per_row(seq_lens: Tensor | int, rows: Tensor) -> Tensor:
    """A length for each of some rows, for verbs that read lengths on the device alone."""
    if isinstance(seq_lens, Tensor):
        return seq_lens
    return torch.full(rows.shape[:1], seq_lens, dtype=torch.int32, device=rows.device)


# Longer than 250 lines: the verbs are documented here and nowhere else, which is two thirds of it.

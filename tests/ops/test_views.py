"""Strides of every tensor that a verb takes: a view gives what its contiguous copy gives, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, available
from caches import make_cache
from quest_attention import PagedKV, QuestConfig, QuestValueError
from quest_attention.config import Backend
from quest_attention.ops import (
    Selection,
    append_slots,
    append_token,
    count_reads,
    make_workspace,
    quest_decode,
    score_pages,
    select_pages,
    sparse_decode_attention,
    update_page_metadata,
    update_slot_metadata,
)

Given = dict[str, Tensor]
BATCH, HEADS, GROUP, DIM, PAGE_SIZE, BUDGET = 2, 2, 2, 16, 8, 24
CONTEXT = {"page_size": PAGE_SIZE, "token_budget": BUDGET}


def given() -> Given:
    """One contiguous tensor of each kind, the same at every call."""
    generator = torch.Generator().manual_seed(7)
    cache = make_cache([44, 29], layout="hnd")
    keys, values = cache.kv.keys.nan_to_num(0).contiguous(), cache.kv.values.nan_to_num(0).contiguous()
    kv = PagedKV(keys, values, cache.kv.metadata, cache.kv.page_table)
    update_page_metadata(kv, cache.seq_lens, cache.seq_lens, backend="reference")

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "query": randn(BATCH, HEADS * GROUP, DIM),
        "keys": keys,
        "values": values,
        "metadata": cache.kv.metadata.nan_to_num(0),
        "page_table": cache.kv.page_table,
        "seq_lens": cache.seq_lens,
        "num_new_tokens": torch.tensor([12, 29], dtype=torch.int32),
        "token_mask": torch.rand(BATCH, 44, generator=generator) < 0.6,
        "sinks": randn(HEADS * GROUP),
        "scores": randn(BATCH, HEADS, kv.max_pages),
        "pages": torch.tensor([[[0, 3, 5], [1, 2, 5]], [[0, 2, 3], [1, 3, -1]]], dtype=torch.int32),
        "counts": torch.tensor([[3, 3], [3, 2]], dtype=torch.int32),
        "counters": torch.tensor([1, 2, 3, 4]),
        "new_keys": randn(BATCH, HEADS, DIM),
        "new_values": randn(BATCH, HEADS, DIM),
        "slots": torch.tensor([21, 3]),
        "out": torch.zeros(BATCH, HEADS, kv.max_pages),
        "step_out": torch.zeros(BATCH, HEADS * GROUP, DIM),
    }


def cache_of(g: Given) -> PagedKV:
    return PagedKV(g["keys"], g["values"], g["metadata"], g["page_table"])


def update(g: Given, backend: Backend) -> None:
    update_page_metadata(cache_of(g), g["seq_lens"], g["num_new_tokens"], backend=backend)


def append(g: Given, backend: Backend) -> None:
    append_token(cache_of(g), g["new_keys"], g["new_values"], g["seq_lens"], backend=backend)


def append_by_slot(g: Given, backend: Backend) -> None:
    append_slots(cache_of(g), g["new_keys"], g["new_values"], g["slots"], backend=backend)


def bounds_by_slot(g: Given, backend: Backend) -> None:
    update_slot_metadata(g["metadata"], g["new_keys"], g["slots"], page_size=PAGE_SIZE, backend=backend)


def score(g: Given, backend: Backend) -> Tensor:
    return score_pages(
        g["query"], cache_of(g), g["seq_lens"], token_mask=g["token_mask"], out=g["out"], backend=backend
    )


def select(g: Given, backend: Backend) -> Selection:
    return select_pages(g["scores"], g["seq_lens"], **CONTEXT, backend=backend)


def select_masked(g: Given, backend: Backend) -> Selection:
    return select_pages(g["scores"], g["seq_lens"], **CONTEXT, token_mask=g["token_mask"], backend=backend)


def attend(g: Given, backend: Backend) -> tuple[Tensor, Tensor | None]:
    selected = Selection(g["pages"], g["counts"], PAGE_SIZE)
    return sparse_decode_attention(
        g["query"], cache_of(g), g["seq_lens"], selected, sinks=g["sinks"], return_lse=True, backend=backend
    )


def attend_masked(g: Given, backend: Backend) -> tuple[Tensor, Tensor | None]:
    selected = Selection(g["pages"], g["counts"], PAGE_SIZE)
    return sparse_decode_attention(
        g["query"], cache_of(g), g["seq_lens"], selected, token_mask=g["token_mask"], return_lse=True, backend=backend
    )


def decode(g: Given, backend: Backend) -> Tensor:
    config = QuestConfig(BUDGET, PAGE_SIZE, backend=backend)
    return quest_decode(g["query"], cache_of(g), g["seq_lens"], config, sinks=g["sinks"], out=g["step_out"]).output


def decode_masked(g: Given, backend: Backend) -> Tensor:
    config = QuestConfig(BUDGET, PAGE_SIZE, backend=backend)
    kv = cache_of(g)
    workspace = make_workspace(kv, HEADS * GROUP, config)
    return quest_decode(
        g["query"], kv, g["seq_lens"], config, sinks=g["sinks"], token_mask=g["token_mask"], workspace=workspace
    ).output


def count(g: Given, backend: Backend) -> None:
    selected = Selection(g["pages"], g["counts"], PAGE_SIZE)
    count_reads(selected, g["seq_lens"], g["counters"], token_budget=BUDGET, backend=backend)


VERBS: dict[Callable[[Given, Backend], Any], str] = {
    update: "keys metadata page_table seq_lens num_new_tokens",
    append: "keys values metadata page_table new_keys new_values seq_lens",
    append_by_slot: "keys values metadata new_keys new_values slots",
    bounds_by_slot: "metadata new_keys slots",
    score: "query metadata page_table seq_lens token_mask out",
    select: "scores seq_lens",
    select_masked: "scores seq_lens token_mask",
    attend: "query keys values page_table seq_lens pages sinks",
    attend_masked: "query keys values page_table seq_lens pages token_mask",
    decode: "query keys values metadata page_table seq_lens sinks",
    decode_masked: "query keys values metadata page_table seq_lens token_mask sinks",
    count: "seq_lens counts counters",
}
SIDE_BY_SIDE = {"keys", "values", "metadata", "new_keys", "new_values", "out"}
"""Whose last dimension must have a stride of 1: what is large, or written to."""


def spread(tensor: Tensor, *, last: bool = True) -> Tensor:
    """The same values in every second place, in each dimension or in all but the last; other values between them."""
    room = ~tensor if tensor.dtype == torch.bool else tensor.roll(1) if tensor.dim() == 1 else tensor.flip(0)
    dims = tensor.dim() if last else tensor.dim() - 1
    for dim in range(dims):
        room = room.repeat_interleave(2, dim)
    view = room[tuple(slice(None, None, 2) for _ in range(dims))]
    return view.copy_(tensor)


def turned(tensor: Tensor, *, last: bool = True) -> Tensor:
    """The same values with the dimensions in another order in memory, the last one outermost where it may be."""
    if tensor.dim() == 1:
        return spread(tensor)
    if last:
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    return tensor.movedim(-2, 0).contiguous().movedim(0, -2)


def expanded(tensor: Tensor, *, last: bool = True) -> Tensor:
    """The first of a dimension in place of all: what `expand` makes, with a stride of 0."""
    dim = 0 if tensor.dim() == 1 or not last else -1
    return tensor.narrow(dim, 0, 1).expand_as(tensor)


def everything(result: Any, g: Given) -> list[Tensor]:
    """What a verb gave and all that it may have written to."""
    given_back = [result] if isinstance(result, Tensor) else list(result or ())
    return [*given_back, *g.values()]


def pairs(of: Callable[[str], bool] = lambda _: True) -> list[Any]:
    found = [(verb, name) for verb, names in VERBS.items() for name in names.split() if of(name)]
    return [pytest.param(*one, id=f"{one[0].__name__}-{one[1]}") for one in found]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", [spread, turned])
@pytest.mark.parametrize(("verb", "argument"), pairs())
def test_a_view_is_read_as_what_it_shows(
    verb: Callable[[Given, Backend], Any], argument: str, view: Callable[..., Tensor], backend: Backend
) -> None:
    plain, viewed = given(), given()
    viewed[argument] = view(viewed[argument], last=argument not in SIDE_BY_SIDE)
    assert torch.equal(viewed[argument], plain[argument])
    assert viewed[argument].stride() != plain[argument].stride()
    expected = everything(verb(plain, available(backend)), plain)
    found = everything(verb(viewed, backend), viewed)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


READ = {
    "query",
    "page_table",
    "seq_lens",
    "num_new_tokens",
    "token_mask",
    "scores",
    "pages",
    "sinks",
    "counts",
    "slots",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("verb", "argument"), pairs(READ.__contains__))
def test_what_is_expanded_is_read_again_and_again(
    verb: Callable[[Given, Backend], Any], argument: str, backend: Backend
) -> None:
    plain, viewed = given(), given()
    if argument == "seq_lens":
        plain["num_new_tokens"] = viewed["num_new_tokens"] = torch.tensor([12, 12])
    viewed[argument] = expanded(viewed[argument])
    plain[argument] = viewed[argument].clone(memory_format=torch.contiguous_format)
    assert 0 in viewed[argument].stride()
    expected = everything(verb(plain, available(backend)), plain)
    found = everything(verb(viewed, backend), viewed)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("verb", "argument"), pairs(SIDE_BY_SIDE.__contains__))
def test_what_must_lie_side_by_side_is_refused_otherwise(
    verb: Callable[[Given, Backend], Any], argument: str, backend: Backend
) -> None:
    viewed = given()
    viewed[argument] = spread(viewed[argument])
    before = {name: tensor.clone() for name, tensor in viewed.items()}
    with pytest.raises(QuestValueError) as caught:
        verb(viewed, available(backend))
    assert caught.value.argument == f"{argument.removeprefix('new_')}.stride(-1)"
    assert caught.value.got == 2
    assert "side by side" in caught.value.expected
    for name, tensor in viewed.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def read_all(kv: PagedKV, query: Tensor, backend: Backend) -> list[Tensor]:
    """Scores, and attention over all pages, of sequences of 20 and 9 tokens."""
    lengths = torch.tensor([20, 9])
    pages = torch.arange(3, dtype=torch.int32).expand(2, 2, 3)
    selected = Selection(pages, torch.full((2, 2), 3, dtype=torch.int32), PAGE_SIZE)
    output, _ = sparse_decode_attention(query, kv, lengths, selected, backend=available(backend))
    return [score_pages(query, kv, lengths, backend=backend), output]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [1, 16])
@pytest.mark.parametrize("across", ["pages", "tokens", "heads", "pages and heads", "all of them"])
def test_a_cache_of_which_memory_holds_a_part(across: str, dim: int, backend: Backend) -> None:
    """One page for all, one head for all: strides of 0."""
    sizes = [
        1 if name in across or across == "all of them" else n for name, n in (("pages", 6), ("tokens", 8), ("heads", 2))
    ]
    keys, values = (torch.randn(*sizes, dim).expand(6, 8, 2, dim) for _ in range(2))
    bounds = torch.randn(sizes[0], sizes[2], 2, dim).expand(6, 2, 2, dim)
    table, query = torch.tensor([[4, 2, 0], [1, 3, 5]], dtype=torch.int32), torch.randn(2, 4, dim)
    assert 0 in keys.stride()
    viewed, plain = (
        PagedKV(keys, values, bounds, table),
        PagedKV(*(one.contiguous() for one in (keys, values, bounds)), table),
    )
    for mine, theirs in zip(read_all(viewed, query, backend), read_all(plain, query, backend), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_of_one_channel_that_lie_apart(backend: Backend) -> None:
    """A channel has no neighbour that it could lie beside, so any strides are taken."""
    keys, values, bounds = torch.randn(6, 8, 2, 1), torch.randn(6, 8, 2, 5), torch.randn(6, 2, 2, 1)
    table, query = torch.tensor([[4, 2, 0], [1, 3, 5]], dtype=torch.int32), torch.randn(2, 4, 1)
    plain = read_all(PagedKV(keys, values, bounds, table), query, backend)
    viewed = read_all(PagedKV(spread(keys), values, spread(bounds), table), spread(query), backend)
    for mine, theirs in zip(viewed, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_one_verb_gives_another_takes(backend: Backend) -> None:
    """Slices of scores, of a selection and of its counts, for some of the sequences and heads."""
    g = given()
    kv, lengths = cache_of(g), g["seq_lens"]
    scores = score_pages(g["query"], kv, lengths, backend=available(backend))
    wide = torch.stack([scores, -scores], -1)
    selected = select_pages(wide[..., 0], lengths, **CONTEXT, backend=backend)
    assert torch.equal(selected.units, select_pages(scores, lengths, **CONTEXT, backend=backend).units)
    for b in range(BATCH):
        one = PagedKV(kv.keys, kv.values, kv.metadata, kv.page_table[b : b + 1])
        part = Selection(selected.units[b : b + 1], selected.counts[b : b + 1], selected.unit_size)
        whole, _ = sparse_decode_attention(g["query"], kv, lengths, selected, backend=backend)
        mine, _ = sparse_decode_attention(g["query"][b : b + 1], one, lengths[b : b + 1], part, backend=backend)
        torch.testing.assert_close(mine, whole[b : b + 1])
        counters = torch.zeros(4, dtype=torch.int64)
        count_reads(part, lengths[b : b + 1], counters, token_budget=BUDGET, backend=backend)
        assert counters[2] == selected.counts[b, 0] == selected.counts[b, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_that_is_rewritten_in_place_is_read_anew(backend: Backend) -> None:
    """As between the replays of a graph: what a cache was made with is kept, not a copy of it."""
    plain, viewed = given(), given()
    viewed["page_table"] = spread(viewed["page_table"])
    kv, config = cache_of(viewed), QuestConfig(BUDGET, PAGE_SIZE, backend=available(backend))
    quest_decode(viewed["query"], kv, viewed["seq_lens"], config)
    for g in (plain, viewed):
        g["page_table"].copy_(g["page_table"].flip(0))
    expected = quest_decode(plain["query"], cache_of(plain), plain["seq_lens"], config)
    found = quest_decode(viewed["query"], kv, viewed["seq_lens"], config)
    assert torch.equal(found.selected.units, expected.selected.units)
    torch.testing.assert_close(found.output, expected.output)

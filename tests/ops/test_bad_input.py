"""What the verbs and the paged view refuse: a named error, and nothing written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from caches import Cache, make_cache
from quest_attention import (
    BackendError,
    PagedKV,
    QuestConfig,
    QuestValueError,
    Selection,
    quest_decode,
    score_pages,
    select_pages,
    sparse_decode_attention,
    update_page_metadata,
)
from quest_attention.forms import Bounds, MetadataForm, Sketch
from quest_attention.ops import (
    DecodeWorkspace,
    HotUnits,
    append_slots,
    append_token,
    count_reads,
    fetch_units,
    make_workspace,
    resolve_backend,
    update_slot_metadata,
)

CONFIG = QuestConfig(token_budget=24, page_size=8)


@pytest.fixture
def cache() -> Cache:
    made = make_cache([60, 33])
    update_page_metadata(made.kv, made.seq_lens, made.seq_lens)
    return made


def decode(cache: Cache, query: torch.Tensor | None = None, **options: Any) -> Any:
    query = torch.randn(2, 4, 16) if query is None else query
    seq_lens = options.pop("seq_lens", cache.seq_lens)
    return quest_decode(query, cache.kv, seq_lens, options.pop("config", CONFIG), **options)


BAD_DECODES: dict[str, tuple[str, dict[str, Any]]] = {
    "another batch": ("query.shape", {"query": torch.randn(3, 4, 16)}),
    "another head dim": ("query.shape", {"query": torch.randn(2, 4, 8)}),
    "a prompt": ("query.shape", {"query": torch.randn(2, 17, 4, 16)}),
    "heads of several tokens": ("query.shape[2]", {"query": torch.randn(2, 4, 5, 16)}),
    "lengths of a single token": ("query_lens", {"query_lens": torch.tensor([1, 1])}),
    "HQ no multiple of HKV": ("query.shape[1]", {"query": torch.randn(2, 5, 16)}),
    "no heads": ("query.shape[1]", {"query": torch.randn(2, 0, 16)}),
    "another dtype": ("query.dtype", {"query": torch.randn(2, 4, 16).bfloat16()}),
    "another device": ("query.device", {"query": torch.randn(2, 4, 16, device="meta")}),
    "too long": ("seq_lens", {"seq_lens": 73}),
    "negative": ("seq_lens", {"seq_lens": -1}),
    "yes": ("seq_lens", {"seq_lens": True}),
    "one row too long": ("seq_lens", {"seq_lens": torch.tensor([60, 73])}),
    "lengths of another batch": ("seq_lens.shape", {"seq_lens": torch.tensor([60])}),
    "float lengths": ("seq_lens.dtype", {"seq_lens": torch.tensor([60.0, 33.0])}),
    "lengths elsewhere": ("seq_lens.device", {"seq_lens": torch.zeros(2, dtype=torch.int32, device="meta")}),
    "another page size": ("config.page_size", {"config": QuestConfig(token_budget=64)}),
    "scale": ("sm_scale", {"sm_scale": float("nan")}),
    "softcap": ("softcap", {"softcap": 0.0}),
    "softcap as text": ("softcap", {"softcap": "3"}),
    "softcap true": ("softcap", {"softcap": True}),
    "sm_scale as text": ("sm_scale", {"sm_scale": "3"}),
    "mask as a list": ("token_mask", {"token_mask": [[True]]}),
    "config as a dict": ("config", {"config": {"metadata": "sketch"}}),
    "sinks as a list": ("sinks", {"sinks": [0.0] * 4}),
    "output as a list": ("out", {"out": []}),
    "sinks": ("sinks.shape", {"sinks": torch.zeros(2)}),
    "sinks elsewhere": ("sinks.device", {"sinks": torch.zeros(4, device="meta")}),
    "mask shape": ("token_mask.shape", {"token_mask": torch.ones(1, 60, dtype=torch.bool)}),
    "mask dtype": ("token_mask.dtype", {"token_mask": torch.ones(2, 60)}),
    "workspace": ("workspace", {"workspace": DecodeWorkspace.allocate(2, 2, 3, torch.device("cpu"))}),
}


@pytest.mark.parametrize("name", BAD_DECODES)
def test_quest_decode(cache: Cache, name: str) -> None:
    argument, options = BAD_DECODES[name]
    with pytest.raises(QuestValueError) as caught:
        decode(cache, **options)
    assert caught.value.argument == argument
    assert caught.value.expected


def test_other_verbs(cache: Cache) -> None:
    query = torch.randn(2, 4, 16)
    before = cache.kv.metadata.clone()
    calls: dict[str, Callable[[], object]] = {
        "num_new_tokens": lambda: update_page_metadata(cache.kv, 5, 6),
        "seq_lens": lambda: update_page_metadata(cache.kv, 1000, 1),
        "group_reduction": lambda: score_pages(query, cache.kv, 5, group_reduction="sum"),  # type: ignore[arg-type]
        "scores.shape": lambda: select_pages(torch.zeros(2, 4), 4, page_size=1, token_budget=2),
        "scores.dtype": lambda: select_pages(torch.zeros(2, 2, 4).half(), 4, page_size=1, token_budget=2),
        "token_budget": lambda: select_pages(torch.zeros(2, 2, 4), 4, page_size=2, token_budget=1),
        "page_size": lambda: select_pages(torch.zeros(2, 2, 4), 4, page_size=0, token_budget=1),
        "selected.units.shape": lambda: sparse_decode_attention(
            query, cache.kv, 5, Selection(torch.zeros(2, 3, 1, dtype=torch.int32), torch.ones(2, 3), 8)
        ),
        "selected.units.dtype": lambda: sparse_decode_attention(
            query, cache.kv, 5, Selection(torch.zeros(2, 2, 1), torch.ones(2, 2), 8)
        ),
        "out.shape": lambda: score_pages(query, cache.kv, 5, out=torch.zeros(2, 2, 3)),
        "out.dtype": lambda: score_pages(query, cache.kv, 5, out=torch.zeros(2, 2, 9, dtype=torch.float64)),
        "out.device": lambda: score_pages(query, cache.kv, 5, out=torch.zeros(2, 2, 9, device="meta")),
        "selected.units.device": lambda: sparse_decode_attention(
            query, cache.kv, 5, Selection(torch.zeros(2, 2, 1, dtype=torch.int32, device="meta"), torch.ones(2, 2), 8)
        ),
    }
    for argument, call in calls.items():
        with pytest.raises(QuestValueError) as caught:
            call()
        assert caught.value.argument == argument
    torch.testing.assert_close(cache.kv.metadata, before, rtol=0, atol=0, equal_nan=True)


def test_what_is_of_another_kind_is_named(cache: Cache) -> None:
    kv, chosen, slots = cache.kv, decode(cache).selected, torch.tensor([1, 2])
    new, query, sizes = torch.randn(2, 2, 16), torch.randn(2, 4, 16), {"page_size": 8}
    whole, scores = torch.zeros(1, 2, 40, 16), torch.zeros(2, 2, 8)
    anything: list[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
        ("kv", update_page_metadata, (None, 3, 1), {}),
        ("kv", append_token, (None, new, new, 3), {}),
        ("kv", append_slots, (None, new, new, slots), {}),
        ("keys", append_slots, (kv, None, new, slots), {}),
        ("slots", append_slots, (kv, new, new, [1, 2]), {}),
        ("metadata", update_slot_metadata, (None, new, slots), sizes),
        ("keys", update_slot_metadata, (kv.metadata, [1], slots), sizes),
        ("kv", score_pages, (query, None, 3), {}),
        ("scores", select_pages, ([1.0], 3), {"token_budget": 24, **sizes}),
        ("selected", sparse_decode_attention, (query, kv, 3, None), {}),
        ("selected.units", sparse_decode_attention, (query, kv, 3, chosen._replace(units=[1])), {}),  # type: ignore[arg-type]
        ("hot", quest_decode, (query, kv, 3, CONFIG), {"hot": 3}),
        ("hot", fetch_units, (kv, None, chosen, 3), {}),
        ("selected", count_reads, (None, 3, torch.zeros(4).long()), {"token_budget": 24}),
        ("counters", count_reads, (chosen, 3, None), {"token_budget": 24}),
        ("kv", make_workspace, (None, 4, CONFIG), {}),
        ("kv", HotUnits.allocate, (None, 1, 64), {}),
        ("form", PagedKV.from_contiguous, (whole, whole, torch.zeros(1, 2, 5, 2, 16)), {"form": None}),
        ("selected.counts", sparse_decode_attention, (query, kv, 3, chosen._replace(counts=chosen.counts.float())), {}),
        *(("batch_sizes", make_workspace, (kv, 4, CONFIG, sizes), {}) for sizes in ("x", [1.5], [2, 0], 3)),
        *(("token_budget", select_pages, (scores, 3), {**sizes, "token_budget": none}) for none in (None, 0)),
        *(
            (name, select_pages, (scores, 3), {"token_budget": 24, **sizes, name: None})
            for name in ("num_sink_pages", "selection_unit")
        ),
        *(
            (name, score_pages, (query, kv, 3), {name: ["max"]})
            for name in ("backend", "group_reduction", "selection_unit")
        ),
        ("config", make_workspace, (kv, 4, {}), {}),
        *(("num_query_heads", make_workspace, (kv, heads, CONFIG), {}) for heads in (0, 5, -2, "4", True)),
        ("num_new_tokens", update_page_metadata, (kv, 3, True), {}),
    ]
    for argument, verb, given, options in anything:
        with pytest.raises(QuestValueError, match=f"^{argument}: got"):
            verb(*given, **options)


def test_numbers_that_divide() -> None:
    ids = torch.zeros(2, dtype=torch.int32)
    selected, counters = Selection(ids.view(1, 1, 2), ids[:1, None], 0), torch.zeros(4, dtype=torch.int64)
    rows, metadata = torch.zeros(2, 1, 4), torch.zeros(3, 1, 2, 4)
    with pytest.raises(QuestValueError, match="page_size: got 0"):
        update_slot_metadata(metadata, rows, ids, page_size=0)
    with pytest.raises(QuestValueError, match=r"selected\.unit_size: got 0"):
        count_reads(selected, ids[:1], counters, token_budget=2)
    with pytest.raises(QuestValueError, match="token_budget: got 0"):
        count_reads(selected._replace(unit_size=2), ids[:1], counters, token_budget=0)


def test_counts_of_a_selection() -> None:
    ids, counters = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    for argument, counts in (
        ("selected.counts", ids),
        ("selected.counts", ids[:, None].float()),
        ("selected.counts.device", ids[:, None].to("meta")),
    ):
        with pytest.raises(QuestValueError) as caught:
            count_reads(Selection(ids.view(1, 1, 1), counts, 2), ids, counters, token_budget=2)
        assert caught.value.argument == argument


def test_backends() -> None:
    with pytest.raises(BackendError, match="got 'triton', expected 'auto' or 'torch' here"):
        resolve_backend("triton", "mps")
    with pytest.raises(QuestValueError, match="backend: got 'cuda'"):
        resolve_backend("cuda", "cpu")  # type: ignore[arg-type]
    for device in (None, "foo", "cuda:", 0):
        with pytest.raises(QuestValueError, match=r"^device: got .*, expected a torch\.device, or the name of one"):
            resolve_backend("auto", device)  # type: ignore[arg-type]
    for name in ("auto", "torch", "reference"):
        assert resolve_backend(name, "cpu").reason


KEYS = torch.zeros(5, 8, 2, 16)
TABLE = torch.zeros(1, 5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("argument", "keys", "values", "metadata", "table"),
    [
        ("keys.shape", KEYS[0], KEYS, torch.zeros(5, 2, 2, 16), TABLE),
        ("keys.dtype", KEYS.int(), KEYS.int(), torch.zeros(5, 2, 2, 16).int(), TABLE),
        ("values.shape", KEYS, KEYS[:4], torch.zeros(5, 2, 2, 16), TABLE),
        ("values.dtype", KEYS, KEYS.half(), torch.zeros(5, 2, 2, 16), TABLE),
        ("metadata.shape", KEYS, KEYS, torch.zeros(5, 2, 16), TABLE),
        ("metadata.dtype", KEYS, KEYS, torch.zeros(5, 2, 2, 16).half(), TABLE),
        ("metadata.device", KEYS, KEYS, torch.zeros(5, 2, 2, 16, device="meta"), TABLE),
        ("keys.shape", KEYS[:, :0], KEYS[:, :0], torch.zeros(5, 2, 2, 16), TABLE),
        ("keys.shape", KEYS[:, :, :0], KEYS[:, :, :0], torch.zeros(5, 0, 2, 16), TABLE),
        ("values.stride(-1)", KEYS[..., :1], KEYS[..., ::2], torch.zeros(5, 2, 2, 1), TABLE),
        ("metadata.stride(-1)", KEYS, KEYS, torch.zeros(5, 2, 2, 32)[..., ::2], TABLE),
        ("keys.stride(-1)", torch.zeros(5, 8, 16, 2).transpose(2, 3), KEYS, torch.zeros(5, 2, 2, 16), TABLE),
        ("page_table.shape", KEYS, KEYS, torch.zeros(5, 2, 2, 16), TABLE[0]),
        ("page_table.dtype", KEYS, KEYS, torch.zeros(5, 2, 2, 16), TABLE.long()),
        ("page_table.device", KEYS, KEYS, torch.zeros(5, 2, 2, 16), TABLE.to("meta")),
    ],
)
def test_paged_kv(
    argument: str, keys: torch.Tensor, values: torch.Tensor, metadata: torch.Tensor, table: torch.Tensor
) -> None:
    with pytest.raises(QuestValueError) as caught:
        PagedKV.from_nhd(keys, values, metadata, table)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "keys", "metadata"),
    [
        ("metadata.shape", torch.zeros(1, 2, 40, 16), torch.zeros(1, 2, 3, 2, 16)),
        ("metadata.shape", torch.zeros(1, 2, 40, 16), torch.zeros(1, 2, 0, 2, 16)),
        ("keys.stride()", torch.zeros(1, 40, 2, 16).transpose(1, 2), torch.zeros(1, 2, 5, 2, 16)),
    ],
)
def test_contiguous_caches(argument: str, keys: torch.Tensor, metadata: torch.Tensor) -> None:
    with pytest.raises(QuestValueError) as caught:
        PagedKV.from_contiguous(keys, torch.zeros_like(keys), metadata)
    assert caught.value.argument == argument


@pytest.mark.parametrize("name", ["keys", "values", "metadata", "page_table"])
@pytest.mark.parametrize("form", [Bounds(), Sketch(8)], ids=lambda form: form.name)
def test_what_is_no_tensor_is_named(name: str, form: MetadataForm) -> None:
    keys = torch.zeros(1, 2, 40, 16)
    stored = torch.zeros(1, 2, 5, *form.shape(8, 16), dtype=form.dtypes(keys.dtype)[0])
    contiguous = {"keys": keys, "values": keys, "metadata": stored}
    paged = {"keys": KEYS, "values": KEYS, "metadata": stored[0].transpose(0, 1).contiguous(), "page_table": TABLE}
    swapped = {**paged, "keys": KEYS.transpose(1, 2), "values": KEYS.transpose(1, 2)}
    for view, given in ((PagedKV.from_contiguous, contiguous), (PagedKV.from_nhd, paged), (PagedKV.from_hnd, swapped)):
        if name in given:
            with pytest.raises(QuestValueError, match=f"{name}: got None, expected a tensor, ") as caught:
                view(**{**given, name: None}, form=form)
            assert caught.value.argument == name
        view(**given, form=form)


def test_a_contiguous_cache_keeps_its_page_table() -> None:
    """The paths that need no page table would read the pages of the first one."""
    kv = make_cache([40, 33], layout="contiguous").kv
    for table in (kv.page_table.flip(0), kv.page_table[:1], kv.page_table.clone()):
        with pytest.raises(QuestValueError, match="page_table: got"):
            replace(kv, page_table=table)
        assert replace(kv, page_table=table, contiguous=None).page_table is table
    assert replace(kv).contiguous is kv.contiguous
    assert copy.deepcopy(kv).batch_size == 2

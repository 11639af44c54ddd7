"""The parts of the plugin that need no vLLM: its options, the layout of blocks, folded rows, refusals, ranks."""

from __future__ import annotations

import importlib.metadata
import itertools
from dataclasses import dataclass, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quest_attention import BackendError, QuestConfig, QuestValueError, UnsupportedModelError
from quest_attention.config import Metadata, SelectionUnit
from quest_attention.forms import FP8, form_of
from quest_attention.ops import append_slots
from quest_attention.pages import PagedKV
from quest_attention.serving.options import QuestOptions
from quest_attention.vllm import plugin
from quest_attention.vllm.folding import Fold
from quest_attention.vllm.layout import BlockLayout, PaddedBlocks, Room, RowedBlocks, ask_for_room, layout_of, page_size
from quest_attention.vllm.options import VLLMOptions, read_options
from quest_attention.vllm.places import Places, read_places
from quest_attention.vllm.proposer import QuestProposer
from quest_attention.vllm.ranks import is_of_draft, mark_target, sparse_layers
from quest_attention.vllm.refusals import check_session, check_vllm_config
from quest_attention.vllm.row_tokens import RowTokens
from quest_attention.vllm.scales import check_cache_dtype, unquantized
from quest_attention.vllm.speculation import check_drafts_without
from quest_attention.vllm.transfers import check_transfer
from quest_attention.vllm.worker import worker_label

BLOCKS, HEADS, TOKENS, DIM = 5, 2, 4, 8


@dataclass(frozen=True)
class FullAttentionSpec:
    """As much of vLLM's as the layout touches; its name counts."""

    block_size: int = TOKENS
    num_kv_heads: int = HEADS
    head_size: int = DIM
    head_size_v: int = DIM
    dtype: torch.dtype = torch.bfloat16
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    tokens_per_state: Any = 1
    page_size_padded: int | None = None

    @property
    def real_page_size_bytes(self) -> int:
        return 2 * self.block_size * self.num_kv_heads * self.head_size * self.dtype.itemsize

    page_size_bytes = real_page_size_bytes


class ChunkedLocalAttentionSpec(FullAttentionSpec):
    """Of a layer that is not full attention."""


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_budget_that_cannot_hold_what_is_always_read_names_the_block(sinks: int) -> None:
    options = VLLMOptions.from_mapping({"token_budget": 64, "num_sink_pages": sinks}, "cpu")
    with pytest.raises(
        QuestValueError, match=rf"at least {128 * (sinks + 1)}: .* \(a page is a block of vLLM: --block"
    ):
        options.config(128)
    with pytest.raises(
        QuestValueError, match=r"quest\.token_budget: got 2, .* \(a page is a block of vLLM: --block-size\)$"
    ):
        VLLMOptions.from_mapping({"token_budget": 2, "num_sink_pages": 2}, "cpu")  # whatever the size of a block


@pytest.mark.parametrize("unit", ["page", "token", 4])
def test_what_is_selected_by_sketches_is_an_option(unit: SelectionUnit) -> None:
    sketches = {"quest": {"metadata": "sketch", "selection_unit": unit}}
    options = read_options(SimpleNamespace(additional_config=sketches), "cpu")
    assert options is not None
    assert options.config(32) == QuestConfig(page_size=32, metadata="sketch", selection_unit=unit)
    with pytest.raises(QuestValueError, match=r"additional_config\.selection_unit"):
        read_options(SimpleNamespace(additional_config={"quest": {}, "selection_unit": unit}), "cpu")


def test_a_page_size_is_vllms_to_set() -> None:
    message = r"^quest\.page_size: got 16, expected nothing: a page is vLLM's block, set by --block-size$"
    with pytest.raises(QuestValueError, match=message):
        read_options(SimpleNamespace(additional_config={"quest": {"page_size": 16}}), "cpu")


def test_a_server_that_asks_for_nothing_and_one_that_asks_for_the_defaults() -> None:
    assert read_options(SimpleNamespace(additional_config={}), "cpu") is None
    assert read_options(SimpleNamespace(additional_config={"quest": {}}), "cpu") == VLLMOptions(device="cpu")


def test_a_release_has_its_layout() -> None:
    assert isinstance(layout_of((0, 25)), PaddedBlocks)
    assert isinstance(layout_of((0, 32)), RowedBlocks)
    assert isinstance(layout_of((0, 33)), RowedBlocks)


FORMS: list[dict[str, Any]] = [
    {}, {"metadata_dtype": "fp8"}, {"metadata": "moments"}, {"metadata": "sketch"},
]  # fmt: skip


def room_of(options: dict[str, Any], dim: int = DIM, dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS) -> Room:
    return Room.of(QuestOptions(options, device="cpu").config(tokens), dim, dtype)


def test_heads_that_a_form_cannot_be_of_are_refused_with_what_auto_is() -> None:
    with pytest.raises(QuestValueError, match=r"head_dim: got 20, expected a multiple of 8 for a sketch, .* bytes$"):
        room_of({"metadata": "sketch"}, dim=20)
    auto = QuestConfig(metadata="auto").resolved("cuda")
    with pytest.raises(QuestValueError, match=r'head_dim: got 20, .* bytes; metadata "auto" is sketch on cuda$'):
        Room.of(auto, 20, torch.bfloat16)


def make_blocks(kind: str, room: Room) -> tuple[BlockLayout, torch.Tensor, torch.Tensor]:
    """A layout, a layer's cache as vLLM makes it for what the layout asked for, and the memory behind it, of ones."""
    heads_last, padded = kind in ("gpu", "rows"), kind in ("gpu", "cpu")
    layout = layout_of((0, 25) if padded else (0, 32))
    spec = layout.with_room(FullAttentionSpec(), room)
    if not padded:
        states = int(TOKENS / spec.tokens_per_state)
        assert states * spec.tokens_per_state == TOKENS, "whole rows"
        shape = (BLOCKS, states, HEADS, 2 * DIM) if heads_last else (BLOCKS, HEADS, states, 2 * DIM)
        storage = torch.ones(shape, dtype=spec.dtype)
        return layout, storage.transpose(1, 2) if heads_last else storage, storage
    storage = torch.ones(BLOCKS, spec.page_size_padded // spec.dtype.itemsize, dtype=spec.dtype)
    shape = (2, TOKENS, HEADS, DIM) if heads_last else (HEADS, TOKENS, 2 * DIM)
    return layout, storage[:, : 2 * TOKENS * HEADS * DIM].view(BLOCKS, *shape), storage


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["gpu", "cpu", "rows", "heads"])
def test_a_block_holds_keys_values_and_what_its_form_keeps(kind: str, options: dict[str, Any]) -> None:
    """No byte belongs to two of them, and none but the last ones of a room to nobody."""
    room = room_of(options)
    layout, cache, storage = make_blocks(kind, room)
    parts = layout.split(cache, HEADS, DIM, room)
    assert parts.keys.shape == parts.values.shape == (BLOCKS, TOKENS, HEADS, DIM)
    assert parts.metadata.shape == (BLOCKS, HEADS, *room.shape)
    assert parts.metadata.dtype == room.dtype
    assert parts.stock.data_ptr() == storage.data_ptr()
    assert parts.stock.numel() == parts.keys.numel() + parts.values.numel()
    taken = []
    for part in (parts.keys, parts.values, parts.metadata):
        storage.zero_()
        part.view(torch.uint8).fill_(1)
        taken.append(storage.view(torch.uint8) == 1)
    sizes = [BLOCKS * TOKENS * HEADS * DIM * cache.element_size()] * 2 + [BLOCKS * HEADS * room.num_bytes]
    assert [int(one.sum()) for one in taken] == sizes
    assert int((taken[0] | taken[1] | taken[2]).sum()) == sum(sizes)


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["gpu", "cpu", "rows", "heads"])
def test_the_verbs_write_to_a_block_what_its_form_keeps(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config, room = QuestOptions(options, device="cpu").config(TOKENS), room_of(options)
    layout, cache, storage = make_blocks(kind, room)
    storage.zero_()
    parts = layout.split(cache, HEADS, DIM, room)
    nobody = torch.zeros(0, 1, dtype=torch.int32)
    kv = PagedKV(parts.keys, parts.values, parts.metadata, nobody, form=form_of(config))
    keys, values = torch.randn(2, TOKENS, HEADS, DIM).bfloat16()
    append_slots(kv, keys, values, torch.arange(2 * TOKENS, 3 * TOKENS))
    assert torch.equal(kv.keys[2], keys) and torch.equal(kv.values[2], values)
    plain = PagedKV(keys[None], values[None], torch.zeros_like(parts.metadata[:1]).contiguous(), nobody, form=kv.form)
    append_slots(plain, keys, values, torch.arange(TOKENS))
    assert torch.equal(kv.metadata[2].view(torch.uint8), plain.metadata[0].view(torch.uint8))
    assert not storage[[0, 1, 3, 4]].any()


@pytest.mark.parametrize(("dim", "dtype", "page_size", "kept", "tokens", "padded"), [
    (64, torch.bfloat16, 16, 192, 1, 256),
    (80, torch.bfloat16, 16, 288, 1, 288),
    (96, torch.bfloat16, 16, 288, 1, 384),
    (128, torch.bfloat16, 16, 384, 1, 384),
    (256, torch.bfloat16, 16, 752, 1, 768),
    (64, torch.float32, 16, 192, 1, 256),
    (128, torch.bfloat16, 32, 640, 2, 640),
    (128, torch.bfloat16, 128, 2176, 5, 2176),
])  # fmt: skip
def test_a_sketch_takes_the_fewest_tokens_that_hold_it(
    dim: int, dtype: torch.dtype, page_size: int, kept: int, tokens: int, padded: int
) -> None:
    room = room_of({"metadata": "sketch"}, dim, dtype, page_size)
    assert (room.num_bytes, room.tokens, room.padded_bytes) == (kept, tokens, padded)
    assert (tokens - 1) * room.token_bytes < kept <= padded <= tokens * room.token_bytes
    bounds = room_of({}, dim, dtype, page_size)
    assert (bounds.tokens, bounds.padded_bytes) == (1, bounds.token_bytes)
    halved = room_of({"metadata_dtype": "fp8"}, dim, torch.bfloat16, page_size)
    assert (halved.tokens, halved.num_bytes) == (1, 2 * dim)


def test_sketches_lie_in_whole_lines_of_a_gpus_memory() -> None:
    """With 128 channels in bfloat16, whatever of both releases made the blocks."""
    spec = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128)
    room = room_of({"metadata": "sketch"}, 128, spec.dtype, 16)
    padded = PaddedBlocks().with_room(spec, room).page_size_padded
    storage = torch.zeros(3, padded // 2, dtype=spec.dtype)
    made = [
        (PaddedBlocks(), storage[:, : 2 * 16 * 8 * 128].view(3, 2, 16, 8, 128)),
        (RowedBlocks(), torch.zeros(3, 8, 17, 256, dtype=spec.dtype)),
        (RowedBlocks(), torch.zeros(3, 17, 8, 256, dtype=spec.dtype).transpose(1, 2)),
    ]
    for layout, cache in made:
        metadata = layout.split(cache, 8, 128, room).metadata
        assert metadata.shape == (3, 8, 1, 384)
        assert all(stride % 128 == 0 for stride in metadata.stride()[:2])
        assert (metadata.data_ptr() - cache.data_ptr()) % 128 == 0


@pytest.mark.parametrize("kind", ["gpu", "heads"])
def test_blocks_without_the_room_are_refused(kind: str) -> None:
    layout, cache, _ = make_blocks(kind, room_of({}))
    with pytest.raises(UnsupportedModelError, match=r"KV cache: got blocks .* with page metadata"):
        layout.split(cache, HEADS, DIM, room_of({"metadata": "sketch"}))
    apart = torch.zeros(BLOCKS, HEADS, TOKENS + 1, 4 * DIM, dtype=torch.bfloat16)[..., : 2 * DIM]
    with pytest.raises(
        UnsupportedModelError, match=r"KV cache: got rows 32 .* expected a head's rows or a row's heads"
    ):
        RowedBlocks().split(apart, HEADS, DIM, room_of({}))


def a_layer(spec: FullAttentionSpec) -> tuple[Any, Any]:
    """vLLM's `Attention`, as much of it as is changed, whose layers store what a spec says, and a backend of ours."""

    class Ours:
        pass

    class Attention:
        attn_backend: type = Ours
        stores = spec

        def get_kv_cache_spec(self, _config: Any) -> FullAttentionSpec:
            return self.stores

    return Attention, Ours


def a_worker(*layers: Any, **quest: Any) -> SimpleNamespace:
    """A configuration when its model has been made of some layers."""
    return SimpleNamespace(
        additional_config={"quest": quest},
        model_config=None,
        compilation_config=SimpleNamespace(static_forward_context=dict(enumerate(layers))),
    )


@pytest.mark.parametrize(("form", "tokens"), [("bounds", 1), ("sketch", 2)])
@pytest.mark.parametrize("version", [(0, 25), (0, 32)])
def test_layers_ask_for_the_room_where_the_backend_is_ours(
    version: tuple[int, int], form: Metadata, tokens: int
) -> None:
    stock, layout = FullAttentionSpec(), layout_of(version)
    attention, ours = a_layer(stock)
    ask_for_room(layout, attention, ours, "cpu")
    once = attention.get_kv_cache_spec
    ask_for_room(layout, attention, ours, "cpu")
    assert attention.get_kv_cache_spec is once
    layer, other = attention(), attention()
    other.attn_backend = int
    server = a_worker(layer, other, metadata=form)
    spec = layer.get_kv_cache_spec(server)
    if version == (0, 32):
        assert spec.tokens_per_state == Fraction(TOKENS, TOKENS + tokens)
    else:
        room = room_of({"metadata": form})
        assert spec.page_size_padded == stock.real_page_size_bytes + HEADS * room.padded_bytes
    assert other.get_kv_cache_spec(server) == stock


def test_blocks_of_layers_of_several_kinds_have_as_many_bytes_before_there_is_room_in_them() -> None:
    """A layer with a window whose token takes half the bytes has twice the tokens in a block, as without Quest."""
    attention, ours = a_layer(FullAttentionSpec())
    ask_for_room(RowedBlocks(), attention, ours, "cpu")
    full, narrow, odd, alone = (attention() for _ in range(4))
    for one, heads in ((narrow, HEADS // 2), (odd, HEADS)):
        one.attn_backend, one.stores = int, FullAttentionSpec(num_kv_heads=heads, sliding_window=64)
    odd.stores = replace(odd.stores, block_size=TOKENS - 1)
    server = a_worker(full, narrow, odd)
    assert narrow.get_kv_cache_spec(server) == replace(narrow.stores, block_size=2 * TOKENS)
    assert odd.get_kv_cache_spec(server) == odd.stores  # no number of its blocks has as many
    assert full.get_kv_cache_spec(server).block_size == TOKENS
    nobody_asks = a_worker(narrow, odd)
    assert narrow.get_kv_cache_spec(nobody_asks) == narrow.stores
    alone.stores = FullAttentionSpec(num_kv_heads=HEADS // 2)
    assert alone.get_kv_cache_spec(a_worker(full, alone)).block_size == TOKENS  # all are Quest's


@pytest.mark.parametrize(("device", "smallest"), [("cpu", 32), ("cuda", 16)])
def test_a_page_is_a_block_but_in_models_with_states(device: str, smallest: int) -> None:
    assert page_size(1056, SimpleNamespace(is_hybrid=True), device) == smallest
    assert page_size(128, SimpleNamespace(is_hybrid=False), device) == page_size(128, None, device) == 128


@pytest.mark.parametrize(
    "spec",
    [
        ChunkedLocalAttentionSpec(),
        FullAttentionSpec(sliding_window=64),
        FullAttentionSpec(attention_chunk_size=64),
        FullAttentionSpec(head_size_v=4),
    ],
)
def test_other_caches_are_refused(spec: FullAttentionSpec) -> None:
    attention, ours = a_layer(spec)
    ask_for_room(RowedBlocks(), attention, ours, "cpu")
    layer = attention()
    with pytest.raises(UnsupportedModelError, match="KV cache: got"):
        layer.get_kv_cache_spec(a_worker(layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_are_found_whatever_the_order_of_a_block(dtype: torch.dtype) -> None:
    """A cache that keeps the numbers of a block in any order; tokens are read back from it."""
    torch.manual_seed(3)
    tokens, dim = 32, 64
    order = torch.randperm(2 * tokens * dim)

    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        for block, head in itertools.product(range(cache.shape[0]), range(cache.shape[1])):
            given = torch.stack([key[slots // tokens == block, head], value[slots // tokens == block, head]])
            cache[block, head].view(-1)[order] = given.flatten()

    places = Places.find(write, tokens, dim, dtype)
    keys, values = torch.randn(2, 3 * tokens, HEADS, dim).to(dtype)
    cache = torch.zeros(3, HEADS, tokens, 2 * dim, dtype=dtype)
    write(keys, values, cache, torch.arange(3 * tokens))
    fold, token = Fold(cache), torch.tensor([[[5, 90], [33, 2]]])  # of a row with two heads
    blocks = fold.table(torch.tensor([[0, 1, 2]], dtype=torch.int32), token // tokens).view(token.shape)
    found = [read_places(fold.records, blocks, part[token % tokens]) for part in places]
    for part, read in zip((keys, values), found, strict=True):
        expected = torch.stack([part[token[0, head], head] for head in range(HEADS)])
        assert torch.equal(read[0], expected)


def test_a_cache_that_does_not_hold_what_it_was_given_is_refused() -> None:
    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, _slots: torch.Tensor) -> None:
        cache.view(-1)[:] = torch.stack([key, value]).flatten() / 2

    with pytest.raises(UnsupportedModelError, match=r"KV cache: got \d+ numbers of 64 in a block in torch.float32"):
        Places.find(write, TOKENS, DIM, torch.float32)


@pytest.mark.parametrize("strides", ["rowed", "padded"])
def test_folded_rows_hold_the_pages_of_their_head(strides: str) -> None:
    """A row for each sequence and head: its blocks are those of the head's own pages."""
    torch.manual_seed(2)
    blocks = torch.randn(BLOCKS, HEADS, TOKENS, 2 * DIM)
    if strides == "rowed":
        cache = torch.cat([blocks, blocks.new_full((BLOCKS, HEADS, 1, 2 * DIM), float("nan"))], 2)[:, :, :TOKENS]
    else:
        room = blocks.new_full((BLOCKS, 2 * HEADS * DIM), float("nan"))
        cache = torch.cat([blocks.flatten(1), room], 1)[:, : blocks[0].numel()].view(BLOCKS, HEADS, TOKENS, 2 * DIM)
    block_table = torch.tensor([[4, 0, 2], [1, 3, 0]], dtype=torch.int32)
    pages = torch.tensor([[[0, 2], [1, 2]], [[1, -1], [0, -1]]], dtype=torch.int32)
    fold = Fold(cache)
    table = fold.table(block_table, pages)
    assert table.dtype == torch.int32
    lengths = [7, 7, 3, 3]
    for row, (b, h) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        rows = fold.cache[table[row].long(), 0].flatten(0, 1)[: lengths[row]]
        expected = torch.cat([blocks[int(block_table[b, page]), h] for page in pages[b, h] if page >= 0])[
            : lengths[row]
        ]
        assert torch.equal(rows, expected)


def a_server(**changes: Any) -> SimpleNamespace:
    """As much of a `VllmConfig` as is looked at."""
    model = {
        "model": "a model",
        "use_mla": False,
        "is_encoder_decoder": False,
        "is_hybrid": False,
        "is_attention_free": False,
        "runner_type": "generate",
        "get_sliding_window": lambda: None,
        "enforce_eager": False,
        "hf_text_config": SimpleNamespace(layer_types=["full_attention"]),
    }
    parallel = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "enable_dbo": False}
    found = {
        "attention_config": SimpleNamespace(backend=SimpleNamespace(name="CUSTOM")),
        "additional_config": {"quest": {}},
        "cache_config": SimpleNamespace(cache_dtype="auto", block_size=16, kv_offloading_size=None),
        "parallel_config": SimpleNamespace(**parallel),
        "kv_transfer_config": None,
        "speculative_config": None,
        "scheduler_config": SimpleNamespace(async_scheduling=True),
        "model_config": SimpleNamespace(**model),
    }
    for name, change in changes.items():
        found[name] = (
            SimpleNamespace(**(vars(found[name]) | change)) if isinstance(found[name], SimpleNamespace) else change
        )
    return SimpleNamespace(**found)


@pytest.mark.parametrize(
    ("version", "is_known"),
    [("0.32.1+cpu", True), ("0.33.0", True), ("0.29.0", False), ("0.34.0", False), ("dev", False)],
)
def test_a_vllm_that_nobody_knows_is_left_alone(version: str, is_known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: version)
    assert plugin._is_known() is is_known
    if version == "dev":
        with pytest.raises(BackendError, match="vllm: got version 'dev', expected that of a release"):
            plugin.vllm_version()


CPU = SimpleNamespace(device_type="cpu")
BOUNDS = {"quest": {"metadata": "bounds"}}
MOMENTS = {"quest": {"metadata": "moments"}}
AUTO = {"quest": {"metadata": "auto"}}
SPARSE_CHECKS = {"quest": {"metadata": "bounds", "verify": "sparse"}}


DRAFTS_BY_QUEST = SimpleNamespace(
    method="custom_class", model="quest_attention.vllm.proposer.QuestProposer", num_speculative_tokens=3
)


def a_head(method: str, kind: str = "llama", **changes: Any) -> SimpleNamespace:
    """vLLM's `SpeculativeConfig` of an EAGLE or MTP head."""
    draft = SimpleNamespace(hf_config=SimpleNamespace(model_type=kind))
    given = {"num_speculative_tokens": 3, "attention_backend": None, "draft_model_config": draft, **changes}
    return SimpleNamespace(method=method, **given)


@pytest.mark.parametrize(
    ("additional", "message"),
    [
        ({"Quest": {}}, "additional_config: got 'Quest', expected 'quest', in small letters"),
        ({" quest": {}}, "additional_config: got ' quest', expected 'quest'"),
        ({"quest": {}, "token_budget": 64}, "token_budget: got 64, expected it under 'quest': quest.token_budget"),
    ],
)
def test_options_beside_their_place_are_refused(additional: dict[str, Any], message: str) -> None:
    with pytest.raises(QuestValueError, match=message):
        read_options(SimpleNamespace(additional_config=additional), "cpu")
    two = SimpleNamespace(additional_config={"quest": {}, "another": 1})
    assert read_options(two, "cpu") == VLLMOptions(device="cpu")


def test_a_worker_says_its_replica() -> None:
    def label(size: int, index: int) -> str:
        parallel = SimpleNamespace(data_parallel_size=size, data_parallel_rank=index, data_parallel_index=index)
        return worker_label(parallel, 3)

    assert label(1, 0) == "worker 3"
    assert label(2, 0) == "replica 0, worker 3"
    assert label(1, 1) == "replica 1, worker 3"  # of a model whose replicas know nothing of one another


@pytest.mark.parametrize("lens", [[3, 3], [1, 4, 2], [2, 1]])
def test_tokens_of_rows_are_found_and_put_back(lens: list[int]) -> None:
    starts = torch.tensor([0, *itertools.accumulate(lens), 99], dtype=torch.int32)  # of a row behind
    tokens = RowTokens.of(lens, starts)
    assert tokens is not None and (tokens.count, tokens.most) == (sum(lens), max(lens))
    flat = torch.arange(sum(lens))
    by_row = tokens.by_row(flat)
    expected = [list(range(begin, begin + has)) for begin, has in zip(starts.tolist(), lens, strict=False)]
    assert [row[:has] for row, has in zip(by_row.tolist(), lens, strict=True)] == expected
    assert torch.equal(tokens.flat(by_row), flat)
    row, nth = tokens.row_and_place(len(lens))
    assert torch.equal(by_row[row, nth], flat)
    single = tokens.with_one()
    assert (None if single is None else single.tolist()) == ([has == 1 for has in lens] if len(set(lens)) > 1 else None)
    assert RowTokens.of([1, 1], starts) is None


def test_layers_of_a_draft_are_those_that_came_after_the_models() -> None:
    ours, stock = (SimpleNamespace(get_name=lambda name=name: name) for name in ("CUSTOM", "CPU_ATTN"))
    layers = {"model.layers.0.attn": SimpleNamespace(attn_backend=ours)}
    assert not mark_target({"model.layers.0.attn": SimpleNamespace(attn_backend=stock)}), "Quest is in none"
    assert not is_of_draft(layers["model.layers.0.attn"], layers)
    assert mark_target(layers)
    layers["model.layers.1.attn"] = SimpleNamespace(attn_backend=stock)
    assert mark_target(layers), "a draft may make configurations in between"
    assert [is_of_draft(layer, layers) for layer in layers.values()] == [False, True]
    assert sparse_layers(layers, 0, lambda name: int(name.split(".")[2])) == ["model.layers.0.attn"]


def test_a_plain_server_is_taken() -> None:
    check_vllm_config(a_server(), CPU)
    check_vllm_config(a_server(additional_config={}, model_config={"use_mla": True}), CPU)  # nobody asks
    ngram = SimpleNamespace(method="ngram")
    check_vllm_config(a_server(additional_config=BOUNDS, speculative_config=ngram), CPU)
    check_vllm_config(a_server(additional_config=BOUNDS, speculative_config=DRAFTS_BY_QUEST), CPU)
    for method in ("eagle", "eagle3", "mtp"):
        check_vllm_config(a_server(additional_config=SPARSE_CHECKS, speculative_config=a_head(method)), CPU)
    eager = {"enforce_eager": True}  # for PyTorch's verbs, in want of a GPU
    check_vllm_config(a_server(speculative_config=ngram, model_config=eager), SimpleNamespace(device_type="cuda"))
    check_vllm_config(a_server(additional_config=MOMENTS), CPU)
    check_vllm_config(a_server(additional_config=AUTO), CPU)


def test_moments_do_not_go_with_tokens_that_are_taken_back() -> None:
    """They would count tokens of which another was then written: no bound, and no mean either."""
    message = r"speculative_config\.method: got 'ngram', expected none with quest\.metadata moments"
    with pytest.raises(QuestValueError, match=message):
        check_vllm_config(a_server(additional_config=MOMENTS, speculative_config=SimpleNamespace(method="ngram")), CPU)
    with pytest.raises(QuestValueError, match=r'metadata moments, .*; metadata "auto" is moments on cpu$'):
        check_vllm_config(a_server(additional_config=AUTO, speculative_config=SimpleNamespace(method="ngram")), CPU)


@pytest.mark.parametrize("unit", ["page", "token", 4])
def test_sketches_go_with_tokens_that_are_taken_back(unit: SelectionUnit) -> None:
    """A page is sketched from the cache when it is complete, once more after its tokens were written again."""
    quest = {"quest": {"metadata": "sketch", "selection_unit": unit}}
    check_vllm_config(a_server(additional_config=quest, speculative_config=SimpleNamespace(method="ngram")), CPU)


def a_transfer(name: str, **changes: Any) -> SimpleNamespace:
    """As much of vLLM's `KVTransferConfig` as is looked at."""
    plain = {"kv_connector_module_path": None, "enable_permute_local_kv": False, "kv_connector_extra_config": {}}
    return SimpleNamespace(kv_connector=name, **(plain | changes))


@pytest.mark.parametrize("metadata", ["bounds", "sketch"])
def test_a_connector_that_was_seen_to_take_metadata_along(metadata: Metadata) -> None:
    for transfer in (None, a_transfer("NixlConnector"), a_transfer("NixlPullConnector")):
        server = a_server(additional_config={"quest": {"metadata": metadata}}, kv_transfer_config=transfer)
        check_transfer(server, "cpu", (0, 32))
    store = {"cpu_bytes_to_use": 1 << 30}
    for extra in (store, {"spec_name": "CPUOffloadingSpec", **store}):
        transfer = a_transfer("OffloadingConnector", kv_connector_extra_config=extra)
        server = a_server(additional_config={"quest": {"metadata": metadata}}, kv_transfer_config=transfer)
        check_transfer(server, "cuda", (0, 33))


@pytest.mark.parametrize(("transfer", "message"), [
    (a_transfer("ExampleConnector"), r"vLLM 0\.32 one of NixlConnector, .*: ExampleConnector copies .* slot"),
    (a_transfer("SharedStorageConnector"), "SharedStorageConnector copies keys and values slot by slot, and leaves"),
    (a_transfer("LMCacheConnectorV1"), "LMCacheConnectorV1 copies keys and values slot by slot"),
    (a_transfer("DecodeBenchConnector"), "DecodeBenchConnector fills blocks with numbers of its own"),
    (a_transfer("OffloadingConnector"), "OffloadingConnector moves whole blocks, .* but was not tested so"),
    (a_transfer("MultiConnector"), "MultiConnector is not known to take page metadata along"),
    (a_transfer("NixlConnector", kv_connector_module_path="a.b"), "kv_connector_module_path: got 'a.b', expected none"),
    (a_transfer("NixlConnector", enable_permute_local_kv=True), "enable_permute_local_kv: got True, expected False"),
    (
        a_transfer("NixlConnector", kv_connector_extra_config={"bidirectional_kv_xfer": True}),
        "bidirectional_kv_xfer: got True, expected False",
    ),
    (
        a_transfer("NixlConnector", kv_connector_extra_config={"enforce_handshake_compat": False}),
        "enforce_handshake_compat: got False, expected True",
    ),
])  # fmt: skip
def test_connectors_that_leave_metadata_behind_or_were_not_tested(transfer: Any, message: str) -> None:
    with pytest.raises(QuestValueError, match=message):
        check_transfer(a_server(additional_config=BOUNDS, kv_transfer_config=transfer), "cpu", (0, 32))


def test_connectors_go_with_the_device_the_release_the_model_and_the_form_they_were_tested_with() -> None:
    server = a_server(additional_config=BOUNDS, kv_transfer_config=a_transfer("NixlConnector"))
    with pytest.raises(QuestValueError, match=r"expected none on device cuda with vLLM 0\.32: .* not tested so"):
        check_transfer(server, "cuda", (0, 32))
    with pytest.raises(QuestValueError, match=r"none, or on device cuda with vLLM 0\.33 one of Offloading"):
        check_transfer(server, "cuda", (0, 33))
    for release in ((0, 25), (0, 33)):
        with pytest.raises(QuestValueError, match=rf"none on device cpu with vLLM 0\.{release[1]}: .* not tested so"):
            check_transfer(server, "cpu", release)
    tiered = a_transfer("OffloadingConnector", kv_connector_extra_config={"spec_name": "TieringOffloadingSpec"})
    with pytest.raises(QuestValueError, match="spec_name: got 'TieringOffloadingSpec', expected CPUOffloadingSpec: no"):
        check_transfer(a_server(additional_config=BOUNDS, kv_transfer_config=tiered), "cuda", (0, 33))
    mixed = {"hf_text_config": SimpleNamespace(layer_types=["full_attention", "sliding_attention"])}
    several = a_server(additional_config=BOUNDS, kv_transfer_config=a_transfer("NixlConnector"), model_config=mixed)
    with pytest.raises(
        QuestValueError, match="models with layers of sliding_attention were not tested with connectors"
    ):
        check_transfer(several, "cpu", (0, 32))
    for quest in (MOMENTS, AUTO):
        server = a_server(additional_config=quest, kv_transfer_config=a_transfer("NixlConnector"))
        with pytest.raises(
            QuestValueError, match=r"quest\.metadata moments, in which the last token of a prompt would"
        ):
            check_transfer(server, "cpu", (0, 32))


@pytest.mark.parametrize(("name", "device", "is_read"), [
    ("auto", "cpu", True), ("bfloat16", "cpu", True), ("float16", "cpu", False), ("fp8", "cpu", False),
    ("auto", "cuda", True), ("bfloat16", "cuda", True), ("fp8", "cuda", True), ("fp8_e4m3", "cuda", True),
    ("float16", "cuda", False), ("fp8_e5m2", "cuda", False), ("fp8_per_token_head", "cuda", False),
    ("nvfp4", "cuda", False),
])  # fmt: skip
def test_caches_in_the_dtype_of_the_model_and_in_8_bits(name: str, device: str, *, is_read: bool) -> None:
    if is_read:
        check_cache_dtype(name, torch.bfloat16, device)
        return
    with pytest.raises(QuestValueError, match=f"kv_cache_dtype: got '{name}', expected one of 'auto', 'bfloat16'"):
        check_cache_dtype(name, torch.bfloat16, device)


@pytest.mark.parametrize("scale", [torch.tensor(1.0), torch.tensor(0.3), torch.tensor([0.5, 0.3])], ids=str)
def test_queries_in_8_bits_are_what_the_stock_kernel_takes_them_for(scale: Tensor) -> None:
    layer = SimpleNamespace(_q_scale=scale, _q_scale_float=float(scale.max()))
    stored = torch.randn(3, 4, 8).to(FP8)
    of_heads = scale.expand(2).repeat_interleave(2) if scale.dim() else scale.expand(4)
    expected = stored.float() * of_heads[:, None]
    torch.testing.assert_close(unquantized(layer, stored, torch.float32), expected)
    plain = torch.randn(3, 4, 8)
    assert unquantized(layer, plain, torch.float32) is plain


def test_a_backend_that_cannot_run_here_is_refused_before_a_request() -> None:
    with pytest.raises(BackendError, match=r"quest\.backend: got 'triton', expected 'auto' or 'torch' here"):
        check_vllm_config(
            a_server(additional_config={"quest": {"backend": "triton"}}), SimpleNamespace(device_type="xpu")
        )


def test_a_backend_that_cannot_be_captured_is_refused_on_a_gpu() -> None:
    gpu = SimpleNamespace(device_type="cuda", has_device_capability=lambda capability: capability <= 80)
    torchs = {"quest": {"backend": "torch"}}
    with pytest.raises(QuestValueError, match=r"quest\.backend: got 'torch', expected 'triton', or --enforce-eager"):
        check_vllm_config(a_server(additional_config=torchs), gpu)
    eager = {"model_config": {"enforce_eager": True}}
    check_vllm_config(a_server(additional_config=torchs, **eager), gpu)
    narrow = {"quest": {"backend": "torch", "metadata_dtype": "fp8"}}
    with pytest.raises(QuestValueError, match=r"quest\.metadata_dtype: got 'fp8', expected 'kv' on a GPU of compute"):
        check_vllm_config(a_server(additional_config=narrow, **eager), gpu)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_config": {"backend": None}}, 'attention_backend: got "vLLM\'s own choice", expected CUSTOM'),
        ({"attention_config": {"backend": SimpleNamespace(name="FLASHINFER")}}, "attention_backend: got 'FLASHINFER'"),
        ({"cache_config": {"cache_dtype": "fp8_e4m3"}}, "kv_cache_dtype: got 'fp8_e4m3'"),
        ({"cache_config": {"kv_cache_dtype_skip_layers": ["0"]}}, "kv_cache_dtype_skip_layers: got .*, expected none"),
        ({"cache_config": {"calculate_kv_scales": True}}, "calculate_kv_scales: got True, expected False: keys that"),
        ({"cache_config": {"block_size": 4096}}, "token_budget: got 2048, expected at least 8192: 2 forced"),
        ({"parallel_config": {"decode_context_parallel_size": 2}}, "decode_context_parallel_size: got 2"),
        ({"parallel_config": {"prefill_context_parallel_size": 2}}, "prefill_context_parallel_size: got 2"),
        ({"parallel_config": {"enable_dbo": True}}, "enable_dbo: got True"),
        ({"cache_config": {"kv_offloading_size": 1.0}}, "kv_offloading_size: got 1.0"),
        ({"parallel_config": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size: got 2"),
        ({"additional_config": {"Quest": {}}}, "additional_config: got 'Quest', expected 'quest', in small letters"),
        (
            {"additional_config": {"quest": {"metadata": "auto", "token_budget": 31}}},
            r'^quest\.token_budget: got 31, .*; metadata "auto" is moments on cpu \(a page is a block of vLLM: --block',
        ),
        (
            {"additional_config": {"quest": {"metadata": "auto", "selection_unit": 4}}},
            r"^quest\.selection_unit: got 4, expected page for moments, which scores pages",
        ),
        (
            {"additional_config": {"quest": {"metadata": "moments", "selection_unit": "token"}}},
            r"^quest\.selection_unit: got 'token', expected page for moments, which scores pages",
        ),
        (
            {"additional_config": {"quest": {"metadata": "sketch", "token_budget": 31}}},
            r"^quest\.token_budget: got 31, expected at least 32: 2 forced pages of 16 tokens \(a page is a block",
        ),
        ({"model_config": {"rswa_window": 64}}, "with a window that moves in steps"),
        ({"model_config": {"is_mm_prefix_lm": True}}, "read in both directions, .* with --language-model-only"),
        ({"cache_config": {"kv_sharing_fast_prefill": True}}, "kv_sharing_fast_prefill: got True, expected False"),
        ({"speculative_config": SimpleNamespace(method="suffix")}, "speculative_config.method: got 'suffix'"),
        ({"speculative_config": SimpleNamespace(method="draft_model")}, "speculative_config.method: got 'draft_model'"),
        (
            {"additional_config": BOUNDS, "speculative_config": a_head("mtp", kind="gemma4_mtp")},
            "speculative_config.method: got 'mtp', expected .* not with gemma4_mtp, whose layers read the model's own",
        ),
        (
            {
                "additional_config": BOUNDS,
                "speculative_config": a_head("eagle", attention_backend=SimpleNamespace(name="CUSTOM")),
            },
            "speculative_config.attention_backend: got 'CUSTOM', expected none, or vLLM's own",
        ),
        (
            {
                "additional_config": BOUNDS,
                "speculative_config": SimpleNamespace(method="custom_class", model="a.Class"),
            },
            r"speculative_config.model: got 'a.Class', expected quest_attention\.vllm\.proposer\.QuestProposer",
        ),
        (
            {"additional_config": SPARSE_CHECKS, "speculative_config": DRAFTS_BY_QUEST},
            "quest.verify: got 'sparse', expected 'dense' with speculative_config.model .* is checked by stock",
        ),
        (
            {
                "additional_config": BOUNDS,
                "speculative_config": DRAFTS_BY_QUEST,
                "parallel_config": {"tensor_parallel_size": 2},
            },
            "tensor_parallel_size: got 2, expected 1 with speculative_config.model",
        ),
        (
            {
                "additional_config": BOUNDS,
                "speculative_config": DRAFTS_BY_QUEST,
                "model_config": {
                    "hf_text_config": SimpleNamespace(layer_types=["sliding_attention", "full_attention"])
                },
            },
            "with layers of sliding_attention, expected full attention over text alone with speculative_config.model",
        ),
        (
            {
                "additional_config": BOUNDS,
                "speculative_config": SimpleNamespace(
                    **vars(DRAFTS_BY_QUEST), num_speculative_tokens_per_batch_size=[(1, 4, 3)]
                ),
            },
            r"num_speculative_tokens_per_batch_size: got \[\(1, 4, 3\)\], expected none with speculative_config.model",
        ),
        (
            {
                "additional_config": BOUNDS,
                "speculative_config": DRAFTS_BY_QUEST,
                "model_config": {"enable_prompt_embeds": True},
            },
            "enable_prompt_embeds: got True, expected False with speculative_config.model",
        ),
        (
            {
                "additional_config": BOUNDS,
                "speculative_config": a_head("mtp"),
                "model_config": {"hf_text_config": SimpleNamespace(layer_types=["linear_attention", "full_attention"])},
            },
            "with layers of linear_attention, expected full attention in every layer with method mtp",
        ),
        ({"additional_config": SPARSE_CHECKS}, "quest.verify: got 'sparse', expected 'dense', or --speculative-config"),
        (
            {"additional_config": SPARSE_CHECKS, "speculative_config": a_head("eagle", num_speculative_tokens=16)},
            "speculative_config.num_speculative_tokens: got 16, expected at most 15 with quest.verify 'sparse'",
        ),
        (
            {
                "additional_config": {"quest": {"metadata": "bounds", "verify": "sparse", "token_budget": 47}},
                "speculative_config": a_head("eagle", num_speculative_tokens=4),
                "cache_config": {"block_size": 32},
            },
            r"quest.token_budget: got 47, expected at least 64: 2 forced pages of 32 tokens \(a page is a block",
        ),
        (
            {"additional_config": SPARSE_CHECKS, "speculative_config": a_head("eagle", enable_adaptive_verification=1)},
            "speculative_config.enable_adaptive_verification: got 1, expected none with quest.verify 'sparse'",
        ),
        ({"model_config": {"use_mla": True}}, "with MLA"),
        ({"model_config": {"is_encoder_decoder": True}}, "an encoder and decoder"),
        ({"model_config": {"is_attention_free": True}}, "without attention"),
        ({"model_config": {"runner_type": "pooling"}}, "to run as pooling"),
        (
            {"model_config": {"get_sliding_window": lambda: 512, "hf_text_config": SimpleNamespace()}},
            "a sliding window of 512 alone, expected layers with full attention among them",
        ),
        (
            {"model_config": {"hf_text_config": SimpleNamespace(layer_types=["chunked_attention"] * 2)}},
            "layers of chunked_attention alone",
        ),
    ],
)
def test_servers_that_are_refused(changes: dict[str, Any], message: str) -> None:
    server = a_server(**changes)
    with pytest.raises((QuestValueError, UnsupportedModelError), match=message):
        check_vllm_config(server, CPU)


def test_quest_does_not_draft_for_a_server_without_it() -> None:
    for speculation in (None, SimpleNamespace(method="custom_class", model="a.Class"), a_head("eagle")):
        check_drafts_without(speculation)
    with pytest.raises(QuestValueError, match=r"speculative_config\.model: .* 'quest' in --additional-config and"):
        check_drafts_without(DRAFTS_BY_QUEST)
    settings = SimpleNamespace(speculative_config=DRAFTS_BY_QUEST)
    with pytest.raises(BackendError, match=r"got vLLM's own attention .* \(VLLM_PLUGINS\)$"):  # nobody looked at it
        QuestProposer(settings).propose([[7]], [1], torch.tensor([[7]]))


@pytest.mark.parametrize("quest", [MOMENTS, AUTO])
def test_a_prompt_that_goes_on_has_no_moments_where_steps_are_on_their_way(quest: dict[str, Any]) -> None:
    """vLLM goes back by a token then, and writes its place again."""
    for good, is_async in ((BOUNDS, True), ({"quest": {"metadata": "sketch"}}, True), ({}, True), (quest, False)):
        check_session(a_server(additional_config=good, scheduler_config={"async_scheduling": is_async}), "cpu")
    with pytest.raises(QuestValueError, match=r"resumable: got True, expected False with quest\.metadata moments, in"):
        check_session(a_server(additional_config=quest), "cpu")


def test_layers_that_share_keys_and_values_are_as_dense_as_the_layer_whose_they_are() -> None:
    def of(**options: Any) -> SimpleNamespace:
        backend = SimpleNamespace(get_name=lambda: "CUSTOM")
        return SimpleNamespace(attn_backend=backend, sliding_window=None, attn_type="decoder", **options)

    layers = {
        "0": of(),
        "1": of(),
        "2": of(kv_sharing_target_layer_name="0"),
        "3": of(kv_sharing_target_layer_name="1"),
    }
    assert sparse_layers(layers, 0, int) == ["0", "1", "2", "3"]
    assert sparse_layers(layers, 1, int) == ["1", "3"]
    assert sparse_layers(layers, 2, int) == []


def test_a_model_of_several_kinds_is_taken_where_groups_were_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"hf_text_config": SimpleNamespace(layer_types=["full_attention", "sliding_attention"])}
    server = a_server(model_config=both)
    check_vllm_config(server, CPU)
    monkeypatch.setattr(plugin, "vllm_version", lambda: (0, 32))
    plugin._check_groups(server.model_config)
    monkeypatch.setattr(plugin, "vllm_version", lambda: (0, 25))
    plugin._check_groups(a_server().model_config)
    message = r"a model with layers of sliding_attention in vLLM 0\.25, expected full .*, or vLLM 0\.32, on which such"
    with pytest.raises(UnsupportedModelError, match=message):
        plugin._check_groups(server.model_config)


def test_drafts_that_an_older_release_does_not_take_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    ngram = SimpleNamespace(method="ngram")
    monkeypatch.setattr(plugin, "vllm_version", lambda: (0, 32))
    for speculation in (None, ngram, DRAFTS_BY_QUEST, a_head("eagle")):
        plugin._check_drafts(speculation)
    monkeypatch.setattr(plugin, "vllm_version", lambda: (0, 25))
    for speculation in (None, ngram):
        plugin._check_drafts(speculation)
    with pytest.raises(QuestValueError, match=r"speculative_config\.model: .* in vLLM 0\.25, which keeps no blocks"):
        plugin._check_drafts(DRAFTS_BY_QUEST)
    with pytest.raises(QuestValueError, match=r"speculative_config\.method: got 'eagle', .* tested from 0\.32 on"):
        plugin._check_drafts(a_head("eagle"))


def test_layers_that_choose_are_counted_among_full_attention_layers() -> None:
    """Windows, states and layers without attention stand before and between them; experts have names of their own."""

    def of(backend: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: backend), **options)

    plain = {"sliding_window": None, "attn_type": "decoder"}
    layers = {
        "model.layers.10.self_attn.attn": of("CUSTOM", **plain),
        "model.layers.0.self_attn.attn": of("CPU_ATTN", **(plain | {"sliding_window": 512})),
        "model.layers.1.linear_attn": SimpleNamespace(mamba_type="gdn_attention"),
        "model.layers.2.self_attn.attn": of("CUSTOM", **plain),
        "model.layers.2.mlp.experts": SimpleNamespace(),
        "model.layers.4.self_attn.attn": of("CHUNKED_LOCAL_ATTENTION", **plain),
        "model.layers.5.self_attn.attn": of("CUSTOM", **(plain | {"attn_type": "encoder_only"})),
        "model.layers.7.self_attn.attn": of("CUSTOM", **plain),
    }

    def index_of(name: str) -> int:
        return int(name.split(".")[2])

    full = [f"model.layers.{index}.self_attn.attn" for index in (2, 7, 10)]
    for num_dense_layers in range(5):
        assert sparse_layers(layers, num_dense_layers, index_of) == full[num_dense_layers:]

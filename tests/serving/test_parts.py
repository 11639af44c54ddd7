"""The parts of the plugin that need no vLLM: options, the layout of blocks, folded rows, counters, refusals."""

from __future__ import annotations

import importlib.metadata
import time
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quest_attention import BackendError, QuestConfig, QuestValueError, UnsupportedModelError
from quest_attention.ops import Selection
from quest_attention.pages import FP8_METADATA, KEY_MAX, KEY_MIN
from quest_attention.vllm import plugin
from quest_attention.vllm.counters import StepCounters, worker_label
from quest_attention.vllm.folding import Fold
from quest_attention.vllm.layout import PaddedBlocks, RowedBlocks, layout_of
from quest_attention.vllm.options import QuestOptions, advice_on_budget, read_options
from quest_attention.vllm.ranks import choosing_layers
from quest_attention.vllm.refusals import check_vllm_config
from quest_attention.vllm.step import read_lengths

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


class ChunkedLocalAttentionSpec(FullAttentionSpec):
    """Of a layer that is not full attention."""


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_budget_that_cannot_hold_what_is_always_read_names_the_block(sinks: int) -> None:
    options = QuestOptions.from_mapping({"token_budget": 64, "num_sink_pages": sinks})
    with pytest.raises(QuestValueError, match=rf"expected at least {128 * (sinks + 1)}: .*--block-size"):
        options.config(128)


def test_an_operator_is_told_of_a_budget_that_is_small_for_the_longest_sequence() -> None:
    assert advice_on_budget(512, 8192) is None
    assert str(advice_on_budget(511, 8192)).startswith("token_budget 511 is less than 1/16 of 8192 positions")


def test_options_of_reading_and_of_serving() -> None:
    options = QuestOptions.from_mapping({"token_budget": 1024, "num_dense_layers": 1, "log_interval": 0})
    assert options.config(32) == QuestConfig(1024, 32, num_dense_layers=1)
    assert (options.log_interval, options.backend, options.is_narrow) == (0, "auto", False)
    assert QuestOptions.from_mapping({}).config(16) == QuestConfig()
    assert read_options(SimpleNamespace(additional_config={})) is None
    assert read_options(SimpleNamespace(additional_config={"quest": {}})) == QuestOptions()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "quest: got \\[\\], expected an object"),
        ({"page_size": 16}, "quest.page_size: got 16, expected nothing: a page is vLLM's block"),
        ({"num_dense_layer": 1}, "did you mean num_dense_layers"),
        ({"log_interval": "10"}, "quest.log_interval: got '10'"),
        ({"num_recent_pages": -1}, "num_recent_pages: got -1"),
        ({"token_budget": 0}, "token_budget: got 0"),
    ],
)
def test_options_that_are_refused(given: Any, message: str) -> None:
    with pytest.raises(QuestValueError, match=message):
        QuestOptions.from_mapping(given)


def test_a_budget_is_held_to_the_block_size() -> None:
    options = QuestOptions.from_mapping({"token_budget": 64})
    assert options.config(32).page_budget == 2
    with pytest.raises(QuestValueError, match="token_budget: got 64, expected at least 128"):
        options.config(128)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_row_more_in_each_block(narrow: bool) -> None:
    layout = layout_of((0, 32))
    assert isinstance(layout, RowedBlocks)
    assert layout.customize(FullAttentionSpec()).tokens_per_state == Fraction(TOKENS, TOKENS + 1)
    cache = torch.zeros(BLOCKS, HEADS, TOKENS + 1, 2 * DIM, dtype=torch.bfloat16)
    assert_parts(layout.split(cache, HEADS, DIM, narrow=narrow), cache, narrow=narrow)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_padding_at_the_end_of_each_block(device: str, narrow: bool) -> None:
    layout = layout_of((0, 25))
    assert isinstance(layout, PaddedBlocks)
    shape = (2, TOKENS, HEADS, DIM) if device == "gpu" else (HEADS, TOKENS, 2 * DIM)
    taken, room = 2 * TOKENS * HEADS * DIM, 2 * HEADS * DIM
    storage = torch.zeros(BLOCKS, taken + room, dtype=torch.bfloat16)
    cache = storage[:, :taken].view(BLOCKS, *shape)
    assert_parts(layout.split(cache, HEADS, DIM, narrow=narrow), storage, narrow=narrow)


def assert_parts(parts: Any, storage: torch.Tensor, *, narrow: bool) -> None:
    """Every number of a block belongs to one of keys, values and bounds, and nothing to two."""
    assert parts.keys.shape == parts.values.shape == (BLOCKS, TOKENS, HEADS, DIM)
    assert parts.metadata.shape == (BLOCKS, HEADS, 2, DIM)
    assert parts.metadata.dtype == (FP8_METADATA if narrow else torch.bfloat16)
    parts.keys.fill_(1)
    parts.values.fill_(2)
    parts.metadata[:, :, KEY_MAX] = 3
    parts.metadata[:, :, KEY_MIN] = -3
    assert (parts.keys == 1).all() and (parts.values == 2).all()
    assert parts.stock.numel() == parts.keys.numel() + parts.values.numel()
    assert parts.stock.data_ptr() == storage.data_ptr()
    if not narrow:
        counted = [int((storage == value).sum()) for value in (1, 2, 3, -3)]
        assert counted == [BLOCKS * TOKENS * HEADS * DIM] * 2 + [BLOCKS * HEADS * DIM] * 2
        assert sum(counted) == storage.numel()


def test_layers_of_vllm_0_25_ask_for_the_room_where_the_backend_is_ours() -> None:
    class Ours:
        pass

    class Attention:
        attn_backend: type = Ours

        def get_kv_cache_spec(self, _config: Any) -> FullAttentionSpec:
            return FullAttentionSpec()

    layout, stock = PaddedBlocks(), FullAttentionSpec()
    layout.prepare(Attention, Ours)
    once = Attention.get_kv_cache_spec
    layout.prepare(Attention, Ours)
    assert Attention.get_kv_cache_spec is once
    padded = Attention().get_kv_cache_spec(None).page_size_padded
    assert padded == stock.real_page_size_bytes * (TOKENS + 1) // TOKENS
    other = Attention()
    other.attn_backend = int
    assert other.get_kv_cache_spec(None) == stock


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
    with pytest.raises(UnsupportedModelError, match="KV cache: got"):
        RowedBlocks().customize(spec)


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


def test_lengths_that_are_read_are_those_of_the_chosen_pages() -> None:
    config = QuestConfig(token_budget=50, page_size=16)
    for length in range(1, 200):
        read = int(read_lengths(torch.tensor([length]), config))
        last = (length - 1) % 16 + 1  # tokens of the last page
        assert read == (length if length <= 50 else 2 * 16 + last)


def make_counters(lines: list[str], interval: float = 10) -> StepCounters:
    return StepCounters(QuestConfig(32), torch.device("cpu"), "worker 0", interval, lines.append)


def test_counters_of_rows_on_host_and_device() -> None:
    counters = make_counters([])
    selected = Selection(torch.zeros(3, 1, 2, dtype=torch.int32), torch.tensor([[2], [1], [0]], dtype=torch.int32))
    counters.count_quest(selected, torch.tensor([100, 10, 0], dtype=torch.int32))
    counters.count_stock([20, 0])
    expected = {"sparse_rows": 1, "dense_rows": 2, "pages_read": 5, "pages_held": 10, "eager_steps": 2}
    assert counters.snapshot() == expected
    counters.reset()
    assert not any(counters.snapshot().values())


def test_counters_made_by_a_step_are_reset_outside_of_one() -> None:
    counters = make_counters([])
    with torch.inference_mode():
        counters.plan(1)
        counters.count_quest(
            Selection(torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32)), torch.tensor([99])
        )
    counters.reset()
    assert not any(counters.snapshot().values())


def test_a_line_at_an_interval_where_something_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = 1000.0, []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    counters = make_counters(lines)
    selected = Selection(torch.zeros(1, 1, 2, dtype=torch.int32), torch.tensor([[2]], dtype=torch.int32))

    def step() -> None:
        counters.plan(1)
        counters.count_quest(selected, torch.tensor([160], dtype=torch.int32))

    counters.plan(0)
    assert lines == []  # nobody decoded
    step()
    step()
    assert len(lines) == 1  # the first step is told of at once
    for _ in range(3):
        step()
    assert len(lines) == 1
    now += 11
    step()
    assert len(lines) == 2
    assert lines[1].startswith(
        "Quest, worker 0: 4 of 4 decode rows sparse, 8 of 40 pages read (20.0 %); since the start"
    )
    now += 600  # idle
    step()
    assert len(lines) == 3
    counters.plan(0)
    assert len(lines) == 3
    silent = make_counters(lines, interval=0)
    for _ in range(2):
        silent.plan(1)
        silent.count_stock([1])
    assert len(lines) == 3


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
        "model_config": SimpleNamespace(**model),
    }
    for name, change in changes.items():
        found[name] = (
            SimpleNamespace(**(vars(found[name]) | change)) if isinstance(found[name], SimpleNamespace) else change
        )
    return SimpleNamespace(**found)


@pytest.mark.parametrize(("version", "is_tested"), [("0.32.1+cpu", True), ("0.29.0", False), ("dev", False)])
def test_a_vllm_that_nobody_knows_is_left_alone(version: str, is_tested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: version)
    assert plugin._is_tested() is is_tested
    if version == "dev":
        with pytest.raises(BackendError, match="vllm: got version 'dev', expected that of a release"):
            plugin.vllm_version()


CPU = SimpleNamespace(device_type="cpu")


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
        read_options(SimpleNamespace(additional_config=additional))
    assert read_options(SimpleNamespace(additional_config={"quest": {}, "another": 1})) == QuestOptions()


def test_a_worker_says_its_replica() -> None:
    def label(size: int, index: int) -> str:
        parallel = SimpleNamespace(data_parallel_size=size, data_parallel_rank=index, data_parallel_index=index)
        return worker_label(parallel, 3)

    assert label(1, 0) == "worker 3"
    assert label(2, 0) == "replica 0, worker 3"
    assert label(1, 1) == "replica 1, worker 3"  # of a model whose replicas know nothing of one another


def test_a_plain_server_is_taken() -> None:
    check_vllm_config(a_server(), CPU)
    check_vllm_config(a_server(additional_config={}, model_config={"use_mla": True}), CPU)  # nobody asks
    check_vllm_config(a_server(speculative_config=SimpleNamespace(method="ngram")), CPU)


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
        ({"cache_config": {"block_size": 4096}}, "token_budget: got 2048, expected at least 4096"),
        ({"parallel_config": {"decode_context_parallel_size": 2}}, "decode_context_parallel_size: got 2"),
        ({"parallel_config": {"prefill_context_parallel_size": 2}}, "prefill_context_parallel_size: got 2"),
        ({"parallel_config": {"enable_dbo": True}}, "enable_dbo: got True"),
        ({"kv_transfer_config": SimpleNamespace(kv_connector="A")}, "kv_transfer_config: got 'A'"),
        ({"cache_config": {"kv_offloading_size": 1.0}}, "kv_offloading_size: got 1.0"),
        ({"parallel_config": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size: got 2"),
        ({"additional_config": {"Quest": {}}}, "additional_config: got 'Quest', expected 'quest', in small letters"),
        ({"model_config": {"rswa_window": 64}}, "whose every layer is causal and reads everything"),
        ({"speculative_config": SimpleNamespace(method="suffix")}, "speculative_config.method: got 'suffix'"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "speculative_config.method: got 'eagle3'"),
        ({"model_config": {"use_mla": True}}, "with MLA"),
        ({"model_config": {"is_encoder_decoder": True}}, "an encoder and decoder"),
        ({"model_config": {"is_hybrid": True}}, "with states"),
        ({"model_config": {"runner_type": "pooling"}}, "to run as pooling"),
        ({"model_config": {"get_sliding_window": lambda: 512}}, "a sliding window of 512"),
        (
            {"model_config": {"hf_text_config": SimpleNamespace(layer_types=["full_attention", "chunked_attention"])}},
            "layers of chunked_attention",
        ),
    ],
)
def test_servers_that_are_refused(changes: dict[str, Any], message: str) -> None:
    server = a_server(**changes)
    with pytest.raises((QuestValueError, UnsupportedModelError), match=message):
        check_vllm_config(server, CPU)


def test_layers_that_choose_are_counted_among_full_attention_layers() -> None:
    """Windows, states and layers without attention stand before and between them; experts have names of their own."""

    def of(backend: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: backend), **options)

    plain = {"sliding_window": None, "attn_type": "decoder"}
    layers = {
        "model.layers.10.self_attn.attn": of("CUSTOM", **plain),
        "model.layers.0.self_attn.attn": of("CUSTOM", **(plain | {"sliding_window": 512})),
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
        assert choosing_layers(layers, num_dense_layers, index_of) == full[num_dense_layers:]

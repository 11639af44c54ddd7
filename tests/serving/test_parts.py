"""The parts of the plugin that need no vLLM: its options, the layout of blocks, folded rows, refusals, ranks."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quest_attention import BackendError, QuestConfig, QuestValueError, UnsupportedModelError
from quest_attention.config import Metadata
from quest_attention.forms import FP8, KEY_MAX, KEY_MIN, TwoVectors, form_of, metadata_dtype
from quest_attention.ops import update_slot_metadata
from quest_attention.pages import PagedKV
from quest_attention.vllm import plugin
from quest_attention.vllm.folding import Fold
from quest_attention.vllm.layout import PaddedBlocks, RowedBlocks, layout_of
from quest_attention.vllm.options import VLLMOptions, read_options
from quest_attention.vllm.ranks import sparse_layers
from quest_attention.vllm.refusals import check_vllm_config
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


class ChunkedLocalAttentionSpec(FullAttentionSpec):
    """Of a layer that is not full attention."""


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_budget_that_cannot_hold_what_is_always_read_names_the_block(sinks: int) -> None:
    options = VLLMOptions.from_mapping({"token_budget": 64, "num_sink_pages": sinks})
    with pytest.raises(
        QuestValueError, match=rf"at least {128 * (sinks + 1)}: .* \(a page is a block of vLLM: --block"
    ):
        options.config(128)
    with pytest.raises(
        QuestValueError, match=r"quest\.token_budget: got 2, .* \(a page is a block of vLLM: --block-size\)$"
    ):
        VLLMOptions.from_mapping({"token_budget": 2, "num_sink_pages": 2})  # whatever the size of a block


@pytest.mark.parametrize("unit", ["token", 4, "pages"])
def test_vllm_reads_whole_blocks(unit: str | int) -> None:
    given = {"quest": {"selection_unit": unit, "metadata": "sketch"}}
    with pytest.raises(QuestValueError, match=rf"^quest\.selection_unit: got {unit!r}, expected 'page': inside vLLM"):
        read_options(SimpleNamespace(additional_config=given))
    assert VLLMOptions.from_mapping({"selection_unit": "page"}).config(16) == QuestConfig()
    with pytest.raises(
        QuestValueError, match=r"^quest\.metadata: got 'sketch', expected bounds or moments: inside vLLM"
    ):
        VLLMOptions.from_mapping({"metadata": "sketch"})
    with pytest.raises(QuestValueError, match=r"additional_config\.selection_unit"):
        read_options(SimpleNamespace(additional_config={"quest": {}, "selection_unit": "page"}))


def test_a_page_size_is_vllms_to_set() -> None:
    message = r"^quest\.page_size: got 16, expected nothing: a page is vLLM's block, set by --block-size$"
    with pytest.raises(QuestValueError, match=message):
        read_options(SimpleNamespace(additional_config={"quest": {"page_size": 16}}))


def test_a_server_that_asks_for_nothing_and_one_that_asks_for_the_defaults() -> None:
    assert read_options(SimpleNamespace(additional_config={})) is None
    assert read_options(SimpleNamespace(additional_config={"quest": {}})) == VLLMOptions()


@pytest.mark.parametrize("fp8", [False, True])
def test_a_row_more_in_each_block(fp8: bool) -> None:
    layout = layout_of((0, 32))
    assert isinstance(layout, RowedBlocks)
    assert layout.customize(FullAttentionSpec()).tokens_per_state == Fraction(TOKENS, TOKENS + 1)
    cache = torch.zeros(BLOCKS, HEADS, TOKENS + 1, 2 * DIM, dtype=torch.bfloat16)
    assert_parts(layout.split(cache, HEADS, DIM, FP8 if fp8 else cache.dtype), cache, fp8=fp8)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_padding_at_the_end_of_each_block(device: str, fp8: bool) -> None:
    layout = layout_of((0, 25))
    assert isinstance(layout, PaddedBlocks)
    shape = (2, TOKENS, HEADS, DIM) if device == "gpu" else (HEADS, TOKENS, 2 * DIM)
    taken, room = 2 * TOKENS * HEADS * DIM, 2 * HEADS * DIM
    storage = torch.zeros(BLOCKS, taken + room, dtype=torch.bfloat16)
    cache = storage[:, :taken].view(BLOCKS, *shape)
    assert_parts(layout.split(cache, HEADS, DIM, FP8 if fp8 else cache.dtype), storage, fp8=fp8)


def assert_parts(parts: Any, storage: torch.Tensor, *, fp8: bool) -> None:
    """Every number of a block belongs to one of keys, values and bounds, and nothing to two."""
    assert parts.keys.shape == parts.values.shape == (BLOCKS, TOKENS, HEADS, DIM)
    assert parts.metadata.shape == (BLOCKS, HEADS, 2, DIM)
    assert parts.metadata.dtype == (FP8 if fp8 else torch.bfloat16)
    parts.keys.fill_(1)
    parts.values.fill_(2)
    parts.metadata[:, :, KEY_MAX] = 3
    parts.metadata[:, :, KEY_MIN] = -3
    assert (parts.keys == 1).all() and (parts.values == 2).all()
    assert parts.stock.numel() == parts.keys.numel() + parts.values.numel()
    assert parts.stock.data_ptr() == storage.data_ptr()
    if not fp8:
        counted = [int((storage == value).sum()) for value in (1, 2, 3, -3)]
        assert counted == [BLOCKS * TOKENS * HEADS * DIM] * 2 + [BLOCKS * HEADS * DIM] * 2
        assert sum(counted) == storage.numel()


@pytest.mark.parametrize("form", ["bounds", "moments"])
@pytest.mark.parametrize("rowed", [False, True])
def test_forms_that_score_pages_fit_the_room_of_a_block(form: Metadata, rowed: bool) -> None:
    """Room is asked for whatever the form: two numbers of each channel, as wide as those of a key."""
    config = QuestConfig(metadata=form)
    assert form_of(config).shape(TOKENS, DIM) == (TwoVectors.ROWS, DIM)
    shape = (BLOCKS, HEADS, TOKENS + rowed, 2 * DIM)
    storage = torch.zeros(BLOCKS, HEADS * (TOKENS + 1) * 2 * DIM, dtype=torch.bfloat16)
    cache = storage[:, : shape[1] * shape[2] * shape[3]].view(shape)
    layout = layout_of((0, 32) if rowed else (0, 25))
    parts = layout.split(cache, HEADS, DIM, metadata_dtype(config, cache.dtype))
    nobody = torch.zeros(0, 1, dtype=torch.int32)
    kv = PagedKV(parts.keys, parts.values, parts.metadata, nobody, form=form_of(config))
    update_slot_metadata(
        kv.metadata, torch.randn(2, HEADS, DIM).bfloat16(), torch.tensor([8, 9]), page_size=TOKENS, form=kv.form
    )
    assert kv.metadata[2].any() and not kv.metadata[[0, 1, 3, 4]].any()
    assert not kv.keys.any() and not kv.values.any()


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
MOMENTS = {"quest": {"metadata": "moments"}}


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
    assert read_options(SimpleNamespace(additional_config={"quest": {}, "another": 1})) == VLLMOptions()


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
    check_vllm_config(a_server(additional_config=MOMENTS), CPU)


def test_moments_do_not_go_with_tokens_that_are_taken_back() -> None:
    """They would count tokens of which another was then written: no bound, and no mean either."""
    message = r"speculative_config\.method: got 'ngram', expected none with quest\.metadata moments"
    with pytest.raises(QuestValueError, match=message):
        check_vllm_config(a_server(additional_config=MOMENTS, speculative_config=SimpleNamespace(method="ngram")), CPU)


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
        assert sparse_layers(layers, num_dense_layers, index_of) == full[num_dense_layers:]

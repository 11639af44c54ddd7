"""What Quest adds to a layer's attention in vLLM, called by hand: no engine is started."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("vllm", reason="runs with make test-vllm, which installs vLLM")

from quest_attention import QuestConfig, QuestValueError
from quest_attention.forms import Bounds
from quest_attention.ops import Selection
from quest_attention.serving.options import QuestOptions

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vLLM imports warns of itself
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.attention.backends.utils import split_decodes_and_prefills

    from quest_attention.vllm import batches
    from quest_attention.vllm.cpu import QuestCPUImpl
    from quest_attention.vllm.gpu import check_estimates
    from quest_attention.vllm.impl import OpenCache, QuestAttentionImpl, QuestBackend

pytestmark = pytest.mark.filterwarnings("ignore")
HEADS, TOKENS, DIM = 2, 4, 8


class Attends(QuestCPUImpl):
    """Quest on a CPU with nothing behind it: what ran is noted."""

    def __init__(self, num_dense_layers: int = 0, layers: tuple[str, ...] = ("model.layers.0.attn",)) -> None:
        self.num_kv_heads, self.head_size = HEADS, DIM
        self._options = QuestOptions({"num_dense_layers": num_dense_layers}, device="cpu")
        self._layers = {name: a_layer(name) for name in layers}
        self._is_dense = None
        self.ran: list[str] = []

    def open(self, _layer: Any, kv_cache: Tensor) -> OpenCache:
        parts: Any = SimpleNamespace(stock=kv_cache)
        paged: Any = SimpleNamespace(metadata=kv_cache, page_size=TOKENS, form=Bounds())
        return OpenCache(0, parts, paged)

    def attend(self, *_: Any) -> Selection:
        self.ran.append("quest")
        return Selection(torch.zeros(1, HEADS, 1, dtype=torch.int32), torch.ones(1, HEADS, dtype=torch.int32), TOKENS)

    def _forward_stock(self, *_: Any) -> Tensor:
        self.ran.append("stock")
        return torch.empty(0)


def a_layer(name: str, **changes: Any) -> Any:
    """As much of vLLM's `Attention` as is looked at."""
    found = {
        "layer_name": name,
        "attn_backend": SimpleNamespace(get_name=lambda: "CUSTOM"),
        "sliding_window": None,
        "attn_type": "decoder",
    }
    return SimpleNamespace(**(found | changes))


def a_step(rows: int = 1) -> Any:
    """Metadata of a batch, of whose rows so many run Quest."""
    step = SimpleNamespace(num_rows=rows, num_tokens=rows, rest=None, counted_layer="", parts=[])
    return SimpleNamespace(quest=step)


def attend(impl: QuestAttentionImpl, name: str, metadata: Any, *scales: Tensor | None) -> None:
    query = torch.zeros(1, HEADS, DIM)
    impl.forward(a_layer(name), query, query, query, torch.zeros(0), metadata, torch.zeros(1, HEADS, DIM), *scales)


@pytest.mark.parametrize("metadata", [a_step(1), a_step(0), SimpleNamespace(quest=None), None])
def test_an_output_that_is_to_be_quantized_is_refused(metadata: Any) -> None:
    """vLLM gives a scale where it has fused quantization of the output into attention, whose output is then 8 bits."""
    impl = Attends()
    attend(impl, "model.layers.0.attn", metadata)
    assert len(impl.ran) == 1
    for name, scales in (("output_scale", (torch.ones(1),)), ("output_block_scale", (None, torch.ones(1)))):
        with pytest.raises(QuestValueError, match=f"{name}: got 'a tensor', expected None: .*fuse_attn_quant"):
            attend(impl, "model.layers.0.attn", metadata, *scales)
    assert len(impl.ran) == 1


def test_vllm_is_told_to_fuse_nothing_into_quests_attention() -> None:
    """Fused updates of the cache would write keys past the bounds; a fused output would be of another dtype."""
    impl: Any = Attends()
    assert impl.fused_output_quant_supported(None) is False
    for name in ("rope_kvcache", "qk_norm_rope_kvcache", "qk_norm_mrope_kvcache"):
        assert getattr(impl, f"fused_{name}_supported")() is False
        assert f"fused_{name}_supported" in vars(QuestAttentionImpl), "whatever the stock class says in other releases"
    assert vars(QuestBackend)["supports_kv_cache_update_bypass"] is False, "in 0.33 FlashAttention says that it does"


def test_a_cache_is_let_go_of() -> None:
    """What vLLM measures graphs with is gone when the real cache is made, where Quest's views do not keep it."""
    impl, cache = Attends(), torch.zeros(2, HEADS, TOKENS, 2 * DIM)
    impl._opened = impl.open(None, cache)
    impl._fold_of(impl._opened)
    # Views are tensors of their own: of the cache itself only its memory tells that it is held.
    held = weakref.ref(cache), StorageWeakRef(cache.untyped_storage())
    del cache
    assert held[0]() is not None and not held[1].expired()
    impl.close()
    assert held[0]() is None and held[1].expired()


@pytest.mark.parametrize(("num_dense_layers", "sparse"), [(0, [1, 3, 4]), (1, [3, 4]), (2, [4]), (3, [])])
def test_dense_layers_are_counted_among_those_that_attend(num_dense_layers: int, sparse: list[int]) -> None:
    """A model some of whose layers have no attention: 1, 3 and 4 have."""
    names = tuple(f"model.layers.{index}.attn" for index in (1, 3, 4))
    for index, name in zip((1, 3, 4), names, strict=True):
        impl = Attends(num_dense_layers, names)
        attend(impl, name, a_step())
        assert impl.ran == (["quest"] if index in sparse else ["stock"])


def test_a_dense_layer_writes_no_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUAttentionBackendImpl, "do_kv_cache_update", lambda *_: None)
    names = ("model.layers.0.attn", "model.layers.1.attn")
    key = torch.randn(3, HEADS, DIM)
    for name in names:
        bounds = torch.full((3, HEADS, 2, DIM), float("nan"))
        Attends(1, names).do_kv_cache_update(a_layer(name), key, key, bounds, torch.tensor([4, 5, 6]))
        written = ~bounds.isnan()
        assert written[1].all() == (name == names[1])
        assert not written[0].any() and not written[2].any()


@pytest.mark.parametrize("last_is_prompt", [False, True])
def test_a_batch_padded_for_a_graph_is_split_where_nobody_tells_of_the_padding(last_is_prompt: bool) -> None:
    starts = torch.tensor([0, 1, 2, 3, 3])
    batch = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=torch.tensor([9, 8, 7, 0]), num_reqs=4,
        num_actual_tokens=4, max_query_len=1, max_seq_len=9, block_table_tensor=torch.zeros(4, 1, dtype=torch.int32),
        slot_mapping=torch.arange(4), is_prefilling=torch.tensor([False, False, last_is_prompt]),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="size"):  # so it must be told
        split_decodes_and_prefills(batch, decode_threshold=1, treat_short_extends_as_decodes=False)
    told = batches.told_of_every_row(batch)
    assert told.is_prefilling.tolist() == [False, False, last_is_prompt, False]
    assert batches.told_of_every_row(told) is told
    rows, *_ = split_decodes_and_prefills(told, decode_threshold=1, treat_short_extends_as_decodes=False)
    assert rows == (2 if last_is_prompt else 4)


def test_rows_that_check_speculated_tokens_are_told_from_pieces_of_prompts() -> None:
    """A row that decodes, one that checks three tokens, two pieces of prompts, a row resumed, one that only pads."""
    batch = SimpleNamespace(
        query_start_loc_cpu=torch.tensor([0, 1, 4, 3, 60, 20, 0]).cumsum(0),
        seq_lens_cpu_upper_bound=torch.tensor([50, 104, 67, 60, 300, 0]),
        is_prefilling=torch.tensor([False, False, True, True, False, False]),
        num_reqs=6,
    )
    assert batches.checking_lengths(batch, 1, 3) == [104]
    batch.is_prefilling = None  # then a short piece of a prompt passes for one
    assert batches.checking_lengths(batch, 1, 3) == [104, 67]


def test_rows_that_only_pad_a_batch_are_left_out_and_some_rows_are_a_batch_of_their_own() -> None:
    """Rows of three tokens, one and two, and two that only pad."""
    starts = torch.tensor([0, 3, 4, 6, 6, 6], dtype=torch.int32)
    lengths = torch.tensor([50, 60, 70, 0, 0], dtype=torch.int32)
    batch = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, num_reqs=5, num_actual_tokens=6,
        max_query_len=3, max_seq_len=70, block_table_tensor=torch.arange(10, dtype=torch.int32).view(5, 2),
        slot_mapping=torch.arange(6), seq_lens_cpu_upper_bound=lengths,
    )  # fmt: skip
    assert batches.fresh_tokens(batch, 5) == [3, 1, 2]
    assert batches.by_kind([50, 60, 70], [3, 1, 2]) == ([60], [50, 70])
    rows, tokens = [0, 2], [0, 1, 2, 4, 5]
    starts = torch.tensor([0, 3, 5], dtype=torch.int32)
    some = batches.SomeRows(rows, torch.tensor(rows), tokens, torch.tensor(tokens), starts).of(batch, 3, 70)
    assert some.query_start_loc.tolist() == some.query_start_loc_cpu.tolist() == [0, 3, 5]
    assert (some.num_reqs, some.num_actual_tokens, some.max_query_len, some.max_seq_len) == (2, 5, 3, 70)
    assert some.seq_lens.tolist() == some.seq_lens_cpu_upper_bound.tolist() == [50, 70]
    assert some.block_table_tensor.tolist() == [[0, 1], [4, 5]]
    assert some.slot_mapping.tolist() == tokens


def test_checks_by_sketches_that_a_gpu_has_no_memory_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(max_model_len=131072, get_num_attention_heads=lambda _: 64, get_num_kv_heads=lambda _: 8)
    config = QuestConfig(512, metadata="sketch", selection_unit="token")
    server = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=8), model_config=model, parallel_config=None
    )  # 8 x 9 x 64 x 131072 x 4 bytes
    gpu = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    check_estimates(server, 9, config, torch.device("cuda"))
    server.scheduler_config.max_num_seqs = 256
    message = r"quest.metadata: got 'sketch', expected bounds, or a smaller .* take 77.3 GB by sketches"
    gpu.total_memory = 16 << 30
    with pytest.raises(QuestValueError, match=message):
        check_estimates(server, 9, config, torch.device("cuda"))
    check_estimates(server, 8, config, torch.device("cuda"))  # whose 64 heads choose without estimates in memory
    alone = QuestConfig(512, metadata="sketch", selection_unit="token", candidate_factor=0)
    check_estimates(server, 8, alone, torch.device("cuda"))
    alone = replace(alone, token_budget=128)  # of so many positions too few for a sample to say which pass
    with pytest.raises(QuestValueError, match=r"8 tokens over 131072 positions take 68.7 GB by sketches"):
        check_estimates(server, 8, alone, torch.device("cuda"))

"""Chunks of a prompt behind earlier tokens on a GPU: as with the mask that is not there, and without its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("transformers")
from transformers.cache_utils import DynamicCache

from quest_attention import QuestConfig, enable_quest
from quest_attention.hf import cache_argument, lower_right
from quest_attention.hf.lower_right import attend_lower_right
from quest_attention.hf.offload import CacheShape, memory_of
from test_lower_right import in_chunks
from tiny import generate, make_llama, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Warning. Profiler clears events"),  # newer torch says so of every profile
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
DEVICE = torch.device("cuda")
DIM, KV_HEADS = 128, 2
FLASH, EFFICIENT = "flash", "fmha_cutlass"  # parts of the names of PyTorch's kernels


def tensors(group: int, count: int, length: int, dtype: torch.dtype = torch.bfloat16, dim: int = DIM) -> list[Tensor]:
    """Queries `[2, HQ, T, D]`, and keys and values in storage with room behind them, as a cache has it."""
    torch.manual_seed(0)
    shapes = [(2, KV_HEADS * group, count, dim)] + 2 * [(2, KV_HEADS, length + 100, dim)]
    query, key, value = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    return [query, key[:, :, :length], value[:, :, :length]]


def ours(query: Tensor, key: Tensor, value: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    return attend_lower_right(query, key, value, scaling=0.1, dropout=0.0, autocast=autocast)


def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As transformers does it: a mask, and keys and values repeated."""
    group, count, length = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    mask = torch.ones(count, length, dtype=torch.bool, device=query.device).tril(length - count)
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.1).transpose(1, 2)


def kernels(made: profile) -> str:
    return " ".join(event.key for event in made.key_averages())


@pytest.mark.parametrize("count", [1, 2, 7, 64, 500])
@pytest.mark.parametrize(
    ("dtype", "group", "dim", "kernel"),
    [
        (torch.bfloat16, 4, DIM, FLASH),
        (torch.bfloat16, 1, DIM, FLASH),
        (torch.float16, 4, 64, FLASH),
        (torch.bfloat16, 4, 36, FLASH),  # padded by PyTorch
        (torch.bfloat16, 2, 512, EFFICIENT),
        (torch.float32, 4, DIM, EFFICIENT),
        (torch.float32, 1, DIM, EFFICIENT),
    ],
    ids=str,
)
def test_it_is_what_the_mask_gives(dtype: torch.dtype, group: int, dim: int, kernel: str, count: int) -> None:
    given = tensors(group, count, 1_537, dtype, dim)
    exact = masked(*(tensor.double() for tensor in given))
    with profile(activities=[ProfilerActivity.CUDA]) as made:
        output = ours(*given)
    assert output.shape == exact.shape and output.dtype == dtype and output.is_contiguous()
    assert kernel in kernels(made), kernels(made)
    error, plain = ((each.double() - exact).abs().max() for each in (output, masked(*given)))
    assert error <= 2 * plain


@pytest.mark.parametrize("group", [1, 4])
def test_nothing_of_a_masks_size_is_allocated(group: int) -> None:
    """Nor keys and values for every query head."""
    count, length = 2_048, 131_072
    given = tensors(group, count, length)
    mask, repeated = count * length, 2 * given[1].numel() * group * 2  # bytes, the mask's as booleans
    ours(*given)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")  # the device is not waited for
    try:
        output = ours(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - before
    assert output.numel() * output.element_size() <= peak < min(mask, repeated) // 2  # flash attention may split rows


@pytest.mark.parametrize(("dtype", "group"), [(torch.bfloat16, 4), (torch.bfloat16, 1), (torch.float32, 4)], ids=str)
def test_gradients(dtype: torch.dtype, group: int) -> None:
    given = tensors(group, 100, 700, dtype)
    upstream = torch.randn(2, 100, KV_HEADS * group, DIM, device=DEVICE)

    def gradients(attend: Any, as_dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(as_dtype).detach().requires_grad_() for tensor in given]
        attend(*leaves).backward(upstream.to(as_dtype))
        return [leaf.grad.double() for leaf in leaves if leaf.grad is not None]

    exact = gradients(masked, torch.float64)
    for mine, plain, right in zip(gradients(ours, dtype), gradients(masked, dtype), exact, strict=True):
        assert (mine - right).abs().max() <= 2 * (plain - right).abs().max()


def test_autocast_casts() -> None:
    """PyTorch's class for the alignment goes around it."""
    query, key, value = tensors(4, 64, 700, torch.float32)
    narrow = torch.bfloat16
    with torch.autocast("cuda", dtype=narrow):
        output = ours(query, key, value.to(narrow), autocast=narrow)
        plain = masked(query, key, value.to(narrow))
    assert output.dtype == plain.dtype == narrow
    torch.testing.assert_close(output, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["quest", "dynamic"])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.filterwarnings("ignore:the model was given a DynamicCache")
def test_a_model_in_chunks(kind: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make_llama(heads=4, kv_heads=kv_heads, dim=64).to(DEVICE, torch.bfloat16)
    exact: Any = make_llama(heads=4, kv_heads=kv_heads, dim=64).to(DEVICE, torch.float64)
    ids = prompt(2, 400).to(DEVICE)
    exact.load_state_dict(model.state_dict())
    config = QuestConfig(64, metadata="bounds", num_dense_layers=1)
    taken: list[tuple[int, int]] = []
    attend = lower_right.attend_lower_right

    def seen(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        taken.append((query.shape[2], key.shape[2]))
        return attend(query, key, *args, **options)

    monkeypatch.setattr("quest_attention.hf.attention.attend_lower_right", seen)
    sizes = [150, 150, 100]

    def logits() -> Tensor:
        with torch.inference_mode(), enable_quest(model, config) as quest:
            cache = quest.make_cache() if kind == "quest" else DynamicCache(config=model.config)
            return in_chunks(model, cache, ids, sizes).double()

    mine = logits()
    assert taken == [each for each in [(150, 300), (100, 400)] for _ in range(3)]
    monkeypatch.setattr(lower_right, "knows_lower_right", lambda _: False)
    plain = logits()
    assert len(taken) == 6
    with torch.inference_mode():
        right = exact(ids, **cache_argument(DynamicCache(config=exact.config))).logits
    assert (mine - right).abs().mean() <= 2 * (plain - right).abs().mean()


def test_a_prompt_in_chunks_needs_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate()` over a long prompt: no mask, though it makes one of padding, and no repeated keys."""
    model: Any = make_llama(heads=8, kv_heads=2, dim=DIM).to(DEVICE, torch.bfloat16)
    length, chunk = 65_536, 1_024
    ids = prompt(1, length).to(DEVICE)
    config = QuestConfig(512, metadata="bounds", num_dense_layers=1)
    peaks = []
    for knows in (True, False):
        monkeypatch.setattr(lower_right, "knows_lower_right", lambda _, knows=knows: knows)
        with enable_quest(model, config, cuda_graphs=False):
            generate(model, ids[:, : 4 * chunk], 1, prefill_chunk_size=chunk)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            generate(model, ids, 1, prefill_chunk_size=chunk)  # a step would make room for more
            peaks.append(torch.cuda.max_memory_allocated() - before)
    shape = CacheShape(1, length, 2, DIM, DIM, torch.bfloat16, sparse_layers=2, dense_layers=1, group=4)
    with_mask, without = (memory_of(shape, config, 512, chunk=chunk, is_masked=each) for each in (True, False))
    assert without.mask == without.repeated == 0
    assert peaks[1] - peaks[0] > (with_mask.mask + with_mask.repeated) // 2
    # Besides keys, values and metadata: the hidden states of a chunk, and its queries, a few times over.
    layers = without.dense + without.host + without.metadata
    assert peaks[0] < 2 * layers + with_mask.repeated // 2

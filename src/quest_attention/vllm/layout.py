"""Where the metadata of a page lies: inside vLLM's block, behind its keys and values.

So vLLM's memory planning pays for them, and they go where the block goes: prefix cache, reuse, preemption. A block of
`N` tokens, `H` KV heads and `D` channels gets room for one token more per head, `2 D` numbers, two of each channel,
which is what a form keeps (`quest_attention.forms`). Of `B` blocks vLLM makes

    0.25  [B, 2, N, H, D] on a GPU, [B, H, N, 2 D] on a CPU; the room is padding at the end of the block
    0.32  [B, H, N, 2 D]; the room is a row more, [B, H, N + 1, 2 D]
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import wraps
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from quest_attention.errors import UnsupportedModelError
from quest_attention.forms import TwoVectors

__all__ = ["BlockLayout", "BlockParts", "PaddedBlocks", "RowedBlocks", "check_full", "layout_of"]

_INSTALLED = "quest_attention_padding"


class BlockParts(NamedTuple):
    """Views of a layer's KV cache.

    Attributes:
        stock: What vLLM's own backend expects.
        keys: `[B, N, H, D]`. On a CPU vLLM keeps keys and values in formats of its own in this place.
        values: `[B, N, H, D]`.
        metadata: `[B, H, 2, D]`; see `PagedKV`.
    """

    stock: Tensor
    keys: Tensor
    values: Tensor
    metadata: Tensor


class BlockLayout(Protocol):
    """How a release of vLLM is asked for the room, and where the room then is."""

    def prepare(self, attention: Any, backend: type) -> None:
        """Before a model's layers are asked what they store; more than once is once.

        Args:
            attention: vLLM's class `Attention`.
            backend: Quest's backend: layers with others are left alone.
        """
        ...

    def customize(self, spec: Any) -> Any:
        """What a layer stores, as vLLM lets a backend change it.

        Raises:
            UnsupportedModelError: The layer's cache is not that of full attention.
        """
        ...

    def split(self, kv_cache: Tensor, num_kv_heads: int, head_dim: int, stored: torch.dtype) -> BlockParts:
        """Views of a layer's cache, whose metadata has the dtype `stored`."""
        ...


class RowedBlocks:
    """A row more in each block: vLLM 0.32."""

    def prepare(self, attention: Any, backend: type) -> None:
        """VLLM asks by itself."""

    def customize(self, spec: Any) -> Any:
        """See `BlockLayout`."""
        check_full(spec)
        return replace(spec, tokens_per_state=Fraction(spec.block_size, spec.block_size + 1))

    def split(self, kv_cache: Tensor, num_kv_heads: int, head_dim: int, stored: torch.dtype) -> BlockParts:
        """See `BlockLayout`."""
        del num_kv_heads
        stock, room = kv_cache[:, :, :-1], kv_cache[:, :, -1]
        keys, values = stock.transpose(1, 2).split(head_dim, -1)
        return BlockParts(stock, keys, values, _as_metadata(room, stored))


class PaddedBlocks:
    """Padding at the end of each block: vLLM 0.25."""

    def prepare(self, attention: Any, backend: type) -> None:
        """Change `Attention.get_kv_cache_spec`, which has no other seam."""
        original = attention.get_kv_cache_spec
        if getattr(original, _INSTALLED, False):
            return

        @wraps(original)
        def get_kv_cache_spec(layer: Any, vllm_config: Any) -> Any:
            spec = original(layer, vllm_config)
            return _padded(spec) if spec is not None and issubclass(layer.attn_backend, backend) else spec

        setattr(get_kv_cache_spec, _INSTALLED, True)
        attention.get_kv_cache_spec = get_kv_cache_spec

    def customize(self, spec: Any) -> Any:
        """VLLM 0.25 does not ask."""
        return spec

    def split(self, kv_cache: Tensor, num_kv_heads: int, head_dim: int, stored: torch.dtype) -> BlockParts:
        """See `BlockLayout`."""
        width = TwoVectors.ROWS * head_dim
        taken = kv_cache[0].numel()  # numbers of keys and values in a block
        if kv_cache.stride(0) < taken + num_kv_heads * width:
            wanted = taken + num_kv_heads * width
            raise UnsupportedModelError(
                f"KV cache: got blocks {kv_cache.stride(0)} apart, expected {wanted}, with page metadata"
            )
        room = kv_cache.as_strided(
            (kv_cache.shape[0], num_kv_heads, width), (kv_cache.stride(0), width, 1), kv_cache.storage_offset() + taken
        )
        on_gpu = kv_cache.dim() == 5
        keys, values = kv_cache.unbind(1) if on_gpu else kv_cache.transpose(1, 2).split(head_dim, -1)
        return BlockParts(kv_cache, keys, values, _as_metadata(room, stored))


def layout_of(version: tuple[int, int]) -> BlockLayout:
    """The layout of a release of vLLM."""
    return RowedBlocks() if version >= (0, 32) else PaddedBlocks()


def _padded(spec: Any) -> Any:
    check_full(spec)
    room = TwoVectors.ROWS * spec.num_kv_heads * spec.head_size * spec.dtype.itemsize
    return replace(spec, page_size_padded=spec.real_page_size_bytes + room)


def _as_metadata(room: Tensor, stored: torch.dtype) -> Tensor:
    """`[B, H, 2 D]` as `[B, H, 2, D]`; metadata in 8 bits takes the first part of the room."""
    width = room.shape[-1]
    metadata: Tensor = room.view(stored)[..., :width].unflatten(-1, (TwoVectors.ROWS, width // TwoVectors.ROWS))
    return metadata


def check_full(spec: Any) -> None:
    """Whether a layer stores what full attention does.

    Raises:
        UnsupportedModelError: It does not.
    """
    kind = type(spec).__name__
    if kind != "FullAttentionSpec" or spec.sliding_window is not None or spec.attention_chunk_size is not None:
        raise UnsupportedModelError(f"KV cache: got a {kind}, expected full attention in every layer")
    if spec.head_size_v != spec.head_size:
        raise UnsupportedModelError(
            f"KV cache: got values of {spec.head_size_v} channels, expected {spec.head_size}, as keys have"
        )

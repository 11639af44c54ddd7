"""Where the metadata of a page lies: inside vLLM's block, behind its keys and values.

So vLLM's memory planning pays for it, and it goes where the block goes: prefix cache, reuse, preemption. `Room` says
what the configured form keeps of a block and KV head (`quest_attention.forms`), and how much room that wants. Of `B`
blocks of `N` tokens, `H` KV heads and `D` channels vLLM makes

    0.25        [B, 2, N, H, D] on a GPU, [B, H, N, 2 D] on a CPU; the room is padding at the end of the block
    0.32, 0.33  [B, H, N, 2 D]; the room is some rows more, [B, H, N + rows, 2 D]: as many tokens as hold it

A page is a block, but for two kinds of models whose blocks vLLM makes large, so that those of all layers have as many
bytes: with states, and with keys and values of other shapes in other layers. There a block holds several pages, each
with its room, and vLLM cuts it into blocks of a page for the worker (its "kernel blocks").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import wraps
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestValueError, UnsupportedModelError
from quest_attention.forms import form_of, metadata_dtype
from quest_attention.vllm.options import read_options
from quest_attention.vllm.scales import stored_dtype

__all__ = [
    "BlockLayout",
    "BlockParts",
    "PaddedBlocks",
    "Room",
    "RowedBlocks",
    "ask_for_room",
    "check_full",
    "layout_of",
    "page_in",
    "page_size",
]

_INSTALLED = "quest_attention_room"
_LINE = 128
"""What a GPU reads at once [bytes]."""
_SMALLEST = {"cuda": 16, "cpu": 32}
"""Blocks that the stock kernels take at least, by the type of the device [tokens]."""


class BlockParts(NamedTuple):
    """Views of a layer's KV cache.

    Attributes:
        stock: What vLLM's own backend expects.
        keys: `[B, N, H, D]`. On a CPU vLLM keeps keys and values in formats of its own in this place.
        values: `[B, N, H, D]`.
        metadata: `[B, H, *form.shape]`; see `PagedKV`.
    """

    stock: Tensor
    keys: Tensor
    values: Tensor
    metadata: Tensor


@dataclass(frozen=True)
class Room:
    """What is kept of one block and KV head beside its keys and values, and the room for it.

    Attributes:
        page_size: Tokens of a page [tokens].
        token_bytes: Of the key and the value of a token [bytes].
        shape: Of what is kept: so many rows of so many numbers.
        dtype: Of these numbers.

    >>> Room.of(QuestConfig.paper(), 128, torch.bfloat16).tokens
    1
    >>> Room.of(QuestConfig(metadata="sketch"), 128, torch.bfloat16)
    Room(page_size=16, token_bytes=512, shape=(1, 384), dtype=torch.uint8)
    """

    page_size: int
    token_bytes: int
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, config: QuestConfig, head_dim: int, keys: torch.dtype) -> Room:
        """Of a config, for keys and values of a shape and dtype.

        Raises:
            QuestValueError: The form cannot keep such keys.
        """
        try:
            shape, dtype = form_of(config).shape(config.page_size, head_dim), metadata_dtype(config, keys)
        except QuestValueError as error:
            raise config.mistake(error.argument, error.got, error.expected) from None
        return cls(config.page_size, 2 * head_dim * keys.itemsize, shape, dtype)

    @property
    def num_bytes(self) -> int:
        """Of what is kept [bytes]."""
        rows, numbers = self.shape
        return rows * numbers * self.dtype.itemsize

    @property
    def tokens(self) -> int:
        """Fewest tokens whose keys and values take as much room [tokens]."""
        return -(-self.num_bytes // self.token_bytes)

    @property
    def padded_bytes(self) -> int:
        """Room where it need not be whole tokens: whole lines of a GPU's memory, unless these are more [bytes].

        >>> Room.of(QuestConfig(metadata="sketch"), 64, torch.bfloat16).padded_bytes  # of 192 bytes
        256
        """
        lines = -(-self.num_bytes // _LINE) * _LINE
        return lines if lines <= self.tokens * self.token_bytes else self.num_bytes


class BlockLayout(Protocol):
    """How a release of vLLM is asked for the room, and where the room then is."""

    def with_room(self, spec: Any, room: Room) -> Any:
        """What a layer stores, vLLM's `FullAttentionSpec`, with room for metadata."""
        ...

    def split(self, kv_cache: Tensor, num_kv_heads: int, head_dim: int, room: Room) -> BlockParts:
        """Views of a layer's cache.

        Raises:
            UnsupportedModelError: Its blocks have no such room.
        """
        ...


class RowedBlocks:
    """Rows more in each block: vLLM 0.32 and newer."""

    def with_room(self, spec: Any, room: Room) -> Any:
        """See `BlockLayout`."""
        roomy = replace(spec, tokens_per_state=Fraction(room.page_size, room.page_size + room.tokens))
        if spec.block_size == room.page_size:
            return roomy
        from vllm.v1.attention.backend import MultipleOf

        # By which vLLM aligns blocks that it cuts into blocks of so many tokens, and `page_in` knows them.
        return replace(roomy, block_stride_alignment=MultipleOf(room.page_size))

    def split(self, kv_cache: Tensor, num_kv_heads: int, head_dim: int, room: Room) -> BlockParts:
        """See `BlockLayout`."""
        blocks, _, states, width = kv_cache.shape
        block_stride, head_stride, row_stride, _ = kv_cache.stride()
        together = room.tokens * width  # numbers of a head's room
        if states != room.page_size + room.tokens:
            wanted = f"{room.page_size} and {room.tokens} with page metadata"
            raise UnsupportedModelError(f"KV cache: got blocks of {states} rows, expected {wanted}")
        if row_stride == num_kv_heads * width and head_stride == width:
            head_stride = together  # heads lie side by side in a row, and take their parts of all of the last rows
        elif row_stride != width:
            raise UnsupportedModelError(
                f"KV cache: got rows {row_stride} and heads {head_stride} numbers apart, expected a head's rows or a "
                "row's heads side by side"
            )
        stock = kv_cache[:, :, : room.page_size]
        first = kv_cache.storage_offset() + room.page_size * row_stride
        run = kv_cache.as_strided((blocks, num_kv_heads, together), (block_stride, head_stride, 1), first)
        keys, values = stock.transpose(1, 2).split(head_dim, -1)
        return BlockParts(stock, keys, values, _as_metadata(run, room))


class PaddedBlocks:
    """Padding at the end of each block: vLLM 0.25."""

    def with_room(self, spec: Any, room: Room) -> Any:
        """See `BlockLayout`."""
        return replace(spec, page_size_padded=spec.real_page_size_bytes + spec.num_kv_heads * room.padded_bytes)

    def split(self, kv_cache: Tensor, num_kv_heads: int, head_dim: int, room: Room) -> BlockParts:
        """See `BlockLayout`."""
        width = room.padded_bytes // kv_cache.element_size()
        taken = kv_cache[0].numel()  # numbers of keys and values in a block
        wanted = taken + num_kv_heads * width
        if kv_cache.stride(0) < wanted:
            raise UnsupportedModelError(
                f"KV cache: got blocks {kv_cache.stride(0)} apart, expected {wanted}, with page metadata"
            )
        run = kv_cache.as_strided(
            (kv_cache.shape[0], num_kv_heads, width), (kv_cache.stride(0), width, 1), kv_cache.storage_offset() + taken
        )
        on_gpu = kv_cache.dim() == 5
        keys, values = kv_cache.unbind(1) if on_gpu else kv_cache.transpose(1, 2).split(head_dim, -1)
        return BlockParts(kv_cache, keys, values, _as_metadata(run, room))


def ask_for_room(layout: BlockLayout, attention: Any, backend: type, device: str) -> None:
    """Have layers say that they store page metadata too, before a model's are asked; more than once is once.

    The method that says it is told the server's configuration. What vLLM asks a backend since 0.32, `customize_spec`,
    is not, and how much room there must be depends on it.

    Args:
        layout: Of the release.
        attention: vLLM's class `Attention`, whose `get_kv_cache_spec` is changed.
        backend: Quest's backend: layers with others are left alone.
        device: Type of the device that it is for.
    """
    original = attention.get_kv_cache_spec
    if getattr(original, _INSTALLED, False):
        return

    @wraps(original)
    def get_kv_cache_spec(layer: Any, vllm_config: Any) -> Any:
        spec = original(layer, vllm_config)
        layers = [one for one in _layers(vllm_config) if isinstance(one, attention)]
        is_ours = [issubclass(one.attn_backend, backend) for one in layers]
        if spec is None or not any(is_ours):
            return spec
        page = page_size(spec.block_size, vllm_config.model_config, device)
        if not all(is_ours):
            specs = [original(one, vllm_config) for one in layers]
            spec = _enlarged(spec, max(one.page_size_bytes for one in specs if one is not None))
        if not issubclass(layer.attn_backend, backend):
            return spec
        check_full(spec)
        options = read_options(vllm_config, device)
        assert options is not None, "a layer of the model was made with these options"
        return layout.with_room(spec, Room.of(options.config(page), spec.head_size, stored_dtype(spec.dtype)))

    setattr(get_kv_cache_spec, _INSTALLED, True)
    attention.get_kv_cache_spec = get_kv_cache_spec


def page_size(block_size: int, model: Any, device: str) -> int:
    """Tokens of a page [tokens].

    Args:
        block_size: Of the server: vLLM's `--block-size` or what it made of it [tokens].
        model: vLLM's `ModelConfig`. If it has states, vLLM makes blocks of attention as large as a state, which is
            hundreds of tokens: pages are then as small as can be.
        device: Type of the device.
    """
    return _SMALLEST[device] if model is not None and model.is_hybrid else block_size


def page_in(spec: Any) -> int | None:
    """Tokens of the pages into which a block of a layer with room is to be cut, or None where it is one [tokens]."""
    return getattr(getattr(spec, "block_stride_alignment", None), "base", None)


def _layers(vllm_config: Any) -> list[Any]:
    return list(vllm_config.compilation_config.static_forward_context.values())


def _enlarged(spec: Any, num_bytes: int) -> Any:
    """What a layer stores, in blocks of as many bytes as another's, if that is a number of its own blocks.

    So does vLLM itself, when it has all specs. With room in some of them the numbers would not come out, and it would
    pad the smaller to the larger ones, which may be half of each.
    """
    times, rest = divmod(num_bytes, spec.page_size_bytes)
    return spec if rest else replace(spec, block_size=times * spec.block_size)


def layout_of(version: tuple[int, int]) -> BlockLayout:
    """The layout of a release of vLLM."""
    return RowedBlocks() if version >= (0, 32) else PaddedBlocks()


def _as_metadata(run: Tensor, room: Room) -> Tensor:
    """What is kept, `[B, H, *shape]`, which begins the room of each block and head, `[B, H, numbers]` of the cache."""
    rows, numbers = room.shape
    metadata: Tensor = run.view(room.dtype)[..., : rows * numbers].unflatten(-1, (rows, numbers))
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

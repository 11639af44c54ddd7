"""`Offload`: keys and values of layers that choose in host memory, what is hot on the device, and what both take."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from quest_attention.config import QuestConfig, check_integer
from quest_attention.errors import QuestValueError
from quest_attention.forms import form_of, metadata_dtype
from quest_attention.hf import lower_right
from quest_attention.hf.host_memory import free_device_bytes, free_host_bytes
from quest_attention.ops.hot_units import least_slots
from quest_attention.pages import num_pages

__all__ = ["CacheShape", "Offload", "OffloadMemory", "OffloadTo", "PoolSize", "check_host", "check_memory", "memory_of"]

OffloadTo = Literal["host"]
"""Where keys and values may lie: in the host's memory."""

_POOL_SHARE = 0.5
"""Of the device memory that is free at the first sparse step, for hot tokens where nobody says how many: the rest is
for activations, which grow and shrink."""
_TABLE_BYTES = 4
"""Of an entry of the table: int32."""
_SLOT_BYTES = 9
"""Of what is kept of a slot: its owner, its stamp, and whether it has values."""
_GIB = 1 << 30


class CacheShape(NamedTuple):
    """Sizes of a cache.

    Attributes:
        batch: Sequences.
        length: Tokens per sequence there is to be room for [tokens].
        kv_heads: KV heads of a layer.
        head_dim: Channels of keys.
        value_dim: Channels of values.
        dtype: Of keys and values as attention reads them.
        sparse_layers: Layers that choose what they read.
        dense_layers: Layers that read everything.
        group: Query heads per KV head.
        stored: Of keys and values in memory; None is `dtype`.
    """

    batch: int
    length: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    sparse_layers: int
    dense_layers: int = 0
    group: int = 1
    stored: torch.dtype | None = None

    @classmethod
    def of(
        cls, model: Any, kinds: Collection[str], *, batch: int, length: int, stored: torch.dtype | None = None
    ) -> CacheShape | None:
        """The sizes of a model's cache, as its configuration has them; None where that does not say.

        Args:
            model: A transformers model.
            kinds: What Quest makes of its layers, as `layer_kinds` says.
            batch: Sequences.
            length: Tokens per sequence [tokens].
            stored: Of keys and values in memory; None is the model's dtype.
        """
        text = model.config.get_text_config(decoder=True)
        heads = getattr(text, "num_attention_heads", None)
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        dim = getattr(text, "head_dim", None)
        if dim is None and isinstance(heads, int):
            dim = text.hidden_size // heads
        if not (isinstance(kv_heads, int) and isinstance(dim, int)):
            return None
        sparse, dense = (sum(kind == each for kind in kinds) for each in ("quest", "dense"))
        group = heads // kv_heads if isinstance(heads, int) else 1
        return cls(batch, length, kv_heads, dim, dim, model.dtype, sparse, dense, group, stored)

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token in one KV head of one layer, as they are stored [bytes]."""
        return (self.head_dim + self.value_dim) * (self.stored or self.dtype).itemsize

    @property
    def suits_flash(self) -> bool:
        """Whether PyTorch's flash attention takes such heads, as they are."""
        dim = self.head_dim
        is_size = dim == self.value_dim <= lower_right.FLASH_MOST_CHANNELS and dim % lower_right.FLASH_CHANNELS == 0
        return is_size and self.dtype in lower_right.FLASH_DTYPES


class OffloadMemory(NamedTuple):
    """What a cache with keys and values in host memory takes.

    Attributes:
        host: Keys and values of sparse layers, in host memory [bytes].
        dense: Those of dense layers, on the device [bytes].
        metadata: Of all pages of sparse layers, on the device [bytes].
        table: Where each unit lies, on the device [bytes].
        pool: Hot tokens of all sparse layers, on the device [bytes].
        prompt: Keys and values of one layer, which a prompt brings to the device while it attends there [bytes].
        repeated: The same for every query head, as they are repeated for a chunk behind others that flash attention
            does not take, for a mask or its dtype [bytes].
        mask: The mask of such a chunk, and what PyTorch makes of it to add to logits, at most [bytes].
        widened: Keys and values of a dense layer that are stored in 8 bits, in the dtype that attention reads, while a
            step attends to them that is no graph's [bytes].
    """

    host: int
    dense: int
    metadata: int
    table: int
    pool: int
    prompt: int
    repeated: int = 0
    mask: int = 0
    widened: int = 0

    @property
    def device(self) -> int:
        """On the device together [bytes]: either what a prompt takes or what steps do, which come after it."""
        prompt = self.prompt + self.repeated + self.mask
        return self.dense + self.metadata + self.table + max(self.pool + self.widened, prompt)


def memory_of(
    shape: CacheShape, quest: QuestConfig, hot_tokens: int, *, chunk: int | None = None, is_masked: bool = False
) -> OffloadMemory:
    """What a cache takes, before anything is allocated.

    Args:
        shape: Of the cache.
        quest: What is read, with a form of metadata.
        hot_tokens: Of each sequence and KV head of a sparse layer [tokens].
        chunk: Tokens of a prompt that pass at a time [tokens]. None is all of them at once, for which no mask is made
            unless sequences are padded, or the model's attention is eager: what those take is not known here.
        is_masked: Whether each has a mask all the same, for padding or because PyTorch's kernels need one there.

    Raises:
        QuestValueError: `hot_tokens`, `chunk`, or sequences or tokens of the shape are no positive integer; or the form
            of metadata is "auto".

    >>> shape = CacheShape(1, 1 << 20, 8, 128, 128, torch.bfloat16, sparse_layers=30, dense_layers=2)
    >>> memory = memory_of(shape, QuestConfig(2048, metadata="bounds"), hot_tokens=16384)
    >>> memory.host >> 30, memory.metadata >> 20, memory.pool >> 20, memory.prompt >> 30
    (120, 7680, 1922, 4)
    """
    counts = {"hot_tokens": hot_tokens, "shape.batch": shape.batch, "shape.length": shape.length}
    for name, count in (counts if chunk is None else {**counts, "chunk": chunk}).items():
        check_integer(name, count, minimum=1)
    pages = num_pages(shape.length, quest.page_size)
    tokens = pages * quest.page_size
    rows = shape.batch * shape.kv_heads
    layer = rows * tokens * shape.token_bytes
    read = rows * shape.length * (shape.head_dim + shape.value_dim) * shape.dtype.itemsize
    has_mask = chunk is not None and chunk < shape.length and (is_masked or not shape.suits_flash)
    masked = shape.batch * (chunk or 0) * shape.length if has_mask else 0
    form = form_of(quest)
    page_bytes = torch.Size(form.shape(quest.page_size, shape.head_dim)).numel()
    page_bytes *= metadata_dtype(quest, shape.stored or shape.dtype).itemsize
    slots = _slots_of(hot_tokens, tokens // quest.unit_size, quest)
    slot_bytes = quest.unit_size * shape.token_bytes + _SLOT_BYTES
    return OffloadMemory(
        host=shape.sparse_layers * layer,
        dense=shape.dense_layers * layer,
        metadata=shape.sparse_layers * rows * pages * page_bytes,
        table=shape.sparse_layers * rows * pages * quest.units_per_page * _TABLE_BYTES,
        pool=shape.sparse_layers * rows * slots * slot_bytes,
        prompt=read,
        repeated=read * shape.group if masked and shape.group > 1 else 0,
        mask=masked * (torch.bool.itemsize + shape.dtype.itemsize),
        widened=read if shape.dense_layers and shape.stored not in (None, shape.dtype) else 0,
    )


def check_memory(memory: OffloadMemory, free_host: int, free_device: int) -> None:
    """Refuse a cache that does not fit, with what it takes and what is free.

    Raises:
        QuestValueError: Host memory or the device's does not suffice.
    """
    if memory.host > free_host:
        raise QuestValueError(
            "offload", f"a cache of {_said(memory.host)} in host memory",
            f"at most the {_said(free_host)} that are free: fewer tokens or sequences",
        )  # fmt: skip
    if memory.device > free_device:
        parts = ", ".join(
            f"{name} {_said(size)}"
            for name, size in memory._asdict().items()
            if name != "host" and size
        )  # fmt: skip
        what = "fewer tokens, sequences, dense layers or hot_tokens" + ", or smaller chunks" * bool(memory.mask)
        raise QuestValueError(
            "offload", f"{_said(memory.device)} on the device ({parts}; either what steps take or what a prompt does)",
            f"at most the {_said(free_device)} that are free: {what}",
        )  # fmt: skip


def check_host(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse keys or values for which host memory has no room, before a cache grows.

    Raises:
        QuestValueError: It has not.
    """
    size, free = torch.Size(shape).numel() * dtype.itemsize, free_host_bytes()
    if size > free:
        expected = f"at most the {_said(free)} that are free: fewer tokens or sequences"
        raise QuestValueError("offload", f"keys or values of {_said(size)} in host memory", expected)


def _said(size: int) -> str:
    return f"{size / _GIB:.2f} GiB ({size} bytes)"


@dataclasses.dataclass(frozen=True)
class Offload:
    """Keys and values of the layers that choose lie in host memory, and hot units of them on the device.

    Attributes:
        hot_tokens: Of each sequence and KV head of a layer that chooses, at least as many as a step reads together,
            candidates included [tokens]. None: half of what is free on the device at the first sparse step, shared
            among those layers.

    Raises:
        QuestValueError: `hot_tokens` is no positive integer.
    """

    hot_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.hot_tokens is not None:
            check_integer("hot_tokens", self.hot_tokens, minimum=1)

    @classmethod
    def asked(
        cls, offload: OffloadTo | None, hot_tokens: int | None, config: QuestConfig, device: torch.device
    ) -> Offload | None:
        """What a user asked for, on the device of a model.

        Raises:
            QuestValueError: An argument is wrong, or the device has no memory of its own beside the host's.
        """
        if offload is None:
            if hot_tokens is not None:
                raise QuestValueError("hot_tokens", hot_tokens, 'None without offload="host": all tokens are as near')
            return None
        if offload != "host":
            raise QuestValueError("offload", offload, '"host" or None')
        if device.type != "cuda":
            in_place = "where keys and values lie in host memory already, and nothing is nearer"
            why = in_place if device.type == "cpu" else "which is no NVIDIA GPU"
            raise QuestValueError("offload", offload, f"None on device {device.type}, {why}")
        chosen = cls(hot_tokens)
        chosen.check(config)
        return chosen

    @staticmethod
    def check_device(model: Any) -> None:
        """Refuse a model that lies on several devices: what fits, and what is hot, is counted of one.

        Raises:
            QuestValueError: It does.
        """
        devices = sorted({str(parameter.device) for parameter in model.parameters()})
        if len(devices) > 1:
            raise QuestValueError("offload", "host", f"None for a model on several devices: {', '.join(devices)}")

    def check(self, config: QuestConfig) -> None:
        """Refuse what cannot be served with it.

        Raises:
            QuestValueError: Tokens are ranked by the keys of whole pages; or there are too few hot tokens.
        """
        if config.candidate_pages:
            expected = f"page for {config.metadata} with offload, which would fetch whole pages to rank their tokens"
            raise config.mistake("selection_unit", config.selection_unit, expected)
        least = least_slots(config, 1 << 31) * config.unit_size
        if self.hot_tokens is not None and self.hot_tokens < least:
            expected = f"at least {least}: what a step reads together, candidates included"
            raise QuestValueError("hot_tokens", self.hot_tokens, expected)

    def check_fits(
        self, shape: CacheShape, quest: QuestConfig, device: torch.device, *, chunk: int | None = None,
        is_masked: bool = False,
    ) -> None:  # fmt: skip
        """Refuse a cache that host and device have no room for, before work starts; see `memory_of` for the last two.

        Raises:
            QuestValueError: They have not.
        """
        least = least_slots(quest, 1 << 31) * quest.unit_size
        hot_tokens = least if self.hot_tokens is None else self.hot_tokens
        is_masked = is_masked or not lower_right.knows_lower_right(device)
        memory = memory_of(shape, quest, hot_tokens, chunk=chunk, is_masked=is_masked)
        check_memory(memory, free_host_bytes(), free_device_bytes(device))


def _slots_of(hot_tokens: int, most: int, quest: QuestConfig) -> int:
    """Slots of each row of a layer's pool for so many tokens: as many as a step reads together at least [units].

    Args:
        hot_tokens: Asked for [tokens].
        most: All that a sequence has room for [units].
        quest: What is read, with a form of metadata.
    """
    return max(least_slots(quest, most), min(most, hot_tokens // quest.unit_size))


class PoolSize:
    """How much is hot in each layer of one cache: the same in all, so the first that has a pool decides for them.

    Args:
        offload: What was asked for.
        sparse_layers: Layers that choose, which share what is free.
    """

    def __init__(self, offload: Offload, sparse_layers: int) -> None:
        self.offload = offload
        self._sparse_layers = sparse_layers
        self._shared: dict[int, int] = {}  # units of a row, by the sequences of a batch

    def slots(self, keys: Tensor, values: Tensor, quest: QuestConfig) -> int:
        """Slots of each row of a layer's pool: of the hot tokens asked for, or of a share of what is free [units].

        Args:
            keys: `[B, HKV, capacity, D]` of the layer, on the device.
            values: Likewise, `[B, HKV, capacity, DV]`.
            quest: What is read, with a form of metadata.

        Raises:
            QuestValueError: What a step reads together is not free.
        """
        size, most = quest.unit_size, keys.shape[2] // quest.unit_size
        least = least_slots(quest, most)
        if self.offload.hot_tokens is not None:
            return _slots_of(self.offload.hot_tokens, most, quest)
        batch, heads = keys.shape[:2]
        if batch not in self._shared:
            free = free_device_bytes(keys.device)
            token_bytes = (keys.shape[3] + values.shape[3]) * keys.element_size()
            slot_bytes = self._sparse_layers * batch * heads * (size * token_bytes + _SLOT_BYTES)
            if least * slot_bytes > free:
                expected = f"at least {_said(least * slot_bytes)} for what a step reads together"
                raise QuestValueError("offload", f"{_said(free)} free on the device", expected)
            self._shared[batch] = int(free * _POOL_SHARE) // slot_bytes
        return max(least, min(most, self._shared[batch]))


# Longer than 250 lines: what is asked for, and the memory that it takes, by which it is refused.

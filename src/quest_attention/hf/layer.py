"""`QuestLayer`: the KV cache of one attention layer, with page metadata beside it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestStateError, QuestValueError, QuestWarning
from quest_attention.hf.counters import LayerCounter
from quest_attention.ops import Selection, Workspace, append_token, make_workspace, update_page_metadata
from quest_attention.pages import FP8_METADATA, PagedKV, num_pages

__all__ = ["GROWTH", "LAYER_ATTRIBUTE", "OnRead", "OnSelect", "QuestLayer", "StorageTooNarrowError", "Workspaces"]

LAYER_ATTRIBUTE = "_quest_layer"
"""Attribute of the key view that `update` returns, by which the attention function finds the layer.

Attention modules hand the tensors of `update` to the attention function unchanged, so the layer travels with them:
right with several caches at once, with threads that share a model and with layers that share keys. A model that
rebuilds its keys in between (multi-head latent attention) loses the attribute and stays dense.
"""

GROWTH = 2
"""Factor by which full storage grows: a token is copied once on average, not at every step."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What `PagedKV` takes."""

OnSelect = Callable[[int, Selection, int], None]
"""Called after each sparse decode step of a layer with its index, the selection and the number of pages it held."""
OnRead = Callable[..., None]
"""Called after it as `on_read(layer, selection, query, keys, **kwargs)`, for those who compare with what was not read:
`query` `[B, HQ, 1, D]`, `keys` `[B, HKV, T, D]` and what else the model gives to its attention."""


class StorageTooNarrowError(QuestStateError):
    """A captured step has tokens of a wider dtype than the storage, which an eager step would widen."""


class Workspaces:
    """Scratch memory that the layers of one cache share, since they run one after the other."""

    def __init__(self) -> None:
        self._by_shape: dict[tuple[object, ...], Workspace | None] = {}

    def get(self, kv: PagedKV, num_query_heads: int, config: QuestConfig) -> Workspace | None:
        """The workspace for a cache of this shape, made at its first use; None where the backend needs none."""
        heads = (num_query_heads, kv.num_kv_heads, kv.values.shape[-1])
        key = (kv.batch_size, kv.max_pages, kv.keys.device, *heads)
        if key not in self._by_shape:
            with torch.inference_mode(False):
                self._by_shape[key] = make_workspace(kv, num_query_heads, config)
        return self._by_shape[key]

    def clear(self) -> None:
        """Free everything: the storage has grown, or the batch has changed."""
        self._by_shape.clear()


class QuestLayer(DynamicLayer):
    """Keys and values `[B, HKV, capacity, D]` that grow by doubling, and the bounds of their pages.

    `update` writes in place and returns views: no token is copied again at each step, as `torch.cat` does.

    Args:
        config: What to read.
        counter: Where steps are counted.
        is_dense: Whether the layer always reads everything; it then keeps no metadata.
        workspaces: Scratch memory shared with the other layers of the cache.
        max_length: Tokens to make room for at once, where known [tokens].
        is_estimate: Whether fewer may come, as in `generate()`, which may end early: then there is room for twice the
            first tokens at most to begin with.
        on_select: Called after each sparse step.

    Attributes:
        was_attended: Whether Quest's attention function has seen the keys of the last decode step.
        on_read: Like `on_select`, with the query and the keys.
        captured_lengths: While a decode step is captured as a CUDA graph, `[B]` int32, tokens per sequence with the
            step's own; else None.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False  # capacity follows from the first tokens

    def __init__(
        self,
        config: QuestConfig,
        counter: LayerCounter,
        *,
        is_dense: bool,
        workspaces: Workspaces,
        max_length: int | None = None,
        is_estimate: bool = False,
        on_select: OnSelect | None = None,
    ) -> None:
        self.config = config
        self.counter = counter
        self.is_dense = is_dense
        self.workspaces = workspaces
        self.max_length = max_length
        self.is_estimate = is_estimate
        self.on_select = on_select
        self.on_read: OnRead | None = None
        self.was_attended = True
        self.captured_lengths: Tensor | None = None
        self._length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._metadata: Tensor | None = None
        self._paged: PagedKV | None = None
        self._every_page: Selection | None = None
        super().__init__()

    # transformers reads `layer.keys` and `layer.values`, and its base class sets both to None when it is made.

    @property
    def keys(self) -> Tensor | None:
        """Keys written so far, `[B, HKV, length, D]`, a view; None before the first update."""
        return None if self._keys is None else self._keys[:, :, : self._length]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._refuse_assignment("keys", keys)

    @property
    def values(self) -> Tensor | None:
        """Values written so far, `[B, HKV, length, DV]`, a view; None before the first update."""
        return None if self._values is None else self._values[:, :, : self._length]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._refuse_assignment("values", values)

    def _refuse_assignment(self, name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            raise QuestStateError(
                f"{name}: assigned to a QuestLayer, whose page metadata would not follow: use update()"
            )
        self._free()

    @property
    def paged(self) -> PagedKV:
        """The storage as pages."""
        assert self._keys is not None and self._values is not None, "storage allocated"
        if self._paged is None:
            with torch.inference_mode(False):
                metadata = self._metadata
                if metadata is None:  # a dense layer in a graph: a placeholder of the right shape, read by nobody
                    batch, heads, capacity, dim = self._keys.shape
                    metadata = self._keys.new_empty(batch, heads, capacity // self.config.page_size, 2, dim)
                self._paged = PagedKV.from_contiguous(self._keys, self._values, metadata)
        return self._paged

    @property
    def num_pages(self) -> int:
        """Pages that hold a token [pages]."""
        return num_pages(self._length, self.config.page_size)

    @property
    def every_page(self) -> Selection:
        """All pages there is room for, as a dense layer reads them when only the device knows the length."""
        if self._every_page is None:
            paged = self.paged
            with torch.inference_mode(False):
                pages = torch.arange(paged.max_pages, dtype=torch.int32, device=paged.keys.device)
                pages = pages.expand(paged.batch_size, paged.num_kv_heads, -1)
                counts = torch.full((paged.batch_size,), paged.max_pages, dtype=torch.int32, device=pages.device)
            self._every_page = Selection(pages, counts)
        return self._every_page

    @property
    def address(self) -> int:
        """Where the keys lie in memory; another after the storage has grown."""
        return 0 if self._keys is None else self._keys.data_ptr()

    @property
    def capacity(self) -> int:
        """Tokens per sequence there is room for [tokens]."""
        return 0 if self._keys is None else self._keys.shape[2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the first tokens `[B, HKV, T, D]`."""
        self.dtype, self.device = torch.promote_types(key_states.dtype, value_states.dtype), key_states.device
        new = key_states.shape[2]
        wanted = self.max_length or 0
        if self.is_estimate:
            wanted = min(wanted, GROWTH * new) if new > 1 else self.config.token_budget
        elif self.max_length is None and new == 1:
            wanted = self.config.token_budget
        self._allocate(key_states, value_states, key_states.shape[0], max(new, wanted))
        self.is_initialized = True

    def _allocate(self, keys: Tensor, values: Tensor, batch: int, length: int) -> None:
        """New storage in `self.dtype` for `batch` sequences of `length` tokens, shaped like `keys` and `values`."""
        page_size = self.config.page_size
        pages = num_pages(length, page_size)
        heads = keys.shape[1]
        # Storage made under inference mode could not be written outside of it, by the next turn of a conversation.
        with torch.inference_mode(False):
            self._keys = keys.new_empty(batch, heads, pages * page_size, keys.shape[3], dtype=self.dtype)
            self._values = values.new_empty(batch, heads, pages * page_size, values.shape[3], dtype=self.dtype)
            self._metadata = None
            if not self.is_dense:
                dtype = FP8_METADATA if self.config.metadata_dtype == "fp8" else self.dtype
                self._metadata = keys.new_empty(batch, heads, pages, 2, keys.shape[3], dtype=dtype)
        self._paged = self._every_page = None
        self.workspaces.clear()

    def _free(self) -> None:
        self._keys = self._values = self._metadata = self._paged = self._every_page = None
        self._length = 0
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens and take them into the bounds of their pages.

        Args:
            key_states: `[B, HKV, T, D]`.
            value_states: `[B, HKV, T, DV]`.
            *args: Ignored, as in transformers' own layers.
            **kwargs: Likewise.

        Returns:
            Views of all keys and values so far; the keys carry the layer itself.

        Raises:
            QuestValueError: The tokens do not fit those in the cache (another batch or model); nothing is written.
                Tokens of another dtype do fit: the storage takes the wider one, as transformers' own does.
            QuestStateError: Gradients are being recorded, which writing in place would break.

        Warns:
            QuestWarning: The model decodes past the budget without Quest's attention.
        """
        if self.captured_lengths is not None:
            return self._update_captured(key_states, value_states, self.captured_lengths)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise QuestStateError(
                "a QuestCache writes in place: run the model under torch.no_grad() or inference_mode()"
            )
        _check_alike(key_states, value_states)  # before storage takes its shape from them
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._keys is not None and self._values is not None, "storage allocated"
        _check_fits("key_states", key_states, self._keys)
        _check_fits("value_states", value_states, self._values)
        new = key_states.shape[2]
        start, end = self._length, self._length + new
        widest = self._widest(key_states, value_states)
        if end > self.capacity or widest != self.dtype:
            self.dtype = widest
            length = self.capacity if end <= self.capacity else max(end, GROWTH * self.capacity)
            self._rebuild(length, lambda tensor: tensor, self._batch())
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self._length = end
        if self._metadata is not None:
            update_page_metadata(self.paged, end, new, self.config.backend)
        self.counter.count_update(new)
        if new == 1:
            self._expect_attention()
        keys, values = self._keys[:, :, :end], self._values[:, :, :end]
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, values

    def _widest(self, keys: Tensor, values: Tensor) -> torch.dtype:
        """The dtype that holds what is stored and these tokens, as `torch.cat` would choose it.

        Autocast makes keys and values of different dtypes, and may begin or end between two steps.
        """
        assert self.dtype is not None, "storage allocated"
        return torch.promote_types(self.dtype, torch.promote_types(keys.dtype, values.dtype))

    def _update_captured(self, keys: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token of each sequence where the device says; what the host knows moves on at each replay."""
        assert self._keys is not None and self._values is not None, "storage allocated"
        if self._widest(keys, values) != self.dtype:
            raise StorageTooNarrowError(f"tokens of {self._widest(keys, values)} for a cache of {self.dtype}")
        key, value = (tokens[:, :, 0].to(self.dtype) for tokens in (keys, values))
        append_token(self.paged, key, value, lengths, self.config.backend)
        everything = self._keys[:, :, :]
        setattr(everything, LAYER_ATTRIBUTE, self)
        return everything, self._values

    def report(self, selected: Selection, query: Tensor, keys: Tensor, **kwargs: Any) -> None:
        """Tell those who asked which pages a sparse step read."""
        if self.on_select is not None:
            self.on_select(self.counter.layer, selected, self.num_pages)
        if self.on_read is not None:
            self.on_read(self.counter.layer, selected, query, keys, **kwargs)

    def count_captured_step(self, batch: int) -> None:
        """A captured step of `batch` sequences ran: the length and the counters follow."""
        self._length += 1
        self.was_attended = True
        self.counter.count_update(1)
        held = batch * self.num_pages
        if self.is_dense:
            self.counter.count_dense("dense layer", held)
        else:
            self.counter.count_sparse(batch * self.config.page_budget, held)

    def _expect_attention(self) -> None:
        """Warn when the keys of the step before were never handed to Quest's attention function."""
        if not self.was_attended and not self.is_dense and self._length > self.config.token_budget:
            warnings.warn(
                "a QuestCache is in use but its keys do not reach Quest's attention, so every step reads all of it: "
                "call enable_quest(model) first",
                QuestWarning,
                stacklevel=3,
            )
        self.was_attended = False

    def _rebuild(self, length: int, pick: Callable[[Tensor], Tensor], batch: int) -> None:
        """Move to new storage, `pick` choosing the sequences to keep."""
        keys, values, metadata = self._keys, self._values, self._metadata
        assert keys is not None and values is not None, "storage allocated"
        self._allocate(keys, values, batch, length)
        assert self._keys is not None and self._values is not None, "storage allocated"
        self._keys[:, :, : self._length] = pick(keys[:, :, : self._length])
        self._values[:, :, : self._length] = pick(values[:, :, : self._length])
        if metadata is not None and self._metadata is not None:
            self._metadata[:, :, : self.num_pages] = pick(metadata[:, :, : self.num_pages])

    def _batch(self) -> int:
        return 0 if self._keys is None else self._keys.shape[0]

    def get_seq_length(self) -> int:
        """Tokens per sequence written so far [tokens]."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a pass of `query_length` tokens will see [tokens]."""
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        """-1: the storage grows."""
        return -1

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the last tokens. Bounds may stay wider than the keys that remain: still bounds.

        Args:
            tokens_to_remove: A negative number of tokens to remove. A positive one is the length to keep, which
                transformers 5.17 still passes and 5.23 refuses.

        Raises:
            QuestValueError: It is no whole number.
        """
        try:
            count = operator.index(tokens_to_remove)  # assisted decoding in transformers 5.17 passes a tensor
        except TypeError:
            raise QuestValueError("tokens_to_remove", tokens_to_remove, "a whole number of tokens") from None
        keep = count if count > 0 else self._length + count
        self._length = max(0, min(self._length, keep))

    def reset(self) -> None:
        """Forget all tokens and free the storage."""
        self._free()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give sequence `b` the contents of sequence `beam_idx[b]`, for beam search.

        Args:
            beam_idx: `[B]` int64.
        """
        if self._length:
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        if self._length:
            self._rebuild(self.capacity, lambda t: t.repeat_interleave(repeats, 0), self._batch() * repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, `[B']` int64."""
        if self._length:
            rows = torch.arange(self._batch(), device=self.device)[indices.to(self.device)]  # bool or int64
            if rows.shape[0] != self._batch():
                self._rebuild(self.capacity, lambda t: t.index_select(0, rows), rows.shape[0])
                return
            for tensor, used in self._stored():
                tensor[:, :, :used] = tensor[:, :, :used].index_select(0, rows)

    def _stored(self) -> list[tuple[Tensor, int]]:
        """Tensors with the part of their third dimension that is in use."""
        assert self._keys is not None and self._values is not None, "storage allocated"
        stored = [(self._keys, self._length), (self._values, self._length)]
        return stored if self._metadata is None else [*stored, (self._metadata, self.num_pages)]

    def offload(self) -> None:
        """Refused: the decode step reads pages in place."""
        raise QuestStateError("offloading: got a QuestCache, expected a cache that stays on its device")

    def prefetch(self) -> None:
        """Refused, as `offload`."""
        self.offload()


def _check_alike(keys: Tensor, values: Tensor) -> None:
    """Keys and values of the same tokens: writing in place would broadcast one value over several tokens."""
    if keys.dim() != 4:
        raise QuestValueError("key_states.shape", list(keys.shape), "[B, HKV, T, D]")
    if values.dim() != 4 or values.shape[:3] != keys.shape[:3]:
        raise QuestValueError(
            "value_states.shape", list(values.shape), f"[{', '.join(map(str, keys.shape[:3]))}, DV], as key_states"
        )
    for name, tensor in (("key_states", keys), ("value_states", values)):
        if tensor.dtype not in _DTYPES:
            raise QuestValueError(f"{name}.dtype", tensor.dtype, f"one of {', '.join(map(str, _DTYPES))}")
    if values.device != keys.device:
        raise QuestValueError("value_states.device", str(values.device), f"{keys.device}, as key_states")


def _check_fits(name: str, tensor: Tensor, stored: Tensor) -> None:
    if tensor.dim() != 4 or tensor.shape[:2] != stored.shape[:2] or tensor.shape[3] != stored.shape[3]:
        batch, heads, _, dim = stored.shape
        expected = f"[{batch}, {heads}, T, {dim}], as this cache holds: a new batch or model needs a new QuestCache"
        raise QuestValueError(f"{name}.shape", list(tensor.shape), expected)
    if tensor.device != stored.device:
        raise QuestValueError(f"{name}.device", str(tensor.device), f"{stored.device}, as this cache")

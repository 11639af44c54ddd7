"""`StoredLayer`: a cache layer of transformers whose tokens are in a `KVStorage`."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from quest_attention.errors import QuestStateError, QuestValueError
from quest_attention.hf.storage import KVStorage
from quest_attention.pages import PagedKV

__all__ = ["StoredLayer"]


class StoredLayer(DynamicLayer):
    """What transformers asks of a layer whatever its attention: lengths, rollback, other sequences.

    Attributes:
        storage: Where tokens are, another object whenever that is another memory; None before the first.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False  # capacity follows from the first tokens

    def __init__(self) -> None:
        self.storage: KVStorage | None = None
        self._length = 0
        super().__init__()

    # transformers reads `layer.keys` and `layer.values`, and its base class sets both to None when it is made.

    @property
    def keys(self) -> Tensor | None:
        """Keys written so far as they are stored, `[B, HKV, length, D]`, a view; None before the first update."""
        if self.storage is None:
            return None
        self.storage.arrive()
        return self.storage.keys[:, :, : self._length]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._refuse_assignment("keys", keys)

    @property
    def values(self) -> Tensor | None:
        """Values written so far as they are stored, `[B, HKV, length, DV]`, a view; None before the first update."""
        if self.storage is None:
            return None
        self.storage.arrive()
        return self.storage.values[:, :, : self._length]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._refuse_assignment("values", values)

    def _refuse_assignment(self, name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            raise QuestStateError(
                f"{name}: assigned to a QuestLayer, whose page metadata would not follow: use update()"
            )
        self.reset()

    @property
    def paged(self) -> PagedKV:
        """The storage as pages."""
        assert self.storage is not None, "storage allocated"
        self.storage.arrive()
        return self.storage.paged

    @property
    def capacity(self) -> int:
        """Tokens per sequence there is room for [tokens]."""
        return 0 if self.storage is None else self.storage.capacity

    def _hold(self, storage: KVStorage) -> None:
        """Have tokens in this memory from now on."""
        self.storage = storage
        self.dtype, self.device = storage.dtype, storage.keys.device

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
        """Take back the last tokens; the metadata of the last page is that of the keys that remain.

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
        length = max(0, min(self._length, keep))
        if self.storage is not None and length < self._length:
            self.storage.cut(length)
        self._length = length

    def reset(self) -> None:
        """Forget all tokens and free the storage. The next tokens find as much room as the first ones did."""
        self.storage = None
        self._length = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give sequence `b` the contents of sequence `beam_idx[b]`, for beam search.

        Args:
            beam_idx: `[B]` int64.
        """
        if self._length:
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        if self.storage is not None and self._length:
            self._hold(self.storage.repeated(repeats, self._length))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, `[B']` int64 or a boolean one for each sequence."""
        if self.storage is not None and self._length:
            rows = torch.arange(self.storage.batch_size, device=self.device)[indices.to(self.device)]
            self._hold(self.storage.selected(rows, self._length))

    def offload(self) -> None:
        """Refused: the decode step reads pages in place."""
        raise QuestStateError("offloading: got a QuestCache, expected a cache that stays on its device")

    def prefetch(self) -> None:
        """Refused, as `offload`."""
        self.offload()

"""`PagedKV`: one view of keys, values and page metadata for every cache layout.

    B    sequences              N   physical pages         P  logical pages per sequence
    HQ   query heads            HKV KV heads               G  query heads per KV head, HQ // HKV
    D    head dimension         T   tokens                 K  selected pages per row
    DV   head dimension of the values, nearly always D

A kernel reaches a token of K or V from a base pointer, the strides of page, token and head, and a page table. The
logical shape is always `[N, page_size, HKV, D]`; what differs between layouts is only the strides:

    NHD         [N, page_size, HKV, D] as stored
    HND         [N, HKV, page_size, D] with two dimensions swapped
    contiguous  [B, HKV, capacity, D]: page p of sequence b has id b * HKV * P + p, the page stride is page_size * D and
                the head stride capacity * D, so that id and head together reach every page although they overlap
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quest_attention.errors import QuestValueError
from quest_attention.forms import FP8, KEY_MAX, KEY_MIN, Bounds, MetadataForm

__all__ = [
    "KEY_MAX",
    "KEY_MIN",
    "ContiguousKV",
    "PagedKV",
    "check_like",
    "check_metadata",
    "check_side_by_side",
    "num_pages",
]

_BOUNDS = Bounds()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, FP8)


def num_pages(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens` tokens, the last one perhaps part-filled.

    >>> num_pages(33, 16)
    3
    """
    return -(-num_tokens // page_size)


class ContiguousKV(NamedTuple):
    """The storage behind a contiguous cache, for paths that need no page table.

    Attributes:
        keys: `[B, HKV, capacity, D]`.
        values: `[B, HKV, capacity, DV]`.
        metadata: `[B, HKV, capacity / page_size, *form.shape]`.
        first_rows: `[B, HKV, 1]` int64, where a head's pages begin when all pages are seen as rows.
        page_table: `[B, P]` int32, the only page table that says what these tensors say.
    """

    keys: Tensor
    values: Tensor
    metadata: Tensor
    first_rows: Tensor
    page_table: Tensor


@dataclass(frozen=True, eq=False)
class PagedKV:
    """Keys, values and page metadata of a batch of sequences, reached through strides and a page table.

    Attributes:
        keys: `[N, page_size, HKV, D]`, any strides but a last one of 1; float32, bfloat16, float16, float64, or, with
            scales, float8_e4m3fn.
        values: `[N, page_size, HKV, DV]`, else as `keys`.
        metadata: `[N, HKV, *form.shape]`, of the keys as they are stored, in one of the dtypes that the form has beside
            theirs: `[N, HKV, 2, D]` in the dtype of the keys, for bounds also in float8_e4m3fn, for moments of keys in
            8 bits in bfloat16, for sketches of any `[N, HKV, 1, bytes]` in uint8.
        page_table: `[B, P]` int32, any strides, the physical page of each logical page. Entries past a sequence's end
            may hold anything. Or `[B, HKV, P]`, a table of each KV head, whose pages then lie apart, as in a pool that
            holds some pages of each: for attention alone, which looks up what is selected and nothing else.
        contiguous: The tensors behind `keys`, `values` and `metadata` when they are one contiguous cache, else None;
            None too for another page table over such a cache.
        form: What the metadata is.
        key_scale: Of keys in float8_e4m3fn, else None: `[1]` or `[HKV]` float32, above 0, which is checked on a CPU. A
            key is what is stored times its scale; what the metadata says of keys is in units of what is stored.
        value_scale: Likewise of values.

    Raises:
        QuestValueError: Shapes, dtypes, devices or strides do not fit together.
    """

    keys: Tensor
    values: Tensor
    metadata: Tensor
    page_table: Tensor
    contiguous: ContiguousKV | None = None
    form: MetadataForm = _BOUNDS
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def __post_init__(self) -> None:
        _check_dims("keys", self.keys, "[N, page_size, HKV, D]")
        pages, page_size, heads, dim = self.keys.shape
        if 0 in (page_size, heads, dim):
            expected = "[N, page_size, HKV, D] with at least one token, head and channel"
            raise QuestValueError("keys.shape", list(self.keys.shape), expected)
        if self.keys.dtype not in _DTYPES:
            raise QuestValueError("keys.dtype", self.keys.dtype, f"float32, bfloat16, float16, float64 or {FP8}")
        _check_tensor("values", self.values, "[N, page_size, HKV, DV]")
        check_like("values", self.values, (pages, page_size, heads, self.values.shape[-1]), self.keys, "keys")
        check_metadata(self.metadata, self.keys, (pages, heads), self.form, page_size)
        for name, scale in (("key_scale", self.key_scale), ("value_scale", self.value_scale)):
            _check_scale(name, scale, self.keys)
        for name, tensor in (("keys", self.keys), ("values", self.values), ("metadata", self.metadata)):
            check_side_by_side(name, tensor, "channels of a token")
        _check_tensor("page_table", self.page_table, "[B, P]")
        if self.page_table.dim() != 2 and (self.page_table.dim() != 3 or self.page_table.shape[1] != heads):
            raise QuestValueError("page_table.shape", list(self.page_table.shape), f"[B, P] or [B, {heads}, P]")
        if self.page_table.dtype != torch.int32:
            raise QuestValueError("page_table.dtype", self.page_table.dtype, "torch.int32")
        if self.page_table.device != self.keys.device:
            raise QuestValueError("page_table.device", str(self.page_table.device), f"{self.keys.device}, as keys")
        if self.contiguous is not None and self.contiguous.page_table is not self.page_table:
            # The paths that need no page table would not see that it is another.
            expected = "the page table of from_contiguous, or contiguous=None with another"
            raise QuestValueError("page_table", "another than the contiguous cache's", expected)

    @classmethod
    def from_nhd(cls, keys: Tensor, values: Tensor, metadata: Tensor, page_table: Tensor, **others: Any) -> PagedKV:
        """View pages stored as (tokens, heads, dim), as `PagedKV` takes them; `others` are its form and scales."""
        return cls(keys, values, metadata, page_table, **others)

    @classmethod
    def from_hnd(cls, keys: Tensor, values: Tensor, metadata: Tensor, page_table: Tensor, **others: Any) -> PagedKV:
        """View pages stored as (heads, tokens, dim), `[N, HKV, page_size, D]`; else as `from_nhd`."""
        _check_dims("keys", keys, "[N, HKV, page_size, D]")
        _check_dims("values", values, "[N, HKV, page_size, D]")
        return cls(keys.transpose(1, 2), values.transpose(1, 2), metadata, page_table, **others)

    @classmethod
    def from_contiguous(cls, keys: Tensor, values: Tensor, metadata: Tensor, **others: Any) -> PagedKV:
        """View the cache of a transformers layer as pages; nothing is copied.

        Args:
            keys: `[B, HKV, capacity, D]`, contiguous, capacity a multiple of the page size.
            values: As `keys`.
            metadata: `[B, HKV, capacity / page_size, *form.shape]`, contiguous; its shape gives the page size.
            **others: As `from_nhd` takes them.

        Raises:
            QuestValueError: A tensor is not contiguous or the shapes do not fit.
        """
        _check_dims("keys", keys, "[B, HKV, capacity, D]")
        batch, heads, capacity, _ = keys.shape
        _check_tensor("values", values, "[B, HKV, capacity, DV]")
        _check_tensor("metadata", metadata, "[B, HKV, capacity / page_size] and what the form keeps of a page")
        check_like("values", values, (batch, heads, capacity, values.shape[-1]), keys, "keys")
        if metadata.dim() != 5 or metadata.shape[2] == 0 or capacity % metadata.shape[2]:
            expected = f"[{batch}, {heads}, {capacity} / page_size] and what the form keeps of a page"
            raise QuestValueError("metadata.shape", list(metadata.shape), expected)
        pages = metadata.shape[2]
        page_size = capacity // pages
        check_metadata(metadata, keys, (batch, heads, pages), others.get("form", _BOUNDS), page_size)
        for name, tensor in (("keys", keys), ("values", values), ("metadata", metadata)):
            if not tensor.is_contiguous():
                raise QuestValueError(f"{name}.stride()", tensor.stride(), "a contiguous tensor")
        reach = _reach(batch, heads, pages)
        rows, width = metadata.shape[3:]
        meta_strides = (rows * width, pages * rows * width, width, 1)
        meta_pages = metadata.as_strided((reach, heads, rows, width), meta_strides, metadata.storage_offset())
        first = torch.arange(batch, dtype=torch.int32, device=keys.device) * (heads * pages)
        page_table = first[:, None] + torch.arange(pages, dtype=torch.int32, device=keys.device)
        first_rows = (torch.arange(batch * heads, device=keys.device) * pages).view(batch, heads, 1)
        contiguous = ContiguousKV(keys, values, metadata, first_rows, page_table)
        pages_of_keys, pages_of_values = _as_pages(keys, page_size), _as_pages(values, page_size)
        return cls(pages_of_keys, pages_of_values, meta_pages, page_table, contiguous, **others)

    @classmethod
    def from_pool(cls, keys: Tensor, values: Tensor, page_table: Tensor, page_size: int, **scales: Any) -> PagedKV:
        """View a pool of pages, some of each KV head, for attention alone; nothing is copied, and no metadata is there.

        Args:
            keys: `[B, HKV, S * page_size, D]`, contiguous, S pages of each sequence and KV head.
            values: As `keys`.
            page_table: `[B, HKV, P]` int32; page `p` of the pool of sequence `b` has id `b * HKV * S + p` there.
            page_size: Tokens per page [tokens].
            **scales: Of keys and values, where they are in 8 bits.

        Raises:
            QuestValueError: A tensor is not contiguous or the shapes do not fit.
        """
        for name, tensor in (("keys", keys), ("values", values)):
            _check_dims(name, tensor, "[B, HKV, S * page_size, D]")
            if not tensor.is_contiguous():
                raise QuestValueError(f"{name}.stride()", tensor.stride(), "a contiguous tensor")
        pages_of_keys, dim = _as_pages(keys, page_size), keys.shape[3]
        nothing = keys.new_empty(dim).expand(*pages_of_keys.shape[::2], *_BOUNDS.shape(page_size, dim))
        return cls(pages_of_keys, _as_pages(values, page_size), nothing, page_table, **scales)

    @property
    def page_size(self) -> int:
        """Tokens per page [tokens]."""
        return self.keys.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """KV heads, HKV."""
        return self.keys.shape[2]

    @property
    def head_dim(self) -> int:
        """Channels per head of keys and queries, D."""
        return self.keys.shape[3]

    @property
    def batch_size(self) -> int:
        """Sequences, B."""
        return self.page_table.shape[0]

    @property
    def max_pages(self) -> int:
        """Logical pages a sequence can have, P [pages]."""
        return self.page_table.shape[-1]

    @property
    def has_table_by_head(self) -> bool:
        """Whether each KV head has a page table of its own."""
        return self.page_table.dim() == 3

    @property
    def is_quantised(self) -> bool:
        """Whether keys and values are stored in 8 bits, with scales."""
        return self.keys.dtype == FP8


def _reach(batch: int, heads: int, pages: int) -> int:
    """Pages of a contiguous cache by their ids: head `h` adds `h * pages` to an id through its stride [pages]."""
    return (batch - 1) * heads * pages + pages if batch else 0


def _as_pages(tensor: Tensor, page_size: int) -> Tensor:
    """Contiguous keys or values `[B, HKV, capacity, D]` as `[N, page_size, HKV, D]`."""
    batch, heads, capacity, width = tensor.shape
    strides = (page_size * width, width, capacity * width, 1)
    shape = (_reach(batch, heads, capacity // page_size), page_size, heads, width)
    return tensor.as_strided(shape, strides, tensor.storage_offset())


def _check_tensor(name: str, tensor: object, layout: str) -> None:
    """A tensor, where None or a list may have been given."""
    if not isinstance(tensor, Tensor):
        raise QuestValueError(name, tensor, f"a tensor, {layout}")


def _check_dims(name: str, tensor: Tensor, layout: str) -> None:
    _check_tensor(name, tensor, layout)
    if tensor.dim() != layout.count(",") + 1:
        raise QuestValueError(f"{name}.shape", list(tensor.shape), layout)


def check_metadata(metadata: Tensor, keys: Tensor, pages: tuple[int, ...], form: MetadataForm, page_size: int) -> None:
    """What a form keeps of `pages` pages of keys `[..., D]`."""
    if isinstance(form, type) or not callable(getattr(form, "shape", None)):
        raise QuestValueError("form", form, "a form, such as Moments(1.0) or what form_of gives for a config")
    _check_tensor("metadata", metadata, f"{list(pages)} and what the form keeps of a page")
    check_like("metadata", metadata, (*pages, *form.shape(page_size, keys.shape[-1])), keys, "keys", check_dtype=False)
    dtypes = form.dtypes(keys.dtype)
    if metadata.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes)) + f", for {form.name} of keys in {keys.dtype}"
        raise QuestValueError("metadata.dtype", metadata.dtype, expected)


def _check_scale(name: str, scale: Tensor | None, keys: Tensor) -> None:
    """One scale, or one a head, where keys and values are quantised."""
    if scale is not None and not isinstance(scale, Tensor):
        raise QuestValueError(name, scale, "a tensor, [1] or [HKV] torch.float32, or None")
    if keys.dtype != FP8:
        if scale is not None:
            raise QuestValueError(name, list(scale.shape), f"None: a cache in {keys.dtype} has no scales")
        return
    heads = keys.shape[2]
    if scale is None or scale.dtype != torch.float32 or scale.shape not in ((1,), (heads,)):
        got = scale if scale is None else f"{list(scale.shape)} {scale.dtype}"
        raise QuestValueError(name, got, f"[1] or [{heads}] torch.float32 for a cache in {keys.dtype}")
    if scale.device != keys.device:
        raise QuestValueError(f"{name}.device", str(scale.device), f"{keys.device}, as keys")
    if scale.device.type == "cpu" and not bool(((scale > 0) & scale.isfinite()).all()):
        raise QuestValueError(name, scale.tolist(), "finite numbers above 0")


def check_like(
    name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, whose: str, *, check_dtype: bool = True
) -> None:
    """A tensor of a shape that goes with another one: its dtype, if asked, and its device."""
    if not isinstance(tensor, Tensor):  # asked here, since a step makes no words that it does not need
        raise QuestValueError(name, tensor, f"a tensor, {list(shape)} to fit {whose}")
    if tensor.shape != shape:
        raise QuestValueError(f"{name}.shape", list(tensor.shape), f"{list(shape)} to fit {whose}")
    if check_dtype and tensor.dtype != like.dtype:
        raise QuestValueError(f"{name}.dtype", tensor.dtype, f"{like.dtype}, as {whose}")
    if tensor.device != like.device:
        raise QuestValueError(f"{name}.device", str(tensor.device), f"{like.device}, as {whose}")


def check_side_by_side(name: str, tensor: Tensor, what: str) -> None:
    """A tensor whose last dimension lies side by side in memory, or has nothing that could lie apart."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise QuestValueError(f"{name}.stride(-1)", tensor.stride(-1), f"1: the {what} lie side by side")


# Longer than 250 lines: a cache, its three layouts and its checks, which those of the verbs share.

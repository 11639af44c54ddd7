"""Checks of the verbs' arguments: one named error each, before anything is written."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quest_attention.config import QuestConfig, check_integer, check_unit_size
from quest_attention.errors import QuestValueError
from quest_attention.forms import FP8, MetadataForm
from quest_attention.ops.selection import Selection
from quest_attention.pages import PagedKV, check_like, check_metadata, check_side_by_side

__all__ = [
    "check_cache",
    "check_counters",
    "check_factors",
    "check_kinds",
    "check_lengths",
    "check_new_tokens",
    "check_one_table",
    "check_query_heads",
    "check_score_output",
    "check_scores",
    "check_selected",
    "check_slot_metadata",
    "check_slots",
    "check_tensor",
    "check_token",
    "check_token_mask",
    "check_wide",
]

_WIDE = (torch.bfloat16, torch.float16, torch.float32)


def _is_readable(device: torch.device) -> bool:
    """Whether the host may look at values: on a CPU it costs nothing, elsewhere it would wait for the device."""
    return device.type == "cpu"


def check_kinds(kv: object, query: object, config: object) -> None:
    """Whether the parts of a step are of the classes that they must be. No words are made where they are."""
    if isinstance(kv, PagedKV) and isinstance(query, Tensor) and isinstance(config, QuestConfig):
        return
    for name, value, kind in (("kv", kv, PagedKV), ("query", query, Tensor), ("config", config, QuestConfig)):
        if not isinstance(value, kind):
            raise QuestValueError(name, value, f"a {kind.__name__}")


def check_tensor(name: str, value: object, layout: str) -> None:
    """A tensor, where None or a list may have been given."""
    if not isinstance(value, Tensor):
        raise QuestValueError(name, value, f"a tensor, {layout}")


def check_cache(kv: object) -> None:
    """A cache, where anything may have been given."""
    if not isinstance(kv, PagedKV):
        raise QuestValueError("kv", kv, "a PagedKV")


def check_factors(sm_scale: Any, softcap: Any) -> None:
    """The factor on logits, which may be any finite number, and their cap, which is positive; None for neither."""
    if sm_scale is not None and not _is_number(sm_scale):
        raise QuestValueError("sm_scale", sm_scale, "a finite number or None")
    if softcap is not None and not (_is_number(softcap) and softcap > 0):
        raise QuestValueError("softcap", softcap, "a positive number or None")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def check_lengths(name: str, lengths: Tensor | int, batch: int, most: int, device: torch.device) -> None:
    """A length for all sequences, known to the host, or `[B]` int32/int64, whose values are read on a CPU alone."""
    if isinstance(lengths, int) and not isinstance(lengths, bool):
        if not 0 <= lengths <= most:
            raise QuestValueError(name, lengths, f"0 to {most}: the pages of the page table hold no more")
        return
    if not isinstance(lengths, Tensor):
        raise QuestValueError(name, lengths, f"an int or a tensor [{batch}]")
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise QuestValueError(f"{name}.shape", list(lengths.shape), f"[{batch}]")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise QuestValueError(f"{name}.dtype", lengths.dtype, "torch.int32 or torch.int64")
    if lengths.device != device:
        raise QuestValueError(f"{name}.device", str(lengths.device), f"{device}, as keys")
    if _is_readable(device) and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > most:
            raise QuestValueError(name, [low, high], f"values from 0 to {most}: the page table holds no more")


def check_new_tokens(num_new_tokens: Tensor | int, seq_lens: Tensor | int, device: torch.device) -> None:
    """No more new tokens than a sequence has, once both are lengths; on a CPU alone if one of them is a tensor."""
    if isinstance(seq_lens, int) and isinstance(num_new_tokens, int):
        if num_new_tokens > seq_lens:
            raise QuestValueError("num_new_tokens", num_new_tokens, f"at most seq_lens, {seq_lens}")
    elif _is_readable(device):
        new, held = torch.broadcast_tensors(torch.as_tensor(num_new_tokens), torch.as_tensor(seq_lens))
        if bool((new > held).any()):
            row = int((new > held).int().argmax())
            raise QuestValueError("num_new_tokens", int(new[row]), f"at most seq_lens, {int(held[row])} in row {row}")


def check_token(name: str, token: Tensor, stored: Tensor, count: int) -> None:
    """Tokens `[T, HKV, D]`, `count` of them, to be written to pages `[N, page_size, HKV, D]`."""
    is_quantised = stored.dtype == FP8
    check_like(name, token, (count, *stored.shape[2:]), stored, "the cache", check_dtype=not is_quantised)
    if is_quantised:
        check_wide(name, token)
    check_side_by_side(name, token, "channels of a token")


def check_wide(name: str, tensor: Tensor) -> None:
    """A dtype in which a step over a quantised cache is calculated."""
    if tensor.dtype not in _WIDE:
        raise QuestValueError(f"{name}.dtype", tensor.dtype, "bfloat16, float16 or float32 beside a cache in 8 bits")


def check_slots(slots: Tensor, count: int, capacity: int, device: torch.device) -> None:
    """A slot for each of `count` tokens, `[T]` int32/int64 on the device (whose values are not read)."""
    check_tensor("slots", slots, "[T] int32 or int64")
    if slots.dim() != 1 or slots.shape[0] != count:
        raise QuestValueError("slots.shape", list(slots.shape), f"[{count}]: one for each key")
    if slots.dtype not in (torch.int32, torch.int64):
        raise QuestValueError("slots.dtype", slots.dtype, "torch.int32 or torch.int64")
    if slots.device != device:
        raise QuestValueError("slots.device", str(slots.device), f"{device}, as the cache")
    if _is_readable(device) and count and int(slots.max()) >= capacity:
        raise QuestValueError("slots", int(slots.max()), f"less than {capacity}: the cache holds no more tokens")


def check_slot_metadata(metadata: Tensor, keys: Tensor, page_size: int, form: MetadataForm) -> None:
    """What a form keeps of pages, `[N, HKV, *form.shape]`, for keys `[T, HKV, D]`."""
    check_integer("page_size", page_size, minimum=1)
    check_tensor("keys", keys, "[T, HKV, D]")
    check_tensor("metadata", metadata, "[N, HKV] and what the form keeps of a page")
    if keys.dim() != 3 or 0 in keys.shape[1:]:
        raise QuestValueError("keys.shape", list(keys.shape), "[T, HKV, D]")
    check_metadata(metadata, keys, (metadata.shape[0] if metadata.dim() else 0, keys.shape[1]), form, page_size)
    check_side_by_side("metadata", metadata, "numbers of a row")
    check_side_by_side("keys", keys, "channels of a token")


def check_token_mask(token_mask: Tensor | None, batch: int, device: torch.device) -> None:
    """`[B, T]` bool, True where a token may be attended to."""
    if token_mask is None:
        return
    if not isinstance(token_mask, Tensor):
        raise QuestValueError("token_mask", token_mask, f"a tensor [{batch}, T] of bool, or None")
    if token_mask.dim() != 2 or token_mask.shape[0] != batch or token_mask.shape[1] == 0:
        raise QuestValueError("token_mask.shape", list(token_mask.shape), f"[{batch}, T] with T at least 1")
    if token_mask.dtype != torch.bool:
        raise QuestValueError("token_mask.dtype", token_mask.dtype, "torch.bool")
    if token_mask.device != device:
        raise QuestValueError("token_mask.device", str(token_mask.device), f"{device}, as keys")


def check_scores(scores: Tensor) -> None:
    """`[B, HKV, U]` float32, as `score_pages` gives them."""
    check_tensor("scores", scores, "[B, HKV, U] float32")
    if scores.dim() != 3 or scores.shape[1] == 0:
        raise QuestValueError("scores.shape", list(scores.shape), "[B, HKV, U]")
    if scores.dtype != torch.float32:
        raise QuestValueError("scores.dtype", scores.dtype, "torch.float32")


def check_one_table(kv: PagedKV) -> None:
    """A page table that says where all of a page is: its keys of every KV head, and its metadata."""
    check_cache(kv)
    if kv.has_table_by_head:
        expected = "[B, P]: with a table of each KV head only sparse_decode_attention of one query token reads"
        raise QuestValueError("kv.page_table.shape", list(kv.page_table.shape), expected)


def check_query_heads(num_query_heads: int, kv: PagedKV) -> None:
    """As many query heads for each KV head of a cache."""
    check_integer("num_query_heads", num_query_heads, minimum=1)
    if num_query_heads % kv.num_kv_heads:
        raise QuestValueError("num_query_heads", num_query_heads, f"a multiple of the {kv.num_kv_heads} KV heads")


def check_score_output(out: Tensor, kv: PagedKV, units_per_page: int) -> None:
    """Room for scores, `[B, HKV, U]` float32, those of a row side by side."""
    shape = (kv.batch_size, kv.num_kv_heads, kv.max_pages * units_per_page)
    check_like("out", out, shape, kv.keys, "keys", check_dtype=False)
    if out.dtype != torch.float32:
        raise QuestValueError("out.dtype", out.dtype, "torch.float32")
    check_side_by_side("out", out, "scores of a row")


def check_selected(selected: Selection, kv: PagedKV) -> None:
    """Units `[B, HKV, K]` int32 of the cache's sequences and KV heads; any numbers, see `Selection`."""
    _check_selection(selected)
    units, size, page_size = selected.units, selected.unit_size, kv.page_size
    shape = units.shape
    if len(shape) != 3 or shape[0] != kv.batch_size or shape[1] != kv.num_kv_heads:
        expected = f"[{kv.batch_size}, {kv.num_kv_heads}, K]"
        raise QuestValueError("selected.units.shape", list(shape), expected)
    if units.dtype != torch.int32:
        raise QuestValueError("selected.units.dtype", units.dtype, "torch.int32")
    if units.device != kv.keys.device:
        raise QuestValueError("selected.units.device", str(units.device), f"{kv.keys.device}, as keys")
    check_unit_size("selected.unit_size", size, page_size)
    _check_counts(selected)


def _check_selection(selected: object) -> None:
    """A `Selection` of tensors."""
    if not isinstance(selected, Selection):
        raise QuestValueError("selected", selected, "a Selection")
    check_tensor("selected.units", selected.units, "[B, HKV, K] int32")
    check_tensor("selected.counts", selected.counts, "[B, HKV] int32")


def _check_counts(selected: Selection) -> None:
    """A count for each list of a `Selection`."""
    counts = selected.counts
    if counts.shape != selected.units.shape[:2] or counts.dtype not in (torch.int32, torch.int64):
        expected = f"{list(selected.units.shape[:2])} torch.int32: one for each list of units"
        raise QuestValueError("selected.counts", f"{list(counts.shape)} {counts.dtype}", expected)


def check_counters(counters: Tensor, selected: Selection, seq_lens: Tensor | int, token_budget: int) -> None:
    """`[4]` int64, a count for each list of the selection, and a length for each sequence."""
    check_tensor("counters", counters, "[4] int64")
    _check_selection(selected)
    if tuple(counters.shape) != (4,) or counters.dtype != torch.int64:
        raise QuestValueError("counters", f"{list(counters.shape)} {counters.dtype}", "[4] torch.int64")
    _check_counts(selected)
    counts = selected.counts
    if counts.device != counters.device:
        raise QuestValueError("selected.counts.device", str(counts.device), f"{counters.device}, as counters")
    check_lengths("seq_lens", seq_lens, counts.shape[0], torch.iinfo(torch.int32).max, counters.device)
    check_integer("selected.unit_size", selected.unit_size, minimum=1)
    check_integer("token_budget", token_budget, minimum=1)

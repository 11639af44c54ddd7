"""Checks of the verbs' arguments: one named error each, before anything is written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quest_attention.config import check_integer
from quest_attention.errors import QuestValueError
from quest_attention.ops.selection import Selection
from quest_attention.pages import FP8_METADATA, PagedKV

__all__ = [
    "check_attention",
    "check_counters",
    "check_lengths",
    "check_new_tokens",
    "check_output",
    "check_query",
    "check_score_output",
    "check_scores",
    "check_selected",
    "check_slot_metadata",
    "check_slots",
    "check_token",
    "check_token_mask",
]


def check_query(query: Tensor, kv: PagedKV) -> None:
    """A decode query `[B, HQ, D]` that fits the cache."""
    if query.dim() != 3 or query.shape[0] != kv.batch_size or query.shape[2] != kv.head_dim:
        expected = f"[{kv.batch_size}, HQ, {kv.head_dim}]: one token per sequence of the page table"
        raise QuestValueError("query.shape", list(query.shape), expected)
    if query.shape[1] == 0 or query.shape[1] % kv.num_kv_heads:
        raise QuestValueError("query.shape[1]", query.shape[1], f"a multiple of the {kv.num_kv_heads} KV heads")
    if query.dtype != kv.keys.dtype:
        raise QuestValueError("query.dtype", query.dtype, f"{kv.keys.dtype}, as keys")
    if query.device != kv.keys.device:
        raise QuestValueError("query.device", str(query.device), f"{kv.keys.device}, as keys")


def _is_readable(device: torch.device) -> bool:
    """Whether the host may look at values: on a CPU it costs nothing, elsewhere it would wait for the device."""
    return device.type == "cpu"


def check_lengths(name: str, lengths: Tensor | int, batch: int, most: int, device: torch.device) -> None:
    """A length for all sequences, known to the host, or `[B]` int32/int64, whose values are read on a CPU alone."""
    if isinstance(lengths, int):
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


def check_token(name: str, token: Tensor, stored: Tensor, batch: int) -> None:
    """One token of each sequence, `[B, HKV, D]`, to be written to pages `[N, page_size, HKV, D]`."""
    shape = (batch, *stored.shape[2:])
    if tuple(token.shape) != shape:
        raise QuestValueError(f"{name}.shape", list(token.shape), str(list(shape)))
    if token.dtype != stored.dtype:
        raise QuestValueError(f"{name}.dtype", token.dtype, f"{stored.dtype}, as the cache")
    if token.device != stored.device:
        raise QuestValueError(f"{name}.device", str(token.device), f"{stored.device}, as the cache")
    if token.stride(-1) != 1 and token.shape[-1] > 1:
        raise QuestValueError(f"{name}.stride(-1)", token.stride(-1), "1: the channels of a token lie side by side")


def check_output(out: Tensor, query: Tensor, kv: PagedKV) -> None:
    """Room for the output of a decode step, `[B, HQ, DV]` contiguous, in the dtype of the query."""
    shape = (*query.shape[:2], kv.values.shape[-1])
    if tuple(out.shape) != shape:
        raise QuestValueError("out.shape", list(out.shape), str(list(shape)))
    if out.dtype != query.dtype:
        raise QuestValueError("out.dtype", out.dtype, f"{query.dtype}, as the query")
    if out.device != query.device:
        raise QuestValueError("out.device", str(out.device), f"{query.device}, as the query")
    if not out.is_contiguous():
        raise QuestValueError("out.stride()", out.stride(), "a contiguous tensor")


def check_slots(slots: Tensor, count: int, capacity: int, device: torch.device) -> None:
    """A slot for each of `count` tokens, `[T]` int32/int64 on the device (whose values are not read)."""
    if slots.dim() != 1 or slots.shape[0] != count:
        raise QuestValueError("slots.shape", list(slots.shape), f"[{count}]: one for each key")
    if slots.dtype not in (torch.int32, torch.int64):
        raise QuestValueError("slots.dtype", slots.dtype, "torch.int32 or torch.int64")
    if slots.device != device:
        raise QuestValueError("slots.device", str(slots.device), f"{device}, as the cache")
    if _is_readable(device) and count and int(slots.max()) >= capacity:
        raise QuestValueError("slots", int(slots.max()), f"less than {capacity}: the cache holds no more tokens")


def check_slot_metadata(metadata: Tensor, keys: Tensor, page_size: int) -> None:
    """Page metadata `[N, HKV, 2, D]` for keys `[T, HKV, D]`."""
    check_integer("page_size", page_size, minimum=1)
    if metadata.dim() != 4 or metadata.shape[2] != 2 or 0 in metadata.shape[1:]:
        raise QuestValueError("metadata.shape", list(metadata.shape), "[N, HKV, 2, D]")
    if metadata.stride(-1) != 1 and metadata.shape[-1] > 1:
        raise QuestValueError("metadata.stride(-1)", metadata.stride(-1), "1: the channels of a bound lie side by side")
    if keys.dim() != 3 or tuple(keys.shape[1:]) != (metadata.shape[1], metadata.shape[3]):
        raise QuestValueError("keys.shape", list(keys.shape), f"[T, {metadata.shape[1]}, {metadata.shape[3]}]")
    if metadata.dtype not in (keys.dtype, FP8_METADATA):
        raise QuestValueError("metadata.dtype", metadata.dtype, f"{keys.dtype}, as keys, or {FP8_METADATA}")
    if keys.device != metadata.device:
        raise QuestValueError("keys.device", str(keys.device), f"{metadata.device}, as metadata")
    if keys.stride(-1) != 1 and keys.shape[-1] > 1:
        raise QuestValueError("keys.stride(-1)", keys.stride(-1), "1: the channels of a token lie side by side")


def check_token_mask(token_mask: Tensor | None, batch: int, device: torch.device) -> None:
    """`[B, T]` bool, True where a token may be attended to."""
    if token_mask is None:
        return
    if token_mask.dim() != 2 or token_mask.shape[0] != batch or token_mask.shape[1] == 0:
        raise QuestValueError("token_mask.shape", list(token_mask.shape), f"[{batch}, T] with T at least 1")
    if token_mask.dtype != torch.bool:
        raise QuestValueError("token_mask.dtype", token_mask.dtype, "torch.bool")
    if token_mask.device != device:
        raise QuestValueError("token_mask.device", str(token_mask.device), f"{device}, as keys")


def check_scores(scores: Tensor) -> None:
    """`[B, HKV, P]` float32, as `score_pages` gives them."""
    if scores.dim() != 3 or scores.shape[1] == 0:
        raise QuestValueError("scores.shape", list(scores.shape), "[B, HKV, P]")
    if scores.dtype != torch.float32:
        raise QuestValueError("scores.dtype", scores.dtype, "torch.float32")


def check_score_output(out: Tensor, kv: PagedKV) -> None:
    """Room for scores, `[B, HKV, P]` float32, those of a row side by side."""
    shape = (kv.batch_size, kv.num_kv_heads, kv.max_pages)
    if tuple(out.shape) != shape:
        raise QuestValueError("out.shape", list(out.shape), str(list(shape)))
    if out.dtype != torch.float32:
        raise QuestValueError("out.dtype", out.dtype, "torch.float32")
    if out.device != kv.keys.device:
        raise QuestValueError("out.device", str(out.device), f"{kv.keys.device}, as keys")
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        raise QuestValueError("out.stride(-1)", out.stride(-1), "1: the scores of a row lie side by side")


def check_selected(selected: Selection, kv: PagedKV) -> None:
    """Pages `[B, HKV, K]` int32 of the cache's sequences and KV heads; any numbers, see `Selection`."""
    pages = selected.pages
    if pages.dim() != 3 or tuple(pages.shape[:2]) != (kv.batch_size, kv.num_kv_heads):
        expected = f"[{kv.batch_size}, {kv.num_kv_heads}, K]"
        raise QuestValueError("selected.pages.shape", list(pages.shape), expected)
    if pages.dtype != torch.int32:
        raise QuestValueError("selected.pages.dtype", pages.dtype, "torch.int32")
    if pages.device != kv.keys.device:
        raise QuestValueError("selected.pages.device", str(pages.device), f"{kv.keys.device}, as keys")


def check_counters(
    counters: Tensor, selected: Selection, seq_lens: Tensor | int, page_size: int, token_budget: int
) -> None:
    """`[4]` int64, and a count and a length for each sequence of the selection."""
    if tuple(counters.shape) != (4,) or counters.dtype != torch.int64:
        raise QuestValueError("counters", f"{list(counters.shape)} {counters.dtype}", "[4] torch.int64")
    counts = selected.counts
    if counts.dim() != 1 or counts.dtype not in (torch.int32, torch.int64):
        raise QuestValueError("selected.counts", f"{list(counts.shape)} {counts.dtype}", "[B] torch.int32")
    if counts.device != counters.device:
        raise QuestValueError("selected.counts.device", str(counts.device), f"{counters.device}, as counters")
    check_lengths("seq_lens", seq_lens, counts.shape[0], torch.iinfo(torch.int32).max, counters.device)
    check_integer("page_size", page_size, minimum=1)
    check_integer("token_budget", token_budget, minimum=1)


def check_attention(sm_scale: float, softcap: float | None, sinks: Tensor | None, query: Tensor) -> None:
    """Softmax scale, logit softcap and attention sinks `[HQ]`."""
    if not math.isfinite(sm_scale):
        raise QuestValueError("sm_scale", sm_scale, "a finite number")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise QuestValueError("softcap", softcap, "a positive number or None")
    if sinks is not None and tuple(sinks.shape) != (query.shape[1],):
        raise QuestValueError("sinks.shape", list(sinks.shape), f"[{query.shape[1]}]: one logit per query head")
    if sinks is not None and sinks.device != query.device:
        raise QuestValueError("sinks.device", str(sinks.device), f"{query.device}, as the query")

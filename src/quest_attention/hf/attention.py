"""The attention function that transformers calls: Quest for a decode step past the budget, else the model's own."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from quest_attention.errors import QuestValueError, UnsupportedModelError
from quest_attention.hf.compiler import kept_from_compilers
from quest_attention.hf.layer import LAYER_ATTRIBUTE, QuestLayer
from quest_attention.hf.lower_right import attend_lower_right, chunk_mask, is_lower_right, written_out
from quest_attention.hf.reading import Reading
from quest_attention.ops import sparse_decode_attention

__all__ = ["EAGER_NAME", "SDPA_NAME", "AttentionForward", "refuse_attentions", "register_attention"]

SDPA_NAME = "quest"
"""Registered for models whose dense attention is scaled_dot_product_attention."""
EAGER_NAME = "quest_eager"
"""Registered for models whose dense attention is their own eager one: logit softcap, attention sinks, or by choice."""
_OPTIONS = {"sm_scale": "scaling", "softcap": "softcap", "sinks": "s_aux"}
"""Options of the verbs, and what transformers calls them."""

AttentionForward = Callable[..., tuple[Tensor, Tensor | None]]
"""The signature of transformers' attention functions, as far as it matters here.

A cache layer may have an attention of its own: what Quest is compared with. Its `update` decides its `reading` and sets
it as `LAYER_ATTRIBUTE` of the keys; its `attend(dense, query, key, value, attention_mask, **kwargs)` is then called,
where `dense(query, key, value, attention_mask, **kwargs)` reads all.
"""


def register_attention() -> None:
    """Make both names known to transformers. Without the mask functions, padded batches would be silently wrong."""
    AttentionInterface.register(SDPA_NAME, _sdpa_or_quest)
    AttentionMaskInterface.register(SDPA_NAME, chunk_mask)
    AttentionInterface.register(EAGER_NAME, _eager_or_quest)
    AttentionMaskInterface.register(EAGER_NAME, _eager_or_decode_mask)


def _eager_or_decode_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Eager's additive mask; for a decode step the boolean one, or none where nothing is masked, as Quest takes it.

    It is made before a layer has tokens, so it knows no `Reading`, and need not: dense attention takes both forms. For
    several tokens none would let each see the later ones.
    """
    q_length = kwargs["q_length"] if "q_length" in kwargs else args[1]
    mask: Tensor | None = (eager_mask if q_length != 1 else sdpa_mask)(*args, **kwargs)
    return mask


def _sdpa_or_quest(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    return _attend(_sdpa, module, query, key, value, attention_mask, **kwargs)


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """As transformers has it, but for a chunk behind earlier tokens whose mask is not written out: see `chunk_mask`."""
    if attention_mask is None or not is_lower_right(attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    fits = attention_mask.shape[2:] == (query.shape[2], key.shape[2])
    if fits and _is_plain(kwargs) and not kwargs.get("output_attentions"):
        options: dict[str, Any] = {"scaling": kwargs.get("scaling"), "dropout": kwargs.get("dropout") or 0.0}
        return attend_lower_right(query, key, value, **options, autocast=_autocast_dtype(query)), None
    return sdpa_attention_forward(module, query, key, value, written_out(attention_mask), **kwargs)


def _eager_or_quest(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    eager: AttentionForward = sys.modules[type(module).__module__].eager_attention_forward

    def dense(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
        return eager(module, query, key, value, attention_mask, **kwargs)

    return _attend(dense, module, query, key, value, attention_mask, **kwargs)


@kept_from_compilers
def _attend(
    dense: AttentionForward, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention as transformers asks for it.

    Args:
        dense: The model's own attention.
        module: The attention module.
        query: `[B, HQ, T, D]`, T the tokens of this pass, or its last ones, which then read what it reads.
        key: `[B, HKV, length, D]`, from `QuestLayer.update` or any other cache; for a sparse step as it is stored.
        value: `[B, HKV, length, DV]`.
        attention_mask: None, or `[B, 1, T, length]`, boolean (True attends) or additive, or as `chunk_mask` has it.
        **kwargs: `scaling`, `softcap`, `s_aux` and whatever else a model passes to its attention.

    Returns:
        `[B, T, HQ, DV]` and None, or what `dense` gives.

    Raises:
        UnsupportedModelError: A decode step past the budget has a position bias, which bounds on keys cannot see, or
            drops out weights, as a model in training does; or a decode step has more queries than the one of its token.
        QuestValueError: Its mask differs between heads, or adds anything but 0 and minus infinity; or its weights are
            asked for.
    """
    layer: QuestLayer | None = getattr(key, LAYER_ATTRIBUTE, None)
    if layer is not None:
        layer.is_attended = True
    reading: Reading | None = getattr(layer, "reading", None)
    if reading is not None and reading.is_step and reading is not Reading.CHECK and query.shape[2] != 1:
        raise UnsupportedModelError(f"query: got {query.shape[2]} tokens, expected 1, as the decode step wrote")
    own: AttentionForward | None = getattr(layer, "attend", None)
    if own is not None:
        return own(functools.partial(dense, module), query, key, value, attention_mask, **kwargs)
    if layer is None or reading is Reading.SEVERAL_TOKENS:
        return dense(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and is_lower_right(attention_mask):
        attention_mask = written_out(attention_mask)  # of a few tokens, whose group is packed beside a mask
    options = {ours: kwargs.get(theirs) for ours, theirs in _OPTIONS.items()}
    if layer.captured_lengths is not None:
        _check_plain(kwargs)
        return _attend_captured(layer, layer.captured_lengths, query, options), None
    batch = query.shape[0]
    layer.count_attention(batch)
    if reading is not Reading.SPARSE:
        # Within the budget the model's own function, so that a generation there is the model's own to the last bit.
        is_ours = reading in (Reading.DENSE_LAYER, Reading.CHECK) and dense is _sdpa
        is_easy = attention_mask is None if reading is Reading.DENSE_LAYER else _is_boolean(attention_mask)
        if is_ours and is_easy and _is_plain(kwargs) and not kwargs.get("dropout"):
            return _dense_decode(query, key, value, attention_mask, options["sm_scale"]), None
        return dense(module, query, key, value, attention_mask, **kwargs)
    _check_plain(kwargs)
    refuse_attentions(kwargs, getattr(module, "config", None))
    assert layer.storage is not None, "the keys are a view of it"
    autocast = _autocast_dtype(query)
    # It would round the scores of pages: bounds hold in float32.
    with nullcontext() if autocast is None else torch.autocast(query.device.type, enabled=False):
        mask = None if attention_mask is None else _token_mask(attention_mask)
        rows = query[:, :, 0].to(layer.storage.dtype)
        since = layer.tokens_since_choice
        step = layer.decode(rows, layer.seq_lens, **options, token_mask=mask)
    # Nothing padded: every sequence is past the budget. Otherwise the device knows, and is not asked.
    is_known = attention_mask is None and not layer.counter.is_told_by_device
    units = batch * layer.config.unit_budget if is_known else step.selected.units_read
    read = units * layer.config.unit_size + batch * since
    ranked = batch * (0 if since else layer.keys_ranked)
    layer.counter.count_sparse(read, batch * layer.tokens_held, ranked)
    if layer.has_listeners:
        layer.report(step.selected.within(layer.seq_lens), query, key, **kwargs)
    return step.output[:, None].to(autocast or query.dtype), None


def refuse_attentions(given: Mapping[str, Any], config: Any) -> None:
    """Refuse a sparse step whose weights are asked for, as an argument or by the model's configuration.

    Args:
        given: Arguments of a forward pass, or of an attention function.
        config: Configuration of the model, or None.

    Raises:
        QuestValueError: They are.
    """
    if given.get("output_attentions", getattr(config, "output_attentions", False)):
        raise QuestValueError(
            "output_attentions",
            True,
            "False in a decode step past the budget, which has no weights for the pages it does not read: "
            "on_select says which it reads, and a larger token_budget or disable() gives all weights",
        )


def _autocast_dtype(query: Tensor) -> torch.dtype | None:
    """What autocast makes dense attention give, though rotary embeddings leave queries in float32; None without it."""
    kind = query.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_on else None


def _is_plain(kwargs: Mapping[str, Any]) -> bool:
    """Whether logits are those of queries and keys alone."""
    return all(kwargs.get(name) is None for name in ("softcap", "s_aux", "position_bias"))


def _check_plain(kwargs: dict[str, Any]) -> None:
    """Refuse what a sparse step would have to leave out."""
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError("position_bias: got a tensor, expected None: Quest's bounds see keys only")
    if kwargs.get("dropout"):
        raise UnsupportedModelError(f"dropout: got {kwargs['dropout']}, expected 0: put the model in eval()")


def _attend_captured(layer: QuestLayer, lengths: Tensor, query: Tensor, options: dict[str, Any]) -> Tensor:
    """A decode step or a check whose lengths are on the device, nothing padded: `[B, T, HQ, DV]`."""
    storage, backend = layer.storage, layer.config.backend
    assert storage is not None, "captured steps follow others"
    if layer.reading is Reading.CHECK:
        several = query.transpose(1, 2).to(storage.dtype)  # [B, T, HQ, D]
        pages = storage.every_page
        output, _ = sparse_decode_attention(several, storage.paged, lengths, pages, **options, backend=backend)
        return output.to(query.dtype)
    rows = query[:, :, 0].to(storage.dtype)
    if layer.reading is Reading.DENSE_LAYER:
        pages = storage.every_page
        output, _ = sparse_decode_attention(rows, storage.paged, lengths, pages, **options, backend=backend)
    else:
        output, selected = layer.decode(rows, lengths, **options)
        if layer.counter.is_told_by_device:
            layer.counter.read_on(query.device).add_(selected.units_read)
    return output[:, None].to(query.dtype)


def _is_boolean(attention_mask: Tensor | None) -> bool:
    """Whether nothing is masked, or by a mask of our own for all heads."""
    return attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)


def _dense_decode(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention of a few tokens per sequence over everything: the group as rows, so that no key is repeated.

    Without a mask it is of one token. transformers' own repeats keys and values for every query head where there is a
    mask, which takes ten times as long on a CPU.

    Args:
        query: `[B, HQ, T, D]`.
        key: `[B, HKV, length, D]`.
        value: `[B, HKV, length, DV]`.
        attention_mask: `[B, 1, T, length]` bool, or None.
        scaling: Of the logits.

    Returns:
        `[B, T, HQ, DV]`.
    """
    batch, heads, count, dim = query.shape
    packed = query.reshape(batch, key.shape[1], -1, dim)  # [B, HKV, G * T, D]
    if attention_mask is not None and packed.shape[2] != count:
        group = packed.shape[2] // count
        attention_mask = attention_mask[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    output = F.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch, heads, count, -1).transpose(1, 2)  # which is laid out by token on a GPU


def _token_mask(attention_mask: Tensor) -> Tensor:
    """`[B, length]` bool, True where a token may be attended to, from the mask of a decode step."""
    if attention_mask.dim() != 4 or attention_mask.shape[1] != 1 or attention_mask.shape[2] != 1:
        raise QuestValueError("attention_mask.shape", list(attention_mask.shape), "[B, 1, 1, length], for all heads")
    rows = attention_mask[:, 0, 0]
    if rows.dtype == torch.bool:
        return rows
    masked = rows <= torch.finfo(rows.dtype).min / 2
    # A mask of the user's own; looking at it stalls a GPU, but a bias we ignored would be silently wrong.
    if not bool((masked | (rows == 0)).all()):
        raise QuestValueError("attention_mask", "additive values", "0 and the lowest number only: bounds see no bias")
    return ~masked

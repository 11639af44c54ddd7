"""Caches in 8 bits: what vLLM says of them, and the scales that it keeps in each layer.

vLLM's 8-bit floats are bytes to it, in the cache and in what a layer says it stores. A layer has three scales of its
own, of queries, keys and values, for all heads or one for each KV head; a checkpoint brings them, else they are 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quest_attention.errors import QuestValueError
from quest_attention.forms import FP8

__all__ = ["check_cache_dtype", "scales_of", "stored_dtype", "unquantized"]

_PLAIN = "auto"
_IN_8_BITS = ("fp8", "fp8_e4m3")
"""vLLM's names for keys and values in float8_e4m3fn."""
_DEVICES = ("cuda",)
"""Types of devices whose stock kernels keep them in bytes that can be read: a CPU has formats of its own."""


def check_cache_dtype(kv_cache_dtype: str, model_dtype: torch.dtype | None, device: str) -> None:
    """Look at what a cache is to hold.

    Args:
        kv_cache_dtype: vLLM's name: of `--kv-cache-dtype`, or what a checkpoint's own settings made of "auto".
        model_dtype: Of the model, None where it is not known.
        device: Type of the device.

    Raises:
        QuestValueError: It is not what Quest reads there.
    """
    plain = [_PLAIN] if model_dtype is None else [_PLAIN, str(model_dtype).removeprefix("torch.")]
    expected = [*plain, *(_IN_8_BITS if device in _DEVICES else ())]
    if kv_cache_dtype not in expected:
        names = ", ".join(map(repr, expected))
        raise QuestValueError("kv_cache_dtype", kv_cache_dtype, f"one of {names}, which Quest reads on this device")


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a cache holds that vLLM says is of a dtype."""
    return FP8 if dtype == torch.uint8 else dtype


def scales_of(layer: Any, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Scales of the keys and values of a layer's cache, `[1]` or `[HKV]`: the layer's own tensors, so that they follow.

    None where the cache has none.
    """
    if dtype != FP8:
        return None, None
    return layer._k_scale.view(-1), layer._v_scale.view(-1)  # noqa: SLF001 - vLLM's names


def unquantized(layer: Any, query: Tensor, dtype: torch.dtype) -> Tensor:
    """Queries `[R, HQ, D]` in a dtype: beside a cache in 8 bits vLLM hands them over in 8 bits too.

    They are what the stock kernel takes them for: what is stored times the layer's scale.
    """
    if query.dtype != FP8:
        return query
    plain, scale = query.to(dtype), layer._q_scale  # noqa: SLF001 - vLLM's names, as below
    if scale.numel() > 1:
        return plain.mul_(scale.repeat_interleave(query.shape[1] // scale.numel())[:, None])
    known: float = layer._q_scale_float  # noqa: SLF001
    return plain if known == 1.0 else plain.mul_(known)

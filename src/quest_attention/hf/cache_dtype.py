"""`CacheDtype`: in what keys and values are stored, by vLLM's names, and where that can be."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from quest_attention.config import Backend
from quest_attention.errors import QuestValueError
from quest_attention.forms import FP8
from quest_attention.ops import resolve_backend

__all__ = ["CacheDtype", "check_cache_dtype", "check_stored", "stored_dtype"]

CacheDtype = Literal["auto", "fp8"]
"""As the model has them, or in float8_e4m3fn with a scale of 1: the nearest number of 8 bits, up to 448."""

_DEVICES = ("cpu", "cuda")
"""Types of devices on which PyTorch converts numbers of 8 bits."""
_WIDE = (torch.float32, torch.bfloat16, torch.float16)
"""What is calculated in beside a cache in 8 bits."""
_KERNEL_CAPABILITY = (8, 9)
"""First compute capability whose instructions convert them, without which Triton compiles no kernel for them."""


def check_cache_dtype(kv_cache_dtype: object) -> None:
    """Refuse what is no name.

    Raises:
        QuestValueError: As said.
    """
    names = get_args(CacheDtype)
    if kv_cache_dtype not in names:
        raise QuestValueError("kv_cache_dtype", kv_cache_dtype, f"one of {', '.join(map(repr, names))}")


def stored_dtype(kv_cache_dtype: CacheDtype) -> torch.dtype | None:
    """In which keys and values are stored; None is in their own."""
    return FP8 if kv_cache_dtype == "fp8" else None


def check_stored(kv_cache_dtype: CacheDtype, dtype: torch.dtype, device: torch.device, backend: Backend) -> None:
    """Refuse a storage that cannot be read where it is to be.

    Args:
        kv_cache_dtype: In what keys and values are to be stored.
        dtype: Theirs as the model makes them.
        device: Of the model.
        backend: Asked for.

    Raises:
        QuestValueError: They are of another dtype than is calculated in; or the device, or its kernels, do not read it.
    """
    if kv_cache_dtype == "auto":
        return
    if dtype not in _WIDE:
        raise QuestValueError("kv_cache_dtype", kv_cache_dtype, f"'auto' for keys and values in {dtype}")
    if device.type not in _DEVICES:
        raise QuestValueError("kv_cache_dtype", kv_cache_dtype, f"'auto' on device {device}: a CPU or a CUDA device")
    if device.type == "cuda" and resolve_backend(backend, device, FP8).name == "triton":
        found = torch.cuda.get_device_capability(device)
        if found < _KERNEL_CAPABILITY:
            least, has = (".".join(map(str, each)) for each in (_KERNEL_CAPABILITY, found))
            expected = f"'auto' with the Triton kernels on a GPU of compute capability {has}, below {least}"
            raise QuestValueError("kv_cache_dtype", kv_cache_dtype, expected)

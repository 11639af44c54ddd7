"""What a cache layer takes as new tokens, and refuses before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_attention.errors import QuestStateError, QuestValueError

__all__ = ["check_alike", "check_fits", "refuse_gradients"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What `PagedKV` takes."""


def refuse_gradients(keys: Tensor, values: Tensor) -> None:
    """Refuse tokens through which gradients would flow: writing in place would break them.

    Raises:
        QuestStateError: Gradients are being recorded.
    """
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        raise QuestStateError("a QuestCache writes in place: run the model under torch.no_grad() or inference_mode()")


def check_alike(keys: Tensor, values: Tensor) -> None:
    """Whether keys and values are of the same tokens: writing in place would broadcast one value over several tokens.

    Args:
        keys: `[B, HKV, T, D]`.
        values: `[B, HKV, T, DV]`.

    Raises:
        QuestValueError: They are not, or are of a dtype that no cache holds.
    """
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


def check_fits(name: str, tensor: Tensor, stored: Tensor) -> None:
    """Whether new tokens are of the batch and model that the storage was made for.

    Args:
        name: Of the argument.
        tensor: `[B, HKV, T, D]`.
        stored: `[B, HKV, capacity, D]`.

    Raises:
        QuestValueError: They are not.
    """
    if tensor.dim() != 4 or tensor.shape[:2] != stored.shape[:2] or tensor.shape[3] != stored.shape[3]:
        batch, heads, _, dim = stored.shape
        expected = f"[{batch}, {heads}, T, {dim}], as this cache holds: a new batch or model needs a new QuestCache"
        raise QuestValueError(f"{name}.shape", list(tensor.shape), expected)
    if tensor.device != stored.device:
        raise QuestValueError(f"{name}.device", str(tensor.device), f"{stored.device}, as this cache")

"""Chunks of a prompt behind earlier tokens: attention that is causal from the lower right corner, without its mask.

transformers writes a mask for such a chunk, `[B, 1, T, length]`, of which PyTorch makes numbers; and beside a mask it
repeats keys and values for every query head. On a GPU that also keeps flash attention away, whose causal attention is
aligned at the lower right already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import causal_mask_function, sdpa_mask

__all__ = [
    "FLASH_CHANNELS", "FLASH_DTYPES", "FLASH_MOST_CHANNELS", "attend_lower_right", "chunk_mask", "is_lower_right",
    "knows_lower_right", "written_out",
]  # fmt: skip

FLASH_DTYPES = (torch.float16, torch.bfloat16)
"""What PyTorch's flash attention takes, which reads a KV head for all its query heads."""
FLASH_MOST_CHANNELS = 256
"""Of a head that it takes."""
FLASH_CHANNELS = 8
"""Heads are of a multiple of these, or PyTorch copies keys and values to pad them."""


def knows_lower_right(device: torch.device) -> bool:
    """Whether PyTorch has kernels on a device that align causal attention so; the one place that decides by device."""
    return device.type == "cuda" and torch.version.hip is None


def chunk_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """`sdpa_mask`, but for a chunk whose mask would say 'causal from the lower right' alone a mask of no heads.

    None would not say it: transformers gives none for the first tokens in a static cache too, where the keys are those
    of its whole length and the mask is aligned at the upper left. So it is `[B, 0, T, length]`, which takes no memory,
    goes to other devices as any mask, and fits no logits: attention that does not know it fails.
    """
    if args or not _says_lower_right(**kwargs):  # transformers names its arguments
        mask: Tensor | None = sdpa_mask(*args, **kwargs)
        return mask
    shape = (kwargs["batch_size"], 0, kwargs["q_length"], kwargs["kv_length"])
    return torch.empty(shape, dtype=torch.bool, device=kwargs["device"])


def _says_lower_right(
    *, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0, mask_function: Any = None,
    attention_mask: Tensor | None = None, local_size: int | None = None, allow_is_causal_skip: bool = True,
    use_vmap: bool = False, device: torch.device | str = "cpu", config: Any = None, **_: Any,
) -> bool:  # fmt: skip
    """Whether a mask with these arguments of `sdpa_mask` is causal and aligned at the lower right, and nothing else.

    It is asked on the host alone: a padding mask may say nothing, but only the device knows; and a static cache has a
    length that is a tensor. Without earlier tokens, or of one token, `sdpa_mask` gives none by itself.
    """
    if torch.compiler.is_compiling() or not isinstance(q_offset, int):
        return False
    is_behind = q_length > 1 and q_offset > 0 and kv_offset == 0 and kv_length == q_offset + q_length
    is_plain = mask_function is causal_mask_function and local_size is None and allow_is_causal_skip and not use_vmap
    if not is_behind or not is_plain or attention_mask is not None:
        return False
    if getattr(config, "alibi", False):  # Falcon adds its bias to the mask
        return False
    return knows_lower_right(torch.device(device))


def is_lower_right(attention_mask: Tensor | None) -> bool:
    """Whether a mask is the one of no heads that `chunk_mask` makes."""
    return attention_mask is not None and attention_mask.dim() == 4 and attention_mask.shape[1] == 0


def written_out(attention_mask: Tensor) -> Tensor:
    """`[B, 1, T, length]` bool, True attends: what a mask of no heads, `[B, 0, T, length]`, stands for."""
    batch, _, count, length = attention_mask.shape
    mask = torch.ones(count, length, dtype=torch.bool, device=attention_mask.device).tril_(length - count)
    return mask.expand(batch, 1, -1, -1)


def attend_lower_right(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, dropout: float, autocast: torch.dtype | None
) -> Tensor:
    """Attention of the last T of `length` tokens, each to itself and those before it.

    Flash attention reads a KV head for its whole group. Where it cannot serve (float32, wide heads, an old GPU) keys
    and values are repeated, as transformers does beside a mask: PyTorch's other kernels take no groups.

    Args:
        query: `[B, HQ, T, D]`.
        key: `[B, HKV, length, D]`.
        value: `[B, HKV, length, DV]`.
        scaling: Of the logits.
        dropout: Share of weights that are left out, in training.
        autocast: Dtype that autocast would cast to, or None: PyTorch's class for the alignment goes around autocast.

    Returns:
        `[B, T, HQ, DV]`.
    """
    if autocast is not None:
        query, key, value = (t if t.dtype == torch.float64 else t.to(autocast) for t in (query, key, value))
    group = query.shape[1] // key.shape[1]
    if group > 1 and not _takes_groups(query, key, value, dropout):
        key, value, group = repeat_kv(key, group), repeat_kv(value, group), 1
    bias = causal_lower_right(query.shape[2], key.shape[2])
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling, enable_gqa=group > 1
    )
    return output.transpose(1, 2).contiguous()


def _takes_groups(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether flash attention serves, which is what the class for the alignment asks before it calls it."""
    return can_use_flash_attention(SDPAParams(query, key, value, None, dropout, False, True))

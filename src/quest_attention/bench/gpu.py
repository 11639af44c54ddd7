"""The GPU that a benchmark needs."""

from __future__ import annotations

import torch

from quest_attention.errors import BackendError
from quest_attention.ops import resolve_backend

__all__ = ["check_gpu"]


def check_gpu() -> None:
    """Whether the Triton kernels run on a GPU of this machine.

    Raises:
        BackendError: They do not.
    """
    if not torch.cuda.is_available():
        raise BackendError("device: got none that PyTorch can use, expected an NVIDIA GPU")
    chosen = resolve_backend("auto", "cuda")
    if chosen.name != "triton":
        raise BackendError(f"backend: got {chosen.name} ({chosen.reason}), expected the Triton kernels")

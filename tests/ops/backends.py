"""Every backend that runs on a CPU, as parameters of tests."""

from __future__ import annotations

import pytest
import torch

from quest_attention.config import Backend
from quest_attention.ops import resolve_backend

__all__ = ["BACKENDS", "FAST_BACKENDS", "available", "interpreted"]

interpreted = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
"""For tests of kernels: the interpreter computes in NumPy, which warns of what a GPU takes in its stride."""

FAST_BACKENDS = ["torch", pytest.param("triton", marks=interpreted)]
BACKENDS = ["reference", *FAST_BACKENDS]


def available(backend: Backend) -> Backend:
    """The backend, or a skip where it cannot run or other tests run it."""
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is for Linux")
        if torch.cuda.is_available():
            pytest.skip("tests/gpu runs the kernels on the GPU")
        resolve_backend(backend, "cpu")  # conftest turned the interpreter on
    return backend

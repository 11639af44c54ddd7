"""Capturing CUDA graphs, in transformers and in vLLM."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["capturing"]


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """Capture what runs inside, as `torch.cuda.graph` does, while Python collects no cycles.

    A cycle may hold an earlier graph, or memory of the host that a GPU reads. Freeing either of them while a stream is
    captured is not permitted, and ends the capture. Whether cycles are collected is the process's, so one captures at a
    time.

    Args:
        graph: Takes the launches.
        options: Of `torch.cuda.graph`.
    """
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    finally:
        if was_collecting:
            gc.enable()

"""`Outgoing`: copies to host memory that run beside what a device computes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Outgoing"]


class Outgoing:
    """The copies of one storage, in order: what reads it calls `wait` first.

    On a GPU they have a stream of their own, shared by all storages, so that a prompt's next layer computes meanwhile.
    On a CPU a copy is done when `send` returns.
    """

    def __init__(self) -> None:
        self._sent: torch.cuda.Event | None = None

    def send(self, copy: Callable[[], None], *tensors: Tensor) -> None:
        """Start a copy of tensors that the device computes.

        Args:
            copy: Makes it.
            *tensors: What it reads; nobody may write to them afterwards.
        """
        device = tensors[0].device
        if device.type != "cuda":
            copy()
            return
        stream = _stream_of(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            copy()
        for tensor in tensors:  # else their memory would be given to others before the copy has read it
            tensor.record_stream(stream)
        self._sent = stream.record_event()

    def wait(self) -> None:
        """Have what the device does next find everything that was sent."""
        if self._sent is not None:
            self._sent.wait()
            self._sent = None


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

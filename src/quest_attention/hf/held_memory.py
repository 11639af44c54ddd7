"""`HeldMemory`: what a cache holds, by where it lies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

__all__ = ["HeldMemory", "bytes_of"]

_MIB = 1 << 20


class HeldMemory(NamedTuple):
    """Memory that keys, values and metadata take, with the room that is left for more of them.

    Attributes:
        host: In host memory beside a device, for which `offload="host"` asks [bytes].
        device: On the device that attends: where that is a CPU, in its memory too [bytes].
    """

    host: int
    device: int

    @classmethod
    def total(cls, parts: Iterable[HeldMemory]) -> HeldMemory:
        """Of several layers together."""
        return cls(*map(sum, zip((0, 0), *parts, strict=True)))

    def summary(self) -> str:
        """A line for people."""
        return f"{self.host / _MIB:,.1f} MiB in host memory, {self.device / _MIB:,.1f} MiB on the device"


def bytes_of(*tensors: Tensor | None) -> int:
    """Of tensors together, whose memory is their own; None has none [bytes]."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

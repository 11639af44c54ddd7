"""Memory of the host that a GPU reads and writes in place, and how much of it is free."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import warnings
import weakref
from pathlib import Path

import torch
from torch import Tensor

from quest_attention.errors import BackendError, QuestWarning

__all__ = ["free_device_bytes", "free_host_bytes", "host_empty", "in_huge_pages"]

_MEMORY_OF_LINUX = Path("/proc/meminfo")
_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
_STAT = Path("/sys/fs/cgroup/memory.stat")
_KIBIBYTE = 1024
_PORTABLE, _MAPPED = 1, 2
"""Flags of `cudaHostRegister`: for all devices, and at an address that kernels reach."""


_waiting: list[tuple[Tensor, torch.device]] = []
"""Memory that nobody has any more and that is locked still."""
_locked: list[Tensor] = []
"""Memory that could not be unlocked, so that it must not be given back."""


class _Mapped:
    """Registered memory of the host as the array interface of CUDA shows it: bytes."""

    def __init__(self, memory: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (memory.numel(),), "typestr": "|u1", "data": (memory.data_ptr(), False), "version": 3,
        }  # fmt: skip


def host_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor in the host's memory that operations of a device take for one of its own.

    On a GPU it is a CUDA tensor over page-locked memory of the host, mapped into the device's addresses: kernels,
    PyTorch's and Triton's, read and write it over the bus, in CUDA graphs too, and no copy of it lies on the card.
    PyTorch's own pinned memory is not taken, since its allocator rounds sizes up to powers of two. On a CPU it is a
    tensor like any other.

    Args:
        shape: Of the tensor.
        dtype: Likewise.
        device: Whose operations it is for.

    Raises:
        BackendError: The host's memory cannot be allocated, locked or mapped.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cuda" or size == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = in_huge_pages(size)
    with torch.cuda.device(device):
        status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, _PORTABLE | _MAPPED)
        if int(status) != 0:
            raise BackendError(f"offload: cannot lock {size} bytes of host memory for {device}: CUDA says {status}")
        mapped = _Mapped(memory)
        weakref.finalize(mapped, _release, memory, device).atexit = False
        seen = torch.as_tensor(mapped, device=device)
    if seen.data_ptr() != memory.data_ptr():  # another address would be a copy
        raise BackendError(f"offload: {device} has another address for locked host memory, expected the host's own")
    return seen.view(dtype).view(shape)


def in_huge_pages(size: int) -> Tensor:
    """So many bytes, `[size]` uint8 zeros, in huge pages where Linux has some: locking takes a while for each page.

    Raises:
        BackendError: The host does not give so many.
    """
    try:
        if size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.zeros(size, dtype=torch.uint8)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, RuntimeError) as error:  # RuntimeError is PyTorch's
        raise BackendError(f"offload: cannot allocate {size} bytes of host memory: {error}") from None
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _release(memory: Tensor, device: torch.device) -> None:
    """Unlock the memory once nobody has the tensor: when the device has read what it was told to."""
    _waiting.append((memory, device))
    if torch.cuda.is_current_stream_capturing():  # which forbids to wait; the next one's turn is this one's too
        return
    while _waiting:
        kept, where = _waiting.pop()
        torch.cuda.synchronize(where)
        status = int(torch.cuda.cudart().cudaHostUnregister(kept.data_ptr()))
        if status != 0:
            _locked.append(kept)
            warnings.warn(
                f"offload: {kept.numel()} bytes of the host stay locked: CUDA says {status}", QuestWarning, stacklevel=2
            )


def free_host_bytes() -> int:
    """Memory of the host that can be allocated, within the limit of a container [bytes]."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _MEMORY_OF_LINUX.exists():
        lines = dict(line.split(":") for line in _MEMORY_OF_LINUX.read_text().splitlines())
        if "MemAvailable" in lines:  # counts what the kernel caches and would give back
            free = int(lines["MemAvailable"].split()[0]) * _KIBIBYTE
    if _LIMIT.exists() and _USED.exists():
        limit = _LIMIT.read_text().strip()
        if limit.isdigit():
            free = min(free, max(0, int(limit) - int(_USED.read_text()) + _cached_bytes()))
    return free


def _cached_bytes() -> int:
    """Of what a container has used, files that the kernel caches and would give back, of weights, say [bytes]."""
    lines = _STAT.read_text().splitlines() if _STAT.exists() else []
    return int(dict(line.split() for line in lines).get("inactive_file", 0))


def free_device_bytes(device: torch.device) -> int:
    """Memory that PyTorch can allocate on a device, what it has cached included [bytes]; of a CPU the host's."""
    if device.type != "cuda":
        return free_host_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

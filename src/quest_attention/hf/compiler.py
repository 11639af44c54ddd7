"""What `torch.compile` leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["kept_from_compilers"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def kept_from_compilers(function: _Function) -> _Function:
    """A function that runs as it is where its caller is compiled; PyTorch's own decorator hides its signature."""
    reason = "Quest writes its cache in place and counts on the host: do not ask for fullgraph=True"
    return cast("_Function", torch.compiler.disable(function, reason=reason))

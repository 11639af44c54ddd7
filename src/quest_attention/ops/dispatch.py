"""Which implementation of the verbs runs: `auto` chooses and says why, a named backend works or raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from quest_attention.config import Backend, QuestConfig, device_type
from quest_attention.errors import BackendError, QuestValueError
from quest_attention.forms import MetadataForm
from quest_attention.ops import candidates, reference_backend, torch_backend
from quest_attention.ops.hot_units import HotUnits
from quest_attention.ops.query_tokens import QueryTokens
from quest_attention.ops.selection import DecodeWorkspace, Selection, Workspace
from quest_attention.ops.step import Rows, Step
from quest_attention.pages import PagedKV

__all__ = ["ResolvedBackend", "Verbs", "resolve_backend"]

_WHY_TRITON = (
    "the Triton kernels, a decode step in one launch, over single tokens in four or six, or in more where it has a "
    "mask or both its context and its budget are very large"
)
"""True of every problem: which of the two it is, only a problem says (`ops.triton.tuning.tune`)."""


class Verbs(Protocol):
    """What a backend offers: the verbs, checked arguments given. `ops` documents them."""

    def update_page_metadata(self, kv: PagedKV, seq_lens: Tensor | int, num_new_tokens: Tensor | int) -> None: ...

    def append_token(self, kv: PagedKV, keys: Tensor, values: Tensor, seq_lens: Tensor) -> None: ...

    def append_slots(self, kv: PagedKV, keys: Tensor, values: Tensor, slots: Tensor) -> None: ...

    def update_slot_metadata(
        self, metadata: Tensor, keys: Tensor, slots: Tensor, page_size: int, form: MetadataForm
    ) -> None: ...

    def score_pages(self, step: Step, out: Tensor | None = None) -> Tensor: ...

    def select_pages(self, rows: Rows, scores: Tensor) -> Selection: ...

    def sparse_decode_attention(
        self, step: Step, selected: Selection, *, return_lse: bool = False, is_own: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`is_own`: the selection is what `select_pages` gave for these very rows, so nobody need look."""
        ...

    def fetch_units(
        self, kv: PagedKV, hot: HotUnits, units: Tensor, seq_lens: Tensor | int, *, is_again: bool = False,
        keys_only: bool = False,
    ) -> None:  # fmt: skip
        """`is_again`: of the same step as the fetch before, whose units are not counted as looked up again.

        `keys_only`: for those who read no values. A later fetch without it brings the values of what is there.
        """
        ...

    def count_reads(self, selected: Selection, seq_lens: Tensor, counters: Tensor, token_budget: int) -> None: ...


class ResolvedBackend(NamedTuple):
    """A backend that will run.

    Attributes:
        name: `"torch"`, `"triton"` or `"reference"`.
        reason: Why this one, as a sentence for `quest env` and logs.
        verbs: The implementation.
        fused: The decode step as a whole, where the backend has a way that is faster than its verbs one after the
            other, as in one launch; it gives None for what that cannot hold, a pool of hot units perhaps.
        choose: Likewise its choice alone, for those who attend in a way of their own.
        query_tokens: How several query tokens of a sequence become those of one group, and attend.
        make_workspace: Allocates scratch memory for decode steps of a shape.
    """

    name: str
    reason: str
    verbs: Verbs
    fused: Callable[[Step], tuple[Tensor, Selection] | None] | None
    choose: Callable[[Step], Selection | None] | None
    query_tokens: type[QueryTokens]
    make_workspace: Callable[[PagedKV, int, QuestConfig, Iterable[int] | None], Workspace | None]


def resolve_backend(name: Backend, device: torch.device | str, dtype: torch.dtype | None = None) -> ResolvedBackend:
    """Find the implementation of the verbs for a device.

    Args:
        name: Which; `"auto"` takes what is fastest among those that can run.
        device: Where the cache is.
        dtype: Of the keys, for which `"auto"` looks too; None where it is not known, and then it is taken for one that
            every backend computes in. A backend that is named refuses, when it runs, keys that it does not compute in.

    Raises:
        QuestValueError: The name is unknown, or there is no such device.
        BackendError: The backend exists but cannot run on this device or in this installation.

    >>> resolve_backend("auto", "cpu").name
    'torch'
    """
    kind = device.type if isinstance(device, torch.device) else device_type(device)
    if name == "torch":
        return _torch("asked for by name")
    if name == "reference":
        reason = "asked for by name: the oracle, far too slow to serve"
        make = DecodeWorkspace.for_cache
        return ResolvedBackend("reference", reason, reference_backend, None, None, QueryTokens, make)
    if name == "triton":
        missing = _why_no_triton(kind)
        if missing is not None:
            raise BackendError(f"backend: got 'triton', expected 'auto' or 'torch' here: {missing}")
        return _triton("asked for by name")
    if name == "auto":
        if kind == "cpu":
            return _torch("chosen for device cpu: plain PyTorch is the fast path on a CPU")
        missing = _why_no_triton(kind, dtype)
        if missing is not None:
            return _torch(f"chosen for device {kind}: {missing}")
        return _triton(f"chosen for device {kind}: {_WHY_TRITON}")
    raise QuestValueError("backend", name, f"one of {', '.join(get_args(Backend))}")


@cache
def _torch(reason: str) -> ResolvedBackend:
    fused, make = candidates.quest_decode, DecodeWorkspace.for_cache
    return ResolvedBackend("torch", reason, torch_backend, fused, None, QueryTokens, make)


@cache  # or an import is looked up at every step
def _triton(reason: str) -> ResolvedBackend:
    from quest_attention.ops import triton as backend

    fused, choose, make = backend.quest_decode, backend.choose_tokens, backend.make_workspace
    return ResolvedBackend("triton", reason, backend, fused, choose, backend.TritonQueryTokens, make)


@cache
def _why_no_triton(kind: str, dtype: torch.dtype | None = None) -> str | None:
    """What keeps the Triton kernels from a kind of device, or from keys of a dtype; or None."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    from quest_attention.ops.triton.launch import KERNEL_DTYPES, is_interpreted

    if dtype is not None and dtype not in KERNEL_DTYPES:
        return f"the Triton kernels do not compute in {dtype}"
    interpreted = is_interpreted()
    if kind == "cuda" and torch.version.hip is None:
        return "TRITON_INTERPRET=1 is set, which is for tests on a CPU" if interpreted else None
    if kind == "cpu" and interpreted:
        return None
    return f"the Triton kernels are written for NVIDIA GPUs, not for device {kind}"

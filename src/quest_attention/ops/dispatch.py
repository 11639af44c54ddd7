"""Which implementation of the verbs runs: `auto` chooses and says why, a named backend works or raises."""

from __future__ import annotations

from typing import NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from quest_attention.config import Backend, GroupReduction
from quest_attention.errors import BackendError, QuestValueError
from quest_attention.ops import reference_backend, torch_backend
from quest_attention.ops.selection import DecodeWorkspace, Selection
from quest_attention.pages import PagedKV

__all__ = ["ResolvedBackend", "Verbs", "resolve_backend"]


class Verbs(Protocol):
    """What a backend offers: the four verbs, checked arguments given. `ops` documents them."""

    def update_page_metadata(self, kv: PagedKV, seq_lens: Tensor | int, num_new_tokens: Tensor | int) -> None: ...

    def score_pages(
        self,
        query: Tensor,
        kv: PagedKV,
        seq_lens: Tensor | int,
        token_mask: Tensor | None = None,
        group_reduction: GroupReduction = "max",
        out: Tensor | None = None,
    ) -> Tensor: ...

    def select_pages(
        self,
        scores: Tensor,
        seq_lens: Tensor | int,
        page_size: int,
        token_budget: int,
        num_sink_pages: int = 0,
        num_recent_pages: int = 1,
        token_mask: Tensor | None = None,
        workspace: DecodeWorkspace | None = None,
    ) -> Selection: ...

    def sparse_decode_attention(
        self,
        query: Tensor,
        kv: PagedKV,
        seq_lens: Tensor | int,
        selected: Selection,
        sm_scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        token_mask: Tensor | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]: ...


class ResolvedBackend(NamedTuple):
    """A backend that will run.

    Attributes:
        name: `"torch"`, `"reference"` or, once there, `"triton"`.
        reason: Why this one, as a sentence for `quest env` and logs.
        verbs: The implementation.
    """

    name: str
    reason: str
    verbs: Verbs


def resolve_backend(name: Backend, device: torch.device | str) -> ResolvedBackend:
    """Find the implementation of the verbs for a device.

    Raises:
        QuestValueError: The name is unknown.
        BackendError: The backend exists but cannot run on this device or in this version.

    >>> resolve_backend("auto", "cpu").name
    'torch'
    """
    kind = torch.device(device).type
    if name == "torch":
        return ResolvedBackend("torch", "asked for by name", torch_backend)
    if name == "reference":
        return ResolvedBackend("reference", "asked for by name: the oracle, far too slow to serve", reference_backend)
    if name == "triton":
        raise BackendError("backend: got 'triton', expected 'auto' or 'torch': this version has no Triton kernels yet")
    if name == "auto":
        why = "plain PyTorch is the fast path on a CPU" if kind == "cpu" else "this version has no Triton kernels yet"
        return ResolvedBackend("torch", f"chosen for device {kind}: {why}", torch_backend)
    raise QuestValueError("backend", name, f"one of {', '.join(get_args(Backend))}")

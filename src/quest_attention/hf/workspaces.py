"""`Workspaces`: scratch memory for the decode steps of one cache."""

from __future__ import annotations

import torch

from quest_attention.config import QuestConfig
from quest_attention.ops import Workspace, make_workspace
from quest_attention.pages import PagedKV

__all__ = ["Workspaces"]


class Workspaces:
    """Scratch memory that the layers of one cache share, since they run one after the other."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], tuple[tuple[int, int], Workspace | None]] = {}

    def get(self, kv: PagedKV, num_query_heads: int, config: QuestConfig) -> Workspace | None:
        """The workspace for a cache of this shape, made at its first use; None where the backend needs none.

        Layers grow one after the other, and all to the same size. So memory for the new size is made once and takes the
        place of that for the old one, which those keep that still need it.
        """
        heads = (kv.keys.device, kv.keys.dtype, num_query_heads, kv.num_kv_heads, kv.head_dim, kv.values.shape[-1])
        size = (kv.batch_size, kv.max_pages)
        if heads not in self._made or self._made[heads][0] != size:
            # What is made under inference mode could not be written outside of it, by the next turn of a conversation.
            with torch.inference_mode(False):
                self._made[heads] = size, make_workspace(kv, num_query_heads, config)
        return self._made[heads][1]

"""`Workspaces`: scratch memory of a worker's decode steps, one piece for batches of every size."""

from __future__ import annotations

from quest_attention.config import QuestConfig
from quest_attention.ops import Workspace, make_workspace
from quest_attention.pages import PagedKV

__all__ = ["Workspaces"]


class Workspaces:
    """Made at the first step and kept: captured graphs hold its address. Layers run one after the other and share it.

    Args:
        most: Sequences of the largest batch, the padding of a captured one included.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: dict[tuple[object, ...], Workspace | None] = {}

    def get(self, kv: PagedKV, num_query_heads: int, config: QuestConfig) -> Workspace | None:
        """Memory for a step; None where the step takes its own, as the single verbs do."""
        key = (num_query_heads, kv.num_kv_heads, kv.max_pages, kv.head_dim, str(kv.keys.device))
        if key not in self._made:
            self._made[key] = make_workspace(kv, num_query_heads, config, batch_sizes=range(1, self._most + 1))
        made = self._made[key]
        return made if made is not None and made.fits(kv, num_query_heads, config) else None

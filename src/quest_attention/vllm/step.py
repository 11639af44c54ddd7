"""`QuestStep`: the rows of a batch that run Quest, the same for all layers of an engine step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.ops import Workspace
from quest_attention.serving.counters import StepCounters

__all__ = ["QuestStep"]


@dataclass
class QuestStep:
    """What an engine step asks of Quest.

    Attributes:
        config: With the size of the blocks that a worker sees as page size.
        counters: Where this worker counts.
        counted_layer: Name of the layer that counts for all.
        lengths: Of decode rows, as the host knows them; an upper bound while tokens are speculated [tokens].
        num_rows: Decode rows that run Quest, R: all of them as soon as one is past the budget, else none. They come
            first in the batch, one token each.
        seq_lens: `[R]` int32, the token of this step included; 0 in rows that only pad a captured batch [tokens].
        block_table: `[R, P]` int32, vLLM's name for a page table.
        rest: Stock metadata of the rows behind, or None.
        folded: On a CPU, stock metadata of the rows folded over KV heads, all but the table.
        workspace: On a GPU, scratch memory of the worker's steps; None where a step takes its own.
    """

    config: QuestConfig
    counters: StepCounters
    counted_layer: str
    lengths: list[int]
    num_rows: int
    seq_lens: Tensor
    block_table: Tensor
    rest: Any = None
    folded: Any = None
    workspace: Workspace | None = None

"""`QuestStep`: the rows of a batch that run Quest, the same for all layers of an engine step; `Part`: some of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.ops import Selection, Workspace
from quest_attention.serving.counters import StepCounters
from quest_attention.vllm.row_tokens import RowTokens

__all__ = ["Part", "QuestStep", "steps_of"]


@dataclass
class QuestStep:
    """What an engine step asks of Quest.

    Attributes:
        config: With the size of the blocks that a worker sees as page size.
        counters: Where this worker counts.
        counted_layer: Name of the layer that counts for all.
        lengths: Of decode rows, of one token each, as the host knows them; an upper bound while tokens are speculated
            [tokens].
        num_rows: Rows that run Quest, R: all of those that may as soon as one is past the budget, else none. They come
            first in the batch. Decode rows may; rows that check speculated tokens where the server asks for it.
        seq_lens: `[R]` int32, the tokens of this step included; 0 in rows that only pad a captured batch [tokens].
        block_table: `[R, P]` int32, vLLM's name for a page table.
        checked: Lengths of the rows that check tokens and may run Quest, as `lengths`.
        tokens: Where the tokens of the rows lie; None where each has one.
        rest: Stock metadata of the rows behind, or None.
        folded: On a CPU, stock metadata of the rows folded over KV heads, all but the table.
        workspace: On a GPU, scratch memory of the worker's steps; None where a step takes its own.
        parts: The rows by how they are read, where requests ask for budgets of their own; else empty.
    """

    config: QuestConfig
    counters: StepCounters
    counted_layer: str
    lengths: list[int]
    num_rows: int
    seq_lens: Tensor
    block_table: Tensor
    checked: list[int] = field(default_factory=list)
    tokens: RowTokens | None = None
    rest: Any = None
    folded: Any = None
    workspace: Workspace | None = None
    parts: list[Part] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Of the rows that run Quest, N, which come first in the batch [tokens]."""
        return self.num_rows if self.tokens is None else self.tokens.count

    def count(self, selected: Selection) -> None:
        """Count what its rows read."""
        most, is_single = (1, None) if self.tokens is None else (self.tokens.most, self.tokens.with_one())
        self.counters.count_quest(selected, self.seq_lens, self.config.token_budget, most, is_single)


@dataclass
class Part:
    """Rows of a step that are read alike.

    Attributes:
        where: Their tokens in the batch, `[n]` int64 on the device.
        step: What they ask of Quest; None where they are read whole.
        stock: Where they are, stock metadata of these rows.
        lengths: Of those of one token, as the host knows them [tokens].
        checked: Of the others, likewise.
    """

    where: Tensor
    step: QuestStep | None
    stock: Any
    lengths: list[int]
    checked: list[int]


def steps_of(step: QuestStep) -> list[QuestStep]:
    """What runs Quest in a step: itself, or of its parts those that are not read whole."""
    return [part.step for part in step.parts if part.step is not None] if step.parts else [step]

"""`Method` and `Session`: a way to read the KV cache, and one sequence under it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from quest_attention.eval.context import Context

__all__ = ["LayerReads", "Method", "Session"]


@dataclass(frozen=True)
class LayerReads:
    """What the decode steps of one layer read since the counts were reset, per KV head and sequence.

    Attributes:
        layer: Index in the model.
        is_sparse: Whether the method read less than everything here.
        steps: Decode steps counted [steps].
        tokens_read: Summed over the steps [tokens].
        tokens_held: What reading everything would have read [tokens].
    """

    layer: int
    is_sparse: bool
    steps: int
    tokens_read: int
    tokens_held: int


class Session(ABC):
    """Sequences of one length under one method: their cache, and what has been read of it.

    Attributes:
        cache: Pass it to the model or to `generate()` by `hf.cache_argument`.
    """

    cache: Cache

    @abstractmethod
    def load(self, context: Context) -> None:
        """Take over a context that was read once for all methods, as if this session had read it.

        Raises:
            QuestValueError: The method needs to know what the context attended to, and nobody looked.
        """

    @abstractmethod
    def reset_counts(self) -> None:
        """Count reads from here on."""

    @abstractmethod
    def reads(self) -> list[LayerReads]:
        """What decode steps have read since `reset_counts`, for each layer whose attention is full."""


class Method(ABC):
    """A way to read the KV cache.

    Attributes:
        name: As tables show it.
        summary: One line that says what it reads, for people.
        token_budget: Most tokens a step reads in a layer that may choose; None reads everything [tokens].
        num_dense_layers: Leading full-attention layers that read everything whoever reads; None leaves it to the plan.
        unit: Tokens of what it selects at each step: a page, a token; None where it selects nothing [tokens].
        observes: Whether it has to know what the tokens of the context attended to.
    """

    name: str
    summary: str
    token_budget: int | None = None
    num_dense_layers: int | None = None
    unit: int | None = None
    observes: bool = False

    @abstractmethod
    def session(self, model: PreTrainedModel, max_length: int | None = None) -> AbstractContextManager[Session]:
        """A context manager that gives a `Session`; the model is as it was when it ends.

        Args:
            model: In evaluation mode.
            max_length: Tokens of a sequence to make room for at once, where that is known and worth it [tokens].
        """

"""`Quest`: this library, as it serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from quest_attention.config import QuestConfig
from quest_attention.eval.context import Context, copy_cache
from quest_attention.eval.methods.method import LayerReads, Method, Session
from quest_attention.hf import OnSelect, QuestHandle, QuestLayer, enable_quest

__all__ = ["Quest", "QuestSession"]


class Quest(Method):
    """The pages whose bounds promise the largest logits.

    Args:
        config: What a step reads.
        on_select: Called after each sparse step of a layer.
        cuda_graphs: See `enable_quest`. Off by default: a graph is captured anew for each session, which takes longer
            than the steps of a short answer.
    """

    name = "quest"
    summary = "reads the pages that matter to the query"

    def __init__(
        self, config: QuestConfig, on_select: OnSelect | None = None, *, cuda_graphs: bool | None = False
    ) -> None:
        self.config = config
        self.cuda_graphs = cuda_graphs
        self.token_budget = config.token_budget
        self.num_dense_layers = config.num_dense_layers
        self.unit = config.unit_size
        self.on_select = on_select

    @contextmanager
    def session(self, model: PreTrainedModel, max_length: int | None = None) -> Iterator[Session]:
        """See `Method.session`. Raises what `enable_quest` raises."""
        with enable_quest(model, self.config, on_select=self.on_select, cuda_graphs=self.cuda_graphs) as handle:
            yield self.open(handle, max_length)

    def open(self, handle: QuestHandle, max_length: int | None) -> QuestSession:
        """The session on a model that Quest is enabled on."""
        return QuestSession(handle, max_length)


class QuestSession(Session):
    """A session whose counts are Quest's own counters: whole units, the one being written included."""

    def __init__(self, handle: QuestHandle, max_length: int | None) -> None:
        self._handle = handle
        self.cache = handle.make_cache(max_length)

    def load(self, context: Context) -> None:
        """See `Session.load`."""
        copy_cache(context.cache, self.cache)
        self.reset_counts()

    def reset_counts(self) -> None:
        """See `Session.reset_counts`."""
        self._handle.counters.reset()

    def reads(self) -> list[LayerReads]:
        """See `Session.reads`."""
        keys = [layer.keys for layer in self.cache.layers if isinstance(layer, QuestLayer) and layer.keys is not None]
        sequences = keys[0].shape[0] if keys else 1  # counters sum over sequences, which read alike: all are as long
        return [
            LayerReads(
                counter.layer,
                counter.sparse_steps > 0,
                counter.sparse_steps + counter.dense_steps,
                counter.tokens_read // sequences,
                counter.tokens_held // sequences,
            )
            for counter in self._handle.counters.layers
            if counter.kind in {"quest", "dense"}
        ]

"""`Full`: every layer reads everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from quest_attention.eval.context import Context, copy_cache
from quest_attention.eval.methods.method import LayerReads, Method, Session

__all__ = ["Full"]


class Full(Method):
    """Every layer reads everything: transformers as it comes, `DynamicCache` and the model's own attention."""

    name = "full"
    summary = "reads everything"

    @contextmanager
    def session(self, model: PreTrainedModel, max_length: int | None = None) -> Iterator[Session]:
        """See `Method.session`."""
        del max_length  # transformers' storage has no room ahead
        yield _FullSession(DynamicCache(config=model.config))


class _FullSession(Session):
    cache: DynamicCache

    def __init__(self, cache: DynamicCache) -> None:
        self.cache = cache
        self.reset_counts()

    def load(self, context: Context) -> None:
        """See `Session.load`."""
        copy_cache(context.cache, self.cache)
        self.reset_counts()

    def reset_counts(self) -> None:
        """See `Session.reset_counts`."""
        self._start = self.cache.get_seq_length()

    def reads(self) -> list[LayerReads]:
        """See `Session.reads`."""
        lengths = range(self._start + 1, self.cache.get_seq_length() + 1)
        total = sum(lengths)
        return [
            LayerReads(index, False, len(lengths), total, total)
            for index, layer in enumerate(self.cache.layers)
            if type(layer) is DynamicLayer
        ]

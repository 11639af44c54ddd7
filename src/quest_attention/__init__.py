"""Quest: long-context decoding that reads only the pages of the KV cache that matter to the query.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024, arXiv:2406.10774.

    with enable_quest(model, QuestConfig(token_budget=1024)) as quest:
        model.generate(...)
        print(quest.counters.summary())

Importing this package changes nothing, and does not import transformers before one of its names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quest_attention.config import QuestConfig
from quest_attention.errors import (
    BackendError,
    QuestError,
    QuestStateError,
    QuestValueError,
    QuestWarning,
    UnsupportedModelError,
)
from quest_attention.ops import (
    QuestOutput,
    Selection,
    quest_decode,
    score_pages,
    select_pages,
    sparse_decode_attention,
    update_page_metadata,
)
from quest_attention.pages import PagedKV

if TYPE_CHECKING:
    from quest_attention.hf import QuestCache, QuestCounters, QuestHandle, enable_quest

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "PagedKV",
    "QuestCache",
    "QuestConfig",
    "QuestCounters",
    "QuestError",
    "QuestHandle",
    "QuestOutput",
    "QuestStateError",
    "QuestValueError",
    "QuestWarning",
    "Selection",
    "UnsupportedModelError",
    "__version__",
    "enable_quest",
    "quest_decode",
    "score_pages",
    "select_pages",
    "sparse_decode_attention",
    "update_page_metadata",
]

_NEEDS_TRANSFORMERS = ("QuestCache", "QuestCounters", "QuestHandle", "enable_quest")


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TRANSFORMERS:
        return getattr(importlib.import_module("quest_attention.hf"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Quest: long-context decoding that reads only the pages of the KV cache that matter to the query.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024, arXiv:2406.10774.

    with enable_quest(model, QuestConfig(token_budget=1024)) as quest:
        model.generate(...)
        print(quest.counters.summary())

Importing this package changes nothing, and imports neither PyTorch nor transformers before a name that needs them is
used.
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

if TYPE_CHECKING:
    from quest_attention.hf import QuestCache, QuestCounters, QuestHandle, enable_quest
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

_HOMES = {
    "quest_attention.hf": ("QuestCache", "QuestCounters", "QuestHandle", "enable_quest"),
    "quest_attention.ops": (
        "QuestOutput",
        "Selection",
        "quest_decode",
        "score_pages",
        "select_pages",
        "sparse_decode_attention",
        "update_page_metadata",
    ),
    "quest_attention.pages": ("PagedKV",),
}
"""Names that are found at their first use, since their modules import PyTorch or transformers."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

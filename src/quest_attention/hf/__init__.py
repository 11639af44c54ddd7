"""Quest in transformers: `enable_quest` for a model, `QuestCache` for people who hold their cache themselves."""

from quest_attention.hf.cache import QuestCache, layer_kinds
from quest_attention.hf.counters import LayerCounter, QuestCounters
from quest_attention.hf.draft_counter import DraftCounter
from quest_attention.hf.enable import QuestHandle, enable_quest
from quest_attention.hf.layer import QuestLayer
from quest_attention.hf.naming import cache_argument
from quest_attention.hf.reporting import OnSelect

__all__ = [
    "DraftCounter",
    "LayerCounter",
    "OnSelect",
    "QuestCache",
    "QuestCounters",
    "QuestHandle",
    "QuestLayer",
    "cache_argument",
    "enable_quest",
    "layer_kinds",
]

"""A check of `num_dense_layers`: with too many of them a method would be full attention by another name."""

from __future__ import annotations

from transformers import PreTrainedModel

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestValueError
from quest_attention.eval.wording import counted
from quest_attention.hf import layer_kinds

__all__ = ["check_dense_layers"]


def check_dense_layers(model: PreTrainedModel, config: QuestConfig) -> None:
    """Refuse dense layers that leave none to choose in. A model without full attention is left to `enable_quest`.

    Raises:
        QuestValueError: As said.
    """
    kinds = list(layer_kinds(model.config, config).values())
    if "dense" in kinds and "quest" not in kinds:
        full = kinds.count("dense")
        is_all = full == model.config.get_text_config(decoder=True).num_hidden_layers
        layers = counted(full, "layer" if is_all else "full-attention layer")
        raise QuestValueError("num_dense_layers", config.num_dense_layers, f"less than the model's {layers}")

"""`Watch`: what is looked at before each forward pass of a model on which Quest is enabled."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.cache_utils import Cache

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestWarning
from quest_attention.hf.attention import refuse_attentions
from quest_attention.hf.cache import QuestCache
from quest_attention.hf.compiler import kept_from_compilers
from quest_attention.hf.configs import PrivateConfigs
from quest_attention.hf.naming import given_cache
from quest_attention.hf.reading import Reading

__all__ = ["Watch"]

_TOKENS = ("input_ids", "inputs_embeds")


class Watch:
    """A hook before each forward pass, which finds what would turn Quest off in silence, before anything is written.

    Args:
        model: The model, which calls the hook until `remove`.
        quest: What decode steps read.
        configs: The model's configurations, which name its attention.

    Attributes:
        has_warned: Whether it was said that steps run dense for want of a `QuestCache`: once is enough.
    """

    def __init__(self, model: Any, quest: QuestConfig, configs: PrivateConfigs) -> None:
        self.has_warned = False
        self._quest = quest
        self._configs = configs
        self._saying_nothing: StorageWeakRef | None = None  # a mask of ours without padding, whose slices come
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def remove(self) -> None:
        """Look no more."""
        self._hook.remove()

    def find_padding(self, arguments: dict[str, Any]) -> bool:
        """Whether the mask of a prompt says anything, asked once before its passes: the device has to be waited for.

        If not, they go without it, as each would have to ask anew; since 5.24 transformers does so by itself. The mask
        among the arguments becomes a copy by whose memory slices of it are known: its owner may write to the other one.

        Args:
            arguments: Of `generate()`, for the passes of its prompt; changed in place.
        """
        self._saying_nothing = None
        mask = arguments.get("attention_mask")
        if mask is None:
            return False
        if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(mask.all()):
            return True
        arguments["attention_mask"] = mask = mask.clone()
        self._saying_nothing = StorageWeakRef(mask.untyped_storage())
        return False

    @kept_from_compilers
    def _look(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a forward pass: its arguments without a mask that is known to say nothing, or None for as they are."""
        del model
        self._check(args, kwargs)
        mask, known = kwargs.get("attention_mask"), self._saying_nothing
        if known is None or not isinstance(mask, Tensor) or StorageWeakRef(mask.untyped_storage()) != known:
            return None
        return args, {**kwargs, "attention_mask": None}

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse or warn of what would turn Quest off.

        A model that is called without a cache makes one of transformers' own, which comes back with the next token.
        """
        self._configs.check_attention()
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = given_cache(given)
        tokens = next((given[name] for name in _TOKENS if given.get(name) is not None), None)  # [B, T] or [B, T, D]
        if not isinstance(cache, Cache) or not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return
        new = tokens.shape[1]
        if isinstance(cache, QuestCache):
            reading = cache.reading_of(new)
        else:
            reading = Reading.of(new, cache.get_seq_length() + new, self._quest.token_budget)
        if reading is not Reading.SPARSE:
            return
        if isinstance(cache, QuestCache):
            cache.expect_attention()
            if any(counter.kind == "quest" for counter in cache.counters.layers):
                for config in self._configs.read:
                    refuse_attentions(given, config)
        elif not self.has_warned and not any(hasattr(layer, "attend") for layer in cache.layers):  # of their own
            self.has_warned = True
            warnings.warn(
                f"the model was given a {type(cache).__name__}, which has no page metadata: every layer runs dense; "
                "pass a cache of the handle's make_cache() from the first token on",
                QuestWarning,
                stacklevel=7,
            )

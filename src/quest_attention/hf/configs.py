"""`PrivateConfigs`: a model's own copies of its configurations while Quest is enabled, and what becomes of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

from quest_attention.errors import QuestStateError
from quest_attention.hf.attention import EAGER_NAME, SDPA_NAME

__all__ = ["PrivateConfigs"]

_ATTENTION = "_attn_implementation_internal"  # where a configuration keeps the name of the attention function
_ABSENT = object()


class _Copied(NamedTuple):
    """A configuration that others may share, the model's own copy of it, and the copy's attributes at the start."""

    shared: PretrainedConfig
    private: PretrainedConfig
    at_start: dict[str, Any]


class PrivateConfigs:
    """Copies of a model's configurations that name Quest's attention.

    A configuration holds the name of the attention function, and models built from one share the object: so the model
    gets copies. What is changed in a copy meanwhile (`resize_token_embeddings` writes the size of the vocabulary) is
    the caller's, and `give_back` takes it over into the shared object, as if there had been no copy.

    Args:
        model: The model, which has its copies when this returns.
        attention: Name of the attention function for all of them.

    Attributes:
        read: The copies that say how the decoder runs: the model's, and that of its text where it has one.
    """

    def __init__(self, model: PreTrainedModel, attention: str) -> None:
        self._model = model
        self._modules: list[tuple[Any, PretrainedConfig]] = []
        memo: dict[int, Any] = {}  # one for all, so that a sub-configuration stays the one its parent holds
        copies: dict[int, tuple[PretrainedConfig, PretrainedConfig]] = {}
        module: Any
        for module in model.modules():
            shared = module.__dict__.get("config")
            if isinstance(shared, PretrainedConfig):
                self._modules.append((module, shared))
                module.config = copy.deepcopy(shared, memo)
                copies.update({id(pair[1]): pair for pair in _pairs(shared, module.config)})
        try:
            model.set_attn_implementation(attention)
        except BaseException:
            for module, shared in self._modules:
                module.config = shared
            raise
        # Copies stand for themselves in what is compared, so that each is compared once.
        kept = {key: private for key, (_, private) in copies.items()}
        self._copied = [
            _Copied(shared, private, copy.deepcopy(private.__dict__, dict(kept))) for shared, private in copies.values()
        ]
        self.read: tuple[Any, ...] = (model.config, model.config.get_text_config(decoder=True))
        self._names = tuple(config._attn_implementation for config in self.read)

    def check_attention(self) -> None:
        """Refuse to go on with an attention function other than Quest's.

        Raises:
            QuestStateError: Somebody set another.
        """
        for config, ours in zip(self.read, self._names, strict=True):
            if config._attn_implementation != ours:
                raise QuestStateError(
                    f"attn_implementation: set to {config._attn_implementation!r} while Quest is enabled, which would "
                    "turn Quest off: choose it before enable_quest(), whose dense steps then follow it, or disable() "
                    "the handle, which leaves it as you set it"
                )

    def give_back(self) -> None:
        """Let the model have its shared configurations again, with all that was changed but our attention's name."""
        shared_of = {id(copied.private): copied.shared for copied in self._copied}
        for shared, private, at_start in self._copied:
            for name in private.__dict__.keys() | at_start.keys():
                value = private.__dict__.get(name, _ABSENT)
                if _is_same(value, at_start.get(name, _ABSENT)):
                    continue
                if value is _ABSENT:
                    shared.__dict__.pop(name, None)
                else:
                    shared.__dict__[name] = shared_of.get(id(value), value)
        originals = {id(copied.shared) for copied in self._copied}
        own_name = getattr(self._modules[0][1], _ATTENTION)  # the model's, which is its own first module
        # Modules of the start, also those no longer in the model, and modules that came since.
        for module in [*(module for module, _ in self._modules), *self._model.modules()]:
            config: Any = module.__dict__.get("config")
            if not isinstance(config, PretrainedConfig):
                continue
            if id(config) in shared_of:
                module.config = config = shared_of[id(config)]
            for own, _ in _pairs(config, config):
                # Of the caller's making, perhaps copied from one of ours.
                if id(own) not in originals and getattr(own, _ATTENTION, None) in (SDPA_NAME, EAGER_NAME):
                    setattr(own, _ATTENTION, own_name)


def _pairs(shared: PretrainedConfig, private: PretrainedConfig) -> Iterator[tuple[PretrainedConfig, PretrainedConfig]]:
    """A configuration and those inside it, each with its copy."""
    yield shared, private
    for name, value in shared.__dict__.items():
        if isinstance(value, PretrainedConfig):
            yield from _pairs(value, private.__dict__[name])


def _is_same(first: Any, second: Any) -> bool:
    if first is second:
        return True
    # A configuration that equals another is still another object, which its owner will look for.
    return type(first) is type(second) and not isinstance(first, PretrainedConfig) and bool(first == second)

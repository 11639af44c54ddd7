"""`enable_quest`: make a model decode with Quest, and undo it."""

from __future__ import annotations

import copy
import inspect
import warnings
from types import TracebackType
from typing import Any, NoReturn, cast

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from quest_attention.config import QuestConfig
from quest_attention.errors import BackendError, QuestStateError, QuestValueError, QuestWarning, UnsupportedModelError
from quest_attention.hf.attention import EAGER_NAME, SDPA_NAME, register_attention
from quest_attention.hf.cache import QuestCache, layer_kinds
from quest_attention.hf.compiler import kept_from_compilers
from quest_attention.hf.counters import LayerCounter, QuestCounters
from quest_attention.hf.graph import DecodeGraphs
from quest_attention.hf.layer import OnSelect
from quest_attention.hf.naming import CACHE, given_cache
from quest_attention.hf.support import check_supported, needs_eager
from quest_attention.ops import resolve_backend

__all__ = ["QuestHandle", "enable_quest"]

_HANDLE = "_quest_handle"
_TOKENS = ("input_ids", "inputs_embeds")
_CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def enable_quest(
    model: PreTrainedModel,
    config: QuestConfig | None = None,
    *,
    on_select: OnSelect | None = None,
    cuda_graphs: bool | None = None,
) -> QuestHandle:
    """Make `model.generate()` and forward passes with a `QuestCache` decode with Quest.

    The model keeps its weights and code. Until the handle is closed it has a private copy of its configuration (so that
    models built from the same one are left alone), an attention function that Quest registers with transformers, and
    its `generate()` makes a `QuestCache` where it would make a `DynamicCache`.

    Args:
        model: Any supported model; docs/transformers.md has the families.
        config: What to read; the defaults of `QuestConfig` otherwise.
        on_select: Called after each sparse decode step of a layer as `on_select(layer, selection, num_pages)`.
        cuda_graphs: Whether decode steps past the budget replay CUDA graphs. None: where the model is on an NVIDIA GPU
            and the Triton kernels run, which is where launching kernels would take longer than running them. A step
            that a graph cannot hold (padding, say) runs eagerly; `handle.graphs` counts both, with reasons. A model
            that cannot be captured at all warns once and stays eager, or raises `QuestStateError` if True was given.

    Returns:
        A handle with counters. Use it in a `with` statement, or call `disable()`.

    Raises:
        UnsupportedModelError: Quest cannot serve the model; it is left as it was.
        QuestStateError: Quest is enabled on the model already.
        BackendError: The backend asked for cannot run on the model's device, or cuda_graphs=True has no GPU.

    Warns:
        QuestWarning: Every layer will run dense.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=64))
    >>> with enable_quest(model, QuestConfig(token_budget=32)) as quest:
    ...     _ = model.generate(torch.arange(64)[None], min_new_tokens=4, max_new_tokens=4, pad_token_id=0)
    ...     quest.counters.layers[2].sparse_steps
    3
    """
    if config is None:
        config = QuestConfig()
    if not isinstance(config, QuestConfig):
        raise QuestValueError("config", config, "a QuestConfig")
    check_supported(model, config)
    if getattr(model, _HANDLE, None) is not None:
        raise QuestStateError("Quest is enabled on this model already: call disable() on its handle first")
    backend = resolve_backend(config.backend, model.device)
    can_capture = model.device.type == "cuda" and backend.name == "triton"
    if cuda_graphs and not can_capture:
        raise BackendError(
            f"cuda_graphs: got True on device {model.device} with the {backend.name} backend, "
            "expected an NVIDIA GPU with the triton one"
        )
    capture = can_capture if cuda_graphs is None else cuda_graphs
    return QuestHandle(model, config, on_select, capture=capture, must_capture=bool(cuda_graphs))


class QuestHandle:
    """Quest on one model, until `disable()` or the end of the `with` statement.

    Attributes:
        model: The model.
        config: What decode steps read.
        counters: Steps and pages of every cache that `generate()` made since.
        graphs: Decode steps that replayed a CUDA graph, and why others did not; None without graphs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: QuestConfig,
        on_select: OnSelect | None,
        *,
        capture: bool = False,
        must_capture: bool = False,
    ) -> None:
        self.model = cast("Any", model)  # a module's attributes are Tensor or Module to a type checker
        self.config = config
        kinds = layer_kinds(model.config, config)
        self.counters = QuestCounters([LayerCounter(index, kind) for index, kind in kinds.items()])
        self._on_select = on_select
        name = EAGER_NAME if needs_eager(model) else SDPA_NAME
        register_attention()
        self._shared_configs = _give_private_configs(model)
        try:
            model.set_attn_implementation(name)
        except BaseException:
            self._restore_configs()
            raise
        self._make_cache = self.model._prepare_cache_for_generation
        self.model._prepare_cache_for_generation = self._prepare_cache_for_generation
        for method in _CONTINUOUS_BATCHING:
            setattr(model, method, _refuse_continuous_batching)
        self.graphs = DecodeGraphs(model, must_capture=must_capture) if capture else None
        self._had_forward = "forward" in model.__dict__  # some libraries put their own there
        self._own_forward = model.forward
        if self.graphs is not None:
            self.model.forward = self.graphs.wrap()
        self._has_warned = False
        self._names = tuple(inspect.signature(self._own_forward).parameters)
        self._watch = self.model.register_forward_pre_hook(self._watch_cache, with_kwargs=True)
        setattr(model, _HANDLE, self)

    def __enter__(self) -> QuestHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    @property
    def is_enabled(self) -> bool:
        """Whether the model decodes with Quest through this handle."""
        return getattr(self.model, _HANDLE, None) is self

    def disable(self) -> None:
        """Put the model back as it was. Does nothing the second time."""
        if not self.is_enabled:
            return
        if self.graphs is not None:
            if self._had_forward:
                self.model.forward = self._own_forward
            else:
                self.model.__dict__.pop("forward", None)
        self._watch.remove()
        for name in ("_prepare_cache_for_generation", *_CONTINUOUS_BATCHING, _HANDLE):
            self.model.__dict__.pop(name, None)  # what the class has comes to light again
        self._restore_configs()

    def make_cache(self, max_length: int | None = None) -> QuestCache:
        """A new cache for the model that counts in this handle's counters.

        Args:
            max_length: Tokens to make room for at once, where known [tokens].
        """
        return QuestCache(
            self.model.config, self.config, max_length=max_length, counters=self.counters, on_select=self._on_select
        )

    @kept_from_compilers
    def _watch_cache(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward pass: say once that a decode step past the budget runs dense for want of a `QuestCache`.

        A model that is called without a cache makes one of transformers' own, which comes back with the next token.
        """
        del model
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = given_cache(given)
        if self._has_warned or not isinstance(cache, Cache) or isinstance(cache, QuestCache):
            return
        tokens = next((given[name] for name in _TOKENS if given.get(name) is not None), None)  # [B, T] or [B, T, D]
        if not isinstance(tokens, Tensor) or tokens.dim() < 2 or tokens.shape[1] != 1:
            return
        if cache.get_seq_length() < self.config.token_budget:
            return
        if any(hasattr(layer, "attend") for layer in cache.layers):  # a `Reader`
            return
        self._has_warned = True
        warnings.warn(
            f"the model was given a {type(cache).__name__}, which has no page metadata: every layer runs dense; "
            "pass a cache of the handle's make_cache() from the first token on",
            QuestWarning,
            stacklevel=6,
        )

    def _restore_configs(self) -> None:
        for module, shared in self._shared_configs:
            module.config = shared

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Stands in for the method of `generate()` that makes the cache."""
        given = model_kwargs.get(CACHE)
        if given is not None:
            if isinstance(given, Cache) and not isinstance(given, QuestCache):
                self._has_warned = True
                _warn_dense(
                    f"was given a {type(given).__name__}, which has no page metadata; pass a QuestCache or none"
                )
        elif generation_config.use_cache is False:
            _warn_dense("was asked for use_cache=False")
        elif generation_config.cache_implementation is not None:
            raise QuestValueError(
                "cache_implementation", generation_config.cache_implementation, "None while Quest is enabled"
            )
        else:
            model_kwargs[CACHE] = self.make_cache(max_cache_length)
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()
            return
        self._make_cache(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)


def _warn_dense(why: str) -> None:
    warnings.warn(f"generate() {why}: every layer runs dense", QuestWarning, stacklevel=5)


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedModelError(
        "generate_batch: got a model with Quest, expected one without, whose paged cache knows only transformers' own "
        "attention: use generate(), or disable() Quest first"
    )


def _give_private_configs(model: PreTrainedModel) -> list[tuple[Any, PretrainedConfig]]:
    """Copy the model's configurations for itself; returns what each module had.

    A configuration holds the name of the attention function, and models built from one share the object.
    """
    memo: dict[int, Any] = {}  # one for all, so that a sub-configuration stays the one its parent holds
    had: list[tuple[Any, PretrainedConfig]] = []
    module: Any
    for module in model.modules():
        shared = module.__dict__.get("config")
        if isinstance(shared, PretrainedConfig):
            had.append((module, shared))
            module.config = copy.deepcopy(shared, memo)
    return had

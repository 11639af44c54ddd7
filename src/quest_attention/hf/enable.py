"""`enable_quest`: make a model decode with Quest, and undo it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, cast

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from quest_attention.config import QuestConfig
from quest_attention.errors import BackendError, QuestStateError, QuestValueError, QuestWarning
from quest_attention.hf import lower_right
from quest_attention.hf.attention import EAGER_NAME, SDPA_NAME, register_attention
from quest_attention.hf.cache import QuestCache, check_on_select, layer_kinds
from quest_attention.hf.cache_dtype import CacheDtype, check_cache_dtype, check_stored, stored_dtype
from quest_attention.hf.configs import PrivateConfigs
from quest_attention.hf.counters import LayerCounter, QuestCounters
from quest_attention.hf.draft_counter import DraftCounter
from quest_attention.hf.draft_length import DEFAULT_DRAFTS, MOST_DRAFTS, DraftTokens, check_draft_tokens
from quest_attention.hf.graph import DecodeGraphs
from quest_attention.hf.lossless import Lossless, check_can_draft
from quest_attention.hf.naming import CACHE
from quest_attention.hf.offload import CacheShape, Offload, OffloadTo
from quest_attention.hf.reporting import OnSelect
from quest_attention.hf.support import REFUSED_METHODS, check_supported, needs_eager
from quest_attention.hf.watch import Watch
from quest_attention.ops import check_backend, resolve_backend

__all__ = ["QuestHandle", "enable_quest"]

_HANDLE = "_quest_handle"
_ABSENT = object()


def enable_quest(
    model: PreTrainedModel, config: QuestConfig | None = None, *, on_select: OnSelect | None = None,
    cuda_graphs: bool | None = None, lossless: bool = False, draft_tokens: DraftTokens | None = None,
    offload: OffloadTo | None = None, hot_tokens: int | None = None, kv_cache_dtype: CacheDtype = "auto",
) -> QuestHandle:  # fmt: skip
    """Make `model.generate()` and forward passes with a `QuestCache` decode with Quest.

    The model keeps its weights and code. Until the handle is closed it has a private copy of its configuration (so that
    models built from the same one are left alone), an attention function that Quest registers with transformers, and
    its `generate()` makes a `QuestCache` where it would make a `DynamicCache`.

    Args:
        model: Any supported model; docs/transformers.md has the families.
        config: What to read; the defaults of `QuestConfig` otherwise. Metadata "auto" is resolved for the model's
            device, and the handle's `config` says what it is.
        on_select: Called after each sparse decode step of a layer as `on_select(layer, selection, num_pages)`.
        cuda_graphs: Whether decode steps past the budget replay CUDA graphs. None: where the model is on an NVIDIA GPU
            and the Triton kernels run, which is where launching kernels would take longer than running them. A step
            that a graph cannot hold (padding, say) runs eagerly; `handle.graphs` counts both, with reasons. A model
            that cannot be captured at all warns once and stays eager, or raises `QuestStateError` if True was given.
        lossless: Whether `generate()` writes what the model writes without Quest: sparse steps only draft tokens, a
            dense pass checks several at once, and what it refuses is taken back. Greedy decoding gives the same tokens,
            sampling tokens of the same distribution. Everything else reads the whole cache.
        draft_tokens: With `lossless`, tokens to draft before a check, 1 to 15, or "auto", as many as make most tokens a
            second; None is 4 [tokens]. Where drafting takes longer than it saves, nothing is drafted.
        offload: "host" keeps keys and values of the layers that choose in host memory, page-locked; on the GPU are
            their metadata, the dense layers and a pool of hot tokens. A step reads what it chose from the pool, to
            which what is missing is fetched. The text is the same, but for what the last bits of sums on a GPU change
            (docs/offload.md). For NVIDIA GPUs alone.
        hot_tokens: With `offload`, tokens of the pool for each sequence, layer and KV head; None is what half of the
            GPU's memory holds that is free at the first sparse step [tokens].
        kv_cache_dtype: In what keys and values are stored, by vLLM's names: "auto", in the dtype of the model, or
            "fp8", in 8 bits (e4m3, scale 1), on a GPU and on the host. All attention reads what is stored, a prompt's
            and dense layers' too, and metadata are of it; `lossless` then writes what the model writes with that cache.
            Layers that are left alone keep transformers' own.

    Returns:
        A handle with counters. Use it in a `with` statement, or call `disable()`.

    Raises:
        UnsupportedModelError: Quest cannot serve the model; it is left as it was. A model that somebody wrapped is
            named, with the attribute that holds the model inside. Or its layers cannot take drafted tokens back.
        QuestValueError: Another argument is wrong; or offload is asked for where nothing is nearer than host memory;
            or 8 bits for a model or a GPU that does not take them.
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
    device = getattr(model, "device", None)  # what is no model has none, and is refused below
    config = config.resolved(getattr(device, "type", "cpu"))
    check_on_select(on_select)
    if cuda_graphs is not None and not isinstance(cuda_graphs, bool):
        raise QuestValueError("cuda_graphs", cuda_graphs, "True, False or None")
    if not isinstance(lossless, bool):
        raise QuestValueError("lossless", lossless, "True or False")
    if draft_tokens is not None:
        check_draft_tokens(draft_tokens)
        if not lossless:
            raise QuestValueError("draft_tokens", draft_tokens, "None without lossless=True: nothing is drafted")
    check_cache_dtype(kv_cache_dtype)
    check_supported(model, config)
    check_stored(kv_cache_dtype, model.dtype, model.device, config.backend)
    if lossless and offload is not None:
        raise QuestValueError("offload", offload, "None with lossless=True, whose checks read the whole cache")
    chosen = Offload.asked(offload, hot_tokens, config, model.device)
    if chosen is not None:
        chosen.check_device(model)
    if lossless:
        check_can_draft(model, config)
    if getattr(model, _HANDLE, None) is not None:
        raise QuestStateError("Quest is enabled on this model already: call disable() on its handle first")
    backend = resolve_backend(config.backend, model.device, model.dtype)
    check_backend(backend, config)
    can_capture = model.device.type == "cuda" and backend.name == "triton"
    if cuda_graphs and not can_capture:
        raise BackendError(
            f"cuda_graphs: got True on device {model.device} with the {backend.name} backend, "
            "expected an NVIDIA GPU with the triton one"
        )
    capture = can_capture if cuda_graphs is None else cuda_graphs
    drafts = (DEFAULT_DRAFTS if draft_tokens is None else draft_tokens) if lossless else None
    return QuestHandle(
        model, config, on_select, capture=capture, must_capture=bool(cuda_graphs), draft_tokens=drafts, offload=chosen,
        kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip


class QuestHandle:
    """Quest on one model, until `disable()` or the end of the `with` statement.

    Attributes:
        model: The model.
        config: What decode steps read, with the form of its metadata.
        counters: Steps and pages of every cache that `generate()` made since.
        graphs: Decode steps that replayed a CUDA graph, and why others did not; None without graphs.
        is_lossless: Whether sparse steps only draft.
    """

    def __init__(
        self, model: PreTrainedModel, config: QuestConfig, on_select: OnSelect | None, *, capture: bool = False,
        must_capture: bool = False, draft_tokens: DraftTokens | None = None, offload: Offload | None = None,
        kv_cache_dtype: CacheDtype = "auto",
    ) -> None:  # fmt: skip
        self.model = cast("Any", model)  # a module's attributes are Tensor or Module to a type checker
        self.config = config
        kinds = layer_kinds(model.config, config)
        self.graphs = DecodeGraphs(model, must_capture=must_capture) if capture else None
        self.is_lossless = draft_tokens is not None
        drafts = DraftCounter() if self.is_lossless else None
        self.counters = QuestCounters([LayerCounter(index, kind, config) for index, kind in kinds.items()], drafts)
        self._lossless: Lossless | None = None
        if draft_tokens is not None and drafts is not None:
            self._lossless = Lossless(self.model, draft_tokens, drafts, self.graphs.take if self.graphs else None)
        self._on_select = on_select
        self._offload = offload
        self._kv_cache_dtype: CacheDtype = kv_cache_dtype
        self._is_entered = False
        self._make_cache = self.model._prepare_cache_for_generation
        register_attention()
        self._is_eager = needs_eager(model)
        self._configs = PrivateConfigs(model, EAGER_NAME if self._is_eager else SDPA_NAME)
        self._watch = Watch(model, config, self._configs)
        self._put: dict[str, tuple[Any, Any]] = {}  # attributes of the model: ours, and what was there
        ours = {_HANDLE: self, "_prepare_cache_for_generation": self._prepare_cache_for_generation, **REFUSED_METHODS}
        if self._lossless is not None:
            ours |= self._lossless.methods()
        if self.graphs is not None:
            ours["forward"] = self.graphs.wrap()
        for name, value in ours.items():
            self._put[name] = (value, model.__dict__.get(name, _ABSENT))  # some libraries put their own there
            setattr(model, name, value)

    def __enter__(self) -> QuestHandle:
        if self._is_entered:
            raise QuestStateError("with: this handle is in a with statement already, whose end would come too early")
        self._require_enabled("with")
        self._is_entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self._is_entered = False
        self.disable()

    def _require_enabled(self, call: str) -> None:
        if not self.is_enabled:
            raise QuestStateError(
                f"{call}: this handle is disabled, and the model runs dense: call enable_quest() anew"
            )

    @property
    def is_enabled(self) -> bool:
        """Whether the model decodes with Quest through this handle."""
        return getattr(self.model, _HANDLE, None) is self

    def disable(self) -> None:
        """Put the model back as it was. Does nothing the second time.

        What was changed meanwhile stays changed: the model's configuration, and methods that others put in ours' place.
        """
        if not self.is_enabled:
            return
        self._watch.remove()
        for name, (ours, before) in self._put.items():
            if self.model.__dict__.get(name) is not ours:
                continue
            if before is _ABSENT:
                del self.model.__dict__[name]  # what the class has comes to light again
            else:
                self.model.__dict__[name] = before
        self._configs.give_back()

    def make_cache(
        self, max_length: int | None = None, *, offload: OffloadTo | None = None, hot_tokens: int | None = None,
        kv_cache_dtype: CacheDtype | None = None,
    ) -> QuestCache:  # fmt: skip
        """A new cache for the model that counts in this handle's counters.

        Args:
            max_length: Tokens to make room for at once, where known [tokens]; more may come.
            offload: "host" as `enable_quest` takes it, for this cache; None is as the model was enabled.
            hot_tokens: Likewise.
            kv_cache_dtype: Likewise.

        Raises:
            QuestValueError: `max_length` is no positive integer; memory for one sequence of it is not free; or an
                argument is wrong.
            QuestStateError: The handle is disabled.
        """
        self._require_enabled("make_cache")
        chosen = self._offload
        if offload is not None:
            if hot_tokens is None and chosen is not None:
                hot_tokens = chosen.hot_tokens
            chosen = Offload.asked(offload, hot_tokens, self.config, self.model.device)
            Offload.check_device(self.model)
        elif hot_tokens is not None:
            if chosen is None:
                Offload.asked(None, hot_tokens, self.config, self.model.device)
            else:
                chosen = replace(chosen, hot_tokens=hot_tokens)
                chosen.check(self.config)
        if kv_cache_dtype is not None:
            check_cache_dtype(kv_cache_dtype)
            check_stored(kv_cache_dtype, self.model.dtype, self.model.device, self.config.backend)
        return self._new_cache(max_length, chosen, kv_cache_dtype or self._kv_cache_dtype)

    def _new_cache(
        self, max_length: int | None, offload: Offload | None, kv_cache_dtype: CacheDtype, *, is_estimate: bool = False,
        batch: int = 1, chunk: int | None = None, is_masked: bool = False,
    ) -> QuestCache:  # fmt: skip
        self._require_enabled("make_cache")
        cache = QuestCache(
            self.model.config, self.config, max_length=max_length, counters=self.counters, on_select=self._on_select,
            is_estimate=is_estimate, is_lossless=self.is_lossless, offload=offload,
            kv_cache_dtype=kv_cache_dtype,
        )  # fmt: skip
        if offload is not None and max_length is not None:
            kinds = [counter.kind for counter in self.counters.layers]
            stored = stored_dtype(kv_cache_dtype)
            shape = CacheShape.of(self.model, kinds, batch=batch, length=max_length, stored=stored)
            if shape is not None:
                offload.check_fits(shape, self.config, self.model.device, chunk=chunk, is_masked=is_masked)
        return cache

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int,
    ) -> None:  # fmt: skip
        """Stands in for the method of `generate()` that makes the cache."""
        given = model_kwargs.get(CACHE)
        chunk = getattr(generation_config, "prefill_chunk_size", None)
        is_masked = self._is_eager or not lower_right.knows_lower_right(self.model.device)
        if not is_masked and (chunk is not None or _has_tokens(given)) and not generation_config.is_assistant:
            is_masked = self._watch.find_padding(model_kwargs)
        if self._lossless is not None:
            self._lossless.check(generation_config, given, generation_mode)
            max_cache_length += MOST_DRAFTS + 1  # drafts that are taken back have been somewhere
        if given is not None:
            if isinstance(given, QuestCache):
                given.is_kept = True
            if isinstance(given, Cache) and not isinstance(given, QuestCache):
                self._watch.has_warned = True
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
            answers = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            # What is locked on the host takes a while, and to move it twice the room: so there is room for all at once.
            model_kwargs[CACHE] = self._new_cache(
                max(1, max_cache_length), self._offload, self._kv_cache_dtype, is_estimate=self._offload is None,
                batch=batch_size * answers, chunk=chunk, is_masked=is_masked,
            )  # fmt: skip
            model_kwargs[CACHE].is_kept = False
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()
            return
        self._make_cache(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)


def _has_tokens(cache: object) -> bool:
    """Whether a prompt comes behind others; a static cache has a mask whatever comes."""
    return isinstance(cache, DynamicCache) and cache.get_seq_length() > 0


def _warn_dense(why: str) -> None:
    warnings.warn(f"generate() {why}: every layer runs dense", QuestWarning, stacklevel=5)

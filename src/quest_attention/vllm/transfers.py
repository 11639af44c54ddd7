"""KV connectors: which of vLLM's ways to move blocks elsewhere take page metadata along, as tests showed.

Metadata lies in a block behind its keys and values. A connector that moves the bytes of whole blocks takes it along.
One that copies tokens slot by slot leaves it behind, and pages would be chosen by what others left in the blocks.
"""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

from quest_attention.errors import QuestValueError
from quest_attention.forms import form_of
from quest_attention.vllm.kinds import other_layers
from quest_attention.vllm.layout import page_size
from quest_attention.vllm.options import read_options

__all__ = ["check_transfer", "compare_metadata"]

_ON_A_CPU, _ON_A_GPU = ("cpu", (0, 32)), ("cuda", (0, 33))
_TESTED = {"NixlConnector": _ON_A_CPU, "NixlPullConnector": _ON_A_CPU, "OffloadingConnector": _ON_A_GPU}
"""The type of device, and vLLM's release, with which a test showed that metadata goes along. To vLLM the first two are
one connector. In 0.25 metadata is padding of a block, of which connectors need not know."""
_STORE = "CPUOffloadingSpec"
"""The one of OffloadingConnector's stores with which it did: the host's memory alone."""
_BY_SLOT = "copies keys and values slot by slot, and leaves page metadata behind"
_BY_BLOCK = "moves whole blocks, and page metadata in them, but was not tested so"
_UNKNOWN = "is not known to take page metadata along"
_WHY = {
    "DecodeBenchConnector": "fills blocks with numbers of its own, and makes no page metadata of them",
    "ExampleConnector": _BY_SLOT,
    "ExampleHiddenStatesConnector": _BY_SLOT,
    "HF3FSKVConnector": _BY_BLOCK,
    "LMCacheConnectorV1": _BY_SLOT,
    "MooncakeConnector": _BY_BLOCK,
    "MooncakeStoreConnector": _BY_BLOCK,
    "NixlConnector": _BY_BLOCK,
    "NixlPullConnector": _BY_BLOCK,
    "NixlPushConnector": _BY_BLOCK,
    "OffloadingConnector": _BY_BLOCK,
    "SharedStorageConnector": _BY_SLOT,  # the first one's name in older releases
    "SimpleCPUOffloadConnector": _BY_BLOCK,
}
"""What those of vLLM's connectors do of which it was read in their files."""
_EXTRA = "kv_transfer_config.kv_connector_extra_config"
_HANDSHAKE = "enforce_handshake_compat"
_logger = logging.getLogger("vllm.quest_attention")
_WRAPPED = "quest_attention_metadata"


def check_transfer(vllm_config: Any, device: str, release: tuple[int, int]) -> None:
    """Look at vLLM's settings for moving blocks elsewhere, which it also makes from others (`--kv-offloading-size`).

    Args:
        vllm_config: A `VllmConfig`.
        device: vLLM's type of the device.
        release: Of vLLM, as (major, minor).

    Raises:
        QuestValueError: Metadata would stay behind, or no test showed that it does not.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return
    name, argument = transfer.kv_connector, "kv_transfer_config"
    if transfer.kv_connector_module_path:
        path = transfer.kv_connector_module_path
        raise QuestValueError(f"{argument}.kv_connector_module_path", path, f"none: {name} from there {_UNKNOWN}")
    if _TESTED.get(name) != (device, release):
        here = [other for other, tested in _TESTED.items() if tested == (device, release)]
        running = f"on device {device} with vLLM {release[0]}.{release[1]}"
        wanted = f"none, or {running} one of {', '.join(here)}" if here else f"none {running}"
        raise QuestValueError(argument, name, f"{wanted}: {name} {_WHY.get(name, _UNKNOWN)}")
    others = None if vllm_config.model_config is None else other_layers(vllm_config.model_config)
    if others is not None:
        raise QuestValueError(argument, name, f"none: models with {others} were not tested with connectors")
    extra = transfer.kv_connector_extra_config
    if transfer.enable_permute_local_kv:
        raise QuestValueError(
            "kv_transfer_config.enable_permute_local_kv", True, "False: page metadata has no such axes to permute"
        )
    if name == "OffloadingConnector" and extra.get("spec_name", _STORE) != _STORE:
        raise QuestValueError(f"{_EXTRA}.spec_name", extra["spec_name"], f"{_STORE}: no other store was tested")
    if extra.get("bidirectional_kv_xfer"):
        raise QuestValueError(f"{_EXTRA}.bidirectional_kv_xfer", True, "False: blocks that go back were not tested")
    if not extra.get(_HANDSHAKE, True):
        raise QuestValueError(
            f"{_EXTRA}.{_HANDSHAKE}", False, "True: by it servers see whether they keep the same page metadata"
        )
    options = read_options(vllm_config, device)
    assert options is not None, "who asks for Quest is looked at"
    config = options.least_config()
    form = form_of(config)
    # Where all of a prompt came from elsewhere its last token is computed once more, into a block that has it already.
    if not (form.is_bound or form.takes_whole_pages):
        reason = "none with quest.metadata moments, in which the last token of a prompt would count twice: use bounds"
        raise config.mistake(argument, name, f"{reason} or sketch")


def compare_metadata(vllm_config: Any, device: str) -> None:
    """Have NIXL's handshake, if NIXL is asked for, compare what two servers keep of a page; more than once is once.

    It compares models, names of backends and bytes of a block, of which another form of metadata may have as many.

    Args:
        vllm_config: A `VllmConfig`.
        device: vLLM's type of the device.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or not transfer.kv_connector.startswith("Nixl"):
        return
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker

    original = base_worker.compute_nixl_compatibility_hash
    if getattr(original, _WRAPPED, False):
        return

    @wraps(original)
    def compute_nixl_compatibility_hash(vllm_config: Any, attn_backend_name: str, *arguments: Any, **named: Any) -> str:
        signature = f"{attn_backend_name}{_signature(vllm_config, device)}"
        return str(original(vllm_config, signature, *arguments, **named))

    _logger.info("Quest: NIXL's handshake compares%s, beside what is vLLM's own.", _signature(vllm_config, device))
    setattr(compute_nixl_compatibility_hash, _WRAPPED, True)
    base_worker.compute_nixl_compatibility_hash = compute_nixl_compatibility_hash


def _signature(vllm_config: Any, device: str) -> str:
    """What must be alike where metadata is made and where it is read: dense layers have none, and ranks have heads."""
    options = read_options(vllm_config, device)
    if options is None:
        return ""
    page = page_size(vllm_config.cache_config.block_size, vllm_config.model_config, device)
    config = options.config(page)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    kept = (form_of(config).name, config.metadata_dtype, config.page_size, options.num_dense_layers, ranks)
    return f", quest {kept}"

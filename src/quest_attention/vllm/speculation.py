"""Speculation: which drafts go with Quest, and what is refused of it before anything runs."""

from __future__ import annotations

from typing import Any

from quest_attention.errors import QuestValueError, UnsupportedModelError
from quest_attention.forms import form_of
from quest_attention.ops.query_tokens import MOST_QUERY_TOKENS
from quest_attention.serving.options import KEY, QuestOptions
from quest_attention.vllm.kinds import other_layers
from quest_attention.vllm.options import BACKEND_NAME

__all__ = ["PROPOSER", "check_drafts_without", "check_speculation", "drafts_by_heads", "drafts_by_quest"]

_DRAFT_FREE = ("ngram",)
"""Ways to speculate without a model of its own."""
_HEADS = ("eagle", "eagle3", "mtp")
"""Ways to speculate with layers that vLLM makes from a configuration of their own, in which a backend is named: theirs
is the stock one, so that nothing of Quest is in them."""
_FROM_OUTSIDE = "custom_class"
"""vLLM's name for drafts by a class from outside."""
PROPOSER = "quest_attention.vllm.proposer.QuestProposer"
"""The one that is known here."""
_OTHER_HEADS = ("gemma4_mtp", "step3p5_mtp")
"""Of these, types of drafts whose layers read the model's own keys and take its backend whatever is named, or
lie in several groups of the cache."""


def check_speculation(options: QuestOptions, vllm_config: Any) -> None:
    """Look at how a server speculates, if it does.

    Args:
        options: Of Quest.
        vllm_config: A `VllmConfig`.

    Raises:
        QuestValueError: Its drafts, or their check, do not go with Quest or with another setting.
        UnsupportedModelError: They do not go with the model.
    """
    speculation = vllm_config.speculative_config
    _check_verify(options, speculation)
    config = options.least_config()
    form = form_of(config)
    # Bounds still bound what is left, and whole pages are taken anew from the cache when they are complete again.
    if speculation is not None and not (form.is_bound or form.takes_whole_pages):
        reason = f"none with {KEY}.metadata moments, in which tokens taken back would stay: use bounds or sketch"
        raise config.mistake("speculative_config.method", speculation.method, reason)
    if speculation is not None:
        _check_drafts(speculation, vllm_config.model_config)
    if drafts_by_quest(speculation):
        _check_proposer(options, vllm_config)


def check_drafts_without(speculation: Any) -> None:
    """Look at how a server speculates that does not ask for Quest.

    Args:
        speculation: vLLM's `SpeculativeConfig`, or None.

    Raises:
        QuestValueError: Quest is to draft, which would find no layer of its own at the first request.
    """
    if drafts_by_quest(speculation):
        both = f"{KEY!r} in --additional-config and --attention-backend {BACKEND_NAME}"
        expected = f"another, or {both}: else no layer is Quest's, and none could draft"
        raise QuestValueError("speculative_config.model", speculation.model, expected)


def drafts_by_heads(speculation: Any) -> bool:
    """Whether a server speculates with layers that vLLM gives the backend of the speculative configuration.

    Args:
        speculation: vLLM's `SpeculativeConfig`, or None.
    """
    return speculation is not None and speculation.method in _HEADS


def drafts_by_quest(speculation: Any) -> bool:
    """Whether the model drafts for itself with Quest, so that it reads everything in all other steps.

    Args:
        speculation: vLLM's `SpeculativeConfig`, or None.
    """
    return speculation is not None and speculation.method == _FROM_OUTSIDE and speculation.model == PROPOSER


def _check_drafts(speculation: Any, model: Any) -> None:
    method, names = speculation.method, ", ".join((*_DRAFT_FREE, *_HEADS, _FROM_OUTSIDE))
    if method == _FROM_OUTSIDE and not drafts_by_quest(speculation):
        raise QuestValueError("speculative_config.model", speculation.model, f"{PROPOSER} with method {_FROM_OUTSIDE}")
    if method not in (*_DRAFT_FREE, *_HEADS, _FROM_OUTSIDE):
        raise QuestValueError("speculative_config.method", method, f"one of {names}: other drafts are not tested")
    draft = getattr(getattr(speculation, "draft_model_config", None), "hf_config", None)
    kind = getattr(draft, "model_type", None)
    if method in _HEADS and kind in _OTHER_HEADS:
        expected = f"one of {names}, not with {kind}, whose layers read the model's own keys or lie in several groups"
        raise QuestValueError("speculative_config.method", method, expected)
    others = None if model is None or method not in _HEADS else other_layers(model)
    if others is not None:
        expected = f"full attention in every layer with method {method}: in others it is not tested"
        raise UnsupportedModelError(f"model: got {model.model} with {others}, expected {expected}")
    backend = getattr(getattr(speculation, "attention_backend", None), "name", None)
    if backend == BACKEND_NAME:
        expected = "none, or vLLM's own: the layers of a draft have one token to look ahead, and run without Quest"
        raise QuestValueError("speculative_config.attention_backend", backend, expected)


def _check_proposer(options: QuestOptions, vllm_config: Any) -> None:
    """What does not go with drafts of the model itself.

    Raises:
        QuestValueError: Something of it is asked for.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    method = f"with speculative_config.model {PROPOSER}"
    if options.verify != "dense":
        raise QuestValueError(
            f"{KEY}.verify", options.verify, f"'dense' {method}: what Quest drafts is checked by stock"
        )
    for name in ("tensor_parallel_size", "data_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise QuestValueError(name, getattr(parallel, name), f"1 {method}: more is not tested")
    for name, found in (
        ("enable_lora", getattr(vllm_config, "lora_config", None)),
        ("kv_transfer_config", vllm_config.kv_transfer_config),
    ):
        if found is not None:
            raise QuestValueError(name, "one", f"none {method}: not tested")
    varying = "num_speculative_tokens_per_batch_size"
    if found := getattr(vllm_config.speculative_config, varying, None):
        expected = f"none {method}: vLLM does not tell such a class how many tokens a step is to have"
        raise QuestValueError(f"speculative_config.{varying}", found, expected)
    if model is None:
        return
    if getattr(model, "enable_prompt_embeds", False):  # the model is then compiled for embeddings, not for tokens
        raise QuestValueError("enable_prompt_embeds", True, f"False {method}: a draft's steps are given tokens")
    others = other_layers(model)
    if others is not None or getattr(model, "is_multimodal_model", False) or getattr(model, "uses_mrope", False):
        what = others or "images or several positions a token"
        raise UnsupportedModelError(
            f"model: got {model.model} with {what}, expected full attention over text alone {method}"
        )


def _check_verify(options: QuestOptions, speculation: Any) -> None:
    if options.verify == "dense":
        return
    name, got = f"{KEY}.verify", options.verify
    if speculation is None:
        raise QuestValueError(
            name, got, "'dense', or --speculative-config: no token is speculated that could be checked"
        )
    if options.query_tokens > MOST_QUERY_TOKENS:
        expected = f"at most {MOST_QUERY_TOKENS - 1} with {name} 'sparse': a row checks them and one more"
        raise QuestValueError("speculative_config.num_speculative_tokens", options.query_tokens - 1, expected)
    for varying in ("enable_adaptive_verification", "num_speculative_tokens_per_batch_size"):
        found = getattr(speculation, varying, None)
        if found:
            expected = f"none with {name} 'sparse': a graph is of rows that check as many tokens as one another"
            raise QuestValueError(f"speculative_config.{varying}", found, expected)

"""Tiny random models and what to compare them by, for the tests of the transformers integration."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quest_attention import QuestConfig, QuestCounters, enable_quest, update_page_metadata
from quest_attention.hf import QuestCache, QuestLayer
from quest_attention.pages import PagedKV

PAGE_SIZE = 4
VOCABULARY = 97
SMALL = QuestConfig(token_budget=24, page_size=PAGE_SIZE, num_dense_layers=1, metadata="bounds")
LARGE = dataclasses.replace(SMALL, token_budget=4096)


def make_llama(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    layers: int = 3,
    seed: int = 0,
    vocab: int = VOCABULARY,
    **options: Any,
) -> LlamaForCausalLM:
    """A Llama of random weights, large enough that different tokens give clearly different logits."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=heads * dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        intermediate_size=48,
        vocab_size=vocab,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def prompt(batch: int = 1, length: int = 60, seed: int = 1) -> Tensor:
    """Random token ids `[batch, length]`, none of them the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def generate(model: PreTrainedModel, ids: Tensor, new: int = 12, **options: Any) -> Tensor:
    """Tokens that `generate()` makes; greedy unless told otherwise."""
    runner: Any = model
    options = {"do_sample": False, "pad_token_id": 0} | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    made: Tensor = runner.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
    return made


def logits_of_steps(
    model: PreTrainedModel, ids: Tensor, config: QuestConfig, new: int = 6
) -> tuple[Tensor, QuestCounters]:
    """Logits `[steps, B, V]` of a prefill and greedy decode steps under Quest, and the counters."""
    with enable_quest(model, config) as quest:
        runner: Any = model
        made = runner.generate(
            ids,
            attention_mask=(ids != 0).long(),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(made.logits), quest.counters


def quest_layers(cache: QuestCache) -> list[QuestLayer]:
    """The layers of a cache that keep metadata."""
    return [layer for layer in cache.layers if isinstance(layer, QuestLayer) and not layer.is_dense]


def assert_metadata_is_exact(cache: QuestCache) -> None:
    """Every page's bounds are what the oracle makes of the keys in the cache."""
    for layer in quest_layers(cache):
        paged, length = layer.paged, layer.get_seq_length()
        stored = paged.contiguous
        assert stored is not None
        fresh = torch.full_like(stored.metadata, float("nan"))
        scales = {"key_scale": paged.key_scale, "value_scale": paged.value_scale}
        kv = PagedKV.from_contiguous(stored.keys, stored.values, fresh, **scales)
        update_page_metadata(kv, length, length, backend="reference")
        torch.testing.assert_close(
            stored.metadata[:, :, : layer.num_pages].float(), fresh[:, :, : layer.num_pages].float(), rtol=0, atol=0
        )

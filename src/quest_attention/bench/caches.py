"""Caches of random keys and values, one for each layer that a timing rotates over."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.forms import form_of, metadata_dtype
from quest_attention.ops import update_page_metadata
from quest_attention.pages import PagedKV, num_pages

__all__ = ["cluster_keys", "make_caches", "with_metadata"]

_NEWEST = 1 / 16
"""Of a sequence, the tokens that queries look at most where keys are clustered."""
_NEARER = 0.7
"""By how much their logits are larger, in standard deviations of those of random keys.

With 8 KV heads a third of what is chosen of 32K tokens is then theirs, as of the fullest of 16 parts of a book:
benchmarks/results/spread_qwen.json; of shorter contexts less, of longer ones more.
"""


def make_caches(
    layers: int, batch: int, context: int, num_kv_heads: int, *, capacity: int | None = None, head_dim: int = 128,
    page_size: int = 16, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cuda",
) -> tuple[list[PagedKV], Tensor]:  # fmt: skip
    """Caches of NHD pages in random order, their bounds up to date, and the lengths of the sequences, int32 [batch].

    Args:
        layers: Caches to make.
        batch: Sequences of each.
        context: Tokens of each sequence.
        num_kv_heads: KV heads of a layer.
        capacity: Tokens for which the page table has room, where a server would hold longer ones; `context` if None.
        head_dim: Of keys and values alike.
        page_size: Tokens per page.
        dtype: Of keys, values and bounds.
        device: Where they are.
    """
    used, wide = num_pages(context, page_size), num_pages(max(context, capacity or 0), page_size)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    caches = []
    for _ in range(layers):
        keys = torch.empty(batch * used, page_size, num_kv_heads, head_dim, dtype=dtype, device=device).normal_()
        values = torch.empty_like(keys).normal_()
        metadata = torch.empty(batch * used, num_kv_heads, 2, head_dim, dtype=dtype, device=device)
        table = torch.zeros(batch, wide, dtype=torch.int32, device=device)
        table[:, :used] = torch.randperm(batch * used, device=device).view(batch, used)
        caches.append(PagedKV(keys, values, metadata, table))
        update_page_metadata(caches[-1], lengths, lengths)
    return caches, lengths


def cluster_keys(kv: PagedKV, query: Tensor, context: int) -> int:
    """Have queries look at the newest tokens most, as in texts; gives the first of those.

    With random keys what is chosen lies evenly over a sequence.

    Args:
        kv: Keys of sequences that are all `context` tokens long, which change; their metadata are to be made anew.
        query: `[B, HQ, D]`.
        context: Tokens of each sequence.
    """
    first = context - int(_NEWEST * context)
    heads = query.view(kv.batch_size, kv.num_kv_heads, -1, kv.head_dim).float()
    towards = torch.nn.functional.normalize(heads.sum(2), dim=-1)  # [B, HKV, D]
    gain = (heads * towards[:, :, None]).sum(-1).mean() / kv.head_dim**0.5  # of a logit, by a step that way
    token = torch.arange(first, context, device=query.device)
    page = kv.page_table[:, token // kv.page_size].long()
    kv.keys[page, token % kv.page_size] += (_NEARER / gain * towards)[:, None].to(kv.keys.dtype)
    return first


def with_metadata(kv: PagedKV, lengths: Tensor, config: QuestConfig) -> PagedKV:
    """The same keys and values with metadata of another form or dtype, made of them as a prefill makes it.

    Args:
        kv: Keys and values, which are shared and not copied.
        lengths: `[batch]` int32, of the sequences [tokens].
        config: What is kept, and in which dtype.
    """
    form = form_of(config)
    shape = (*kv.metadata.shape[:2], *form.shape(kv.page_size, kv.head_dim))
    metadata = torch.empty(shape, dtype=metadata_dtype(config, kv.keys.dtype), device=kv.keys.device)
    other = PagedKV(kv.keys, kv.values, metadata, kv.page_table, form=form)
    update_page_metadata(other, lengths, lengths)
    return other

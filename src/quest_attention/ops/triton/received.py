"""Kernels of the evaluation: the attention each token received from the queries of a pass, no weight ever written.

A first pass over the keys gives each query its log-sum-exp, a second one each key the sum of its weights. In torch the
weights of a long prompt are written and read several times, which takes longer than the model itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quest_attention.ops.triton.arithmetic import LOG2_E, dot
from quest_attention.ops.triton.launch import launch

__all__ = ["received_attention"]

_QUERIES = 64
"""Queries of a block [tokens]."""
_KEYS = 64
"""Keys of a block [tokens]."""


def received_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The weights of `observation.attention_weights`, summed over queries and their heads.

    Args:
        query: `[B, HQ, t, D]`, the last tokens of those of the keys; each sees keys up to its own.
        key: `[B, HKV, T, D]`, of the same dtype.
        scaling: Of the logits.

    Returns:
        `[B, HKV, T]` float32.
    """
    batch, heads, count, dim = query.shape
    kv_heads, length = key.shape[1:3]
    lse = torch.empty(batch, heads, count, dtype=torch.float32, device=query.device)
    received = torch.empty(batch, kv_heads, length, dtype=torch.float32, device=query.device)
    shared = (*query.stride(), *key.stride(), heads, kv_heads, count, length, scaling)
    options = {"HEAD_DIM": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)), "QUERIES": _QUERIES, "KEYS": _KEYS}
    launch(_lse_kernel, (triton.cdiv(count, _QUERIES) * batch * heads,), query, key, lse, *shared, **options)
    grid = (triton.cdiv(length, _KEYS) * batch * kv_heads,)
    launch(_receive_kernel, grid, query, key, lse, received, *shared, **options)
    return received


@triton.jit
def _load_rows(base, row, count, row_stride, dim_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors of some tokens, `[len(row), BLOCK_D]`, zeros past the last one and past the head dim."""
    channel = tl.arange(0, BLOCK_D)
    inside = (row < count)[:, None] & (channel < HEAD_DIM)[None, :]
    at = row[:, None].to(tl.int64) * row_stride + channel[None, :] * dim_stride
    return tl.load(base + at, mask=inside, other=0.0)


@triton.jit
def _logits(queries, keys, query_at, key_at, first, scaling, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Base-2 logits of a block `[QUERIES, KEYS]`, minus infinity where a key is later than the query."""
    products = dot(queries, tl.trans(keys), tl.zeros([QUERIES, KEYS], dtype=tl.float32))
    return tl.where(key_at[None, :] <= first + query_at[:, None], products * (scaling * LOG2_E), float("-inf"))


@triton.jit
def _lse_kernel(
    query, key, lse,
    query_batch, query_head, query_row, query_dim,
    key_batch, key_head, key_row, key_dim,
    heads, kv_heads, count, length, scaling,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of each query of a block, for one head."""
    blocks = tl.cdiv(count, QUERIES)
    block, sequence_head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    sequence, head = (sequence_head // heads).to(tl.int64), (sequence_head % heads).to(tl.int64)
    kv_head = head // (heads // kv_heads)
    query_at = block * QUERIES + tl.arange(0, QUERIES)
    first = length - count
    query_base = query + sequence * query_batch + head * query_head
    key_base = key + sequence * key_batch + kv_head * key_head
    queries = _load_rows(query_base, query_at, count, query_row, query_dim, HEAD_DIM, BLOCK_D)
    largest = tl.full([QUERIES], -1e30, dtype=tl.float32)
    total = tl.zeros([QUERIES], dtype=tl.float32)
    for start in range(0, tl.minimum(length, first + (block + 1) * QUERIES), KEYS):
        key_at = start + tl.arange(0, KEYS)
        keys = _load_rows(key_base, key_at, length, key_row, key_dim, HEAD_DIM, BLOCK_D)
        logits = _logits(queries, keys, query_at, key_at, first, scaling, QUERIES, KEYS)
        larger = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(logits - larger[:, None]), 1)
        largest = larger
    tl.store(lse + sequence_head.to(tl.int64) * count + query_at, largest + tl.log2(total), mask=query_at < count)


@triton.jit
def _receive_kernel(
    query, key, lse, received,
    query_batch, query_head, query_row, query_dim,
    key_batch, key_head, key_row, key_dim,
    heads, kv_heads, count, length, scaling,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The sum of the weights of each key of a block, over the queries that see it and the heads of its group."""
    blocks = tl.cdiv(length, KEYS)
    block, sequence_head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    sequence, kv_head = (sequence_head // kv_heads).to(tl.int64), (sequence_head % kv_heads).to(tl.int64)
    group = heads // kv_heads
    key_at = block * KEYS + tl.arange(0, KEYS)
    first = length - count
    key_base = key + sequence * key_batch + kv_head * key_head
    keys = _load_rows(key_base, key_at, length, key_row, key_dim, HEAD_DIM, BLOCK_D)
    seen_from = tl.maximum(block * KEYS - first, 0) // QUERIES * QUERIES  # no query before sees a key of the block
    total = tl.zeros([KEYS], dtype=tl.float32)
    for member in range(group):
        head = kv_head * group + member
        query_base = query + sequence * query_batch + head * query_head
        lse_base = lse + (sequence * heads + head) * count
        for start in range(seen_from, count, QUERIES):
            query_at = start + tl.arange(0, QUERIES)
            queries = _load_rows(query_base, query_at, count, query_row, query_dim, HEAD_DIM, BLOCK_D)
            norms = tl.load(lse_base + query_at, mask=query_at < count, other=float("inf"))
            logits = _logits(queries, keys, query_at, key_at, first, scaling, QUERIES, KEYS)
            total += tl.sum(tl.exp2(logits - norms[:, None]), 0)
    tl.store(received + sequence_head.to(tl.int64) * length + key_at, total, mask=key_at < length)

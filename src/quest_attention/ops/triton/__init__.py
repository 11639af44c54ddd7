"""The GPU kernels, one verb a file; this package is the backend. Only `dispatch` imports it: it needs triton."""

from __future__ import annotations

from quest_attention.ops.triton.attention import sparse_decode_attention
from quest_attention.ops.triton.choice import select_pages
from quest_attention.ops.triton.counts import count_reads
from quest_attention.ops.triton.decode import quest_decode
from quest_attention.ops.triton.fetch import fetch_units
from quest_attention.ops.triton.metadata import append_slots, append_token, update_page_metadata, update_slot_metadata
from quest_attention.ops.triton.query_tokens import TritonQueryTokens
from quest_attention.ops.triton.scores import score_pages
from quest_attention.ops.triton.token_decode import choose_tokens
from quest_attention.ops.triton.workspace import make_workspace

__all__ = [
    "TritonQueryTokens",
    "append_slots",
    "append_token",
    "choose_tokens",
    "count_reads",
    "fetch_units",
    "make_workspace",
    "quest_decode",
    "score_pages",
    "select_pages",
    "sparse_decode_attention",
    "update_page_metadata",
    "update_slot_metadata",
]

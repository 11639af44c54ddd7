"""Compile every kernel for a Hopper GPU, without one: the interpreter takes things that the compiler does not.

    python tests/ops/hopper.py

Run in a process of its own, since the interpreter and the compiler exclude each other. Prints a line for each kernel.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from quest_attention import QuestConfig
from quest_attention.ops import Step
from quest_attention.ops import triton as backend
from quest_attention.ops.triton import attention, counts, decode, masks, metadata, received, scores, selection
from quest_attention.ops.triton.launch import FUSED_ARITHMETIC
from quest_attention.pages import FP8_METADATA, PagedKV


class NoGpu:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return device


def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Stands in for `launch`."""
    compiled = kernel.warmup(*arguments, grid=grid, **options, **FUSED_ARITHMETIC)
    print(kernel.fn.__name__, len(compiled.asm["cubin"]), flush=True)


def run_all(dtype: torch.dtype, group: int, *, narrow: bool, host: bool, pages: int, budget: int) -> None:
    """Every verb and the fused step, on memory that is never touched."""
    heads, dim, page_size, batch = 2, 128, 16, 1
    keys = torch.empty(1, page_size, heads, dim, dtype=dtype).expand(pages, -1, -1, -1)
    bounds = torch.empty(1, heads, 2, dim, dtype=FP8_METADATA if narrow else dtype).expand(pages, -1, -1, -1)
    kv = PagedKV(keys, keys, bounds, torch.zeros(batch, pages, dtype=torch.int32))
    length = pages * page_size
    seq_lens: Any = length if host else torch.full((batch,), length, dtype=torch.int32)
    if not host:
        backend.append_token(kv, keys[:batch, 0], keys[:batch, 0], seq_lens)
    slots = torch.zeros(batch, dtype=torch.int64)
    backend.append_slots(kv, keys[:batch, 0], keys[:batch, 0], slots)
    backend.update_slot_metadata(bounds, keys[:batch, 0], slots, page_size, kv.form)
    query = torch.empty(batch, heads * group, dim, dtype=dtype)
    mask = None if host else torch.ones(batch, length, dtype=torch.bool)
    backend.update_page_metadata(kv, seq_lens, length if host else 1)
    config = QuestConfig(budget, page_size, group_reduction="mean" if narrow else "max")
    sinks = torch.empty(heads * group) if narrow else None
    step = Step(
        query=query,
        kv=kv,
        seq_lens=seq_lens,
        config=config,
        token_mask=mask,
        sm_scale=0.1,
        softcap=20.0 if narrow else None,
        sinks=sinks,
    )
    found = backend.score_pages(step)
    selected = backend.select_pages(step, found)
    if not host:
        backend.count_reads(selected, seq_lens, torch.zeros(4, dtype=torch.int64), page_size, budget)
    backend.sparse_decode_attention(step, selected, return_lse=host)
    assert backend.quest_decode(replace(step, config=QuestConfig(budget), token_mask=None)) is not None


def main() -> None:
    """Compile what differs in kind: dtypes, one head and several, both bounds, lengths on host and device, sections."""
    driver.set_active(NoGpu())
    for module in (attention, counts, decode, masks, metadata, scores, selection, received):
        module.launch = compile_only  # type: ignore[attr-defined]
    run_all(torch.bfloat16, 1, narrow=False, host=False, pages=256, budget=512)
    run_all(torch.bfloat16, 4, narrow=True, host=True, pages=256, budget=512)
    run_all(torch.float16, 1, narrow=True, host=True, pages=9000, budget=512)
    run_all(torch.float32, 4, narrow=False, host=False, pages=9000, budget=512)
    for dim in (64, 256):
        query, key = (torch.empty(2, heads, 96, dim, dtype=torch.bfloat16) for heads in (4, 2))
        received.received_attention(query, key, 0.1)


if __name__ == "__main__":
    if triton.knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: the interpreter does not compile")
    main()

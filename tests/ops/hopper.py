"""Compile every kernel for a Hopper GPU, without one: the interpreter takes things that the compiler does not.

What is compiled must fit a multiprocessor, and no warp may be late: see `late_warps`.

    python tests/ops/hopper.py few
    python tests/ops/hopper.py all

Run in a process of its own, since the interpreter and the compiler exclude each other. Prints a line for each kernel.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from late_warps import late_loads
from quest_attention import QuestConfig
from quest_attention.forms import FP8, Bounds, Moments, Sketch
from quest_attention.ops import HotUnits, Selection, Step
from quest_attention.ops import triton as backend
from quest_attention.ops.triton import (
    attention,
    choice,
    counts,
    decode,
    fetch,
    masks,
    metadata,
    query_tokens,
    received,
    scores,
    sketch,
    token_decode,
    token_workspace,
)
from quest_attention.ops.triton.launch import FUSED_ARITHMETIC
from quest_attention.pages import PagedKV

SHARED_BYTES = 227 * 1024
"""Of a program at most."""


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
    assert compiled.metadata.shared <= SHARED_BYTES, f"{kernel.fn.__name__} wants {compiled.metadata.shared} bytes"
    late = late_loads(compiled.asm["ptx"]) if compiled.metadata.num_warps > 1 else []
    assert not late, f"{kernel.fn.__name__}: {late}"
    print(kernel.fn.__name__, len(compiled.asm["cubin"]), flush=True)


@triton.jit
def _take_turn(clock, seen, WAITS: tl.constexpr):  # noqa: N803 - a constant
    """What a late warp breaks where nothing waits."""
    now = tl.load(clock)
    if WAITS:
        tl.debug_barrier()
    tl.store(clock, now + 1)
    tl.store(seen + tl.arange(0, 512), now)


def check_late_warps() -> None:
    """That a late warp is found, and only there."""
    clock = torch.zeros(1, dtype=torch.int32)
    for waits in (False, True):
        compiled = _take_turn.warmup(clock, clock, waits, grid=(1,), num_warps=4, **FUSED_ARITHMETIC)
        assert bool(late_loads(compiled.asm["ptx"])) != waits


def run_all(
    dtype: torch.dtype,
    group: int,
    *,
    narrow: bool,
    host: bool,
    pages: int,
    budget: int,
    is_quantised: bool = False,
    moments: bool = False,
) -> None:
    """Every verb and the fused step, on memory that is never touched."""
    heads, dim, page_size, batch = 2, 128, 16, 1
    new = torch.empty(batch, heads, dim, dtype=dtype)
    keys = torch.empty(1, page_size, heads, dim, dtype=FP8 if is_quantised else dtype).expand(pages, -1, -1, -1)
    scale = torch.ones(heads) if is_quantised else None
    kept = torch.empty(1, heads, 2, dim, dtype=FP8 if narrow else dtype).expand(pages, -1, -1, -1)
    form = Moments(1.0) if moments else Bounds()
    table = torch.zeros(batch, pages, dtype=torch.int32)
    kv = PagedKV(keys, keys, kept, table, form=form, key_scale=scale, value_scale=scale)
    length = pages * page_size
    seq_lens: Any = length if host else torch.full((batch,), length, dtype=torch.int32)
    if not host:
        backend.append_token(kv, new, new, seq_lens)
    slots = torch.zeros(batch, dtype=torch.int64)
    backend.append_slots(kv, new, new, slots)
    backend.update_slot_metadata(kept, keys[:batch, 0], slots, page_size, kv.form)
    query = torch.empty(batch, heads * group, dim, dtype=dtype)
    mask = None if host else torch.ones(batch, length, dtype=torch.bool)
    backend.update_page_metadata(kv, seq_lens, length if host else 1)
    config = QuestConfig(budget, page_size, metadata=form.name, group_reduction="mean" if narrow else "max")
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
        backend.count_reads(selected, seq_lens, torch.zeros(4, dtype=torch.int64), budget)
    backend.sparse_decode_attention(step, selected, return_lse=host)
    assert (
        backend.quest_decode(replace(step, config=QuestConfig(budget, metadata=form.name), token_mask=None)) is not None
    )


def run_query_tokens(
    dtype: torch.dtype, tokens: int, group: int, dim: int, *, is_quantised: bool = False, host: bool = False
) -> None:
    """Several query tokens, folded and attended to over every page."""
    heads, page_size, pages, batch = 2, 16, 256, 1
    keys = torch.empty(1, page_size, heads, dim, dtype=FP8 if is_quantised else dtype).expand(pages, -1, -1, -1)
    scale = torch.ones(heads) if is_quantised else None
    kept = torch.empty(1, heads, 2, dim, dtype=keys.dtype).expand(pages, -1, -1, -1)
    table = torch.zeros(batch, pages, dtype=torch.int32)
    kv = PagedKV(keys, keys, kept, table, form=Bounds(), key_scale=scale, value_scale=scale)
    length: Any = pages * page_size if host else torch.full((batch,), pages * page_size, dtype=torch.int32)
    query = torch.empty(batch, tokens, heads * group, dim, dtype=dtype)
    lens = None if host else torch.full((batch,), tokens, dtype=torch.int64)
    asked = backend.TritonQueryTokens(query, lens, kv, length)
    config = QuestConfig(512, page_size, metadata="bounds")
    step = Step(query=asked.folded(), kv=kv, seq_lens=length, config=config, softcap=20.0 if host else None)
    pages_of = torch.zeros(batch, heads, pages, dtype=torch.int32)
    every = Selection(pages_of, pages_of[:, :, 0], page_size)
    asked.attend_folded(step, replace(step, seq_lens=length - tokens), every, backend)


def run_sketches(dtype: torch.dtype, group: int, dim: int, *, is_quantised: bool = False) -> None:
    """The kernels of sketches, and those of the verbs for single tokens."""
    heads, page_size, pages, batch = 2, 16, 9000, 1
    keys = torch.empty(1, page_size, heads, dim, dtype=FP8 if is_quantised else dtype).expand(pages, -1, -1, -1)
    scale = torch.ones(heads) if is_quantised else None
    form = Sketch(page_size)
    kept = torch.empty(1, heads, *form.shape(page_size, dim), dtype=torch.uint8).expand(pages, -1, -1, -1)
    table = torch.zeros(batch, pages, dtype=torch.int32)
    kv = PagedKV(keys, keys, kept, table, form=form, key_scale=scale, value_scale=scale)
    seq_lens, new = (
        torch.full((batch,), pages * page_size, dtype=torch.int32),
        torch.empty(batch, heads, dim, dtype=dtype),
    )
    backend.append_token(kv, new, new, seq_lens)
    backend.append_slots(kv, new, new, torch.zeros(batch, dtype=torch.int64))
    config = QuestConfig(512, page_size, metadata="sketch", selection_unit="token")
    step = Step(query=torch.empty(batch, heads * group, dim, dtype=dtype), kv=kv, seq_lens=seq_lens, config=config)
    estimates = sketch.SketchEstimates(step)
    estimates.of_all(pages)
    selected = backend.select_pages(step, torch.empty(batch, heads, pages * page_size))
    backend.sparse_decode_attention(step, selected)


def run_tokens(
    dtype: torch.dtype,
    group: int,
    dim: int,
    *,
    scans: bool,
    host: bool,
    is_quantised: bool = False,
    softcap: float | None = None,
    masked: bool = False,
    ranks_by_keys: bool = True,
    sequences: int = 1,
) -> None:
    """The step over single tokens, which starts launches early and ranks by binary products where it can."""
    heads, page_size, pages = 2, 16, 9000
    keys = torch.empty(1, page_size, heads, dim, dtype=FP8 if is_quantised else dtype).expand(pages, -1, -1, -1)
    scale = torch.ones(heads) if is_quantised else None
    form = Sketch(page_size)
    kept = torch.empty(1, heads, *form.shape(page_size, dim), dtype=torch.uint8).expand(pages, -1, -1, -1)
    table = torch.zeros(sequences, pages, dtype=torch.int32)
    kv = PagedKV(keys, keys, kept, table, form=form, key_scale=scale, value_scale=scale)
    factor = 4 if ranks_by_keys else 0
    config = QuestConfig(
        512 if ranks_by_keys else 2048, page_size, metadata="sketch", selection_unit="token", candidate_factor=factor
    )
    lengths: Any = pages * page_size if host else torch.full((sequences,), pages * page_size, dtype=torch.int32)
    query = torch.empty(sequences, heads * group, dim, dtype=dtype)
    sinks = torch.empty(heads * group) if host else None
    token_workspace.can_scan = lambda *_: scans
    token_decode.starts_early = lambda _: {"FOLLOWS": True, "launch_pdl": True}
    mask = torch.ones(sequences, 5000, dtype=torch.bool) if masked else None
    step = Step(query=query, kv=kv, seq_lens=lengths, config=config, sinks=sinks, softcap=softcap, token_mask=mask)
    assert token_decode.decode_tokens(step) is not None
    if not ranks_by_keys:
        assert token_decode.choose_tokens(step) is not None


def run_hot_units(dtype: torch.dtype, group: int, dim: int, *, host: bool, is_quantised: bool = False) -> None:
    """Pages and tokens fetched into a pool, and steps that read it."""
    heads, page_size, pages, length = 2, 16, 300, 4800
    stored = torch.empty(1, heads, length, dim, dtype=FP8 if is_quantised else dtype)
    scale = torch.ones(1) if is_quantised else None
    seq_lens: Any = length if host else torch.full((1,), length, dtype=torch.int32)
    query = torch.empty(1, heads * group, dim, dtype=dtype)
    token_workspace.can_scan = lambda *_: dim == 128
    for form, config in (
        (Bounds(), QuestConfig(512, page_size, metadata="bounds")),
        (Sketch(page_size), QuestConfig(128, page_size, metadata="sketch", selection_unit="token")),
    ):
        kept = torch.empty(1, heads, pages, *form.shape(page_size, dim), dtype=form.dtypes(stored.dtype)[0])
        kv = PagedKV.from_contiguous(stored, stored, kept, form=form, key_scale=scale, value_scale=scale)
        hot = HotUnits.allocate(kv, config.unit_size, 4000 // config.unit_size)
        step = Step(query=query, kv=kv, seq_lens=seq_lens, config=config, hot=hot)
        if config.unit_size == 1:
            assert token_decode.decode_tokens(step) is not None
            continue
        units = torch.zeros(1, heads, config.unit_budget, dtype=torch.int32)
        backend.fetch_units(kv, hot, units, seq_lens)
        near = Step(query=query, kv=hot.paged, seq_lens=seq_lens, config=config)
        backend.sparse_decode_attention(near, Selection(units, units[:, :, 0], config.unit_size))


def compile_few() -> None:
    """Every kernel, and of what differs in kind what differs most: see `compile_more`."""
    run_all(torch.bfloat16, 1, narrow=False, host=False, pages=256, budget=512)
    run_all(torch.bfloat16, 4, narrow=True, host=True, pages=9000, budget=512, is_quantised=True)
    run_query_tokens(torch.bfloat16, 5, 4, 128)
    run_sketches(torch.bfloat16, 4, 128)
    run_tokens(torch.bfloat16, 4, 128, scans=True, host=False, softcap=50.0)
    run_tokens(torch.bfloat16, 4, 128, scans=True, host=False, sequences=600)  # one program picks from a row
    run_tokens(torch.bfloat16, 8, 64, scans=True, host=False, ranks_by_keys=False, masked=True)
    run_tokens(torch.float16, 1, 80, scans=False, host=True, is_quantised=True, ranks_by_keys=False)
    run_hot_units(torch.bfloat16, 4, 128, host=False)
    query, key = (torch.empty(2, heads, 96, 64, dtype=torch.bfloat16) for heads in (4, 2))
    received.received_attention(query, key, 0.1)


def compile_more() -> None:
    """What else differs: dtypes, heads, caches, forms of metadata, lengths on host and device, sections."""
    run_all(torch.bfloat16, 4, narrow=True, host=True, pages=256, budget=512)
    run_all(torch.float16, 1, narrow=True, host=True, pages=9000, budget=512)
    run_all(torch.float32, 4, narrow=False, host=False, pages=9000, budget=512)
    run_all(torch.bfloat16, 1, narrow=False, host=False, pages=256, budget=512, is_quantised=True, moments=True)
    run_all(torch.bfloat16, 4, narrow=False, host=False, pages=256, budget=512, moments=True)
    run_query_tokens(torch.bfloat16, 16, 8, 128, is_quantised=True)
    run_query_tokens(torch.float16, 3, 1, 80, host=True)
    run_sketches(torch.float16, 1, 80, is_quantised=True)
    run_tokens(torch.bfloat16, 7, 64, scans=True, host=True)
    run_tokens(torch.bfloat16, 8, 256, scans=True, host=False, masked=True)
    run_tokens(torch.float16, 1, 80, scans=False, host=False, is_quantised=True)
    run_tokens(torch.bfloat16, 64, 256, scans=False, host=False)
    run_tokens(torch.bfloat16, 4, 128, scans=True, host=False, ranks_by_keys=False)
    run_tokens(torch.bfloat16, 2, 64, scans=False, host=True, softcap=50.0, masked=True)
    run_hot_units(torch.float16, 1, 80, host=True)
    run_hot_units(torch.bfloat16, 4, 128, host=False, is_quantised=True)
    query, key = (torch.empty(2, heads, 96, 256, dtype=torch.bfloat16) for heads in (4, 2))
    received.received_attention(query, key, 0.1)


def main(which: str) -> None:
    """Compile `few` or `all`."""
    driver.set_active(NoGpu())
    # As vLLM sets one: whoever does has Triton write the constants of a kernel as JSON, which holds no function.
    triton.knobs.runtime.jit_post_compile_hook = lambda **_: None
    for module in (
        attention, counts, decode, fetch, masks, metadata, query_tokens, scores, choice, received, sketch, token_decode
    ):  # fmt: skip
        module.launch = compile_only  # type: ignore[attr-defined]
    check_late_warps()
    compile_few()
    if which == "all":
        compile_more()


if __name__ == "__main__":
    if triton.knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: the interpreter does not compile")
    main(sys.argv[1])

"""Decode steps as they are served, one a layer, that a timing replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.ops import QuestOutput, make_workspace, quest_decode
from quest_attention.ops.triton.tuning import tune
from quest_attention.pages import PagedKV

__all__ = ["check_kernels", "quest_steps"]


def quest_steps(
    queries: Sequence[Tensor], caches: Sequence[PagedKV], lengths: Tensor, config: QuestConfig
) -> list[partial[QuestOutput]]:
    """A call for each layer, with scratch memory and output shared as in a model; the first has run.

    Args:
        queries: `[B, HQ, D]` for each layer, in the dtype of the keys.
        caches: One for each layer.
        lengths: `[B]` int32, of the sequences, all past the budget [tokens].
        config: What a step reads.

    Raises:
        RuntimeError: The fused kernel cannot hold the step, or it read another number of pages than the budget gives.
    """
    batch, num_heads = queries[0].shape[:2]
    workspace = make_workspace(caches[0], num_heads, config)
    if workspace is None or tune(caches[0], num_heads, config) is None:
        raise RuntimeError(f"batch {batch}, {caches[0].max_pages} pages: the fused kernel cannot hold this")
    out = torch.empty_like(queries[0])
    steps = [
        partial(quest_decode, q, kv, lengths, config, workspace=workspace, out=out)
        for q, kv in zip(queries, caches, strict=True)
    ]
    counts = steps[0]().selected.counts.tolist()
    if counts != [[config.page_budget] * caches[0].num_kv_heads] * batch:
        raise RuntimeError(f"read {counts} pages, expected {config.page_budget} of each row")
    return steps


def check_kernels(step: Callable[[], object]) -> None:
    """A step is one launch of the fused kernel and nothing else.

    Raises:
        RuntimeError: A profile shows other kernels.
    """
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = sorted({event.key for event in profile.key_averages() if event.self_device_time_total > 0})
    if names != ["_decode_kernel"]:
        raise RuntimeError(f"a step ran {names}, expected _decode_kernel alone")

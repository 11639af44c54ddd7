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

__all__ = ["check_kernels", "kernels_of", "quest_steps"]

_FUSED = "_decode_kernel"
"""The kernel that is all of a step by metadata of pages."""


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
        RuntimeError: Metadata scores pages and the fused kernel cannot hold the step; or the step read another number
            of pages or tokens than the budget gives.
    """
    batch, num_heads = queries[0].shape[:2]
    workspace = make_workspace(caches[0], num_heads, config)
    if caches[0].form.scores == "page" and (workspace is None or tune(caches[0], num_heads, config) is None):
        raise RuntimeError(f"batch {batch}, {caches[0].max_pages} pages: the fused kernel cannot hold this")
    out = torch.empty_like(queries[0])
    steps = [
        partial(quest_decode, q, kv, lengths, config, workspace=workspace, out=out)
        for q, kv in zip(queries, caches, strict=True)
    ]
    counts = steps[0]().selected.counts.tolist()
    if counts != [[config.unit_budget] * caches[0].num_kv_heads] * batch:
        what = (
            "pages"
            if config.units_per_page == 1
            else "tokens"
            if config.unit_size == 1
            else f"runs of {config.unit_size} tokens"
        )
        raise RuntimeError(f"read {counts} {what}, expected {config.unit_budget} of each row")
    return steps


def kernels_of(step: Callable[[], object]) -> dict[str, int]:
    """The kernels that a step launches, and how often each: what has to run one after the other."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return {event.key: event.count for event in profile.key_averages() if event.self_device_time_total > 0}


def check_kernels(step: Callable[[], object]) -> None:
    """A step is one launch of the fused kernel and nothing else.

    Raises:
        RuntimeError: A profile shows other kernels.
    """
    kernels = kernels_of(step)
    if kernels != {_FUSED: 1}:
        raise RuntimeError(f"a step ran {kernels}, expected {_FUSED} alone, once")

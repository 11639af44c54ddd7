"""Decode steps as they are served, one a layer, that a timing replays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.ops import QuestOutput, make_workspace, quest_decode
from quest_attention.ops.triton.launch import launching_in_turn
from quest_attention.ops.triton.tuning import tune
from quest_attention.pages import PagedKV

__all__ = ["LaunchTime", "check_kernels", "launch_times", "quest_steps"]

_LEAST_SHARE = 1 / 3
"""Of the budget that a step reads at least where estimates alone choose: four fifths are aimed at."""
_FUSED = ("_decode_kernel",)
"""The kernel that is all of a step by metadata of pages."""
_RANKING = ("prepare_kernel", "scan_kernel", "scan_kernel")
"""Those that begin a step by single tokens."""
_BY_KEYS = (*_RANKING, "pick_kernel", "choose_kernel", "_attend_kernel")
"""All of one where keys rank candidates."""
_ALONE = (*_RANKING, "attend_passing_kernel")
"""All of one where estimates alone choose."""


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
            of pages or tokens than the budget gives: where kernels let estimates alone choose, more, or less than a
            third.
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
    # Where estimates alone choose single tokens, kernels read what a sample of them lets pass.
    is_about = workspace is not None and config.unit_size == 1 and not config.candidate_factor
    least = int(_LEAST_SHARE * config.unit_budget) if is_about else config.unit_budget
    if not all(least <= count <= config.unit_budget for row in counts for count in row):
        what = (
            "pages"
            if config.units_per_page == 1
            else "tokens"
            if config.unit_size == 1
            else f"runs of {config.unit_size} tokens"
        )
        raise RuntimeError(f"read {counts} {what}, expected {least} to {config.unit_budget} of each row")
    return steps


class LaunchTime(NamedTuple):
    """A launch of a step.

    Attributes:
        kernel: Its name.
        alone: The time it takes where it waits for nothing [us].
    """

    kernel: str
    alone: float


def launch_times(steps: Sequence[Callable[[], object]], repeats: int = 10) -> list[LaunchTime]:
    """The launches of a step in their order, each with the time that it takes alone: the median of all steps.

    In a step launches overlap where a GPU starts them early, and wait for one another: it takes another time than they
    do together.

    Args:
        steps: Alike, over different data, more in all than the cache of the GPU holds.
        repeats: How often each runs.

    Raises:
        RuntimeError: The steps do not launch the same kernels in the same order.
    """
    with launching_in_turn():
        for step in steps:
            step()  # compiles
        with warnings.catch_warnings():
            # Newer torch says of every profile that it forgets its events when it ends.
            warnings.filterwarnings("ignore", "Warning: Profiler clears events")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(repeats):
                    for step in steps:
                        step()
                torch.cuda.synchronize()
    ran = [event for event in profile.events() if event.device_type.name == "CUDA"]
    ran.sort(key=lambda event: event.time_range.start)
    runs = repeats * len(steps)
    each = len(ran) // runs
    names = [event.name for event in ran]
    if not ran or len(ran) % runs or names != names[:each] * runs:
        raise RuntimeError(f"{runs} steps launched {names}, expected the same kernels in each")
    return [LaunchTime(names[nth], median(event.device_time for event in ran[nth::each])) for nth in range(each)]


def check_kernels(step: Callable[[], object], config: QuestConfig) -> None:
    """A step that chooses whole pages or single tokens runs the kernels that are made for it, and nothing else.

    Args:
        step: A call of it.
        config: What it reads.

    Raises:
        RuntimeError: A profile shows other kernels.
    """
    kernels = tuple(launched.kernel for launched in launch_times([step], 1))
    expected = _FUSED if config.units_per_page == 1 else _BY_KEYS if config.candidate_factor else _ALONE
    if kernels != expected:
        raise RuntimeError(f"a step ran {', '.join(kernels)}; expected {', '.join(expected)}")

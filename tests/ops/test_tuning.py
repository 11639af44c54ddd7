"""Shapes of launches: those measured where they were measured, as many programs as fill another GPU elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from quest_attention import PagedKV, QuestConfig
from quest_attention.pages import num_pages

tuning = pytest.importorskip("quest_attention.ops.triton.tuning", reason="Triton is for Linux")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _forget_devices() -> None:
    tuning.filling_programs.cache_clear()


def cache_of(batch: int, tokens: int, heads: int = 8) -> PagedKV:
    """A cache in bfloat16 of whose memory there is one page."""
    pages = num_pages(tokens, 16)
    keys = torch.empty(1, 16, 1, 128, dtype=torch.bfloat16).expand(pages, -1, heads, -1)
    bounds = torch.empty(1, 1, 2, 128, dtype=torch.bfloat16).expand(pages, heads, -1, -1)
    return PagedKV(keys, keys, bounds, torch.zeros(1, 1, dtype=torch.int32).expand(batch, pages))


@pytest.mark.parametrize(("multiprocessors", "programs"), [(132, 528), (114, 456), (108, 432), (58, 232), (16, 64)])
def test_a_gpu_is_asked_once_how_many_programs_fill_it(
    multiprocessors: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(multi_processor_count=multiprocessors)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert [tuning.filling_programs(GPU) for _ in range(3)] == [programs] * 3
    assert asked == [GPU]
    assert tuning.filling_programs(CPU) == 528, "the interpreter does as the cards that were measured"
    tuning.filling_programs(torch.device("cuda", 1))
    assert asked == [GPU, torch.device("cuda", 1)], "two GPUs may differ"


MEASURED = [
    # batch, tokens, query heads: section_pages, score_splits, splits
    ((1, 8192, 32), (2048, 8, 32)),
    ((1, 32768, 32), (2048, 32, 32)),
    ((1, 131072, 32), (2048, 16, 32)),
    ((4, 131072, 32), (2048, 16, 32)),
    ((8, 32768, 32), (2048, 16, 16)),
    ((1, 8192, 8), (2048, 16, 32)),
    ((4, 131072, 8), (2048, 16, 16)),
]


@pytest.mark.parametrize(("problem", "shape"), MEASURED)
def test_shapes_are_those_that_were_measured(problem: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    batch, tokens, heads = problem
    found = tuning.tune(cache_of(batch, tokens), heads, QuestConfig.paper())
    assert (found.section_pages, found.score_splits, found.splits) == shape


def test_programs_follow_the_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    kv, config = cache_of(8, 131072), QuestConfig.paper(4096)
    wide = tuning.tune(kv, 32, config)
    assert tuning.attending_programs(512, 16, 8, CPU) == 66
    assert tuning.attending_programs(512, 16, 32, CPU) == 33  # with 34 a few would wait for a turn of their own
    assert tuning.scoring_programs(8192, 64, 32, CPU) == 33
    monkeypatch.setattr(tuning, "MEASURED_MULTIPROCESSORS", 264)
    tuning.filling_programs.cache_clear()
    assert tuning.attending_programs(512, 16, 8, CPU) == 128
    assert tuning.scoring_programs(8192, 64, 32, CPU) == 66
    wider = tuning.tune(kv, 32, config)
    assert (wide.splits, wider.splits) == (16, 33)
    assert wider._replace(splits=16) == wide


def test_the_cards_that_were_measured_are_named() -> None:
    assert (tuning.MEASURED_ON, tuning.MEASURED_MULTIPROCESSORS) == (("H100", "H200"), 132)

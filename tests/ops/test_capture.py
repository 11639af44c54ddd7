"""`capturing`: nothing is freed behind the back of a CUDA graph while it is captured."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch

from quest_attention.ops.capture import capturing


class InACycle:
    """Freed by the collector alone; notes when."""

    def __init__(self, freed: list[bool], held: object = None) -> None:
        self.itself, self.freed, self.held = self, freed, held

    def __del__(self) -> None:
        self.freed.append(gc.isenabled())


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def graph(graph: object, **_: Any) -> Iterator[None]:
        del graph
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)


def make_many() -> None:
    """What has the collector look for cycles, of all generations."""
    kept: list[list[object]] = []
    for _ in range(200_000):
        kept.append([kept])


@pytest.mark.usefixtures("stand_in")
def test_cycles_are_left_alone_until_the_capture_ends() -> None:
    freed: list[bool] = []
    InACycle(freed)
    with capturing(None):  # type: ignore[arg-type]
        make_many()
        assert not freed
    assert gc.isenabled()
    gc.collect()
    assert freed == [True]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("was_collecting", [True, False])
def test_the_collector_is_as_it_was_after_a_failed_capture(was_collecting: bool) -> None:
    if not was_collecting:
        gc.disable()
    try:
        with suppress(RuntimeError), capturing(None):  # type: ignore[arg-type]
            assert not gc.isenabled()
            raise RuntimeError("operation not permitted")
        assert gc.isenabled() == was_collecting
    finally:
        gc.enable()


@pytest.mark.gpu
def test_a_graph_in_a_cycle_does_not_end_the_capture_of_another() -> None:
    freed: list[bool] = []
    numbers = torch.zeros(8, device="cuda")
    earlier, graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with capturing(earlier):
        numbers += 1
    InACycle(freed, earlier)
    del earlier
    with capturing(graph):
        make_many()
        numbers += 1
    graph.replay()
    assert numbers.tolist() == [1.0] * 8
    gc.collect()
    assert freed

"""Memory of the host that a GPU reads and writes in place, and units fetched from it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from quest_attention import QuestConfig, quest_decode, update_page_metadata
from quest_attention.forms import FP8, Bounds, Sketch
from quest_attention.hf.host_memory import host_empty
from quest_attention.hf.host_storage import HostStorage
from quest_attention.hf.offload import Offload, PoolSize
from quest_attention.hf.storage import KVStorage
from quest_attention.hf.workspaces import Workspaces
from quest_attention.ops import HotUnits, resolve_backend
from quest_attention.pages import PagedKV

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def test_a_tensor_of_the_hosts_is_one_of_the_devices() -> None:
    before = torch.cuda.memory_allocated()
    far = host_empty((3, 5, 128), torch.bfloat16, DEVICE)
    assert (far.device.type, far.dtype, far.shape, torch.cuda.memory_allocated()) == (
        "cuda", torch.bfloat16, (3, 5, 128), before,
    )  # fmt: skip
    near = torch.randn(3, 5, 128, device=DEVICE).to(torch.bfloat16)
    far.copy_(near)
    assert torch.equal(far, near)
    rows = torch.tensor([2, 0], device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    far.index_select(0, rows)
    with torch.cuda.graph(graph):
        found = far.index_select(0, rows)
    far.copy_(2 * near)
    graph.replay()
    assert torch.equal(found, 2 * near[rows])
    del far, found, graph
    gc.collect()
    assert host_empty((0, 4), torch.float32, DEVICE).shape == (0, 4)


def held_bytes() -> int:
    """What this process holds of the host's memory [bytes]; others use the machine too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def test_locked_memory_is_given_back() -> None:
    size = 1 << 30
    before = held_bytes()
    for _ in range(3):
        far = host_empty((size,), torch.uint8, DEVICE)
        far.fill_(1)
        torch.cuda.synchronize()
        assert held_bytes() > before + size // 2
        del far
        gc.collect()
    assert held_bytes() < before + size // 2


def far_cache(form: Bounds | Sketch, length: int, dtype: torch.dtype = torch.bfloat16) -> tuple[PagedKV, PagedKV]:
    """A cache on the device, and one with its keys and values in host memory."""
    shape = (2, 4, length, 128)
    keys, values = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    metadata = torch.empty(
        *shape[:2], length // 16, *form.shape(16, 128), device=DEVICE, dtype=form.dtypes(keys.dtype)[0]
    )
    scale = torch.ones(1, device=DEVICE) if dtype == FP8 else None
    scales = {"key_scale": scale, "value_scale": scale}
    near = PagedKV.from_contiguous(keys, values, metadata, form=form, **scales)
    update_page_metadata(near, length, length)
    stored = [host_empty(shape, dtype, DEVICE).copy_(tensor) for tensor in (keys, values)]
    return near, PagedKV.from_contiguous(*stored, metadata, form=form, **scales)


@pytest.mark.parametrize("size", [16, 1])
def test_units_come_and_go_as_by_the_pytorch_path(size: int) -> None:
    _, far = far_cache(Bounds(), 16_000)
    pools = [HotUnits.allocate(far, size, 700) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for turn in range(20):
        wanted = torch.stack([torch.randperm(16_000 // size, generator=generator)[:300] for _ in range(8)])
        wanted = wanted.view(2, 4, 300).to(DEVICE, torch.int32)
        wanted[..., :200] = torch.arange(200, device=DEVICE)  # these come again
        wanted = torch.where((wanted < 200) & (torch.arange(300, device=DEVICE) >= 200), -1, wanted)
        for pool, backend in zip(pools, ("torch", "triton"), strict=True):
            verbs = resolve_backend(backend, DEVICE).verbs
            verbs.fetch_units(far, pool, wanted, 16_000, keys_only=turn % 3 == 0)
        for name in ("table", "owners", "stamps", "valued", "hands", "clock", "counts"):
            assert torch.equal(getattr(pools[0], name), getattr(pools[1], name)), name
    held = pools[0].owners >= 0
    rows, valued = (which.repeat_interleave(size, 2) for which in (held, held & (pools[0].valued > 0)))
    assert torch.equal(pools[0].keys[rows], pools[1].keys[rows])
    assert torch.equal(pools[0].values[valued], pools[1].values[valued])


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_steps_over_the_pool_are_those_over_the_cache(dtype: torch.dtype, group: int) -> None:
    """Single tokens, bit by bit: the same kernels choose and attend. Of pages the same are chosen."""
    tokens = QuestConfig(512, metadata="sketch", selection_unit="token")
    pages = QuestConfig(512, metadata="bounds")
    for config, form in ((tokens, Sketch(16)), (pages, Bounds())):
        near, far = far_cache(form, 32_000, dtype)
        hot = HotUnits.allocate(far, config.unit_size, 4_096 // config.unit_size)
        for _ in range(5):
            query = torch.randn(2, 4 * group, 128, device=DEVICE).to(torch.bfloat16)
            expected, step = (
                quest_decode(query, near, 32_000, config),
                quest_decode(query, far, 32_000, config, hot=hot),
            )
            assert torch.equal(step.selected.units, expected.selected.units)
            if config is tokens:
                assert torch.equal(step.output, expected.output)
            else:
                torch.testing.assert_close(step.output, expected.output, rtol=2e-2, atol=2e-3)
        looked_up, fetched, _, _, in_place = hot.counts.tolist()
        assert 0 < fetched < looked_up
        assert (in_place > 0) == (config is tokens), "cold candidates and the sample"


def test_prompts_arrive_whole() -> None:
    """Chunks go out on a stream of their own: what is read afterwards, or goes on at an odd place, has all of them."""
    length, chunk = 30_011, 2_500
    keys, values = (torch.randn(1, 8, length, 128, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    config = QuestConfig(512, metadata="sketch", selection_unit="token")
    given = {
        "batch": 1, "length": length, "dtype": torch.bfloat16, "config": config, "has_metadata": True,
        "workspaces": Workspaces(),
    }  # fmt: skip
    near = KVStorage(keys, values, **given)
    far = HostStorage(keys, values, pool=PoolSize(Offload(4_096), 1), **given)
    for start in range(0, length, chunk):
        new = [tensor[:, :, start : start + chunk].clone() for tensor in (keys, values)]
        for storage in (near, far):
            storage.before_write(start)
            storage.write(*new, start)
        brought, expected = (
            storage.for_attention(*new, start + new[0].shape[2], chooses=False) for storage in (far, near)
        )
        assert all(map(torch.equal, brought, expected))
        del new
    far.arrive()
    assert torch.equal(far.keys[:, :, :length], keys)
    assert torch.equal(far.values[:, :, :length], values)
    whole = length // 16
    assert near.metadata is not None and far.metadata is not None
    assert torch.equal(far.metadata[:, :, :whole], near.metadata[:, :, :whole])

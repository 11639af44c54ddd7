"""Which backend `auto` takes: by the device and by the dtype of the keys; what it says of itself is true."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from backends import BACKENDS, available, interpreted
from caches import make_cache
from likeness import query_for
from quest_attention import QuestConfig, QuestValueError, quest_decode, update_page_metadata
from quest_attention.config import Backend
from quest_attention.ops import (
    append_slots,
    append_token,
    dispatch,
    make_workspace,
    reference,
    resolve_backend,
    update_slot_metadata,
)
from quest_attention.pages import KEY_MAX, KEY_MIN

tuning = pytest.importorskip("quest_attention.ops.triton.tuning", reason="Triton is for Linux")


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton as it is where it compiles."""
    monkeypatch.setattr("quest_attention.ops.triton.launch.is_interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    dispatch._why_no_triton.cache_clear()
    yield
    dispatch._why_no_triton.cache_clear()


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_auto_looks_for_the_dtype_of_the_keys() -> None:
    for dtype in (None, torch.float32, torch.bfloat16, torch.float16):
        assert resolve_backend("auto", "cuda", dtype).name == "triton"
    chosen = resolve_backend("auto", "cuda", torch.float64)
    assert (chosen.name, chosen.verbs) == ("torch", resolve_backend("torch", "cuda").verbs)
    assert chosen.reason == "chosen for device cuda: the Triton kernels do not compute in torch.float64"


def test_every_verb_resolves_by_the_dtype_of_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def spy(name: Backend, device: torch.device, dtype: object = None) -> dispatch.ResolvedBackend:
        asked.append(dtype)
        return resolve_backend(name, device)

    monkeypatch.setattr("quest_attention.ops.resolve_backend", spy)
    cache, rows = make_cache([30, 8], dtype=torch.float64), torch.zeros(2, 2, 16, dtype=torch.float64)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens)
    append_token(cache.kv, rows, rows, cache.seq_lens)
    append_slots(cache.kv, rows, rows, torch.tensor([-1, -1]))
    update_slot_metadata(cache.kv.metadata, rows, torch.tensor([-1, -1]), page_size=8)
    make_workspace(cache.kv, 4, QuestConfig(16, 8))
    quest_decode(query_for(cache, 2), cache.kv, cache.seq_lens, QuestConfig(16, 8))
    assert asked == [torch.float64] * 6


@interpreted
def test_kernels_refuse_keys_whose_bounds_they_would_round() -> None:
    """A float64 key rounded to float32 may lie beyond its bound."""
    cache = make_cache([20], dtype=torch.float64)
    kv, rows, slots = cache.kv, torch.zeros(1, 2, 16, dtype=torch.float64), torch.tensor([0])
    before = kv.metadata.clone()
    for call in (
        lambda: update_page_metadata(kv, 20, 20, backend=available("triton")),
        lambda: append_token(kv, rows, rows, torch.tensor([20]), backend="triton"),
        lambda: append_slots(kv, rows, rows, slots, backend="triton"),
        lambda: update_slot_metadata(kv.metadata, rows, slots, page_size=8, backend="triton"),
    ):
        with pytest.raises(QuestValueError, match=r"keys\.dtype: got torch\.float64"):
            call()
    torch.testing.assert_close(kv.metadata, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_narrow_bounds_of_float64_keys_bound(backend: Backend) -> None:
    """Just outside of a number that both 8 bits and float32 have."""
    mine, oracle = (make_cache([8], dtype=torch.float64, narrow=True) for _ in range(2))
    for cache in (mine, oracle):
        cache.kv.keys[:] = 0.3125
        cache.kv.keys[:, 3], cache.kv.keys[:, 5] = 0.3125 + 1e-12, 0.3125 - 1e-12
    update_page_metadata(mine.kv, 8, 8, backend=backend)
    reference.update_page_metadata(oracle.kv, [8], [8])
    page = int(mine.kv.page_table[0, 0])
    bounds = mine.kv.metadata[page].double()
    assert bool((bounds[:, KEY_MAX] > 0.3125).all()) and bool((bounds[:, KEY_MIN] < 0.3125).all())
    assert torch.equal(bounds, oracle.kv.metadata[page].double())


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_the_reason_holds_for_every_problem() -> None:
    """A step with a mask, or with large budgets over long contexts, takes several launches: nobody promises one."""
    assert resolve_backend("auto", "cuda").reason == (
        "chosen for device cuda: the Triton kernels, a decode step in one launch, over single "
        "tokens in four or six, or in more where it has a mask or "
        "both its context and its budget are very large"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_named_says_so(backend: Backend) -> None:
    assert resolve_backend(available(backend), "cpu", torch.float64).reason.startswith("asked for by name")

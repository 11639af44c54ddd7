"""Tokens written by slot, as a server writes them: prompts in pieces, single tokens, padding, pages used again."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, FAST_BACKENDS, available
from caches import LAYOUTS, make_cache
from quest_attention import QuestValueError
from quest_attention.config import Backend
from quest_attention.ops import Selection, append_slots, count_reads, reference, update_slot_metadata
from quest_attention.pages import KEY_MAX, KEY_MIN, PagedKV

DTYPES = (torch.float32, torch.bfloat16)


def a_servers_batches(page_size: int, num_pages: int, steps: int, seed: int) -> list[Tensor]:
    """Slots of each step: sequences get a prompt, a chunk or a token, lose tokens, end, and give their pages back."""
    rng = random.Random(seed)
    free, sequences, batches = list(range(num_pages)), [], []
    rng.shuffle(free)
    for _ in range(steps):
        if len(sequences) < 3 and rng.random() < 0.6:
            sequences.append([0, []])  # tokens, pages
        slots: list[int] = []
        for sequence in list(sequences):
            length, pages = sequence
            if rng.random() < 0.15:
                sequences.remove(sequence)
                free += pages
                continue
            if rng.random() < 0.2:
                length = max(0, length - rng.randrange(1, 4))  # speculated tokens that were not accepted
            for position in range(length, length + rng.choice([0, 1, 1, 2, 5, 3 * page_size])):
                if position // page_size >= len(pages):
                    if not free:
                        break
                    pages.append(free.pop(0))
                slots.append(pages[position // page_size] * page_size + position % page_size)
                length = position + 1
            sequence[0] = length
        batches.append(torch.tensor(slots + [-1] * rng.randrange(3), dtype=torch.int64))
    return batches


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("narrow", [False, True], ids=["as keys", "8 bits"])
def test_a_servers_cache_is_the_oracles(backend: Backend, layout: str, dtype: torch.dtype, narrow: bool) -> None:
    mine, oracle = (make_cache([64], layout=layout, dtype=dtype, narrow=narrow).kv for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    batches = a_servers_batches(mine.page_size, mine.keys.shape[0], 12, seed=1)
    assert sum(len(slots) for slots in batches) > 50
    for slots in batches:
        keys, values = torch.randn(2, len(slots), mine.num_kv_heads, mine.head_dim, generator=generator).to(dtype)
        append_slots(mine, keys, values, slots, backend=available(backend))
        reference.append_slots(oracle, keys, values, slots.tolist())
        for part in ("keys", "values", "metadata"):
            ours, exact = (getattr(kv, part).float() for kv in (mine, oracle))
            torch.testing.assert_close(ours, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_bounds_alone_leave_the_cache_alone(backend: Backend) -> None:
    mine, oracle = (make_cache([40]).kv for _ in range(2))
    keys = torch.randn(13, mine.num_kv_heads, mine.head_dim)
    slots = torch.tensor([*range(8, 16), -1, 5, 6, 7, -1], dtype=torch.int32)
    before = mine.keys.clone()
    update_slot_metadata(mine.metadata, keys, slots, page_size=mine.page_size, backend=available(backend))
    reference.update_slot_metadata(oracle.metadata, keys, slots.tolist(), oracle.page_size, oracle.form)
    torch.testing.assert_close(mine.metadata, oracle.metadata, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(mine.keys, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_were_taken_back_stay_within_the_bounds(backend: Backend) -> None:
    kv = make_cache([8]).kv
    rows = torch.randn(6, kv.num_kv_heads, kv.head_dim)
    append_slots(kv, rows, rows, torch.arange(6), backend=available(backend))
    append_slots(kv, rows[:1], rows[:1], torch.tensor([3]), backend=backend)  # tokens 3 to 5 were speculated
    assert (kv.metadata[0, :, KEY_MAX] >= rows.amax(0)).all() and (kv.metadata[0, :, KEY_MIN] <= rows.amin(0)).all()
    append_slots(kv, rows[:1], rows[:1], torch.tensor([0]), backend=backend)  # somebody else's page now
    assert (kv.metadata[0, :, KEY_MAX] == rows[0]).all() and (kv.metadata[0, :, KEY_MIN] == rows[0]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: Backend) -> None:
    kv = make_cache([8]).kv
    before = kv.metadata.clone()
    for slots in (torch.empty(0, dtype=torch.int64), torch.tensor([-1, -1])):
        rows = torch.randn(len(slots), kv.num_kv_heads, kv.head_dim)
        append_slots(kv, rows, rows, slots, backend=available(backend))
    torch.testing.assert_close(kv.metadata, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mistakes_are_named_and_nothing_is_written(layout: str) -> None:
    kv: PagedKV = make_cache([40], layout=layout).kv
    rows = torch.randn(2, kv.num_kv_heads, kv.head_dim)
    slots, before = torch.tensor([0, 1]), kv.metadata.clone()
    capacity = kv.keys.shape[0] * kv.page_size
    for match, keys, values, where in [
        ("slots.shape", rows, rows, slots[:1]),
        ("slots.dtype", rows, rows, slots.float()),
        (f"slots: got {capacity}, expected less", rows, rows, torch.tensor([0, capacity])),
        ("keys.shape", rows[:, :1], rows, slots),
        ("keys.dtype", rows.double(), rows, slots),
        ("values.shape", rows, rows[..., :3], slots),
    ]:
        with pytest.raises(QuestValueError, match=match):
            append_slots(kv, keys, values, where)
    for match, metadata, keys in [
        ("metadata.shape", kv.metadata[:, :, :1], rows),
        ("keys.shape", kv.metadata, rows[0]),
        ("metadata.dtype", kv.metadata.half(), rows),
    ]:
        with pytest.raises(QuestValueError, match=match):
            update_slot_metadata(metadata, keys, slots, page_size=kv.page_size)
    torch.testing.assert_close(kv.metadata, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 5, 300])
def test_reads_are_counted(backend: Backend, rows: int) -> None:
    rng = random.Random(rows)
    lengths = [rng.choice([0, 1, 31, 32, 33, 1000]) for _ in range(rows)]
    counts = [[min(4, -(-length // 8)), rng.randint(0, 4)] for length in lengths]  # heads may read different numbers
    counters, expected = torch.tensor([1, 2, 3, 4]), [1, 2, 3, 4]
    selected = Selection(
        torch.zeros(rows, 2, 4, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32).view(rows, 2), 8
    )
    for _ in range(2):
        where = torch.tensor(lengths, dtype=torch.int32)
        count_reads(selected, where, counters, token_budget=32, backend=available(backend))
        more = reference.count_reads(counts, lengths, 8, 32)
        expected = [old + new for old, new in zip(expected, more, strict=True)]
    assert counters.tolist() == expected


def test_counters_of_another_shape_are_refused() -> None:
    selected = Selection(torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32), 8)
    for counters in (torch.zeros(3, dtype=torch.int64), torch.zeros(4)):
        with pytest.raises(QuestValueError, match="counters"):
            count_reads(selected, torch.ones(1, dtype=torch.int32), counters, token_budget=32)

"""Which programs share a row: as many as keep a GPU busy, whatever pads a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backends import available, interpreted
from caches import make_cache
from likeness import query_for
from quest_attention import QuestConfig, update_page_metadata
from quest_attention.forms import Sketch
from quest_attention.ops import HotUnits, Step

pytestmark = interpreted

available("triton")
import triton  # noqa: E402 - after what skips the file
import triton.language as tl  # noqa: E402

from quest_attention.ops.triton import token_decode, token_workspace  # noqa: E402
from quest_attention.ops.triton.launch import launch  # noqa: E402
from quest_attention.ops.triton.sharing import live_sequences, programs_for, shares_of, sharing  # noqa: E402

AT_ONCE = 528

SHARING = [
    # rows, programs of each: as many as run at once where they fill the GPU, else more
    (1, 528), (5, 105), (8, 66), (48, 11), (64, 8), (112, 4), (128, 4), (240, 2), (528, 1),
    (192, 5), (200, 5), (272, 5), (320, 3), (784, 2), (2048, 1), (4000, 1),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "programs"), SHARING)
def test_a_row_is_shared_so_that_no_turn_of_programs_is_half_empty(rows: int, programs: int) -> None:
    assert programs_for(rows, AT_ONCE, AT_ONCE) == programs
    assert programs_for(rows, 32, AT_ONCE) == min(programs, 32)


def test_two_thirds_of_the_programs_that_run_at_once_have_a_row() -> None:
    for rows in range(1, 2049):
        together = rows * programs_for(rows, AT_ONCE, AT_ONCE)
        turns = -(-together // AT_ONCE)
        assert together >= 2 / 3 * AT_ONCE * turns, (rows, together)


@triton.jit(do_not_specialize=["lengths", "sequences", "heads", "each", "programs", "parts"])
def _look(found, lengths, sequences, heads, each, programs, parts, AT_ONCE: tl.constexpr):  # noqa: N803 - a constant
    live = live_sequences(lengths, sequences)
    tl.store(found, live)
    tl.store(found + 1, sharing(live, sequences, heads, each, programs, parts, AT_ONCE))


def look(lengths: Tensor | int, sequences: int, heads: int, tiles: int) -> list[int]:
    """How many sequences a kernel finds, and the programs of a row."""
    found = torch.zeros(2, dtype=torch.int32)
    shares = shares_of(sequences, heads, tiles, AT_ONCE)
    launch(_look, (1,), found, lengths, sequences, heads, shares.each, shares.programs, tiles, AT_ONCE=AT_ONCE)
    return found.tolist()


@pytest.mark.parametrize("tiles", [16, 256])
def test_a_kernel_shares_as_the_host_does(tiles: int) -> None:
    for live in (1, 2, 5, 6, 7, 24, 25, 26, 31, 33, 98, 300):
        each = programs_for(8 * live, tiles, AT_ONCE)
        assert look(torch.ones(live, dtype=torch.int32), live, 8, tiles) == [live, each]
        assert look(7, live, 8, tiles) == [live, each], "a length that the host knows"
        padded = torch.zeros(live + 9, dtype=torch.int32)
        padded[:live] = 1
        assert look(padded, live + 9, 8, tiles) == [live, each], "whatever pads the batch"


def test_sequences_of_no_tokens_among_others() -> None:
    assert look(torch.tensor([0, 3, 0, 5, 0, 0], dtype=torch.int32), 6, 1, 64)[0] == 4
    assert look(torch.zeros(6, dtype=torch.int32), 6, 1, 64)[0] == 1


def test_a_launch_has_the_programs_of_any_number_of_sequences() -> None:
    for sequences in (1, 2, 8, 25, 98):
        shares = shares_of(sequences, 8, 256, AT_ONCE)
        assert shares.each == programs_for(8 * sequences, 256, AT_ONCE) and shares.programs <= 3 * AT_ONCE
        for live in range(1, sequences + 1):
            each = programs_for(8 * live, 256, AT_ONCE)
            assert 8 * live * each <= shares.programs and each <= shares.most


@pytest.mark.parametrize("where", ["everywhere", "together"])
def test_what_passes_is_shared_evenly_wherever_it_lies(where: str) -> None:
    """In a table that has room for 32 times as many tokens."""
    cache = make_cache([1000], heads=1, dim=16, page_size=16, form=Sketch(16))
    if where == "together":  # as many as pass, or nearly
        token = torch.arange(600, 760)
        cache.kv.keys[cache.kv.page_table[0, token // 16].long(), token % 16, 0] += 4 * query_for(cache, 2)[0].sum(0)
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    table = torch.nn.functional.pad(cache.kv.page_table, (0, 2048 - cache.kv.max_pages))
    kv = replace(cache.kv, page_table=table, contiguous=None)
    config = QuestConfig(256, metadata="sketch", selection_unit="token", candidate_factor=0)
    workspace = token_workspace.make_token_workspace(kv, 2, config)
    assert workspace is not None
    workspace.partial_lse.fill_(float("-inf"))
    step = Step(query=query_for(cache, 2), kv=kv, seq_lens=cache.seq_lens, config=config, workspace=workspace)
    done = token_decode.decode_tokens(step)
    assert done is not None
    total = int(done[1].counts[0, 0])
    attended = (workspace.partial_lse.view(-1, 2)[:, 0] > float("-inf")).nonzero().flatten().tolist()
    assert total > 150 and attended == list(range(-(-total // 16))), "16 tokens each, and one the rest"


@pytest.mark.parametrize(("factor", "is_masked"), [(0, False), (4, False), (0, True)])
@pytest.mark.parametrize("lengths", [[413, 700, 0, 0, 0], [0, 413, 0, 700, 60, 0]], ids=["behind", "among"])
def test_what_pads_a_batch_changes_nothing(
    lengths: list[int], factor: int, is_masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By so few programs at once that more sequences have fewer each."""
    monkeypatch.setattr("quest_attention.ops.triton.token_workspace.filling_programs", lambda _: 24)
    cache = make_cache([max(1, n) for n in lengths], dim=16, page_size=16, form=Sketch(16))
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    config = QuestConfig(96, metadata="sketch", selection_unit="token", candidate_factor=factor)
    query, padded = query_for(cache, 2), torch.tensor(lengths, dtype=torch.int32)
    has = [b for b, length in enumerate(lengths) if length]
    alone = replace(cache.kv, page_table=cache.kv.page_table[has])
    mask = torch.arange(700).expand(len(lengths), -1) % 7 > 0 if is_masked else None
    found = []
    for q, kv, seq_lens, token_mask in (
        (query, cache.kv, padded, mask),
        (query[has], alone, padded[has], None if mask is None else mask[has]),
    ):
        step = Step(query=q, kv=kv, seq_lens=seq_lens, config=config, token_mask=token_mask)
        done, listed = token_decode.decode_tokens(step), token_decode.choose_tokens(step)
        assert done is not None and listed is not None
        assert torch.equal(listed.units, done[1].units) and torch.equal(listed.counts, done[1].counts)
        found.append(done)
    (output, selected), (expected, wanted) = found
    torch.testing.assert_close(output[has], expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(selected.units[has], wanted.units)
    assert torch.equal(selected.counts[has], wanted.counts)
    none = [b for b, length in enumerate(lengths) if not length]
    assert not output[none].any() and not selected.counts[none].any() and (selected.units[none] == -1).all()


@pytest.mark.parametrize("at_once", [24, AT_ONCE])
def test_a_pool_of_hot_tokens_beside_several_sequences(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes is then listed by programs that are shared so, and attended to by others."""
    monkeypatch.setattr("quest_attention.ops.triton.token_workspace.filling_programs", lambda _: at_once)
    cache = make_cache([413, 300, 260], heads=8, dim=16, page_size=16, form=Sketch(16), layout="contiguous")
    update_page_metadata(cache.kv, cache.seq_lens, cache.seq_lens, backend="torch")
    config = QuestConfig(96, metadata="sketch", selection_unit="token", candidate_factor=0)
    workspace = token_workspace.make_token_workspace(cache.kv, 16, config)
    assert workspace is not None
    step = Step(query=query_for(cache, 2), kv=cache.kv, seq_lens=cache.seq_lens, config=config, workspace=workspace)
    expected = token_decode.decode_tokens(step)
    out = torch.full((3, 16, 16), float("nan"))
    done = token_decode.decode_tokens(replace(step, hot=HotUnits.allocate(cache.kv, 1, 150), out=out))
    assert expected is not None and done is not None
    assert torch.equal(done[1].units, expected[1].units)
    torch.testing.assert_close(done[0], expected[0], rtol=1e-5, atol=2e-6)
    assert not workspace.counters.any()

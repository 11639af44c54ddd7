"""Which programs of a launch share a row: as many for each row, with none for the sequences that pad a batch.

A server pads a batch to the size of a CUDA graph, with sequences of no tokens behind the others. A launch has as many
programs as the most that any number of sequences is shared among, and its programs look how many there are.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl

__all__ = ["Shares", "live_sequences", "programs_for", "share_of_list", "shares_of", "sharing"]

_TURN = tl.constexpr(1 / 16)
"""Of the work on a row, what a turn of programs takes beside it: measured with 48 to 784 rows of 8K to 128K tokens."""
_MOST_TURNS = tl.constexpr(3)
"""Turns among which is looked for those that take least: with more a launch would have many programs without work."""
_FULL_ENOUGH = tl.constexpr(10)
"""Programs of a row from which on one turn leaves no more than one in so many places empty."""
_LOOKED_AT = tl.constexpr(256)
"""Sequences looked at at a time."""


class Shares(NamedTuple):
    """How the programs of a launch share rows.

    Attributes:
        parts: Of a row at most, however few rows there are.
        programs: Of the launch, which are enough whatever number of sequences has tokens.
        each: Of these, those of a row where all sequences have tokens.
        most: Those of a row at most: where fewer sequences have tokens, each has more.
    """

    parts: int
    programs: int
    each: int
    most: int


@cache
def programs_for(rows: int, most: int, at_once: int) -> int:
    """Programs that share the work on each of so many rows.

    As many as run at once, or more where these are so few a row that much of the GPU would wait for the others: of 200
    rows two each are 400 of 528, and five each nearly fill two turns.

    Args:
        rows: Of the sequences that have tokens.
        most: Programs of a row at most.
        at_once: Programs that run at once.
    """
    some = [max(1, turns * at_once // rows) for turns in range(1, _MOST_TURNS.value + 1)]
    least = min(some, key=lambda programs: triton.cdiv(programs * rows, at_once) * (1 / programs + _TURN.value))
    return min(least, most)


def shares_of(sequences: int, num_kv_heads: int, parts: int, at_once: int) -> Shares:
    """How a launch for a batch is shared.

    Args:
        sequences: Of the batch: all of them have tokens, or the first ones.
        num_kv_heads: Rows of each.
        parts: Of a row at most.
        at_once: Programs that run at once.
    """
    return _up_to(triton.next_power_of_2(sequences), num_kv_heads, parts, at_once)[sequences - 1]


@cache  # a server asks for each size of a batch
def _up_to(sequences: int, num_kv_heads: int, parts: int, at_once: int) -> list[Shares]:
    """`shares_of` batches of each number of sequences up to one."""
    found, programs, most = [], 0, 0
    for rows in range(num_kv_heads, sequences * num_kv_heads + 1, num_kv_heads):
        each = programs_for(rows, parts, at_once)
        programs, most = max(programs, rows * each), max(most, each)
        found.append(Shares(parts, programs, each, most))
    return found


@triton.jit
def live_sequences(lengths, sequences):
    """How many sequences there are up to the last one that has tokens; one at least."""
    found = sequences
    if lengths.dtype.is_ptr():
        if sequences > 1:
            found = 1
            for start in range(0, sequences, _LOOKED_AT):
                nth = start + tl.arange(0, _LOOKED_AT)
                length = tl.load(lengths + nth, mask=nth < sequences, other=0)
                found = tl.maximum(found, tl.max(tl.where(length > 0, nth + 1, 1), 0))
    return found


@triton.jit
def sharing(live, sequences, num_kv_heads, each, programs, parts, AT_ONCE: tl.constexpr):
    """`programs_for` the rows of so many `live` sequences; `each`, `programs` and `parts` are those of `Shares`.

    Where nothing pads the batch it is `each`, which the host has found: divisions take a program a while.
    """
    if live < sequences:
        rows = live * num_kv_heads
        each = tl.maximum(AT_ONCE // rows, 1)
        if each < _FULL_ENOUGH:
            least = float("inf")
            for turns in tl.static_range(1, _MOST_TURNS + 1):
                some = tl.maximum(turns * AT_ONCE // rows, 1)
                cost = tl.cdiv(some * rows, AT_ONCE).to(tl.float32) * (1.0 / some.to(tl.float32) + _TURN)
                each = tl.where(cost < least, some, each)
                least = tl.minimum(cost, least)
        each = tl.maximum(tl.minimum(tl.minimum(each, parts), programs // rows), 1)
    return each


@triton.jit
def share_of_list(total, part, parts):
    """Where a part of a list of so many tokens begins and ends: each has as many as the others, in blocks of 16."""
    each = tl.cdiv(tl.cdiv(total, parts), 16) * 16
    start = tl.minimum(part * each, total)
    return start, tl.minimum(start + each, total)

"""Lossless decoding of a model of random weights: the acceptance of its drafts imposed, its rounds timed."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quest_attention.bench.timing import percentiles
from quest_attention.errors import QuestValueError
from quest_attention.hf import QuestCache, cache_argument, drafting

__all__ = ["Acceptance", "imposed_acceptance", "measured_acceptance", "time_rounds"]

_FIRST_ROUNDS = 8
"""Not counted: they allocate, are captured, and find out what steps take."""
_EVEN = (5**0.5 - 1) / 2
"""Golden ratio: its multiples fill the interval from 0 to 1 evenly, so that few draws have the shares of many."""


class Acceptance(NamedTuple):
    """How many drafts a model accepted, in a measurement.

    Attributes:
        at_least: Shares of the checks that accepted so many drafts at least, from one on.
        dense_layers: Leading layers that the drafts read whole.
    """

    at_least: list[float]
    dense_layers: int


def measured_acceptance(path: Path, *, text: str, arm: str) -> Acceptance:
    """What a measurement says of a kind of text.

    Args:
        path: What `benchmarks/acceptance.py` wrote.
        text: Of which kind, such as "book".
        arm: What drafted, such as "bounds@1024".

    Raises:
        QuestValueError: It holds no such row.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    for row in record["rows"]:
        if (row["text"], row["arm"], row["drafts"]) == (text, arm, "greedy"):
            return Acceptance(row["accepted_at_least"], record["settings"]["num_dense_layers"])
    known = sorted({f"{row['text']} {row['arm']}" for row in record["rows"]})
    raise QuestValueError("acceptance", f"{text} {arm}", f"one of {', '.join(known)}, as {path.name} has")


@contextlib.contextmanager
def imposed_acceptance(shares: Sequence[float], seed: int) -> Iterator[None]:
    """Let checks accept as many drafts as a measurement says, whatever they are: random weights seldom agree.

    Everything else runs as it would: a row of a batch accepts a number of its own. Numbers follow one another as draws
    of a low discrepancy, so that also few checks accept what the shares say.

    Args:
        shares: Of checks that accept so many drafts at least, from one draft on.
        seed: Of the first draw.
    """
    drawn = torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    module: Any = drafting
    before = module.accept_likeliest

    def accept(drafts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal drawn
        at_least = torch.tensor(list(shares[: drafts.shape[1]]), dtype=torch.float64)
        rows = (drawn + _EVEN * torch.arange(1, len(drafts) + 1)) % 1
        drawn = rows[-1:]
        accepted = (rows[:, None] < at_least).sum(1).to(scores.device)
        return accepted, scores.argmax(-1).gather(1, accepted[:, None])[:, 0]

    module.accept_likeliest = accept
    try:
        yield
    finally:
        module.accept_likeliest = before


def time_rounds(
    model: Any, cache: QuestCache, batch: int, length: int, tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds a token of a lossless `generate()` after a cache of `length` tokens.

    A round's time is that between the ends of two rounds, so it holds all that `generate()` does. Counted are rounds in
    which all sequences go on, after the first ones. Time over tokens is that of all of them together: a round of few
    tokens counts as much as it takes.

    Args:
        model: On which Quest is enabled, lossless.
        cache: Of the handle's `make_cache()`, filled.
        batch: Sequences.
        length: Tokens in the cache [tokens].
        tokens: To write of each sequence [tokens].
        clock: What times are read from [s].

    Raises:
        RuntimeError: There are too few rounds to count.
    """
    ends: list[tuple[float, list[int]]] = []
    loop: Any = drafting.Drafting
    run_round = loop.run_round  # the class is patched: nothing else sees where a round ends

    def note(self: Any) -> None:
        before = list(self.held)
        run_round(self)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        ends.append((clock(), [new - old for old, new in zip(before, self.held, strict=True)]))

    ids = torch.ones(batch, length + 1, dtype=torch.long, device=model.device)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    loop.run_round = note
    try:
        model.generate(ids, **cache_argument(cache), **options)
    finally:
        loop.run_round = run_round
    rounds = [
        ((now - before) * 1e3, sum(gains) / batch)
        for (before, _), (now, gains) in list(itertools.pairwise(ends))[_FIRST_ROUNDS:]
        if all(gains)
    ]
    if not rounds:
        raise RuntimeError(f"{tokens} tokens are too few: no round is left to count after {_FIRST_ROUNDS}")
    ms, written = (sum(values) for values in zip(*rounds, strict=True))
    return {
        "ms_per_token": ms / written,
        "round_ms": percentiles([took for took, _ in rounds]),
        "tokens_a_round": written / len(rounds),
        "rounds": len(rounds),
    }

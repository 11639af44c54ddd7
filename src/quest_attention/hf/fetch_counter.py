"""`FetchCounter`: what came from host memory to the device, where keys and values lie there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["FetchCounter", "Fetches"]

_MIB = 1 << 20


class Fetches(NamedTuple):
    """Units that sparse steps wanted on the device, over KV heads, sequences, steps and layers.

    Attributes:
        units_looked_up: Those that were selected, or that were candidates for it [units].
        units_fetched: Those of them that were not hot [units].
        bytes_fetched: Keys and values that were copied by fetches: keys of those, values of what was selected of them,
            and both of the unit being written [bytes].
        bytes_in_place: Keys that kernels read in host memory: of a sample that estimates what all logits amount to,
            where it is not hot, and of more candidates than the pool gets [bytes].
    """

    units_looked_up: int
    units_fetched: int
    bytes_fetched: int
    bytes_in_place: int

    @classmethod
    def total(cls, parts: Iterable[Fetches]) -> Fetches:
        """Of several layers together."""
        return cls(*map(sum, zip((0, 0, 0, 0), *parts, strict=True)))

    @property
    def hit_rate(self) -> float | None:
        """Share of the units looked up that were hot, 0 to 1; None where none was."""
        return 1 - self.units_fetched / self.units_looked_up if self.units_looked_up else None

    def to_dict(self) -> dict[str, Any]:
        """Everything counted, ready for JSON."""
        return {**self._asdict(), "hit_rate": self.hit_rate}

    def summary(self) -> str:
        """A line for people."""
        if self.hit_rate is None:
            return "keys and values in host memory, of which nothing was fetched"
        in_place = self.bytes_in_place / _MIB
        more = f", and {in_place:,.1f} MiB of keys were read in place" if in_place else ""
        return (
            f"keys and values in host memory; {self.hit_rate:.1%} of {self.units_looked_up:,} units looked up were "
            f"hot, candidates included; {self.bytes_fetched / _MIB:,.1f} MiB came to the device{more}"
        )


class FetchCounter:
    """Counts on each device that a layer's caches are on, where a CUDA graph can add to them.

    Attributes:
        unit_size: Tokens of a unit [tokens].
        key_bytes: Of the key of a token in one KV head [bytes].
        value_bytes: Of its value [bytes].
    """

    def __init__(self) -> None:
        self.unit_size = self.key_bytes = self.value_bytes = 0
        self._counts: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """`[5]` int64 on a device: see `ops.HotUnits`. The same each time, since graphs keep its address."""
        if device not in self._counts:
            with torch.inference_mode(False):
                self._counts[device] = torch.zeros(5, dtype=torch.int64, device=device)
        return self._counts[device]

    def reset(self) -> None:
        """Forget everything counted."""
        for counts in self._counts.values():
            counts.zero_()

    @property
    def fetches(self) -> Fetches | None:
        """What was counted; None where no cache lies in host memory. Waits for the device."""
        if not self._counts:
            return None
        counts = (counts.tolist() for counts in self._counts.values())
        looked_up, fetched, keys, values, in_place = map(sum, zip(*counts, strict=True))
        copied = self.unit_size * (keys * self.key_bytes + values * self.value_bytes)
        return Fetches(looked_up, fetched, copied, in_place * self.key_bytes)

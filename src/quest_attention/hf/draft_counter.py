"""`DraftCounter`: what became of drafted tokens."""

from __future__ import annotations

import threading
from typing import Any

__all__ = ["DraftCounter"]


class DraftCounter:
    """Drafts and checks of lossless decoding, over all sequences: a check of four sequences counts four times.

    Attributes:
        drafted: Tokens that sparse steps drafted [tokens].
        accepted: Those that a check let stay, also those behind the end of a text that ends in their midst [tokens].
        checks: Dense passes over drafts, of one sequence each [checks].
        plain_steps: Dense steps of a single token without drafts, of one sequence each, by reason [steps]: `"within
            budget"`, where a draft would read as much; `"measuring"`, to know what a step takes; `"drafting does not
            pay"`; `"the end"`, where one token is left to write, and with CUDA graphs no more than there are drafts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything counted."""
        self.drafted = 0
        self.accepted = 0
        self.checks = 0
        self.plain_steps: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock, so that a cache can be copied with its counters."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that stayed, 0 to 1; None without drafts."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_a_check(self) -> float | None:
        """Tokens that a check gave, its own one included; None without checks [tokens]."""
        return (self.accepted + self.checks) / self.checks if self.checks else None

    def count_check(self, drafted: int, accepted: int, rows: int) -> None:
        """A check of the drafts of some rows: how many there were in all, and how many stayed."""
        with self._lock:
            self.drafted += drafted
            self.accepted += accepted
            self.checks += rows

    def count_plain(self, reason: str, rows: int) -> None:
        """A dense step of some rows."""
        with self._lock:
            self.plain_steps[reason] = self.plain_steps.get(reason, 0) + rows

    def to_dict(self) -> dict[str, Any]:
        """Everything counted, ready for JSON."""
        return {
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": self.acceptance,
            "checks": self.checks,
            "tokens_a_check": self.tokens_a_check,
            "plain_steps": dict(self.plain_steps),
        }

    def summary(self) -> str:
        """A line for people."""
        plain = ", ".join(f"{count} {reason}" for reason, count in self.plain_steps.items())
        steps = f"{sum(self.plain_steps.values())} steps without drafts" + (f" ({plain})" if plain else "")
        if not self.checks:
            return f"nothing drafted; {steps}"
        return (
            f"{self.accepted} of {self.drafted} drafted tokens accepted ({self.acceptance:.1%}), "
            f"{self.checks} checks, {self.tokens_a_check:.2f} tokens a check; {steps}"
        )

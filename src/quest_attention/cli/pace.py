"""`Pace`: how long a run will still take, said once, when enough of it is done to know."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Pace"]

FEW = 3
"""Times that answers came, after which a guess is made."""
SETTLED, WORTH_SAYING = 5.0, 10.0
"""How long it has gone on before that, and how long it must still take for anybody to care [s]."""
MINUTE, HOUR = 60, 3600


class Pace:
    """Time left of a run, from the time taken so far.

    Args:
        total: What there is to do, in any unit.
        skips_first: Whether the time to the first answers says nothing, since models are loaded in it.
        clock: Seconds that go on.
    """

    def __init__(
        self, total: int, *, skips_first: bool = False, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._left = total
        self._clock = clock
        self._started: float | None = None if skips_first else clock()
        self._done = 0
        self._times = 0
        self._is_said = False

    def take(self, amount: int) -> str | None:
        """Note that so much was done; the time left in words, the first time it can be told."""
        self._left -= amount
        now = self._clock()
        if self._started is None:
            self._started = now
            return None
        self._done += amount
        self._times += 1
        elapsed = now - self._started
        if self._is_said or self._times < FEW or elapsed < SETTLED:
            return None
        self._is_said = True
        seconds = elapsed * self._left / self._done
        return _in_words(seconds) if seconds >= WORTH_SAYING else None


def _in_words(seconds: float) -> str:
    """A time as exact as a guess is.

    >>> _in_words(47), _in_words(754), _in_words(9000)
    ('50 s', '13 min', '2 h 30 min')
    """
    if seconds < 2 * MINUTE:
        return f"{round(seconds / 10) * 10} s"
    if seconds < 2 * HOUR:
        return f"{round(seconds / MINUTE)} min"
    hours, minutes = divmod(round(seconds / MINUTE / 10) * 10, HOUR // MINUTE)
    return f"{hours} h {minutes} min"

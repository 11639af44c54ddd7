"""Wilson's score interval: how sure a share of right answers is."""

from __future__ import annotations

import math

__all__ = ["wilson_interval"]

_NORMAL_QUANTILE = 1.959964
"""Two-sided 95 % of the normal distribution."""


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, in percent.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    Args:
        right: Right answers.
        n: Answers, at least one.

    >>> [round(bound, 1) for bound in wilson_interval(100, 100)]
    [96.3, 100.0]
    """
    share, z = right / n, _NORMAL_QUANTILE
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)

"""`DraftLength`: how many tokens to draft before the next check, by what drafts, checks and plain steps take."""

from __future__ import annotations

from typing import Literal

from quest_attention.errors import QuestValueError
from quest_attention.ops.query_tokens import MOST_QUERY_TOKENS

__all__ = ["DEFAULT_DRAFTS", "MOST_DRAFTS", "DraftLength", "DraftTokens", "Reason", "check_draft_tokens"]

DraftTokens = int | Literal["auto"]
Reason = Literal["within budget", "measuring", "drafting does not pay", "the end"]
MOST_DRAFTS = MOST_QUERY_TOKENS - 1
"""A check has the drafts and the token before them [tokens]."""
DEFAULT_DRAFTS = 4
"""A fifth draft is reached by about half the checks of a small model with moments: docs/speed.md [tokens]."""
_AUTO_BEGINS = 4
_AUTO = (1, 2, 3, 4, 6, 8, 11, MOST_DRAFTS)
"""What "auto" chooses among: on a GPU a graph is captured for each that is tried [tokens]."""
_PRIOR = (3.4, 0.6)
"""Drafts accepted and refused before the first is seen: as of books with a small model, by moments (docs/speed.md)."""
_MEMORY = 0.9
"""Of what was seen before each further check: a text may change after some ten of them."""
_WARMUPS = 1
"""First passes of a kind that are not timed: they allocate, and a GPU's are captured."""
_PLAIN_STEPS = 3
"""Timed before the first draft: other work on the machine disturbs a single one."""
_FREE_LOSS = 3
"""Plain steps' worth of time that drafting may lose before it stops, for the same reason [steps]."""
_MOST_LOSS = 0.015
"""Share of the time that finding out may take where drafting does not pay."""
_MOST_ACCEPTANCE = 1 - 1e-6
"""Probability: at 1 the sum of a geometric series is another."""
_LEAST_SECONDS = 1e-9
"""Of a round, where clocks are coarse [s]."""
_RENEWAL = 64
"""Checks after which a plain step is timed again: the text has grown."""


def check_draft_tokens(draft_tokens: object) -> None:
    """Refuse what is no number of drafts.

    Raises:
        QuestValueError: As said.
    """
    if draft_tokens == "auto" and isinstance(draft_tokens, str):
        return
    if not isinstance(draft_tokens, int) or isinstance(draft_tokens, bool) or not 1 <= draft_tokens <= MOST_DRAFTS:
        raise QuestValueError("draft_tokens", draft_tokens, f'1 to {MOST_DRAFTS} tokens, or "auto"')


class DraftLength:
    """Decides before each check of one `generate()` whether to draft, and how many tokens.

    With `k` drafts of which each stays with probability `p` if those before it do, a round gives `(1 - p^(k+1)) / (1 -
    p)` tokens and takes `k` draft steps and a check; a plain step gives one. All of these times are measured while the
    text is written. Where plain steps are faster, drafting stops, and is tried again when so much time has passed that
    a try costs no more than some per cent of it.

    Args:
        draft_tokens: Drafts before a check, or "auto", as many as make most tokens a second [tokens].
    """

    def __init__(self, draft_tokens: DraftTokens) -> None:
        self._is_auto = draft_tokens == "auto"
        self._length = _AUTO_BEGINS if draft_tokens == "auto" else draft_tokens
        self._accepted, self._refused = _PRIOR
        self._plain = _Seconds(warmups=_WARMUPS, least=_PLAIN_STEPS)
        self._draft = _Seconds()  # of one
        self._is_of_one = True  # of rounds of a single draft, which chooses; of several most do not
        self._more = _Seconds()  # that a check takes more than a plain step, for each draft
        self._tried: set[int] = set()
        self._since_plain = 0
        self._pause = 0.0  # plain time to go before the next try [s]
        self._lost = 0.0  # by tries that did not pay, since the last that did [s]

    @property
    def acceptance(self) -> float:
        """Probability that a draft stays, if those before it do."""
        return self._accepted / (self._accepted + self._refused)

    def next(self) -> tuple[int, Reason]:
        """How many tokens to draft, and why none."""
        if not self._plain.is_known or self._since_plain >= _RENEWAL:
            return 0, "measuring"
        if self._pause > 0:
            return 0, "drafting does not pay"
        if not self._draft.is_known:
            return 1, "measuring"  # the cheapest way to know what a draft takes
        return self._length, "measuring"

    def tell_plain(self, seconds: float) -> None:
        """A step without drafts took so long [s]."""
        self._plain.add(seconds)
        self._since_plain = 0
        self._pause -= seconds

    def tell_check(
        self, drafts: int, accepted: float, examined: float, rows: int, seconds: tuple[float, float]
    ) -> None:  # fmt: skip
        """A round with drafts.

        Args:
            drafts: How many there were of each row [tokens].
            accepted: How many stayed, over all rows [tokens].
            examined: How many were looked at: those, and the first that was refused [tokens].
            rows: Of which so many were.
            seconds: What the drafts took, and what the check took [s].
        """
        self._accepted = self._accepted * _MEMORY + accepted
        self._refused = self._refused * _MEMORY + examined - accepted
        self._since_plain += 1
        if drafts not in self._tried:  # a check of another size allocates again
            self._tried.add(drafts)
            return
        plain = self._plain.mean
        if drafts > 1 and self._is_of_one:
            self._draft, self._is_of_one = _Seconds(), False
        self._draft.add(seconds[0] / drafts)
        self._more.add((seconds[1] - plain) / drafts)
        choices = _AUTO if self._is_auto else (self._length,)
        best = max(choices, key=self._speed)
        if self._speed(best) * plain >= 1:
            self._length = best
            self._lost = 0.0
            return
        self._lost += max(0.0, sum(seconds) - plain * (1 + accepted / rows))
        # What the next try would lose counts too: a single one of many drafts takes as long as many plain steps.
        risked = self._lost + max(0.0, self._tokens(best) / self._speed(best) - plain * self._tokens(best))
        if risked < _FREE_LOSS * plain:
            return
        self._pause = risked / _MOST_LOSS
        seen = self._accepted + self._refused  # the next try is to count as much as all before it
        self._accepted, self._refused = self._accepted / seen, self._refused / seen

    def _tokens(self, drafts: int) -> float:
        """Tokens that a round of so many drafts is likely to give [tokens]."""
        p = min(self.acceptance, _MOST_ACCEPTANCE)
        return (1 - p ** (drafts + 1)) / (1 - p)

    def _speed(self, drafts: int) -> float:
        """Tokens a second with so many drafts; checks take longer in proportion to theirs."""
        seconds = self._plain.mean + drafts * (self._draft.mean + self._more.mean)
        return self._tokens(drafts) / max(_LEAST_SECONDS, seconds)


class _Seconds:
    """What a pass takes: a mean that forgets, without the first passes [s].

    Args:
        warmups: Passes that are not counted.
        least: Passes that are, before the mean is believed.
    """

    def __init__(self, warmups: int = 0, least: int = 1) -> None:
        self._warmups = warmups
        self._least = least
        self._count = 0
        self.mean = 0.0

    @property
    def is_known(self) -> bool:
        """Whether enough passes were timed."""
        return self._count >= self._warmups + self._least

    def add(self, seconds: float) -> None:
        """One more pass."""
        self._count += 1
        counted = self._count - self._warmups
        if counted > 0:
            self.mean += (seconds - self.mean) * max(1 / counted, 1 - _MEMORY)

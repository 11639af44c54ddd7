"""`Reading`: what the attention of a pass reads, and why."""

from __future__ import annotations

from enum import Enum

__all__ = ["Reading"]


class Reading(Enum):
    """What the attention of a pass reads: some pages (`SPARSE`), or everything, for the reason that is the value.

    It is decided here alone, when a layer takes the tokens of the pass; attention then asks the layer. The shape of a
    query would not say it: layers may share keys, and several tokens may one day choose.
    """

    SEVERAL_TOKENS = "several tokens"  # a prompt, or drafts to verify: no decode step, and counted by tokens
    WITHIN_BUDGET = "within budget"  # before the layer is asked: a short generation is the model's own in all of them
    DENSE_LAYER = "dense layer"
    SPARSE = "sparse"
    CHECK = "check"  # of a lossless cache: drafted tokens are checked, or the next one is not drafted

    @classmethod
    def of(cls, new: int, length: int, token_budget: int, *, is_dense: bool = False) -> Reading:
        """What a pass reads.

        Args:
            new: Tokens of the pass, of each sequence [tokens].
            length: Tokens of the longest sequence, those included [tokens].
            token_budget: See `QuestConfig` [tokens].
            is_dense: Whether the layer never chooses.

        >>> [Reading.of(new, length, 32).value for new, length in [(40, 40), (1, 1), (1, 32), (1, 33)]]
        ['several tokens', 'within budget', 'within budget', 'sparse']
        """
        if new != 1:
            return cls.SEVERAL_TOKENS
        if length <= token_budget:
            return cls.WITHIN_BUDGET
        return cls.DENSE_LAYER if is_dense else cls.SPARSE

    @property
    def is_step(self) -> bool:
        """Whether the pass is a decode step, a check of drafted tokens among them, which reads once for all of them."""
        return self is not Reading.SEVERAL_TOKENS

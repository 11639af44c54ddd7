"""`Evicting`: methods that drop tokens for good, and choose which by a policy.

Each layer past the dense ones holds at most `token_budget - 1` tokens before a decode step brings one more, so that a
step reads `token_budget` tokens, its own included: the same as a Quest step. Tokens keep the rotary positions they were
written with. The context is read with full attention and cut at the first decode step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestStateError, QuestValueError
from quest_attention.eval.context import Context
from quest_attention.eval.methods.method import Method, Session
from quest_attention.eval.methods.reading import ReadingLayer, ReadingSession, refuse_mask
from quest_attention.eval.observation import Observation, attention_weights
from quest_attention.hf import QuestHandle, enable_quest
from quest_attention.hf.attention import AttentionForward
from quest_attention.hf.reading import Reading

__all__ = ["Evicting", "Policy", "last_indices", "top_indices"]


class Policy(ABC):
    """Which tokens of one layer stay. Its scores `[B, HKV, n]` belong to the tokens that are there.

    Attributes:
        observes: Whether it needs the attention of the context and of the decode steps.
    """

    observes: ClassVar[bool] = True

    def start(self, observation: Observation) -> Tensor:
        """Scores of the tokens of a context, `[B, HKV, n]`, from what was attended to."""
        raise NotImplementedError

    def step(self, scores: Tensor, weights: Tensor) -> Tensor:
        """Scores after a decode step gave its tokens the `weights` `[B, HKV, G, n]`; the newest token is the last."""
        raise NotImplementedError

    @abstractmethod
    def keep(self, scores: Tensor, room: int) -> Tensor:
        """Indices of the `room` tokens that stay, `[B, HKV, room]` in ascending order; fewer than there are."""


def last_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the last `count` tokens, `[B, HKV, count]`."""
    length = scores.shape[2]
    return torch.arange(length - count, length, device=scores.device).expand(*scores.shape[:2], count)


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending, `[B, HKV, count]`."""
    return scores.topk(count, -1).indices.sort(-1).values


class Evicting(Method):
    """A method that drops tokens for good.

    Args:
        token_budget: Tokens a step reads, its own included [tokens].
        num_dense_layers: Leading full-attention layers that keep everything [layers].

    Raises:
        QuestValueError: The budget is smaller than the method can work with.
    """

    least_budget: ClassVar[int] = 2
    token_budget: int
    num_dense_layers: int

    def __init__(self, token_budget: int, num_dense_layers: int) -> None:
        if token_budget < self.least_budget:
            raise QuestValueError("token_budget", token_budget, f"at least {self.least_budget} for {self.name}")
        self.token_budget = token_budget
        self.num_dense_layers = num_dense_layers
        self.observes = self.policy().observes

    @abstractmethod
    def policy(self) -> Policy:
        """A new policy, for one layer."""

    @contextmanager
    def session(self, model: PreTrainedModel, max_length: int | None = None) -> Iterator[Session]:
        """See `Method.session`. Raises what `enable_quest` raises, whose place in the model this takes."""
        del max_length  # transformers' storage has no room ahead
        config = QuestConfig.paper(self.token_budget, page_size=1, num_dense_layers=self.num_dense_layers)
        with enable_quest(model, config, cuda_graphs=False) as handle:
            yield _EvictingSession(handle, self)


class _EvictingSession(ReadingSession):
    def __init__(self, handle: QuestHandle, method: Evicting) -> None:
        super().__init__(handle, lambda index: _EvictingLayer(index, method.policy(), method.token_budget))
        self._name = method.name

    def load(self, context: Context) -> None:
        """See `Session.load`."""
        for index, layer in self.layers.items():
            assert isinstance(layer, _EvictingLayer), "made here"
            observation = context.observations.get(index)
            if layer.policy.observes and observation is None:
                raise QuestValueError("context", f"no observation of layer {index}", f"one, which {self._name} needs")
            layer.observation = None if observation is None else observation.copy()
        super().load(context)


class _EvictingLayer(ReadingLayer):
    """Holds a whole context, and from the first decode step on what its policy keeps.

    Attributes:
        observation: What the context attended to; the layer observes itself where this is None.
    """

    is_croppable = False

    def __init__(self, index: int, policy: Policy, token_budget: int) -> None:
        super().__init__(index, token_budget)
        self.policy = policy
        self.observation: Observation | None = None
        self._length = 0
        self._scores: Tensor | None = None  # [B, HKV, n], once decoding has begun

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = key_states.shape[2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self._length += new
        if self._scores is not None:
            self._scores = torch.nn.functional.pad(self._scores, (0, new))
            self.tokens_read += keys.shape[2]
        return keys, values

    def make_room(self) -> None:
        if self.reading is Reading.SEVERAL_TOKENS:
            if self._scores is not None:
                raise QuestStateError("tokens were dropped already: feed further ones one by one")
        elif self._length:
            self._evict()

    def _evict(self) -> None:
        assert self.keys is not None and self.values is not None, "tokens were written"
        if self._scores is None:
            if self.policy.observes:
                assert self.observation is not None, "the layer observes itself where nobody else did"
                self._scores = self.policy.start(self.observation)
                self.observation = None  # it holds the keys that go now
            else:
                self._scores = torch.zeros(self.keys.shape[:3], device=self.keys.device)
        room = self.token_budget - 1
        if self._scores.shape[2] > room:
            index = self.policy.keep(self._scores, room)
            self._scores = self._scores.gather(2, index)
            self.keys = self.keys.gather(2, index[..., None].expand(-1, -1, -1, self.keys.shape[3]))
            self.values = self.values.gather(2, index[..., None].expand(-1, -1, -1, self.values.shape[3]))

    def attend(
        self,
        dense: AttentionForward,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See `hf.attention.AttentionForward`.

        Raises:
            UnsupportedModelError: A decode step has a mask: its sequences are padded.
        """
        if self._scores is None:
            if self.policy.observes and self.observation is None:
                self.observation = Observation()
            if self.policy.observes and self.observation is not None:
                self.observation.observe(query, key, **kwargs)
            return dense(query, key, value, attention_mask, **kwargs)
        refuse_mask(attention_mask)
        if self.policy.observes:
            weights = attention_weights(query, key, **kwargs)[:, :, :, 0]
            self._scores = self.policy.step(self._scores, weights)
        return dense(query, key, value, None, **kwargs)

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0
